"""Weights in and out: nanoGPT's checkpoints, a run's files, GPT-2 folders as Hugging Face has them.

A GPT-2 folder holds config.json and model.safetensors, or shards of it: 8 bytes with N, lowest
first; N bytes of JSON, {"wte.weight": {"dtype": "F32", "shape": [300, 16], "data_offsets": [0,
19200]}, ...}; the numbers of all tensors without a gap. Its names are ours, its linear layers
(Conv1D) the transpose of ours. Left out: other architectures; they are refused by name.
"""

import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from harness.errors import UserError, printable
from harness.files import load_safely, refuse_inside, write
from harness.keep import file_of
from model import GPT, GPTConfig

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SIZES = ("n_layer", "n_head", "n_embd")         # the tensors say the others
# Settings that change the logits of the same tensors, and what GPT has, the default first.
SETTINGS = {"model_type": ["gpt2"], "layer_norm_epsilon": [1e-5], "tie_word_embeddings": [True],
            "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
            "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"]}
SINGLE = "model.safetensors"
KNOWN = ("a checkpoint of nanoGPT or of this program, or a GPT-2 folder, as save_pretrained writes "
         "it (for LoRA after merge_and_unload)")
MOST_JSON = 1_000_000       # bytes; the header of GPT-2 XL takes 60,000
# A tokenizer.json has bytes as letters that can be seen: a space is chr(256 + 32).
LETTERS = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def pretrained(option, path, n_vocab, block_size):
    """The GPT of a nanoGPT checkpoint, of a model that a run kept or of a GPT-2 folder, in float32,
    cut to block_size positions and to the tokenizer's n_vocab ids: no text has others."""
    path = Path(path)
    try:
        sizes, tensors = read_folder(path) if path.is_dir() else read_checkpoint(path)
        return build(sizes, tensors, n_vocab, block_size, path)
    except Exception as error:          # anything can go wrong in bytes that nobody vouches for
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{option}: {str(path)[:130]}: {kind}{' '.join(str(error).split())[:240]}; "
                        f"expected {KNOWN}") from None


def expect(holds, what, got):
    if not holds:
        raise UserError(f"expected {what}, got {got}")


def build(sizes, tensors, n_vocab, block_size, path):
    """sizes (fields of GPTConfig) and tensors by name -> GPT, where they fit and can be trained."""
    state, (layers, heads, width) = {}, (int(sizes[name]) for name in SIZES)
    # Before the model: sizes that a file only claims, or with stride 0, must not fill the memory.
    held = sum(file.stat().st_size for file in (path, *path.glob("*.safetensors")))
    expect(layers <= len(tensors) and 12 * layers * width ** 2 <= held,
           "weights for its n_layer and n_embd", f"{held:,} bytes")
    for name, x in tensors.items():         # _orig_mod is torch.compile's; GPT2Model has no prefix
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        name = name if name == HEAD else f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):      # constants of old files
            expect(name not in state and x.is_floating_point(), f"one float {name:.60}", x.dtype)
            state[name] = x
    rows, context = len(state[EMBEDDING]), len(state[POSITIONS])
    # Twice as many rows are no rounding: they belong to another tokenizer.
    expect(n_vocab <= rows < 2 * n_vocab, f"a vocabulary of the tokenizer's {n_vocab} ids, or some "
           "more (--tokenizer, --vocab_size)", rows)
    expect(context >= block_size, f"a context of at least --block_size={block_size}", context)
    state.setdefault(HEAD, state[EMBEDDING])
    for name, kept in ((EMBEDDING, n_vocab), (HEAD, n_vocab), (POSITIONS, block_size)):
        state[name] = state[name][:kept]
    model = GPT(GPTConfig(n_vocab, block_size, layers, heads, width, gelu=sizes["gelu"],
                          bias="transformer.ln_f.bias" in state))
    model.load_state_dict(state)                                    # names and shapes
    expect(all(x.isfinite().all() for x in model.parameters()), "finite numbers", "others")
    expect(torch.equal(state[HEAD], state[EMBEDDING]), "a head tied to the embedding", "another")
    if rows > n_vocab:
        print(f"{printable(path)}: {rows - n_vocab:,} of {rows:,} rows of the vocabulary are cut")
    return model


