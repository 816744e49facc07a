"""Micro-batches, several processes and bfloat16: the same numbers, computed elsewhere.

Gradients are compared in float64, where rounding is far below what any mistake would do; losses
after steps of Adam are not, because it turns rounding into steps of the size of the learning rate.
The processes are forks of this one, with the environment that torchrun gives. They meet at a port
of this machine.
"""

import os
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch

import train
from conftest import ROOT
from data import Example, Pair, collate
from harness import command, evaluate, keep
from harness.errors import UserError
from harness.options import in_bfloat16, parse_args
from harness.steps import gradient, in_all, joined_processes, rank_and_world
from harness.texts import load_task
from model import GPT, GPTConfig, response_logps
from small_run import TINY, ended, forked, log_of, rows_of
from test_keep import printed_by, signal_after

CPU = torch.device("cpu")
IDS = [4, 0, 8, 2, 5, 6, 1, 3, 7]       # 9 indices: halves and parts are of unequal size


def small_model(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(11, 24, 2, 2, 8)).double()


def losses():
    """A mean over tokens and one over pairs: 9 pairs, whose responses have 1 to 17 tokens."""
    draw = torch.Generator().manual_seed(0)
    pairs = [Pair(*(torch.randint(11, (n,), generator=draw).tolist()
                    for n in (1 + i % 3, 1 + i, 17 - 2 * i))) for i in range(9)]
    psi, logps = torch.randn(2, 2, 9, generator=draw, dtype=torch.double)
    return {"kd": train.KD(pairs, small_model(1)),
            "tvkd": train.TVKD(pairs, logps - 20, 0.5, psi, 2.0)}


def same_gradient(got, expected):
    """Up to rounding in float64: 1e-16 for each of some thousand terms, relative to the norm."""
    norm = sum(g.square().sum() for g in expected).sqrt()
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * norm


# --- processes -----------------------------------------------------------------------------------

def two_processes(out, work, *args):
    """work(rank, out, *args) in two processes as torchrun starts them -> their exit statuses.

    What process RANK prints goes to out.RANK.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [forked(f"{out}.{rank}.log", as_torchrun, rank, port, work, out, *args)
            for rank in (0, 1)]
    return [ended(pid) for pid in pids]


def as_torchrun(rank, port, work, *args):
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return work(rank, *args)


def save_gradients(rank, out):
    """Of a batch of 9, and of one of a single pair, of which the second process gets nothing."""
    with joined_processes(CPU):
        found = {}
        for name, loss in losses().items():
            for ids in (IDS, IDS[:1]):
                model = small_model(0)
                total = gradient(model, loss, ids, 3)
                found[name, len(ids)] = total, [p.grad for p in model.parameters()]
        torch.save(found, f"{out}.{rank}.pt")
    return 0


def test_two_processes_have_the_gradient_of_the_batch(tmp_path):
    """Both of them the same sums, and the gradient of one process without micro-batches."""
    out = tmp_path / "out"
    assert two_processes(out, save_gradients) == [0, 0], printed_by(f"{out}.0")
    first, second = (torch.load(f"{out}.{rank}.pt") for rank in (0, 1))
    for (name, n), (total, gradients) in first.items():
        model, loss = small_model(0), losses()[name]
        expected = gradient(model, loss, IDS[:n])
        same_gradient(gradients, [parameter.grad for parameter in model.parameters()])
        assert total == pytest.approx(expected, rel=1e-6) and second[name, n][0] == total
        same_gradient(second[name, n][1], gradients)


def train_on(rank, out, *options, before=None):
    """train.main, after before() in the second process, which must neither write nor evaluate."""
    if rank == 1:
        keep.write = command.write = evaluate.evaluate = None
        if before:
            before()
    return train.main([*TINY, f"--out={out}", *options])


def train_until(rank, out):
    return train_on(rank, out, "--save_interval=0", before=partial(signal_after, 3, signal.SIGKILL))


def test_two_processes_train(tmp_path):
    """9 student pairs in batches of 8 and 1, so that one process is left without. The first alone
    prints, evaluates and writes. The same command keeps all."""
    options, out = ("--student_pairs=9", "--methods=dpo"), tmp_path / "out"
    for _ in range(2):
        assert two_processes(out, train_on, *options) == [0, 0], printed_by(f"{out}.1")
    printed = printed_by(f"{out}.0")
    assert printed.count(": kept in ") == 4 and "rebuilt" not in printed and "seed 0" in printed
    assert printed_by(f"{out}.1") == ""
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4] * 4
    assert keep.read(out / "seed0" / "dpo.pt")["key"]["processes"] == 2     # one keeps none of it


def test_what_ends_one_process_ends_all(tmp_path):
    """The second dies in step 3 of its first stage: the first does not wait for ever, and leaves
    its checkpoint of that step. Both go on from it to the log of a run that nothing ended."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    first, second = two_processes(out, train_until)
    assert second == -signal.SIGKILL and first not in (0, second)
    assert not (out / "results.json").exists() and not list(out.glob("seed0/*.pt"))
    for folder in (out, whole):
        assert two_processes(folder, train_on) == [0, 0], printed_by(f"{folder}.0")
    assert "teacher-sft: resumed at step 3" in printed_by(f"{out}.0")
    assert log_of(out) == log_of(whole) and rows_of(out) == rows_of(whole)


def test_without_torchrun_a_process_is_alone(monkeypatch):
    """RANK may be anybody's: without torchrun's own variable nobody is waited for. With it, more
    processes than GPUs are refused."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined_processes(CPU) as device:
        assert device == CPU and rank_and_world() == (0, 1) and in_all(True) and not in_all(False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--nproc_per_node: expected at most the 1 GPUs"):
        joined_processes(torch.device("cuda")).__enter__()


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the README, end to end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *TINY, f"--out={out}", "--methods=dpo"]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0\n") == 1 and list(rows_of(out)) == ["teacher", "sft", "dpo"]


# --- precision -----------------------------------------------------------------------------------

def test_bfloat16_is_asked_for_only_where_it_is(monkeypatch):
    """auto: on CUDA that supports it. On a CPU only by name, and CUDA is not even asked there."""
    monkeypatch.delattr(torch.cuda, "is_bf16_supported")        # to ask is an error
    assert [in_bfloat16(precision, CPU) for precision in ("auto", "float32", "bfloat16")] == [
        False, False, True]
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported, False)
        assert in_bfloat16("auto", torch.device("cuda")) == supported
        assert not in_bfloat16("float32", torch.device("cuda"))


def test_bfloat16_keeps_log_probs_in_float32(tmp_path):
    """Products in the blocks have 8 bits: log-probs are float32 and differ by some 1/256 of their
    size. All models of a run with --precision=bfloat16 are such, and step 0 allows for it."""
    torch.manual_seed(0)
    model, inside = GPT(GPTConfig(50, 40, 2, 2, 16)), []
    tokens, mask = collate([Example([1, 2, 3], [4, 5, 0])])
    exact = response_logps(model, tokens, mask)
    model.config.bfloat16 = True
    model.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda module, given, result: inside.append(result.dtype))
    rounded = response_logps(model, tokens, mask)
    assert inside == [torch.bfloat16] and rounded.dtype == model.lm_head.weight.dtype
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1
    config = parse_args([*TINY, "--methods=dpo", "--precision=bfloat16"], train.METHODS)
    models = train.experiment(config, 0, load_task(config, 0), CPU, keep.Keep(tmp_path, CPU))
    assert [m.config.bfloat16 for pair in models.values() for m in pair[:2]] == [True] * 6
