"""Weights in and out: nanoGPT's checkpoints, a run's files, GPT-2 folders as Hugging Face has them.

A GPT-2 folder holds config.json and the weights in model.safetensors, or in several such files
that model.safetensors.index.json lists. A safetensors file:

    8 bytes     N, little-endian
    N bytes     JSON: {"wte.weight": {"dtype": "F32", "shape": [300, 16],
                                      "data_offsets": [0, 19200]}, ...}
    the rest    the numbers of all tensors without a gap; offsets count from the end of the JSON

Our names are GPT-2's, by way of nanoGPT. Its linear layers (Conv1D) hold the transpose of ours. A
file that would load and compute something else is refused. Left out: other architectures.
"""

import json
import pickletools
import re
import zipfile
from os.path import realpath
from pathlib import Path

import numpy as np
import torch

from harness.errors import UserError, printable
from harness.files import load_safely, write
from harness.keep import file_of
from model import GPT, GPTConfig

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")     # constants that old files carry along
SIZES = ("n_layer", "n_head", "n_embd")         # the tensors say how many ids and positions
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Settings of a config.json that change the logits, and the value with which GPT gives the same.
SETTINGS = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "add_cross_attention": False, "pruned_heads": {}, "quantization_config": None,
            "auto_map": None}
SINGLE = "model.safetensors"
KNOWN = ("a checkpoint of nanoGPT or of this program, or the folder of a GPT-2 with config.json "
         "and model.safetensors, as save_pretrained writes it (for LoRA after merge_and_unload)")
MOST_JSON = 1_000_000       # bytes; the header of GPT-2 XL takes 60,000
LARGEST = 10_000            # logit; those of trained models stay below 1,000
MOST_OBJECTS = 500_000      # of a pickle; GPT-2 XL with its optimizer takes 75,000
MARK = "TVKD, the readable one"     # in an export, which another export may replace
# A tokenizer.json has bytes as letters that can be seen: a space is chr(256 + 32).
LETTERS = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def expect(holds, what, got, path):
    if not holds:
        raise UserError(f"expected {what}, got {got} in {path}")


def brief(value):
    """A value from a file, as a message may show it: the repr of a container can be endless."""
    plain = value is None or type(value) in (bool, int, float, str)
    return f"{value!r:.40}" if plain else type(value).__name__