def first_bytes(path):
    """MOST_JSON bytes, or the whole file."""
    raw = np.fromfile(path, np.uint8, MOST_JSON).tobytes()
    expect(raw[:8] != b"version ", f"{path.name}: run `git lfs pull`", "a pointer of Git LFS")
    return raw


def read_checkpoint(path):
    """A file of torch.save -> (sizes, tensors by name)."""
    first_bytes(path)
    with zipfile.ZipFile(path) as archive:
        expect(not archive.testzip(), "undamaged files in the archive", "a wrong checksum")
    content = load_safely(path, path.name)
    return {"gelu": "exact", **(content.get("model_args") or content["config"])}, content["model"]


def read_folder(folder):
    """A GPT-2 folder -> (sizes, tensors by name), the linear layers transposed as ours are."""
    config, tensors = json.loads(first_bytes(folder / "config.json")), {}
    for name, possible in SETTINGS.items():
        value = config.setdefault(name, possible[0])
        expect(value in possible, f"{name} {' or '.join(map(str, possible))}", f"{value!r:.40}")
    for file in [*folder.glob("model-*-of-*.safetensors")] or [folder / SINGLE]:
        tensors |= read_safetensors(file)
    config["gelu"] = "exact" if config["activation_function"] == "gelu" else "tanh"
    # subtle: attn.c_proj is square, so without t() it would load and compute nonsense.
    return config, {name: x.t() if name.endswith(CONV1D) else x for name, x in tensors.items()}


def read_safetensors(path):
    """The tensors of one file by name, in the file's types."""
    raw, tensors = first_bytes(path), {}
    start = 8 + int.from_bytes(raw[:8], "little")
    numbers = np.memmap(path, mode="c", offset=start)       # read where it is looked at
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":                                  # any text; not a tensor
            dtype = FLOATS.get(entry["dtype"], torch.uint8)         # masks take a byte a number
            part = torch.frombuffer(numbers[slice(*entry["data_offsets"])], dtype=dtype)
            tensors[name] = part.view(entry["shape"])
    size = sum(tensor.nbytes for tensor in tensors.values())
    expect(size == len(numbers), f"{size:,} bytes of numbers in {path.name}", f"{len(numbers):,}")
    return tensors


def export_targets(folder, out, labels):
    """{label: its folder in `folder`}: new ones, outside --out. Raises UserError if not."""
    targets = {label: Path(folder) / file_of(label, "") for label in labels}
    for target in targets.values():
        refuse_inside("export", target, out)
        if os.path.lexists(target) or os.path.isfile(folder):
            raise UserError(f"--export: expected nothing at {target}, choose another folder")
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
                **{name: getattr(config, name) for name in SIZES}, "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
                "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                "tie_word_embeddings": True, "bos_token_id": eos, "eos_token_id": eos}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.decode([eos]),
             "eos_token": tokenizer.decode([eos]), "model_max_length": config.block_size}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SINGLE, to_safetensors(tensors))
    # config.json last: without it nothing loads the folder, so a kill leaves no half of an export.
    for name, record in {"tokenizer.json": tokenizer_json(tokenizer),
                         "tokenizer_config.json": names, "config.json": settings}.items():
        write(folder / name, json.dumps(record, indent=1).encode("ascii"))


def to_safetensors(tensors):
    """float32 tensors by name -> the bytes of a safetensors file."""
    header, raw = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        start = len(raw)
        raw += tensor.detach().cpu().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, len(raw)]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)         # so that the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw


def tokenizer_json(tokenizer):
    """A vocabulary as the tokenizers library reads it. It lists merges, where tiktoken has ranks:
    here every split of a token into two. Its \\w lacks the joiners, and its {1,3}+ repeats."""
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    text = {token: token.decode("latin-1").translate(LETTERS) for token in ranks}
    merges = [[text[token[:i]], text[token[i:]]] for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    regex = re.sub(r"(\{[\d,]+\})\+", r"\1", tokenizer._pat_str)
    regex = regex.replace(r"\W", r"[^\w]").replace(r"\w", "\\w\u200c\u200d")
    pieces = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"version": "1.0", "decoder": BYTES,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, BYTES]},
            "added_tokens": [{"id": i, "content": name, "special": True, **plain}
                             for name, i in special.items()],
            "model": {"type": "BPE", "ignore_merges": True, "merges": merges,
                      "vocab": {text[token]: i for token, i in ranks.items()} | special}}
