"""Micro-batches, processes, bfloat16, and weights to start from: the same numbers, only elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import measure
import train
from conftest import ROOT, close
from model import GPT, GPTConfig
from options import parse_args, in_bfloat16
from test_store import evil_files
from test_train import SMALL, run

SIZES = tuple(f"--{who}_{size}" for who in ("teacher", "student") for size in ("layers", "heads", "width"))
CPU = torch.device("cpu")
FAST = [*SMALL, "--test_pairs=4", "--val_pairs=2", "--samples=1", "--max_new_tokens=6"]


# --- micro-batches ----------------------------------------------------------------------------------------------------------

def test_sums_by_hand():
    """One weight w; items with losses c w over n tokens, (c, n) = (8, 1), (1, 1), (1, 1), (2, 1). The gradient of the batch is
    (8 + 1 + 1 + 2) / 4 = 3 whatever the micro-batches, 3 + 1 too, where the mean of means would be (10/3 + 2) / 2 = 8/3."""
    model = torch.nn.Linear(1, 1, bias=False)
    c = torch.tensor([8.0, 1, 1, 2])

    def loss_of(model, ids):
        return {"loss": (c[ids] * model.weight.squeeze()).sum(), "n": len(ids), "tokens": 10 * len(ids)}
    for micro_batch in (0, 1, 2, 3, 4, 9):
        model.zero_grad()
        total = train.gradient(model, model, loss_of, torch.arange(4), micro_batch)
        close(model.weight.grad, [[3.0]])
        assert total == {"loss": pytest.approx(12 * model.weight.item()), "n": 4, "tokens": 40}


def test_micro_batches_give_the_gradient_of_the_batch():
    """Responses of 1 to 30 tokens, so that the shares are unequal: SFT, KD and TVKD, 5 pairs at once or 1, 2, 3 at a time."""
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(50, 40, 1, 2, 8)) for _ in range(2))
    lengths = [3, 30, 7, 1, 12]
    pairs = [data.Pair([1, 2], list(range(n)), [5] * (31 - n)) for n in lengths]
    rows, psi = measure.both_responses(pairs), torch.randn(2, 5)
    ref_logps = measure.cached_logps(teacher, rows, 10, CPU).view(2, -1)
    for loss_of in (train.supervised([[row] for row in rows[:5]], CPU), train.distillation(teacher, pairs, CPU),
                    train.preference(pairs, ref_logps, 0.5, CPU, psi, 1.0)):
        found = []
        for micro_batch in (0, 1, 2, 3):
            student.zero_grad()
            total = train.gradient(student, student, loss_of, torch.arange(5), micro_batch)
            found.append((total["loss"] / total["n"], torch.cat([p.grad.flatten() for p in student.parameters()])))
        for loss, grad in found[1:]:
            assert loss == pytest.approx(found[0][0], abs=1e-5)
            torch.testing.assert_close(grad, found[0][1], atol=1e-5, rtol=1e-4)


def test_parts_leave_the_loss_as_it_is(monkeypatch):
    """The rows of a batch go through the model in parts by length: one part or six, the same sums."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 40, 1, 2, 8))
    pairs = [data.Pair([1], list(range(n)), [5] * (31 - n)) for n in (3, 30, 7, 1, 12)]
    found = []
    for parts in (6, 1):
        monkeypatch.setattr(train, "PARTS", parts)
        sums = train.preference(pairs, torch.zeros(2, 5), 1.0, CPU)(model, [3, 0, 1])
        found.append([torch.as_tensor(x).item() for x in sums.values()])
    assert found[0] == pytest.approx(found[1], abs=1e-3) and found[0][-1] == 3 * (2 * 1 + 31)


def test_a_process_without_a_pair_adds_nothing(monkeypatch):
    """The third process of three has no share of a batch of two pairs: it takes part with 0, and its gradient is 0 times 3 / 2."""
    model = torch.nn.Linear(1, 1, bias=False)
    monkeypatch.setattr(train, "processes", lambda: (2, 3))
    seen = []

    def all_reduce(total):
        seen.append(total.tolist())
        total += torch.tensor([12.0, 2, 20])                                # what the first two had
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    total = train.gradient(model, model, lambda model, ids: {"loss": 5 * model.weight.sum(), "n": len(ids), "tokens": 10},
                           torch.arange(2), 0)
    assert seen == [[0, 0, 0]] and total == {"loss": 12, "n": 2, "tokens": 20}
    close(model.weight.grad, [[0.0]])


