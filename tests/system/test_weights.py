"""Weights in and out: every file below is written here by hand, byte for byte, or by torch.save."""

import copy
import hashlib
import json
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch

import harness.weights as weights
import train
from conftest import close
from data import Example
from harness.errors import UserError
from harness.tokenizers import learn_tokenizer, load_tokenizer
from harness.weights import export_model, pretrained, to_safetensors
from model import GPT, GPTConfig

SIZES = dict(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=8)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int32: "I32", torch.bool: "BOOL"}


class Named:
    name, eot_token = "gpt2", 299


def gpt(**sizes):
    """A model with random weights, biases and LayerNorms too."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SIZES, **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model, block_size=32):
    with torch.no_grad():
        return model(torch.arange(block_size).unsqueeze(0))


def assemble(entries, numbers):
    """The bytes of a safetensors file from its header, a dict or text, and the rest."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def layout(tensors):
    """{name: tensor} -> (header, numbers)"""
    header, numbers = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    return header, numbers


def conv1d(model):
    """The tensors of a model as GPT-2 holds them, without the head."""
    return {name: tensor.t() if name.endswith(CONV1D) else tensor
            for name, tensor in model.state_dict().items() if name != HEAD}


CONFIG = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2,
          "n_embd": 8, "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.1,
          "layer_norm_epsilon": 1e-05, "scale_attn_weights": True}


def folder_of(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "model.safetensors").write_bytes(assemble(*layout(tensors)))
    return folder


def load(path, n_vocab=300, block_size=32):
    return pretrained("--student_init", path, n_vocab, block_size)


def refused(path, n_vocab=300, block_size=32):
    """The message, in one line, with the option before it."""
    with pytest.raises(UserError) as caught:
        load(path, n_vocab, block_size)
    message = str(caught.value)
    assert message.startswith("--student_init: ") and "expected " in message
    assert message.isprintable() and len(message) < 600
    return message


# --- out ------------------------------------------------------------------------------------------

def test_bytes_by_hand():
    """The header's lines have 32 + 55 + 54 = 141 characters; with three spaces they are 144, 90 in
    hexadecimal. 1.0 is 3f800000, 2.0 is 40000000, -0.5 is bf000000, the lowest byte first."""
    expected = (b'\x90\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"},'
                b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}   '
                b'\0\0\x80\x3f\0\0\0\x40\0\0\0\xbf')
    assert to_safetensors({"a": torch.tensor([[1.0, 2]]), "b": torch.tensor([-0.5])}) == expected


