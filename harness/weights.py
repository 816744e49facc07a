"""Weights in and out: nanoGPT's checkpoints, a run's files, GPT-2 folders as Hugging Face has them.

A GPT-2 folder holds config.json and the weights in model.safetensors, or in several such files
that model.safetensors.index.json lists. A safetensors file:

    8 bytes     N, little-endian
    N bytes     JSON: {"wte.weight": {"dtype": "F32", "shape": [300, 16],
                                      "data_offsets": [0, 19200]}, ...}
    the rest    the numbers of all tensors without a gap; offsets count from the end of the JSON

Our names are GPT-2's, by way of nanoGPT. Its linear layers (Conv1D) hold the
transpose of ours. A file that would load and compute something else is refused, and so is one that
would only fail in training. Left out: other architectures, pytorch_model.bin.
"""

import json
import math
import pickletools
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from harness.errors import UserError
from harness.files import load_safely, write
from harness.tokenizers import tokenizer_text
from model import GPT, GPTConfig

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")     # constants that old files carry along
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
GPT2_SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Settings of a config.json that change the logits, and the value with which GPT gives the same.
SETTINGS = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "add_cross_attention": False,
            "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "pruned_heads": {}, "quantization_config": None, "auto_map": None}
MOST_JSON = 1_000_000       # bytes; the header of GPT-2 XL takes 60,000
LARGEST = 10_000            # logit; those of trained models stay below 1,000
MOST_STEPS = 500_000        # of a pickle; GPT-2 XL with its optimizer takes 75,000


def expect(holds, what, got, path):
    if not holds:
        raise UserError(f"expected {what}, got {got} in {path}")


def brief(value):
    """A value from a file, as a message may show it: the repr of a container can be endless."""
    if isinstance(value, str):
        return repr(value[:40])
    if type(value) is int:
        return str(value) if abs(value) < 10**15 else "a huge number"
    return repr(value) if value is None or type(value) in (bool, float) else type(value).__name__


def pretrained(option, path, n_vocab, block_size):
    """The GPT of a nanoGPT checkpoint, of a model that a run kept or of a GPT-2 folder, in float32.

    Its context is cut to block_size. nanoGPT rounds its vocabulary up to a multiple of 64; the
    surplus rows go, so that no probability is left on ids that no text has. Raises UserError.
    """
    path = Path(path)
    try:
        sizes, tensors = read_folder(path) if path.is_dir() else read_checkpoint(path)
        return build(sizes, tensors, n_vocab, block_size, path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    except Exception as error:          # anything can go wrong in bytes that nobody vouches for
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"{option}: expected a checkpoint of nanoGPT or of this program, or a "
                        f"GPT-2 folder, got {path}: {reason}") from None


