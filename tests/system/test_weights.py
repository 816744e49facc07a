"""Weights in and out: every file below is written here by hand, byte for byte, or by torch.save."""

import json
import os
import pickle
import struct

import pytest
import tiktoken
import torch

import harness.weights as weights
import train
from conftest import close
from harness.errors import UserError
from harness.tokenizers import END_OF_TEXT, PIECES
from harness.weights import export_model, export_targets, pretrained
from model import GPT, GPTConfig
from small_run import TINY

SIZES = dict(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=8)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
RANKS = {bytes([b]): b for b in range(256)}
FAST = [*(option for option in TINY if not option.split("=")[0].endswith(
    ("layers", "heads", "width"))), "--methods=dpo"]        # the sizes come with the weights
TOKENIZER = tiktoken.Encoding("bytes", pat_str=PIECES, mergeable_ranks=RANKS,
                              special_tokens={END_OF_TEXT: 299})
CONFIG = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2,
          "n_embd": 8, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05}


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
    """The bytes of a safetensors file from its header and the rest."""
    text = json.dumps(entries).encode()
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


def folder_of(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "model.safetensors").write_bytes(assemble(*layout(tensors)))
    return folder


def checkpoint(path, model, **sizes):
    """As nanoGPT writes one, after torch.compile."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "model_args": {**vars(model.config), "dropout": 0.0, **sizes},
                "optimizer": {}, "iter_num": 5, "config": {"dataset": "x"}}, path)
    return path


def load(path, n_vocab=300, block_size=32):
    return pretrained("--student_init", path, n_vocab, block_size)


def refused(path, n_vocab=300, block_size=32):
    """The message, in one line, with the option before it and what can be given at its end."""
    with pytest.raises(UserError) as caught:
        load(path, n_vocab, block_size)
    message = str(caught.value)
    assert message.startswith("--student_init: ") and message.isprintable() and len(message) <= 600
    assert "; expected a checkpoint of nanoGPT" in message and "after merge_and_unload)" in message
    return message


def test_bytes_by_hand():
    """The header's lines have 32 + 55 = 87 characters; with a space they are 88, 58 in
    hexadecimal. 1.0 is 3f800000, -0.5 is bf000000, the lowest byte first."""
    assert weights.to_safetensors({"a": torch.tensor([[1.0, -0.5]])}) == (
        b'\x58\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}} '
        b'\0\0\x80\x3f\0\0\0\xbf')


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_out_and_in_again(tmp_path, bias, gelu):
    """Bit for bit; a model without biases comes back with biases of 0, which change no logit."""
    model = gpt(bias=bias, gelu=gelu)
    export_model(model, tmp_path / "a" / "dpo", TOKENIZER)
    again = load(tmp_path / "a" / "dpo")
    assert again.config == GPTConfig(**SIZES, gelu=gelu) and again.training
    state, expected = again.state_dict(), model.state_dict()
    for name in state:
        assert torch.equal(state[name], expected.get(name, torch.zeros(len(state[name]))))
    assert torch.equal(logits(again), logits(model))


def test_what_an_export_says(tmp_path):
    """Shapes as GPT-2 has them, no head, and the ids of EOS."""
    export_model(gpt(gelu="tanh"), tmp_path, TOKENIZER)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {**config, **CONFIG, "architectures": ["GPT2LMHeadModel"],
                      "bos_token_id": 299, "eos_token_id": 299, "tie_word_embeddings": True,
                      "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tensors = weights.read_safetensors(tmp_path / "model.safetensors")
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (32, 8)
    assert HEAD not in tensors and len(tensors) == 28
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def test_a_vocabulary_by_hand():
    """Bytes as GPT-2 shows them: a space is chr(256 + 32), a line feed chr(256 + 10), and byte 173,
    the last of the 68 that cannot be seen, chr(256 + 67). " ab" comes of " a" + "b", but not of
    " " + "ab", which is no token. Oniguruma counts the two joiners to no word and reads {1,3}+ as
    a repetition; the regular expressions of tiktoken do neither."""
    ranks = {**RANKS, b" a": 256, b" ab": 257, b"\n\n": 258}
    pieces = r"[^\W\d]?+|\d{1,3}+|\p{L}++"
    record = weights.tokenizer_json(tiktoken.Encoding("x", pat_str=pieces, mergeable_ranks=ranks,
                                                      special_tokens={END_OF_TEXT: 300}))
    model, space, feed = record["model"], chr(288), chr(266)
    assert model["merges"] == [[space, "a"], [f"{space}a", "b"], [feed, feed]]
    assert model["vocab"] == {**model["vocab"], space: 32, chr(323): 173, chr(172): 172, "!": 33,
                              f"{space}ab": 257, feed * 2: 258, END_OF_TEXT: 300}
    assert len(model["vocab"]) == 260 and record["added_tokens"][0]["id"] == 300
    assert record["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == (
        "[^[^\\w\u200c\u200d]\\d]?+|\\d{1,3}|\\p{L}++")


def test_half_an_export_is_none(tmp_path, monkeypatch):
    """Killed at its second file, it leaves a folder that nothing loads."""
    monkeypatch.setattr(weights, "tokenizer_json", None)
    with pytest.raises(TypeError):
        export_model(gpt(bias=False), tmp_path, TOKENIZER)
    assert "config.json" in refused(tmp_path)


def test_an_export_replaces_nothing(tmp_path):
    """Free is what is not there, outside --out, not even as a link that leads nowhere."""
    out, folder = tmp_path / "out", tmp_path / "models"
    (folder / "empty").mkdir(parents=True)
    export_model(gpt(), folder / "export", TOKENIZER)
    free = export_targets(folder, out, ["new", "tvkd implicit/value"])
    assert free["tvkd implicit/value"] == folder / "tvkd-implicit-value"
    (folder / "dangling").symlink_to(tmp_path / "elsewhere")
    for name in ("export", "empty", "dangling"):
        with pytest.raises(UserError, match=f"expected nothing at .*{name}, choose another"):
            export_targets(folder, out, ["new", name])
    (tmp_path / "to-out").symlink_to(out)
    for where in (out, out / "seed0", tmp_path / "to-out"):
        with pytest.raises(UserError, match="outside --out="):
            export_targets(where, out, ["dpo"])
    assert not (tmp_path / "elsewhere").exists() and not (folder / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conv1d_by_hand(tmp_path, dtype):
    """Two channels, in numbers that all types hold. GPT-2 computes x W, we compute x W^T: [[1, 2],
    [3, 4]] there is [[1, 3], [2, 4]] here. attn.c_proj is square, so only its numbers tell."""
    small = dict(n_embd=2, n_head=1, n_layer=1)
    tensors = {name: tensor.to(dtype) for name, tensor in conv1d(gpt(**small)).items()}
    tensors["transformer.h.0.attn.c_proj.weight"] = torch.tensor([[1.0, 2], [3, 4]], dtype=dtype)
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.arange(12.0).view(2, 6).to(dtype)
    block = load(folder_of(tmp_path, tensors, **small)).transformer.h[0]
    close(block.attn.c_proj.weight, [[1.0, 3], [2, 4]], 0)
    close(block.attn.c_attn.weight, [[0.0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]], 0)


def test_forms_of_the_same_weights(tmp_path):
    """With the tied head written out; without the prefix, as GPT2Model; with the masks of old
    files, one of which is called a bias; in another order; in shards; with the tanh form named
    otherwise or by default. All the same model."""
    model = gpt(gelu="tanh")
    plain = conv1d(model)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(),
             "h.1.attn.masked_bias": torch.tensor(-1e4)}
    old = masks | {name.removeprefix("transformer."): tensor for name, tensor in plain.items()}
    head, turned = {**plain, HEAD: plain[WTE]}, folder_of(tmp_path / "turned", plain)
    header, numbers = layout(plain)
    (turned / "model.safetensors").write_bytes(assemble(dict(reversed(header.items())), numbers))
    (turned / "config.json").write_text('{"n_layer": 2, "n_head": 2, "n_embd": 8}')
    shards = folder_of(tmp_path / "shards", {}, activation_function="gelu_pytorch_tanh")
    (shards / "model.safetensors").unlink()
    for i, names in enumerate((list(old)[:9], list(old)[9:])):
        part = assemble(*layout({name: old[name] for name in names}))
        (shards / f"model-0000{i + 1}-of-00002.safetensors").write_bytes(part)
    for folder in (folder_of(tmp_path / "a", plain), folder_of(tmp_path / "b", old),
                   folder_of(tmp_path / "c", head), turned, shards):
        assert torch.equal(logits(load(folder)), logits(model)), folder


@pytest.mark.parametrize("rows", [301, 320, 599])
def test_vocabulary_and_context_are_cut(tmp_path, capsys, rows):
    """Of a nanoGPT checkpoint without biases: rows beyond the tokenizer's go, whatever their
    number, and so do positions; it is said."""
    model = gpt(vocab_size=rows, bias=False)
    path = checkpoint(tmp_path / "ckpt.pt", model)
    cut = load(path, 300, 20)
    assert cut.config == GPTConfig(**{**SIZES, "block_size": 20}, bias=False)
    close(logits(cut, 20), logits(model, 20)[..., :300])
    assert f" {rows - 300} of {rows} rows of the vocabulary are cut" in capsys.readouterr().out
    assert load(path, rows).config.vocab_size == rows and capsys.readouterr().out == ""
    for other in (rows + 1, rows // 2):     # half of the rows or more: those of another tokenizer
        assert f"the tokenizer's {other} ids, or some more" in refused(path, other)


@pytest.mark.parametrize("setting, value, message", [
    ("model_type", "gpt\x1b[2J\n", r"expected model_type gpt2, got 'gpt\x1b[2J\n'"),
    ("activation_function", "relu", "gelu_pytorch_tanh or gelu, got 'relu'"),
    ("layer_norm_epsilon", 1e-6, "expected layer_norm_epsilon 1e-05, got 1e-06"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx False, got True"),
    ("tie_word_embeddings", False, "tie_word_embeddings True, got False"),
    ("n_layer", 10**9, "weights for its n_layer and n_embd, got "),
    ("n_embd", 10**400, "weights for its n_layer and n_embd, got "),
    ("n_layer", 3, 'Missing key(s) in state_dict: "transformer.h.2.ln_1.weight"'),
    ("n_embd", 4, "wte.weight: copying a param with shape torch.Size([300, 8])"),
])
def test_settings_that_are_refused(tmp_path, setting, value, message):
    assert message in refused(folder_of(tmp_path, conv1d(gpt()), **{setting: value}))


def changed(header, numbers, **fields):
    """The file with other fields for the first tensor, which takes the bytes 0 to 9600."""
    return assemble({**header, WTE: {**header[WTE], **fields}}, numbers)


@pytest.mark.parametrize("make, message", [
    (lambda h, n: b"", "ValueError"), (lambda h, n: b"\xff" * 8 + n, "OverflowError"),
    (lambda h, n: assemble({"__metadata__": "y" * 10**6, **h}, n), "JSONDecodeError"),
    (lambda h, n: struct.pack("<Q", 10**5) + b"[" * 10**5, "RecursionError"),
    (lambda h, n: assemble(h, n[:-1]), "ValueError"),
    (lambda h, n: assemble(h, n + b"\0"), "17,664 bytes of numbers in model.safetensors"),
    (lambda h, n: assemble({**h, "x": h[WTE]}, n), "expected 27,264 bytes of numbers"),
    (lambda h, n: changed(h, n, data_offsets=[-9600, 0]), "ValueError"),
    (lambda h, n: changed(h, n, shape=[8, 300]), "tokenizer's 300 ids, or some more"),
    (lambda h, n: changed(h, n, shape=[1] * 10**5), "RuntimeError"),
    (lambda h, n: changed(h, n, dtype="F8", shape=[1200, 8]), "one float transformer.wte.weight"),
])
def test_files_that_are_refused(tmp_path, make, message):
    path = folder_of(tmp_path, conv1d(gpt()))
    (path / "model.safetensors").write_bytes(make(*layout(conv1d(gpt()))))
    assert message in refused(path)


def test_folders_and_files_of_other_kinds(tmp_path):
    """What people have in place of the folder or the file."""
    assert "config.json" in refused(tmp_path)       # an adapter's folder holds adapter_config.json
    (folder_of(tmp_path, {}) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "No such file" in refused(tmp_path) and "as save_pretrained writes" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{" + " " * 10**6 + "}")
    assert "JSONDecodeError" in refused(tmp_path)
    file = folder_of(tmp_path / "gpt2", conv1d(gpt())) / "model.safetensors"
    assert "File is not a zip file; expected a checkpoint" in refused(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid")
    for path in (file, file.parent):
        assert "safetensors: run `git lfs pull`, got a pointer of Git LFS" in refused(path)
    assert "No such file" in refused(tmp_path / "no\nfolder\x1b[2J")
    assert "embedded null" in refused("a\0b") and "File name too long" in refused("a" * 10**5)


STATE, OWN = gpt().state_dict(), {**SIZES, "bias": True}


@pytest.mark.parametrize("content, message", [
    ([1], "AttributeError"), ({"wte": 1}, "KeyError: 'config'"), ({"config": OWN}, "'model'"),
    ({"config": {**OWN, "gelu": "relu"}, "model": STATE}, "KeyError: 'relu'"),
    ({"config": {**OWN, "n_embd": 10**4}, "model": {        # of stride 0: a file of 20 kB
        name: torch.zeros(1).expand(len(STATE[name]), 10**4) for name in STATE}}, "weights for it"),
    ({"config": {**OWN, "n_embd": 2, "n_layer": 30}, "model": STATE}, "weights for it"),
    *(({"config": OWN, "model": {**STATE, name: tensor}}, message) for name, tensor, message in [
        (3, STATE[WTE], "AttributeError"), (WTE, STATE[WTE].to("meta"), "RuntimeError"),
        (f"_orig_mod.{WTE}", STATE[WTE], "expected one float transformer.wte.weight"),
        (WTE, STATE[WTE].int(), "one float transformer.wte.weight, got torch.int32"),
        (WTE, torch.zeros(1).expand(10**9, 8), "tokenizer's 300 ids, or some more"),
        ("transformer.ln_f.bias", torch.full((8,), torch.nan), "expected finite numbers"),
        (HEAD, torch.zeros(300, 8), "expected a head tied to the embedding, got another")])])
def test_content_that_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "ckpt.pt")
    assert message in refused(tmp_path / "ckpt.pt")


def test_bombs_are_refused(tmp_path):
    """A flipped bit of a tensor; sizes whose repr has 2^60 brackets."""
    torch.save({"model": {"x": torch.zeros(999)}}, tmp_path / "ckpt.pt")
    raw = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:])
    assert "got a wrong checksum" in refused(tmp_path / "ckpt.pt")
    wide = []
    for _ in range(60):
        wide = [wide, wide]
    for sizes in ({"n_layer": wide}, {"gelu": wide}):
        assert "TypeError" in refused(checkpoint(tmp_path / "ckpt.pt", gpt(), **sizes))
    assert load(checkpoint(tmp_path / "ckpt.pt", gpt(), bias=wide)).config.bias is True


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_crafted_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "ckpt.pt")
    assert "expected a file of tensors and plain values" in refused("ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Evil()))
    assert "File is not a zip file" in refused("ckpt.pt") and not (tmp_path / "ran").exists()


def test_a_run_from_a_folder_and_back(tmp_path):
    """A teacher from a GPT-2 folder, whose first stage leaves it as it is, and a student from a
    checkpoint; --export writes each model of the run, and another run starts from one of them."""
    teacher = gpt(block_size=64, gelu="tanh")
    folder = folder_of(tmp_path / "gpt2", conv1d(teacher), n_positions=64)
    student = checkpoint(tmp_path / "ckpt.pt", gpt(block_size=64, n_layer=1, bias=False))
    out, exports = tmp_path / "out", tmp_path / "exports"
    assert train.main([*FAST, f"--out={out}", "--teacher_sft_steps=0", f"--teacher_init={folder}",
                       f"--student_init={student}"]) == 0
    close(logits(load(out / "seed0" / "teacher-sft.pt", 300, 64)), logits(teacher), 0)
    assert train.main([f"--out={out}", f"--export={exports}", "--device=cpu"]) == 0
    for file in ("dpo", "teacher-dpo"):
        close(logits(load(exports / file)), logits(load(out / "seed0" / f"{file}.pt")), 0)
    assert train.main([*FAST, f"--out={out}2", f"--student_init={exports / 'dpo'}"]) == 0


def test_a_run_refuses_before_training(tmp_path, capsys):
    """Exit code 2, one line, and no folder."""
    path = checkpoint(tmp_path / "ckpt.pt", gpt(vocab_size=320, block_size=64))
    assert train.main([*FAST, f"--student_init={path}", f"--out={tmp_path / 'out'}",
                       "--block_size=200"]) == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"--student_init: {path}: expected a context of at least --block_size=200" in error
    assert error.count("\n") == 1