def test_the_start_is_checked_within_a_micro_batch(tmp_path, monkeypatch):
    """The step 0 check needs a gradient too, of no more pairs than --micro_batch allows."""
    sizes, check = [], train.check_start
    monkeypatch.setattr(train, "check_start", lambda loss_of, model, ids, psi: (sizes.append(len(ids)), check(loss_of, model, ids, psi)))
    run(tmp_path, *FAST[len(SMALL):], "--methods=dpo,tvkd", "--micro_batch=3")
    assert sizes == [3, 3, 3, 3]


# --- processes --------------------------------------------------------------------------------------------------------------

# train.py, which notes in a file of each process what that one evaluates and writes.
WITNESS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import measure, store, train

def noted(module, name):
    function = getattr(module, name)
    def noting(*args, **kwargs):
        with open(__file__ + os.environ["RANK"], "a", encoding="utf-8") as file:
            print(name, file=file)
        return function(*args, **kwargs)
    setattr(module, name, noting)
for module, name in ((measure, "evaluate"), (train, "evaluate"), (store, "write"), (train, "write"), (train, "write_report")):
    noted(module, name)
sys.exit(train.main())
"""


def torchrun(out, *options, script=ROOT / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *FAST, f"--out={out}",
               *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_give_the_same_losses(tmp_path):
    """9 student pairs in batches of 8 and 1, so that a process is left without one, in micro-batches of 3: every loss of every
    stage within 1e-5 of one process without (3e-5 with psi, which adds what two trainings of the teacher differ by). One of the two
    prints, evaluates and writes."""
    script = tmp_path / "witness"
    script.write_text(WITNESS, encoding="utf-8")
    options = ("--student_pairs=9", "--methods=kd,dpo,tvkd")
    rows, log = run(tmp_path / "one", *FAST[len(SMALL):], *options)
    process = torchrun(tmp_path / "two", *options, "--micro_batch=3", script=script)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    lines = (tmp_path / "two" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert shown.count("seed 0\n") == 1 and len(lines) == len(log) and len(log) > 20
    for line, expected in zip(map(json.loads, lines), log):
        assert (line["stage"], line["step"]) == (expected["stage"], expected["step"])
        assert line["loss"] == pytest.approx(expected["loss"], abs=3e-5 if "tvkd" in line["stage"] else 1e-5), line["stage"]
    found = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))["rows"]
    noted = (tmp_path / "witness0").read_text(encoding="utf-8").split()
    assert set(noted) == {"evaluate", "write", "write_report"} and not (tmp_path / "witness1").exists()
    assert [row["pref_margin"] for row in found] == pytest.approx([row["pref_margin"] for row in rows.values()], abs=1e-3)


def test_a_killed_process_ends_the_run(tmp_path):
    """kill -9 of the second process in the middle of a stage: torchrun ends with an error, and soon."""
    process = torchrun(tmp_path / "out", "--teacher_sft_steps=100000")
    log = tmp_path / "out" / "log.jsonl"
    try:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.1)
        with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
        ranks = {pid: open(f"/proc/{pid}/environ", "rb").read().split(b"\0") for pid in children}
        [second] = [pid for pid, environment in ranks.items() if b"RANK=1" in environment]
        os.kill(second, signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# --- precision, compile -----------------------------------------------------------------------------------------------------

def test_bfloat16_is_asked_for_only_where_it_is(monkeypatch):
    """auto: on CUDA that supports it. On a CPU only by name; CUDA is not even asked there."""
    def asked():
        raise AssertionError("CUDA was asked")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    assert [in_bfloat16(precision, CPU) for precision in ("auto", "float32", "bfloat16")] == [False, False, True]
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
        assert in_bfloat16("auto", torch.device("cuda")) == supported
        assert not in_bfloat16("float32", torch.device("cuda"))


def test_bfloat16_keeps_log_probs_in_float32():
    """Weights, logits and log-probs are float32 and differ a little; products in the blocks are bfloat16; sampling works on the
    float32 cache."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 40, 2, 2, 16))
    tokens, mask = data.collate([data.Row([1, 2, 3], [4, 5, 0])])
    exact = measure.score(model, tokens, mask)
    model.config.bfloat16 = True
    inside = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, given, made: inside.append(made.dtype))
    assert model(tokens).dtype == model.lm_head.weight.dtype == torch.float32 and inside == [torch.bfloat16]
    rounded = measure.score(model, tokens, mask)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1
    assert len(model.generate([[1, 2, 3]], 5, eos=49)) == 1