def build(sizes, tensors, n_vocab, block_size, path):
    """sizes (fields of GPTConfig) and tensors by name -> GPT, where they fit and can be trained."""
    vocab_size, context, rounded = sizes["vocab_size"], sizes["block_size"], -(-n_vocab // 64) * 64
    expect(vocab_size in (n_vocab, rounded), f"a vocabulary of the tokenizer's {n_vocab} ids "
           f"(or {rounded})", brief(vocab_size), path)
    expect(context >= block_size, f"a context of at least --block_size={block_size}", context, path)
    width, layers = sizes["n_embd"], sizes["n_layer"]
    count = sum(tensor.numel() for tensor in tensors.values())
    # Before the model: it must not fill the memory because of sizes that a file only claims.
    claimed = width * (vocab_size + context + 12 * layers * width)
    expect(layers <= len(tensors) and claimed <= 4 * count,
           f"the weights of n_layer {brief(layers)} and n_embd {brief(width)}",
           f"{len(tensors)} tensors with {count:,} numbers", path)
    model = GPT(GPTConfig(**{**sizes, "vocab_size": n_vocab, "block_size": block_size}))
    rows = {EMBEDDING: vocab_size, HEAD: vocab_size, POSITIONS: context}
    tensors.setdefault(HEAD, tensors.get(EMBEDDING))
    parameters = model.state_dict()                                 # the same memory
    for name in tensors:
        expect(name in parameters, "tensors of a GPT-2 alone", brief(name), path)
    for name, parameter in parameters.items():
        tensor, shape = tensors.get(name), (rows.get(name, len(parameter)), *parameter.shape[1:])
        expect(tensor is not None, f"a tensor {name}", "none", path)
        expect(tensor.layout is torch.strided and tensor.dtype in FLOATS.values()
               and not tensor.is_meta, f"floats in {name}", f"{tensor.dtype} {tensor.layout}", path)
        expect(tensor.shape == shape, f"{name} of shape {shape}", tuple(tensor.shape), path)
        tensor = tensor.detach()[:len(parameter)].float()
        expect(name != HEAD or torch.equal(tensor, parameter),      # which is the embedding by now
               "an output head tied to the token embedding", "two tensors", path)
        low, high = (x.item() for x in tensor.aminmax())            # NaN if any number is NaN
        expect(math.isfinite(high - low), f"finite numbers in {name}", f"{low} to {high}", path)
        parameter.copy_(tensor)
    ids = torch.arange(min(block_size, n_vocab, 16)).unsqueeze(0)
    with torch.no_grad():
        low, high = (x.item() for x in model(ids).aminmax())
    expect(-LARGEST <= low < high <= LARGEST, f"weights that give logits which differ and stay "
           f"within {LARGEST:,}", f"logits from {low:.6g} to {high:.6g}", path)
    return model


# --------------------------------------------------------------------------------------------------
# Reading

def opened(path):
    """The file, open; but not a pipe, which would wait for somebody to write, nor a device."""
    if path.exists() and not path.is_file():
        raise UserError(f"expected a file, got a folder, a pipe or a device: {path}")
    return open(path, "rb")


def read_sizes(record, names, rates, path):
    """record's sizes, under `names` there -> {name in SIZES: size}. Checks them and dropout rates.

    Training uses dropout 0 whatever the file says, but what it says must be a rate.
    """
    for name in names:
        number = record.get(name)
        expect(type(number) is int and number >= 1, f"{name} from 1 on", brief(number), path)
    sizes = {name: record[given] for name, given in zip(SIZES, names)}
    expect(sizes["n_embd"] % sizes["n_head"] == 0, "n_embd as a multiple of n_head",
           f"{brief(sizes['n_embd'])} and {brief(sizes['n_head'])}", path)
    for name in rates:
        rate = record.get(name, 0)
        expect(type(rate) in (int, float) and 0 <= rate < 1, f"0 <= {name} < 1", brief(rate), path)
    return sizes


def read_checkpoint(path):
    """A file of torch.save -> (sizes, tensors by name)."""
    with opened(path) as file:
        check_archive(file, path)
        content, length = load_safely(file, path), file.seek(0, 2)
    content = content if isinstance(content, dict) else {}
    sizes = content.get("model_args", content.get("config"))        # nanoGPT's, or a run's
    state, tensors = content.get("model"), {}
    expect(isinstance(sizes, dict) and isinstance(state, dict), "a checkpoint of nanoGPT or of "
           "this program", "no model with sizes (model_args or config)", path)
    for name, tensor in state.items():
        expect(isinstance(name, str) and isinstance(tensor, torch.Tensor), "tensors by name in "
               "model", f"{brief(tensor)} under {brief(name)}", path)
        name = name.removeprefix("_orig_mod.")                      # of torch.compile
        expect(name not in tensors, "each tensor once", f"{brief(name)} twice", path)
        if not name.endswith(MASKS):
            tensors[name] = tensor
    # By strides of 0 or shared memory a small file could hold tensors of any size.
    expect(sum(tensor.numel() for tensor in tensors.values()) <= length,
           "all weights in the file", f"more than fit in its {length:,} bytes", path)
    bias, gelu = sizes.get("bias"), sizes.get("gelu", "exact")
    expect(isinstance(bias, bool), "bias True or False", brief(bias), path)
    expect(isinstance(gelu, str) and gelu in GELU.values(), "gelu exact or tanh", brief(gelu), path)
    return {**read_sizes(sizes, SIZES, ["dropout"], path), "bias": bias, "gelu": gelu}, tensors


def check_archive(file, path):
    """Refuse what could keep torch.load busy: a few compressed kilobytes can be a huge pickle."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            stored = entry.compress_type == zipfile.ZIP_STORED
            expect(stored, "a zip archive without compression", "one with", path)
            if entry.filename.lower().endswith(".pkl"):
                steps = islice(pickletools.genops(archive.read(entry)), MOST_STEPS + 1)
                expect(sum(1 for _ in steps) <= MOST_STEPS, f"a pickle of at most {MOST_STEPS:,} "
                       f"steps", "more", path)
    file.seek(0)


def read_folder(folder):
    """A GPT-2 folder -> (sizes, tensors by name), the linear layers transposed as ours are."""
    path, tensors = folder / "config.json", {}
    with opened(path) as file:
        config = parse(file.read(MOST_JSON + 1), path)
    kind, gelu = config.get("model_type"), config.get("activation_function", "gelu_new")
    expect(kind == "gpt2", 'model_type "gpt2", the only one for now', brief(kind), path)
    expect(isinstance(gelu, str) and gelu in GELU, f"activation_function as one of "
           f"{', '.join(GELU)}", brief(gelu), path)
    for name, right in SETTINGS.items():
        value = config.get(name, right)
        expect(value == right, f"{name} {right}", brief(value), path)
    sizes = read_sizes(config, GPT2_SIZES, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), path)
    inner, tied = config.get("n_inner"), config.get("tie_word_embeddings", True)
    expect(inner in (None, 4 * sizes["n_embd"]), "n_inner null or 4 * n_embd", brief(inner), path)
    for name, tensor in read_tensors(folder).items():
        if not name.startswith(("transformer.", "lm_head.")):       # GPT2Model's names
            name = f"transformer.{name}"
        expect(name not in tensors, "each tensor once", f"{brief(name)} twice", folder)
        # subtle: attn.c_proj is square, so without this it would load and compute nonsense.
        tensors[name] = tensor.t() if name.endswith(CONV1D) else tensor
    expect(tied is True or HEAD in tensors, "tie_word_embeddings true", f"{brief(tied)} and no "
           f"lm_head.weight", path)
    return {**sizes, "bias": True, "gelu": GELU[gelu]}, tensors


def read_tensors(folder):
    """The tensors of model.safetensors, or of all files that its index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors(single)
    with opened(index) as file:
        places, files, tensors = parse(file.read(MOST_JSON + 1), index).get("weight_map"), {}, {}
    expect(isinstance(places, dict), "weight_map as an object", brief(places), index)
    for name, file in places.items():
        expect(isinstance(file, str) and Path(file).name == file, "files of this folder in "
               "weight_map", brief(file), index)
        files.setdefault(file, set()).add(name)
    for file, names in files.items():
        part = read_safetensors(folder / file)
        expect(part.keys() == {name for name in names if not name.endswith(MASKS)},
               f"in {brief(file)} the tensors of weight_map", "others", index)
        tensors |= part
    return tensors


def read_safetensors(path):
    """The tensors of one file by name, in the file's types and without MASKS."""
    with opened(path) as file:
        length, room = int.from_bytes(file.read(8), "little"), file.seek(0, 2) - 8
        file.seek(8)
        expect(length <= min(room, MOST_JSON), f"a header within the file and of at most "
               f"{MOST_JSON:,} bytes", f"{length:,}", path)
        header, room, position, tensors = parse(file.read(length), path), room - length, 0, {}
        header.pop("__metadata__", None)                            # any text; not a tensor
        entries = [(*check_entry(name, entry, room, path), name) for name, entry in header.items()]
        for start, end, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
            expect(start == position, f"{brief(name)} at offset {position:,}", f"{start:,}", path)
            position = end
            raw = torch.from_numpy(np.fromfile(file, np.uint8, end - start))
            if not name.endswith(MASKS):
                tensors[name] = raw.view(dtype).view(shape)         # numpy has no bfloat16
        expect(position == room, f"{position:,} bytes of numbers", f"{room:,}", path)
    return tensors


def check_entry(name, entry, room, path):
    """A tensor's entry in the header -> (first byte, byte after the last, dtype, shape)."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    expect(isinstance(dtype, str) and dtype in DTYPES, f"{brief(name)} of a dtype among "
           f"{', '.join(DTYPES)}", brief(dtype), path)
    for part in (shape, offsets):           # 4: the most dimensions, or products could be endless
        expect(isinstance(part, list) and len(part) <= 4 and all(type(n) is int and 0 <= n <= room
               for n in part), f"{brief(name)} with a shape and data_offsets within the {room:,} "
               f"bytes of numbers", "others", path)
    count = math.prod(shape) * DTYPES[dtype].itemsize
    expect(len(offsets) == 2 and offsets[1] - offsets[0] == count > 0,
           f"two data_offsets and {count:,} bytes for {brief(name)}", f"{offsets}", path)
    return *offsets, DTYPES[dtype], shape


def parse(raw, path):
    """Bytes -> a JSON object."""
    expect(len(raw) <= MOST_JSON, f"at most {MOST_JSON:,} bytes", "more", path)
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:       # not UTF-8, not JSON, nested too deeply
        raise UserError(f"expected a JSON object in {path}, got: {error}") from None
    expect(isinstance(record, dict), "a JSON object", brief(record), path)
    return record


def unique(items):
    record = dict(items)
    if len(record) < len(items):            # json.loads would keep the last of two
        raise ValueError("the same key twice")
    return record


# --------------------------------------------------------------------------------------------------
# Writing

def export_model(model, folder, tokenizer):
    """Write a GPT-2 folder, from which transformers' GPT2LMHeadModel gives the same logits.

    A model without biases gets biases of 0, because every GPT-2 has biases. A learned vocabulary is
    written too, as tokenizer.tiktoken; a named one is what other tools know by that name.
    """
    folder, config, tensors = Path(folder), model.config, {}
    for name, tensor in model.state_dict().items():
        if name != HEAD:                                            # tied: the embedding is enough
            tensors[name] = tensor.t() if name.endswith(CONV1D) else tensor
            if not config.bias and name not in (EMBEDDING, POSITIONS):
                tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensor))
    settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
                **{name: getattr(config, ours) for name, ours in zip(GPT2_SIZES, SIZES)},
                "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
                "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": 0.0,
                "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": tokenizer.eot_token,
                "eos_token_id": tokenizer.eot_token}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--export: expected a folder to write to, got {folder}: {error.strerror}"
                        ) from None
    if tokenizer.name == "learned":
        write(folder / "tokenizer.tiktoken", tokenizer_text(tokenizer).encode("ascii"), "--export")
    write(folder / "model.safetensors", to_safetensors(tensors), "--export")
    # Last: without it nothing loads the folder, so after a kill there is no half of an export.
    text = json.dumps(settings, indent=2) + "\n"
    write(folder / "config.json", text.encode("ascii"), "--export")


def to_safetensors(tensors):
    """float32 tensors by name -> the bytes of a safetensors file."""
    header, parts, position = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.detach().cpu().numpy().astype("<f4").tobytes())
        start, position = position, position + len(parts[-1])
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, position]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)         # so that the numbers begin at a multiple of 8
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))