def pretrained(option, path, n_vocab, block_size):
    """The GPT of a nanoGPT checkpoint, of a model that a run kept or of a GPT-2 folder, in float32.

    Its context is cut to block_size, and its vocabulary to the tokenizer's n_vocab ids, so that no
    probability is left on ids that no text has. Raises UserError.
    """
    path = Path(path)
    try:
        sizes, tensors = read_folder(path) if path.is_dir() else read_checkpoint(path)
        return build(sizes, tensors, n_vocab, block_size, path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    except Exception as error:          # anything can go wrong in bytes that nobody vouches for
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
        raise UserError(f"{option}: expected {KNOWN}, got {str(path)[:250]}: {reason}") from None


def build(sizes, tensors, n_vocab, block_size, path):
    """sizes (fields of GPTConfig) and tensors by name -> GPT, where they fit and can be trained."""
    for name, size in sizes.items():
        kind = GPTConfig.__annotations__[name]
        expect(type(size) is kind, f"{name} of type {kind.__name__}", brief(size), path)
    layers, width, state = sizes["n_layer"], sizes["n_embd"], {}
    count = sum(tensor.numel() for tensor in tensors.values())
    # Before the model: it must not fill the memory because of sizes that a file only claims.
    expect(layers <= len(tensors) and 12 * layers * width ** 2 <= count, f"weights for n_layer "
           f"{brief(layers)} and n_embd {brief(width)}", f"{count:,} numbers", path)
    for name, tensor in tensors.items():
        name = name.removeprefix("_orig_mod.")                      # of torch.compile
        if not name.startswith(("transformer.", "lm_head.")):       # GPT2Model's names
            name = f"transformer.{name}"
        expect(name not in state, "each tensor once", f"{brief(name)} twice", path)
        if not name.endswith(MASKS):
            expect(tensor.is_floating_point(), f"floats in {brief(name)}", tensor.dtype, path)
            state[name] = tensor.detach()
    rows, context = len(state[EMBEDDING]), len(state[POSITIONS])
    # Twice as many rows are no rounding: they belong to another tokenizer.
    expect(n_vocab <= rows < 2 * n_vocab, f"a vocabulary of the tokenizer's {n_vocab} ids, or some "
           "more (--tokenizer, --vocab_size)", rows, path)
    expect(context >= block_size, f"a context of at least --block_size={block_size}", context, path)
    state.setdefault(HEAD, state[EMBEDDING])
    for name, kept in ((EMBEDDING, n_vocab), (HEAD, n_vocab), (POSITIONS, block_size)):
        state[name] = state[name][:kept]
    model = GPT(GPTConfig(vocab_size=n_vocab, block_size=block_size, **sizes))
    model.load_state_dict(state)                                    # names and shapes
    for name, parameter in model.named_parameters():
        expect(parameter.isfinite().all(), f"finite numbers in {name}", "others", path)
    expect(torch.equal(state[HEAD], state[EMBEDDING]), "an output head tied to the token embedding",
           "two tensors", path)
    with torch.no_grad():
        low, high = model(torch.arange(min(block_size, n_vocab, 16)).unsqueeze(0)).aminmax()
    expect(-LARGEST <= low < high <= LARGEST, f"weights that give logits which differ and stay "
           f"within {LARGEST:,}", f"logits from {low:.6g} to {high:.6g}", path)
    if rows > n_vocab:
        print(f"{printable(str(path))}: {rows - n_vocab:,} of {rows:,} rows of the vocabulary are "
              f"cut, because the tokenizer has {n_vocab:,} ids")
    return model


# --- reading --------------------------------------------------------------------------------------

def opened(path):
    """The file, open; but not a pipe, which would wait for somebody to write, nor a device."""
    expect(path.is_file() or not path.exists(), "a file", "a folder, a pipe or a device", path)
    file = open(path, "rb")
    if file.peek(24).startswith(b"version https://git-lfs"):
        file.close()
        raise UserError(f"expected {path} itself, got a pointer of Git LFS: run `git lfs pull`")
    return file


def read_checkpoint(path):
    """A file of torch.save -> (sizes, tensors by name)."""
    with opened(path) as file:
        check_archive(file, path)
        content, length = load_safely(file, path), file.seek(0, 2)
    content = content if isinstance(content, dict) else {}
    sizes, tensors = content.get("model_args", content.get("config")), content.get("model")
    if not isinstance(sizes, dict) or not isinstance(tensors, dict):
        raise ValueError("no model with its sizes (model_args or config)")
    # By strides of 0 or shared memory a small file could hold tensors of any size.
    expect(sum(tensor.numel() for tensor in tensors.values()) <= length,
           "all weights in the file", f"more than fit in its {length:,} bytes", path)
    sizes = {"gelu": "exact", **sizes}
    return {name: sizes.get(name) for name in (*SIZES, "bias", "gelu")}, tensors


def check_archive(file, path):
    """Refuse what could keep torch.load busy: a few compressed kilobytes can be a huge pickle."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            stored = entry.compress_type == zipfile.ZIP_STORED
            expect(stored, "a zip archive without compression", "one with", path)
            if entry.filename.lower().endswith(".pkl"):
                check_pickle(archive.read(entry), path)
    file.seek(0)


def check_pickle(pickled, path):
    """Refuse one of too many objects, counted without running it and as if none was shared.

    If a tuple holds one twice, which holds one twice, and so on, 300 bytes are 2^60 tuples, all of
    which are hashed where it is a key. Nesting them 200,000 deep ends Python: a level adds 1 %.
    """
    stack, memo = [], {}        # counts; 0 is a mark
    for step, argument, _ in pickletools.genops(pickled):
        held = memo[argument] if "GET" in step.name else 0
        for kind in reversed(step.stack_before):
            held += 0 if kind is pickletools.stackslice else stack.pop()
            while kind is pickletools.stackslice and stack[-1]:
                held += stack.pop()
        count = 0 if step.name == "MARK" else 1 + 1.01 * held
        expect(count < MOST_OBJECTS, f"a pickle of fewer than {MOST_OBJECTS:,} objects", "more",
               path)
        stack += [count] * len(step.stack_after)
        if "PUT" in step.name:
            memo[argument] = stack[-1]


def read_folder(folder):
    """A GPT-2 folder -> (sizes, tensors by name), the linear layers transposed as ours are."""
    path = folder / "config.json"
    config = parse(path)
    for name, right in SETTINGS.items():
        value = config.get(name, right)
        expect(value == right, f"{name} {right}", brief(value), path)
    gelu, tied = config.get("activation_function", "gelu_new"), config.get("tie_word_embeddings")
    expect(isinstance(gelu, str) and gelu in GELU, f"activation_function as one of "
           f"{', '.join(GELU)}", brief(gelu), path)
    tensors = read_tensors(folder)
    expect(tied in (True, None) or HEAD in tensors, "tie_word_embeddings true",
           f"{brief(tied)} and no {HEAD}", path)
    # subtle: attn.c_proj is square, so without t() it would load and compute nonsense.
    tensors = {name: x.t() if name.endswith(CONV1D) else x for name, x in tensors.items()}
    return {**{name: config.get(name) for name in SIZES}, "bias": True, "gelu": GELU[gelu]}, tensors


def read_tensors(folder):
    """The tensors of model.safetensors, or of all files that its index lists."""
    index, tensors = folder / f"{SINGLE}.index.json", {}
    if (folder / SINGLE).exists() or not index.exists():
        return read_safetensors(folder / SINGLE)
    places = parse(index)["weight_map"]
    for file in dict.fromkeys(places.values()):
        part = read_safetensors(folder / file)
        tensors |= {name: part[name] for name in places if places[name] == file}
    return tensors


def read_safetensors(path):
    """The tensors of one file by name, in the file's types."""
    with opened(path) as file:
        length, room = int.from_bytes(file.read(8), "little"), file.seek(0, 2) - 8
        expect(length <= min(room, MOST_JSON), f"a header within the file and of at most "
               f"{MOST_JSON:,} bytes", f"{length:,}", path)
        header, room, position, tensors = parse(path, 8, length), room - length, 0, {}
        header.pop("__metadata__", None)                            # any text; not a tensor
        file.seek(8 + length)
        entries = [(*entry["data_offsets"], entry["dtype"], entry["shape"], name)
                   for name, entry in header.items()]
        for start, end, dtype, shape, name in sorted(entries):
            expect(dtype in [*DTYPES], f"{brief(name)} as one of {', '.join(DTYPES)}",
                   brief(dtype), path)
            expect(start == position <= end <= room, f"{brief(name)} from byte {position:,} to at "
                   f"most {room:,}", f"{brief(start)} to {brief(end)}", path)
            raw, position = torch.from_numpy(np.fromfile(file, np.uint8, end - start)), end
            tensors[name] = raw.view(DTYPES[dtype]).view(shape)     # numpy has no bfloat16
        expect(position == room, f"{position:,} bytes of numbers", f"{room:,}", path)
    return tensors


def parse(path, start=0, length=MOST_JSON):
    """The JSON object in these bytes of a file."""
    with opened(path) as file:
        file.seek(start)
        raw = file.read(length)
    try:
        return dict(json.loads(raw).items())
    except (ValueError, AttributeError, RecursionError) as error:   # RecursionError: nested deeply
        raise UserError(f"expected a JSON object in {path}, got: {error}") from None


# --- writing --------------------------------------------------------------------------------------

def export_targets(folder, out, labels):
    """{label: its folder in `folder`}, each of them outside --out and new, empty or an earlier
    export without links that lead elsewhere. Raises UserError before anything is written."""
    targets = {label: Path(folder) / file_of(label, "") for label in labels}
    for target in targets.values():
        real = Path(realpath(target))
        try:
            files = [*target.iterdir()] if target.exists() else []
            free = all(path.is_file() and not path.is_symlink() for path in files) and (
                not files or MARK.encode() in np.fromfile(target / SINGLE, "u1", 200).tobytes())
        except OSError:
            free = False
        if not free or target.is_symlink() or Path(realpath(out)) in (real, *real.parents):
            raise UserError(f"--export: expected nothing at {target} or an earlier export alone, "
                            f"outside --out={out}; remove what is there or name another folder")
    return targets


def export_model(model, folder, tokenizer):
    """Write a GPT-2 folder, from which transformers' GPT2LMHeadModel gives the same logits and
    AutoTokenizer the same ids. A model without biases gets biases of 0: every GPT-2 has some."""
    folder, config, tensors, eos = Path(folder), model.config, {}, tokenizer.eot_token
    for name, tensor in model.state_dict().items():
        if name != HEAD:                                            # tied: the embedding is enough
            tensors[name] = tensor.t() if name.endswith(CONV1D) else tensor
            if not config.bias and name not in (EMBEDDING, POSITIONS):
                tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensor))
    settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
                "vocab_size": config.vocab_size, "n_positions": config.block_size,
                **{name: getattr(config, name) for name in SIZES},
                "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
                "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": 0.0,
                "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": eos, "eos_token_id": eos}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.decode([eos]),
             "eos_token": tokenizer.decode([eos]), "model_max_length": config.block_size}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--export: expected a folder to write to, got {folder}: {error.strerror}"
                        ) from None
    write(folder / SINGLE, to_safetensors(tensors), "--export")
    # config.json last: without it nothing loads the folder, so a kill leaves no half of an export.
    for name, record in {"tokenizer.json": tokenizer_json(tokenizer),
                         "tokenizer_config.json": names, "config.json": settings}.items():
        write(folder / name, json.dumps(record, indent=1).encode("ascii"), "--export")


def to_safetensors(tensors):
    """float32 tensors by name -> the bytes of a safetensors file."""
    header, parts, position = {"__metadata__": {"format": "pt", "written_by": MARK}}, [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.detach().cpu().numpy().astype("<f4").tobytes())
        start, position = position, position + len(parts[-1])
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, position]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)         # so that the numbers begin at a multiple of 8
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def tokenizer_json(tokenizer):
    """A vocabulary as the tokenizers library reads it. It lists merges, where tiktoken has ranks:
    here every split of a token into two. Its \\w lacks the joiners, and its {1,3}+ repeats."""
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    text = {token: token.decode("latin-1").translate(LETTERS) for token in ranks}
    merges = [[text[token[:i]], text[token[i:]]] for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", tokenizer._pat_str)
    pattern = pattern.replace(r"\W", r"[^\w]").replace(r"\w", "\\w\u200c\u200d")
    pieces = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
              "invert": False}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"version": "1.0", "decoder": BYTES,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, BYTES]},
            "added_tokens": [{"id": i, "content": name, "special": True, **plain}
                             for name, i in special.items()],
            "model": {"type": "BPE", "ignore_merges": True, "merges": merges,
                      "vocab": {text[token]: i for token, i in ranks.items()} | special}}
