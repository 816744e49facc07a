"""Micro-batches, several processes and bfloat16: the same numbers, computed elsewhere.

The processes are forks of this one, with the environment that torchrun gives. They meet at a port
of this machine.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

import data
import train
from conftest import ROOT, close
from data import Example
from harness.errors import UserError
from harness import evaluate, keep, outcome
from harness.options import in_bfloat16, parse_args
from harness.processes import in_all, rank_and_world, joined_processes
from model import GPT, GPTConfig, response_logps
from small_run import TINY, log_of, rows_of, run
from test_keep import AfterStep

CPU = torch.device("cpu")


# --- micro-batches -------------------------------------------------------------------------------

def test_micro_batches_train_to_the_same_numbers(tmp_path):
    """Batches of 8, of which 3 at a time are in memory: every loss of a run within rounding."""
    rows, log = run(tmp_path / "whole", "--methods=dpo", sizes=TINY)
    parts, parts_log = run(tmp_path / "parts", "--methods=dpo", "--micro_batch=3", sizes=TINY)
    assert len(log) == len(parts_log) == 16
    for line, expected in zip(parts_log, log):
        close(line["loss"], expected["loss"], 2e-5)
    close(parts["dpo"]["pref_margin"], rows["dpo"]["pref_margin"], 1e-4)


# --- processes -----------------------------------------------------------------------------------

def two_processes(out, *options, before=lambda rank: None):
    """train.main in two processes that share every batch -> their exit statuses.

    before(rank) is called first; what process RANK prints goes to out.RANK.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [os.fork() or run_as(rank, port, out, options, before) for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run_as(rank, port, out, options, before):
    try:
        signal.alarm(600)               # a process that waits for ever fails, and does not hang
        sys.stdout = sys.stderr = open(f"{out}.{rank}", "w", encoding="utf-8", buffering=1)
        os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        before(rank)
        os._exit(train.main([*TINY, f"--out={out}", *options]))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(99)


class Noting:
    """A function in place of module.name that first notes its name on stderr.

    Not on stdout: what all processes but the first print there is dropped.
    """

    def __init__(self, module, name):
        self.name, self.function = name, getattr(module, name)
        setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        print("called", self.name, file=sys.stderr)
        return self.function(*args, **kwargs)


def note(rank):
    for module, name in ((evaluate, "evaluate"), (keep, "write"), (outcome, "write"),
                         (outcome, "write_report")):
        Noting(module, name)


def printed_by(out, rank):
    return open(f"{out}.{rank}", encoding="utf-8").read()


def test_two_processes_give_the_same_losses(tmp_path):
    """9 student pairs in batches of 8 and 1, so that one process is left without, in micro-batches
    of 3: every loss of fine-tuning within 1e-5 of one process without, of kd within 1e-4, of DPO
    and TVKD within 3e-5, for they are differences of sums over responses. The first process alone
    prints, evaluates and writes."""
    options, out = ("--student_pairs=9", "--methods=kd,dpo,tvkd"), tmp_path / "two"
    rows, log = run(tmp_path / "one", *options, sizes=TINY)
    assert two_processes(out, *options, "--micro_batch=3", before=note) == [0, 0], \
        printed_by(out, 0) + printed_by(out, 1)
    lines = log_of(out)
    assert len(lines) == len(log) == 28
    for line, expected in zip(lines, log):
        assert (line["stage"], line["step"]) == (expected["stage"], expected["step"])
        tolerance = {"kd": 1e-4, "teacher-sft": 1e-5, "student-sft": 1e-5}.get(line["stage"], 3e-5)
        close(line["loss"], expected["loss"], tolerance)
    for label, row in rows_of(out).items():
        close(row["pref_margin"], rows[label]["pref_margin"], 1e-3)
    printed = printed_by(out, 0)
    called = {line.split()[1] for line in printed.splitlines() if line.startswith("called ")}
    assert called == {"evaluate", "write", "write_report"} and printed.count("\nseed 0\n") <= 1
    assert "seed 0" in printed and printed_by(out, 1) == ""
    # Another number of processes adds up in another order, so nothing is mixed.
    content = keep.read(out / "seed0" / "dpo.pt")
    assert content["key"]["processes"] == 2
    assert two_processes(out, *options, "--micro_batch=3") == [0, 0]
    printed = printed_by(out, 0)
    assert printed.count(": kept in ") == 7 and "rebuilt" not in printed


def third_step_of_the_second(number):
    """Prepares the second process to send itself a signal after its third step."""
    return lambda rank: AfterStep(3, number)() if rank == 1 else None


def test_a_killed_process_ends_the_other(tmp_path):
    """It does not wait for ever; the first stage is not finished, so nothing of it is kept."""
    out = tmp_path / "out"
    first, second = two_processes(out, before=third_step_of_the_second(signal.SIGKILL))
    assert second == -signal.SIGKILL and first not in (0, second)
    assert not (out / "results.json").exists() and not list(out.glob("seed0/*.pt"))


def test_ctrl_c_in_one_process_stops_all(tmp_path):
    """After the same step, with a checkpoint from the first."""
    out = tmp_path / "out"
    assert two_processes(out, before=third_step_of_the_second(signal.SIGINT)) == [130, 130]
    assert keep.read(out / "seed0" / "teacher-sft.pt.partial")["step"] == 3


def test_without_torchrun_a_process_is_alone(monkeypatch):
    """RANK may be anybody's: without torchrun's own variable nobody is waited for."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined_processes(CPU) as device:
        assert device == CPU and rank_and_world() == (0, 1) and in_all(True) and not in_all(False)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--nproc_per_node: expected at most the 1 GPUs"):
        with joined_processes(torch.device("cuda")):
            pass


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
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["rows"] and keep.read(out / "seed0" / "dpo.pt")["key"]["processes"] == 2


# --- precision -----------------------------------------------------------------------------------

def nobody(*_):
    raise AssertionError("CUDA was asked")


def test_bfloat16_is_asked_for_only_where_it_is(monkeypatch):
    """auto: on CUDA that supports it. On a CPU only by name, and CUDA is not even asked there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", nobody)
    assert [in_bfloat16(precision, CPU) for precision in ("auto", "float32", "bfloat16")] == [
        False, False, True]
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
        assert in_bfloat16("auto", torch.device("cuda")) == supported
        assert not in_bfloat16("float32", torch.device("cuda"))


def test_bfloat16_keeps_log_probs_in_float32():
    """Weights, logits and log-probs are float32 and differ a little; products in the blocks are
    bfloat16; sampling works on the float32 cache."""
    torch.manual_seed(0)
    model, inside = GPT(GPTConfig(50, 40, 2, 2, 16)), []
    tokens, mask = data.collate([Example([1, 2, 3], [4, 5, 0])])
    exact = response_logps(model, tokens, mask)
    model.config.bfloat16 = True
    model.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda module, given, result: inside.append(result.dtype))
    assert model(tokens).dtype == model.lm_head.weight.dtype == torch.float32
    assert inside == [torch.bfloat16]
    rounded = response_logps(model, tokens, mask)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1
    assert len(model.generate([[1, 2, 3]], 5, eos=49)) == 1


def test_precision_reaches_every_model(tmp_path):
    """--precision=bfloat16 on the CPU: all models say so, and the step 0 check allows for it."""
    run(tmp_path, "--methods=dpo", "--precision=bfloat16", sizes=TINY)
    for stage in ("teacher-sft", "student-sft", "dpo"):
        assert keep.read(tmp_path / "seed0" / f"{stage}.pt")["config"]["bfloat16"] is True
    config = parse_args(TINY, train.METHODS)
    assert train.new_model("student", config, 300, 0, CPU).config.bfloat16 is False