def test_precision_reaches_the_model(tmp_path):
    """--precision=bfloat16 on the CPU: the models of a run say so, and the step 0 check allows for the rounding of other batches."""
    for precision, expected in (("bfloat16", True), ("auto", False)):
        out = tmp_path / precision
        run(out, *FAST[len(SMALL):], "--methods=dpo", f"--precision={precision}")
        for stage in ("teacher-sft", "student-sft", "dpo"):
            assert torch.load(out / "seed0" / f"{stage}.pt", weights_only=True)["config"]["bfloat16"] is expected


def test_compile_is_off_unless_asked_for(tmp_path, monkeypatch):
    """--compile=1 (torch.compile replaced by the identity) compiles the model of each of the 4 stages: the same rows. --compile=0
    does not."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    rows, _ = run(tmp_path / "off", *FAST[len(SMALL):], "--methods=dpo")
    assert compiled == []
    assert run(tmp_path / "on", *FAST[len(SMALL):], "--methods=dpo", "--compile=1")[0] == rows and len(compiled) == 4


# --- weights to start from --------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    """A nanoGPT checkpoint with random weights, a vocabulary of 300 rounded up to 320, a context of 128; and its model."""
    torch.manual_seed(3)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=128, bias=False, vocab_size=320)
    model = GPT(GPTConfig(**sizes))
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
                "model_args": {**sizes, "dropout": 0.0}, "optimizer": {}, "iter_num": 5, "best_val_loss": torch.tensor(1.0),
                "config": {"dataset": "x"}}, path)
    return path, model, sizes


def test_start_from_a_nanogpt_checkpoint(checkpoint, tmp_path):
    """The same logits on the 300 ids and 64 positions that are left; a run starts from it, its sizes are the checkpoint's."""
    path, model, _ = checkpoint
    given = [arg for arg in FAST if not arg.startswith(SIZES)]
    config = parse_args([*given, f"--student_init={path}"])
    setup = train.prepare(config, 0, CPU)
    assert setup.tokenizer.n_vocab == 300
    ours = train.new_model("student", setup)
    assert (ours.config.n_layer, ours.config.n_embd, ours.config.block_size, ours.config.vocab_size) == (2, 16, 64, 300)
    tokens = torch.randint(300, (2, 64))
    close(ours(tokens), model(tokens)[..., :300], 1e-5)
    out = tmp_path / "out"
    assert train.main([*given, f"--out={out}", f"--teacher_init={path}", "--teacher_sft_steps=0", "--methods=dpo"]) == 0
    kept = torch.load(out / "seed0" / "teacher-sft.pt", weights_only=True)
    assert train.main([*given, f"--out={tmp_path / 'next'}", f"--student_init={out / 'seed0' / 'dpo.pt'}", "--methods=dpo"]) == 0
    close(kept["model"]["transformer.wte.weight"], model.transformer.wte.weight[:300])


def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path, capsys):
    """By the option's name: another vocabulary, a shorter context, an untied head, no checkpoint, a missing file, a pickle that
    would run code."""
    path, model, sizes = checkpoint
    given = [arg for arg in FAST if not arg.startswith(SIZES)]

    def said(*options):
        assert train.main([*given, f"--out={tmp_path / 'out'}", f"--student_init={path}", *options]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err
    assert "--student_init: expected a vocabulary of the tokenizer's 330 ids (or 384), got 320" in said("--vocab_size=330")
    assert "--student_init: expected a context of at least --block_size=200, got 128" in said("--block_size=200")
    kept = torch.load(path, weights_only=True)
    untied = {**kept["model"], "_orig_mod.lm_head.weight": torch.zeros(320, 16)}
    torch.save({**kept, "model": untied}, path)
    assert "--student_init: expected an output head tied to the token embedding, got two tensors" in said()
    scalar = {name: torch.tensor(1.0) for name in kept["model"]}
    for content in ({"model": {}}, {"model": {}, "model_args": sizes}, [1], {"model": scalar, "model_args": sizes}):
        torch.save(content, path)
        assert "--student_init: expected a checkpoint of nanoGPT or of this program" in said()
    for _ in evil_files(path, tmp_path / "ran"):
        assert "--student_init: expected a file of tensors and plain values" in said()
    path.unlink()
    assert "No such file" in said()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit):
        parse_args([f"--teacher_init={path}", "--teacher_width=8"])
    assert "--teacher_width: expected none beside --teacher_init" in capsys.readouterr().err