def test_numbers_begin_at_a_multiple_of_8():
    """Of a transposed tensor the rows are written: [[1, 2]] transposed is 1, then 2."""
    for name in ("a", "bc", "def"):
        raw = to_safetensors({name: torch.tensor([[1.0, 2]]).t()})
        length = struct.unpack("<Q", raw[:8])[0]
        assert length % 8 == 0 and raw[8 + length:] == struct.pack("<2f", 1, 2)
        assert json.loads(raw[8:8 + length])[name]["shape"] == [2, 1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_out_and_in_again(tmp_path, bias, gelu):
    """Bit for bit; a model without biases comes back with biases of 0, which change no logit."""
    model = gpt(bias=bias, gelu=gelu)
    export_model(model, tmp_path / "a" / "dpo", Named)
    again = load(tmp_path / "a" / "dpo")
    assert again.config == GPTConfig(**SIZES, gelu=gelu)
    state, expected = again.state_dict(), model.state_dict()
    for name in state:
        assert torch.equal(state[name], expected.get(name, torch.zeros(len(state[name]))))
    assert torch.equal(logits(again), logits(model))
    export_model(again, tmp_path / "b", Named)
    first, second = tmp_path / "a" / "dpo", tmp_path / "b"
    for file in ("config.json", "model.safetensors") if bias else ():
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_model_that_came_in_can_be_trained(tmp_path):
    """Its head is the embedding itself, every parameter has memory of its own and a gradient."""
    model = load(folder_of(tmp_path, conv1d(gpt())))
    assert model.lm_head.weight is model.transformer.wte.weight and model.training
    parameters = list(model.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters) == 28
    model(torch.arange(32).unsqueeze(0)).square().sum().backward()
    for parameter in parameters:
        assert parameter.is_contiguous() and parameter.grad.any()
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()


def test_what_an_export_says(tmp_path):
    """Names and shapes as GPT-2 has them, no head, and the ids of EOS."""
    export_model(gpt(gelu="tanh"), tmp_path, Named)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                      "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 300,
                      "bos_token_id": 299, "eos_token_id": 299, "activation_function": "gelu_new",
                      "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "attn_pdrop": 0.0}
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["transformer.h.1.attn.c_attn.weight"]["shape"] == [8, 24]
    assert header["transformer.h.1.mlp.c_proj.weight"]["shape"] == [32, 8]
    assert HEAD not in header and len(header) == 1 + 28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    export_model(gpt(), tmp_path, Named)
    assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == "gelu"


def test_a_learned_vocabulary_goes_out_too(tmp_path):
    tokenizer = learn_tokenizer([Example("the cat and the hat", " sat on the mat")], 270)
    export_model(gpt(vocab_size=270), tmp_path, tokenizer)
    again = load_tokenizer(tmp_path / "tokenizer.tiktoken")
    assert again.encode_ordinary("the mat") == tokenizer.encode_ordinary("the mat")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eot_token == 269


def test_half_an_export_is_none(tmp_path, monkeypatch):
    """Killed before its last line, it leaves a folder that nothing loads, over an old one too."""
    export_model(gpt(), tmp_path, Named)
    write = weights.write

    def kill(path, content, option):
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, content, option)
    monkeypatch.setattr(weights, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        export_model(gpt(bias=False), tmp_path, Named)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert "config.json" in refused(tmp_path)


def test_no_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--export: expected a folder to write to, got .*file/dpo"):
        export_model(gpt(), tmp_path / "file" / "dpo", Named)


# --- in: what GPT-2 folders have in common with a checkpoint, and what not -----------------------

def test_conv1d_by_hand(tmp_path):
    """Two channels. GPT-2 computes x W, we compute x W^T: [[1, 2], [3, 4]] there is
    [[1, 3], [2, 4]] here. attn.c_proj is square, so only its numbers tell."""
    small = dict(SIZES, n_embd=2, n_head=1, n_layer=1)
    tensors = conv1d(gpt(**small))
    tensors["transformer.h.0.attn.c_proj.weight"] = torch.tensor([[1.0, 2], [3, 4]])
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.arange(12.0).view(2, 6)
    block = load(folder_of(tmp_path, tensors, n_embd=2, n_head=1, n_layer=1)).transformer.h[0]
    close(block.attn.c_proj.weight, [[1.0, 3], [2, 4]], 0)
    close(block.attn.c_attn.weight, [[0.0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]], 0)


def test_forms_of_the_same_weights(tmp_path):
    """With the tied head written out; without the prefix, as GPT2Model; with the masks of old
    files, one of which is called a bias; in shards. All the same model."""
    model = gpt(gelu="tanh")
    plain = conv1d(model)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(),
             "h.1.attn.masked_bias": torch.tensor(-1e4)}
    without = {name.removeprefix("transformer."): tensor for name, tensor in plain.items()}
    forms = {"plain": plain, "head": {**plain, HEAD: plain[WTE]}, "without": without,
             "masks": {**masks, **without}}
    for name, tensors in forms.items():
        assert torch.equal(logits(load(folder_of(tmp_path / name, tensors))), logits(model))
    shards = folder_of(tmp_path / "shards", {})
    (shards / "model.safetensors").unlink()
    names = list(forms["masks"])
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, part in parts.items():
        tensors = {name: forms["masks"][name] for name in part}
        (shards / file).write_bytes(assemble(*layout(tensors)))
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(shards)), logits(model))
    header, numbers = layout(plain)
    turned = assemble(dict(reversed(header.items())), numbers)      # offsets count, not the order
    (tmp_path / "plain" / "model.safetensors").write_bytes(turned)
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))
    untied = folder_of(tmp_path / "head", forms["head"], tie_word_embeddings=False)
    assert torch.equal(logits(load(untied)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats(tmp_path, dtype):
    """Read as they are and made float32; by hand: bfloat16 is the upper half of float32, so 0x3f80
    is 1 and 0xc049 is -(2 + 1 + 1/8 + 1/64) = -3.140625."""
    tensors = {name: (tensor.double() / 3).to(dtype) for name, tensor in conv1d(gpt()).items()}
    model = load(folder_of(tmp_path, {**tensors, HEAD: tensors[WTE]}))
    for name, tensor in conv1d(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float())
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    (tmp_path / "by_hand").write_bytes(assemble({"x": entry}, b"\x80\x3f\x49\xc0"))
    close(weights.read_safetensors(tmp_path / "by_hand")["x"].double(), [1.0, -3.140625], 0)


def test_the_activation_is_the_files(tmp_path):
    """gelu_new and its other name are the tanh form, also where the file says nothing."""
    tensors = conv1d(gpt())
    for activation in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        path = folder_of(tmp_path, tensors, activation_function=activation)
        assert load(path).config.gelu == ("exact" if activation == "gelu" else "tanh")
    config = {name: value for name, value in CONFIG.items() if name != "activation_function"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert model.config.gelu == "tanh"
    assert torch.equal(logits(model), logits(gpt(gelu="tanh")))
    assert not torch.allclose(logits(model), logits(gpt()), atol=1e-5)


def test_vocabulary_and_context_are_cut(tmp_path):
    """320 rows are 300 rounded up to a multiple of 64; their surplus goes, and so do positions."""
    model = gpt(vocab_size=320)
    path = folder_of(tmp_path, conv1d(model), vocab_size=320)
    cut = load(path, 300, 20)
    assert (cut.config.vocab_size, cut.config.block_size) == (300, 20)
    assert cut.transformer.wte.weight.untyped_storage().nbytes() == 300 * 8 * 4
    close(logits(cut, 20), gpt_tanh_logits(model, 20)[..., :300])
    assert "a vocabulary of the tokenizer's 330 ids (or 384), got 320" in refused(path, 330)
    assert "a context of at least --block_size=33, got 32" in refused(path, 300, 33)


def gpt_tanh_logits(model, block_size):
    again = GPT(GPTConfig(**{**SIZES, "vocab_size": 320, "gelu": "tanh"})).eval()
    again.load_state_dict(model.state_dict())
    return logits(again, block_size)


# --- in: what is refused in a GPT-2 folder --------------------------------------------------------

@pytest.mark.parametrize("setting, value, message", [
    ("model_type", "llama", "expected model_type \"gpt2\", the only one for now, got 'llama'"),
    ("model_type", None, "got None"),
    ("model_type", "gpt\x1b[2J\n", r"got 'gpt\x1b[2J\n'"),
    ("activation_function", "relu", "gelu_pytorch_tanh, gelu, got 'relu'"),
    ("activation_function", ["gelu"], "got list"),
    ("layer_norm_epsilon", 1e-6, "expected layer_norm_epsilon 1e-05, got 1e-06"),
    ("scale_attn_weights", False, "expected scale_attn_weights True, got False"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx False, got True"),
    ("reorder_and_upcast_attn", True, "reorder_and_upcast_attn False, got True"),
    ("add_cross_attention", True, "add_cross_attention False, got True"),
    ("pruned_heads", {"0": [1]}, "pruned_heads {}, got dict"),
    ("quantization_config", {"bits": 4}, "quantization_config None, got dict"),
    ("auto_map", {"AutoModel": "x.Y"}, "auto_map None, got dict"),
    ("n_inner", 16, "expected n_inner null or 4 * n_embd, got 16"),
    ("tie_word_embeddings", False, "tie_word_embeddings true, got False and no lm_head.weight"),
    ("attn_pdrop", 5, "expected 0 <= attn_pdrop < 1, got 5"),
    ("resid_pdrop", float("nan"), "expected 0 <= resid_pdrop < 1, got nan"),
    ("n_layer", 10**9, "weights of n_layer 1000000000 and n_embd 8, got 28 tensors with 4"),
    ("n_layer", 10**400, "of n_layer a huge number"),
    ("n_layer", 3, "a tensor transformer.h.2.ln_1.weight, got none"),
    ("n_layer", 1, "tensors of a GPT-2 alone, got 'transformer.h.1.ln_1.weight'"),
    ("n_layer", 2.0, "expected n_layer from 1 on, got 2.0"),
    ("n_layer", True, "expected n_layer from 1 on, got True"),
    ("n_positions", float("nan"), "expected n_positions from 1 on, got nan"),
    ("n_positions", 64, "wpe.weight of shape (64, 8), got (32, 8)"),
    ("n_embd", 4, "wte.weight of shape (300, 4), got (300, 8)"),
    ("n_embd", 64, "the weights of n_layer 2 and n_embd 64, got 28 tensors"),
    ("n_head", 3, "n_embd as a multiple of n_head, got 8 and 3"),
    ("n_head", 0, "expected n_head from 1 on, got 0"),
    ("vocab_size", [[300]], "expected vocab_size from 1 on, got list"),
])
def test_settings_that_are_refused(tmp_path, setting, value, message):
    path = folder_of(tmp_path, conv1d(gpt()), **{setting: value})
    assert message in refused(path)


def test_more_layers_than_tensors(tmp_path):
    """Of a width of 2 a long context has numbers enough for 500 layers, but not tensors."""
    small = dict(n_embd=2, n_head=1, n_layer=1)
    tensors = conv1d(gpt(**small, block_size=4000))
    path = folder_of(tmp_path, tensors, **{**small, "n_layer": 500}, n_positions=4000)
    assert "the weights of n_layer 500 and n_embd 2, got 16 tensors with 8," in refused(path)


def entry(header, numbers, **fields):
    """The file with other fields for the first tensor, which takes the bytes 0 to 9600."""
    return assemble({**header, WTE: {**header[WTE], **fields}}, numbers)


def twice(header, numbers):
    again = {**header[WTE], "data_offsets": [len(numbers), len(numbers) + 9600]}
    return assemble({**header, "wte.weight": again}, numbers + numbers[:9600])


HOSTILE_FILES = {
    "empty": (lambda h, n: b"", "a header within the file"),
    "header of a gigabyte": (lambda h, n: struct.pack("<Q", 2**30) + n, "got 1,073,741,824"),
    "header of 2^64 - 1": (lambda h, n: b"\xff" * 8 + n, "got 18,446,744,073,709,551,615"),
    "header longer than the file": (lambda h, n: assemble(h, n)[:500], "a header within the file"),
    "long header": (lambda h, n: assemble(json.dumps(h) + " " * 10**6, n), "a header within"),
    "truncated": (lambda h, n: assemble(h, n[:-1]), "with a shape and data_offsets within"),
    "more at the end": (lambda h, n: assemble(h, n + b"\0"), "bytes of numbers, got"),
    "not UTF-8": (lambda h, n: struct.pack("<Q", 2) + b"\xff\xfe", "expected a JSON object in"),
    "not JSON": (lambda h, n: assemble("{x}", n), "expected a JSON object in"),
    "a list": (lambda h, n: assemble([h], n), "expected a JSON object, got list"),
    "nested lists": (lambda h, n: assemble("[" * 10**5, n), "expected a JSON object in"),
    "nested objects": (lambda h, n: assemble('{"a":' * 10**5, n), "expected a JSON object in"),
    "the same key twice": (lambda h, n: assemble('{"a":1,"a":1}', n), "got: the same key twice"),
    "overlap": (lambda h, n: entry(h, n, data_offsets=[4, 9604]), "at offset 0, got 4"),
    "out of range": (lambda h, n: entry(h, n, data_offsets=[10**9, 10**9 + 9600]), "within the"),
    "backwards": (lambda h, n: entry(h, n, data_offsets=[9600, 0]), "and 9,600 bytes for"),
    "negative": (lambda h, n: entry(h, n, data_offsets=[-9600, 0]), "data_offsets within the"),
    "three offsets": (lambda h, n: entry(h, n, data_offsets=[0, 9600, 9600]), "two data_offsets"),
    "shape does not fit": (lambda h, n: entry(h, n, shape=[300, 9]), "10,800 bytes for"),
    "shape turned": (lambda h, n: entry(h, n, shape=[8, 300]), "of shape (300, 8), got (8, 300)"),
    "shape of floats": (lambda h, n: entry(h, n, shape=[300.0, 8]), "with a shape"),
    "shape of 0": (lambda h, n: entry(h, n, shape=[0], data_offsets=[0, 0]), "and 0 bytes for"),
    "shape without end": (lambda h, n: entry(h, n, shape=[1] * 10**5), "with a shape"),
    "huge product": (lambda h, n: entry(h, n, shape=[10**9, 10**9]), "with a shape"),
    "unknown dtype": (lambda h, n: entry(h, n, dtype="F8_E4M3"), "got 'F8_E4M3'"),
    "dtype as a list": (lambda h, n: entry(h, n, dtype=["F32"]), "got list"),
    "int32": (lambda h, n: entry(h, n, dtype="I32"), "floats in transformer.wte"),
    "entry as a number": (lambda h, n: assemble({**h, WTE: 3}, n), "of a dtype among"),
    "another name": (lambda h, n: assemble({"x": h.pop(WTE), **h}, n), "got 'transformer.x'"),
    "no entry": (lambda h, n: assemble({k: h[k] for k in h if k != WTE}, n), "offset 0, got 9,600"),
    "two names of one tensor": (twice, "each tensor once, got 'transformer.wte.weight' twice"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_files_that_are_refused(tmp_path, case):
    make, message = HOSTILE_FILES[case]
    path = folder_of(tmp_path, conv1d(gpt()))
    (path / "model.safetensors").write_bytes(make(*layout(conv1d(gpt()))))
    assert message in refused(path)


@pytest.mark.parametrize("places, message", [
    (None, "weight_map as an object, got None"), ([], "weight_map as an object, got list"),
    ({"x": "../model.safetensors"}, "files of this folder in weight_map, got '../model.safet"),
    ({"x": "/dev/zero"}, "got '/dev/zero'"), ({"x": ".."}, "expected a file, got a folder"),
    ({"x": 3}, "in weight_map, got 3"), ({"x": "a.safetensors"}, "No such file"),
    ({"x": "b.safetensors"}, "in 'b.safetensors' the tensors of weight_map"),
    ({}, "the weights of n_layer 2 and n_embd 8, got 0 tensors"),
])
def test_indexes_that_are_refused(tmp_path, places, message):
    path = folder_of(tmp_path, conv1d(gpt()))
    (path / "model.safetensors").rename(path / "b.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert message in refused(path)


def test_pipes_and_devices_are_never_opened(tmp_path, monkeypatch):
    """In place of the checkpoint, the config, the weights, a shard."""
    def careful(path, mode):
        assert os.path.isfile(path), f"{path} was opened"
        return open(path, mode)
    monkeypatch.setattr(weights, "open", careful, raising=False)
    os.mkfifo(tmp_path / "pipe")
    assert "expected a file, got a folder, a pipe or a device" in refused(tmp_path / "pipe")
    assert "expected a file, got a folder, a pipe or a device" in refused("/dev/zero")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        path = folder_of(tmp_path / name, conv1d(gpt()))
        if "index" in name:
            (path / "model.safetensors").unlink()
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
        assert "expected a file, got a folder, a pipe or a device" in refused(path)


def test_folders_that_are_none(tmp_path):
    """An empty one, one without weights, one whose config is too long, one that is not there, a
    name no file can have."""
    assert "No such file or directory" in refused(tmp_path) and "config.json" in refused(tmp_path)
    (folder_of(tmp_path, {}) / "model.safetensors").unlink()
    assert "model.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG) + " " * 10**6)
    assert "expected at most 1,000,000 bytes, got more in" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "no\nfolder\x1b[2J")
    assert "embedded null" in refused("a\0b")


# --- in: weights ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [WTE, "transformer.h.1.mlp.c_fc.bias"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_or_huge(tmp_path, name, number):
    """By name where a number is not finite; 1e30 is, but no logit is then."""
    model = gpt()
    model.state_dict()[name][1] = number
    paths = folder_of(tmp_path / "a", conv1d(model)), checkpoint(tmp_path / "b", model)
    for path in paths:
        message = refused(path)
        assert f"finite numbers in {name}" in message if number != 1e30 else "logits" in message


@pytest.mark.parametrize("scale, message", [(0.0, "logits from 0 to 0"), (100.0, "within 10,000")])
def test_zeros_and_hundreds(tmp_path, scale, message):
    """Zeros have no gradient, and at weights of 100 everywhere it overflows."""
    signs = [tensor.sign() for tensor in gpt().state_dict().values()]
    model = gpt()
    model.load_state_dict({name: scale * sign for name, sign in zip(model.state_dict(), signs)})
    assert message in refused(folder_of(tmp_path, conv1d(model)))


# --- in: checkpoints ------------------------------------------------------------------------------

def checkpoint(path, model, **sizes):
    """As nanoGPT writes one, after torch.compile."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    arguments = {name: getattr(model.config, name) for name in SIZES}
    torch.save({"model": state, "model_args": {**arguments, "bias": model.config.bias,
                "dropout": 0.0, **sizes}, "optimizer": {}, "iter_num": 5,
                "best_val_loss": torch.tensor(1.0), "config": {"dataset": "x"}}, path)
    return path


def test_a_nanogpt_checkpoint(tmp_path):
    """Without biases, with 320 rows for 300 ids and a context of 32, cut to 20."""
    model = gpt(vocab_size=320, bias=False)
    again = load(checkpoint(tmp_path / "ckpt.pt", model), 300, 20)
    assert again.config == GPTConfig(**{**SIZES, "block_size": 20}, bias=False)
    close(logits(again, 20), logits(model, 20)[..., :300])
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_kept_file(tmp_path):
    """Its config names the form of GELU; a digest may stand behind it."""
    model = gpt(gelu="tanh")
    content = {"config": {**vars(model.config), "bfloat16": True}, "model": model.state_dict()}
    torch.save(content, tmp_path / "dpo.pt")
    raw = (tmp_path / "dpo.pt").read_bytes()
    (tmp_path / "dpo.pt").write_bytes(raw + hashlib.sha256(raw).hexdigest().encode())
    again = load(tmp_path / "dpo.pt")
    assert again.config == model.config and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name, value, message", [
    ("n_layer", 10**9, "the weights of n_layer 1000000000 and n_embd 8, got 29 tensors"),
    ("n_layer", 1e9, "expected n_layer from 1 on, got 1000000000.0"),
    ("block_size", float("nan"), "expected block_size from 1 on, got nan"),
    ("dropout", 5, "expected 0 <= dropout < 1, got 5"), ("dropout", "0", "got '0'"),
    ("dropout", float("nan"), "got nan"), ("bias", 1, "expected bias True or False, got 1"),
    ("bias", False, "tensors of a GPT-2 alone"), ("gelu", "relu", "gelu exact or tanh, got 'relu'"),
    ("vocab_size", torch.tensor(300), "got Tensor"), ("n_head", 0, "got 0"), ("n_embd", "8", "'8'"),
])
def test_sizes_that_are_refused(tmp_path, name, value, message):
    assert message in refused(checkpoint(tmp_path / "ckpt.pt", gpt(), **{name: value}))


def test_other_content_is_refused(tmp_path):
    """No checkpoint, no sizes, no tensors, tensors of other types, kinds and memory."""
    path, state = tmp_path / "ckpt.pt", gpt().state_dict()
    sizes = {**SIZES, "bias": True}

    def said(content):
        torch.save(content, path)
        return refused(path)
    for content in ([1], {}, {"model": {}}, {"model": [state], "model_args": sizes}):
        assert "expected a checkpoint of nanoGPT or of this program" in said(content)
    twice = {**state, f"_orig_mod.{WTE}": state[WTE]}
    for model, message in [({}, "the weights of n_layer 2 and n_embd 8, got 0 tensors"),
                           ({"x": 10**20}, "got a huge number under 'x'"),
                           ({3: state[WTE]}, "got Tensor under 3"), (twice, "each tensor once")]:
        assert message in said({"model": model, "model_args": sizes})
    for other, message in [(state[WTE].int(), "floats in transformer.wte.weight, got torch.int32"),
                           (state[WTE].to_sparse(), "torch.sparse_coo"),
                           (state[WTE].to("meta"), "floats in transformer.wte.weight"),
                           (torch.tensor(1.0), "of shape (300, 8), got ()"),
                           (torch.zeros(1).expand(10**9, 8), "all weights in the file, got more")]:
        assert message in said({"model": {**state, WTE: other}, "model_args": sizes})
    untied = {**state, HEAD: torch.zeros(300, 8)}
    assert "an output head tied to the token embedding, got two tensors" in said(
        {"model": untied, "model_args": sizes})


def test_bombs_are_refused(tmp_path):
    """A pickle of four million lists in four compressed kilobytes or as it is; sizes whose repr has
    2^60 brackets."""
    lists = b"\x80\x02](" + b"]" * 4_000_000 + b"e."
    for compression, message in [(zipfile.ZIP_DEFLATED, "without compression"),
                                 (zipfile.ZIP_STORED, "a pickle of at most 500,000 steps")]:
        with zipfile.ZipFile(tmp_path / "bomb", "w", compression) as archive:
            archive.writestr("archive/data.pkl", lists)
            archive.writestr("archive/version", "3\n")
        assert message in refused(tmp_path / "bomb")
    wide = []
    for _ in range(60):
        wide = [wide, wide]
    for sizes in ({"block_size": wide}, {"bias": wide}, {"gelu": wide}, {"dropout": wide}):
        assert "got list" in refused(checkpoint(tmp_path / "ckpt.pt", gpt(), **sizes))


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_crafted_pickles_run_nothing(tmp_path):
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    assert "expected a file of tensors and plain values" in refused(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert "File is not a zip file" in refused(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


# --- whole runs -----------------------------------------------------------------------------------

FAST = ["--train_pairs=24", "--student_pairs=24", "--val_pairs=2", "--test_pairs=4", "--steps=1",
        "--batch_size=8", "--samples=1", "--max_new_tokens=6", "--teacher_sft_steps=1",
        "--teacher_dpo_steps=1", "--student_sft_steps=1", "--vocab_size=300", "--methods=dpo",
        "--device=cpu"]


def test_a_run_from_a_folder_and_back(tmp_path):
    """A teacher from a GPT-2 folder, whose first stage leaves it as it is, and a student from a
    checkpoint; --export writes each model of the run, and another run starts from one of them."""
    teacher = gpt(block_size=64, gelu="tanh")
    folder = folder_of(tmp_path / "gpt2", conv1d(teacher), n_positions=64)
    student = checkpoint(tmp_path / "ckpt.pt", gpt(block_size=64, n_layer=1, bias=False))
    out, exports = tmp_path / "out", tmp_path / "exports"
    assert train.main([*FAST, f"--out={out}", "--teacher_sft_steps=0", f"--teacher_init={folder}",
                       f"--student_init={student}"]) == 0
    same = load(out / "seed0" / "teacher-sft.pt", 300, 64)
    assert torch.equal(logits(same), logits(teacher))
    assert train.main([f"--out={out}", f"--export={exports}", "--device=cpu"]) == 0
    for file in ("dpo", "teacher-dpo"):
        close(logits(load(exports / file)), logits(load(out / "seed0" / f"{file}.pt")), 0)
    again = [*FAST, f"--out={tmp_path / 'next'}", f"--student_init={exports / 'dpo'}"]
    assert train.main(again) == 0


def test_a_run_refuses_before_training(tmp_path, capsys):
    """Exit code 2, one line, and no folder."""
    path = checkpoint(tmp_path / "ckpt.pt", gpt(vocab_size=320, block_size=64))
    for option, message in [("--vocab_size=330", "tokenizer's 330 ids (or 384), got 320"),
                            ("--block_size=200", "at least --block_size=200, got 64")]:
        arguments = [*FAST, f"--student_init={path}", f"--out={tmp_path / 'out'}", option]
        assert train.main(arguments) == 2 and not (tmp_path / "out").exists()
        errors = capsys.readouterr().err
        assert "--student_init: expected a " in errors and message in errors
        assert errors.count("\n") == 1


# --- a campaign -----------------------------------------------------------------------------------

NONSENSE = [None, True, False, 0, -1, 1.5, 10**30, -10**30, 1e300, float("nan"), float("inf"), "",
            "8", "\x1b]0;x\x07", "\u202e", [], [8], {}, {"8": 8}, [[]] * 50]


def bad_config(rng, path):
    name = rng.choice(["vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "model_type",
                       "activation_function", "layer_norm_epsilon"])
    (path / "config.json").write_text(json.dumps({**CONFIG, name: rng.choice(NONSENSE)}))


def bad_entry(rng, path):
    header, numbers = layout(conv1d(gpt()))
    name = rng.choice(list(header))
    entry, field = header[name], rng.choice(["dtype", "shape", "data_offsets", "name", "entry"])
    if field == "name":
        header[name + rng.choice("xyz")] = header.pop(name)
    elif field == "entry":
        header[name] = rng.choice(NONSENSE)
    elif rng.random() < 0.5:
        entry[field] = rng.choice(NONSENSE)
    elif field == "dtype":
        entry[field] = rng.choice(["F64", "F16", "I32", "U8", "BOOL", "f32", "F8"])
    else:
        place = rng.randrange(len(entry[field]))
        entry[field][place] += rng.choice([-4, -1, 1, 4, 8, 10**6, 2**63])
    (path / "model.safetensors").write_bytes(assemble(header, numbers))


def bad_bytes(rng, path):
    raw = (path / "model.safetensors").read_bytes()
    length, kind = struct.unpack("<Q", raw[:8])[0], rng.randrange(5)
    if kind == 0:
        raw = raw[:rng.randrange(len(raw))]
    elif kind == 1:
        raw += rng.randbytes(rng.randrange(1, 100))
    elif kind == 2:
        raw = rng.randbytes(8) + raw[8:]
    elif kind == 3:
        place = 8 + rng.randrange(length)           # no JSON has this byte, in a string or outside
        raw = raw[:place] + b"\x01" + raw[place + 1:]
    else:
        raw = raw[:8 + length] + struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e30])
                                             ) * 2400 + raw[8 + length + 9600:]
    (path / "model.safetensors").write_bytes(raw)


def bad_index(rng, path):
    names, file = list(conv1d(gpt())), "part.safetensors"
    (path / "model.safetensors").rename(path / file)
    places = {name: file for name in names}
    wrong = [*NONSENSE, "../x", "/etc/passwd", "a.safetensors"]
    places[rng.choice(names + ["x"])] = rng.choice(wrong)
    if rng.random() < 0.3:
        places = {name: file for name in rng.sample(names, rng.randrange(len(names)))}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def bad_sizes(rng, path):
    name = rng.choice(list(SIZES))
    checkpoint(path / "ckpt.pt", gpt(), **{name: rng.choice(NONSENSE)})


def bad_state(rng, path):
    model = gpt()
    state = copy.copy(model.state_dict())
    name = rng.choice(list(state))
    tensor = state[name]
    state[name] = rng.choice([*NONSENSE, tensor.int(), tensor[1:], tensor * 1e38 * 1e38,
                              tensor.unsqueeze(0), torch.tensor(0.0)])
    torch.save({"model": state, "model_args": {**SIZES, "bias": True}}, path / "ckpt.pt")


def bad_archive(rng, path):
    raw = checkpoint(path / "ckpt.pt", gpt()).read_bytes()
    cut = rng.randrange(len(raw) - 22)              # the last 22 bytes say where the directory is
    raw = rng.choice([raw[:cut], rng.randbytes(cut), raw[:cut] + rng.randbytes(len(raw) - cut)])
    (path / "ckpt.pt").write_bytes(raw)


@pytest.mark.parametrize("spoil", [bad_config, bad_entry, bad_bytes, bad_index, bad_sizes,
                                   bad_state, bad_archive])
def test_campaign(tmp_path, spoil):
    """350 spoiled files, 50 of each kind: one line each, and none of them is taken."""
    tensors = conv1d(gpt())
    for seed in range(50):
        path = folder_of(tmp_path / str(seed), tensors)
        spoil(random.Random(seed), path)
        refused(path / "ckpt.pt" if (path / "ckpt.pt").exists() else path)
