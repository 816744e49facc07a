"""harness/keep.py and what it is for: a killed, stopped or changed run ends as one that never was.

Nothing here depends on time: a child process is killed at a file event, a write or a step of
training that is counted, and by itself.
"""

import errno
import hashlib
import itertools
import os
import resource
import shutil
import signal
import sys
from dataclasses import dataclass, fields
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from data import Example, Pair
from harness import code, command, files, keep
from harness.errors import UserError
from harness.evaluate import HeldOut, evaluate
from harness.keep import Keep, file_of, lock
from harness.options import Config, parse_args
from harness.progress import Progress
from harness.texts import load_task
from model import GPT
from small_run import (SMALL, bytes_of, ended, forked, log_of, main_after, refused, rows_of,
                       write_pairs)

OFTEN = [*SMALL, "--save_interval=0"]        # a checkpoint after every step
CPU = torch.device("cpu")


# --- processes that die --------------------------------------------------------------------------

def child(out, *options, before=bool):
    """train.main in a process of its own, after before(), printing to out.log -> its status."""
    return ended(forked(f"{out}.log", main_after, before, *OFTEN, f"--out={out}", *options))


def printed_by(out):
    return Path(f"{out}.log").read_text(encoding="utf-8")


def kill_at(at, out):
    """As before(): dies when it is about to open, rename, remove or create the at-th file of out.
    """
    sys.addaudithook(partial(at_event, at, f"{out}/", itertools.count(1)))


def at_event(at, folder, count, event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir") \
            and str(args[0]).startswith(folder) and next(count) == at:
        os.kill(os.getpid(), signal.SIGKILL)


def signal_after(at, number):
    """As before(): gets a signal after the at-th step of training, before anything else is done."""
    Progress.after = partialmethod(at_step, at, number, itertools.count(1), Progress.after)


def at_step(progress, at, number, count, after, *args):
    if next(count) == at:
        os.kill(os.getpid(), number)
    after(progress, *args)


@pytest.fixture
def whole(default_run):
    """A run that nothing happened to; in this process, so that children find all imports made."""
    return default_run.out


def same_run(one, other):
    """The same rows, log and bytes of every file; nothing half done is left."""
    assert rows_of(one) == rows_of(other)
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    kept, others = ({path.name: raw for path, raw in bytes_of(out / "seed0").items()}
                    for out in (one, other))
    assert kept.keys() == others.keys()
    assert not any(name.endswith((".tmp", ".partial")) for name in kept)
    assert [name for name in kept if kept[name] != others[name]] == []


@pytest.mark.slow
def test_killed_at_file_events(whole, tmp_path):
    """kill -9 at a file event, over and over, until the run is through: as if never killed. At many
    points of the run; the .lock that all of them left blocked none."""
    out, stages, statuses = tmp_path / "out", set(), []
    for at in itertools.count(3, 7):
        statuses.append(child(out, before=partial(kill_at, at, out)))
        if statuses[-1] == 0:
            break
        assert statuses[-1] == -signal.SIGKILL and len(statuses) < 40, printed_by(out)
        stages.add(len(list(out.glob("seed0/*.pt"))))
    assert len(statuses) > 6 and len(stages) > 3 and (out / ".lock").exists()
    same_run(out, whole)


def test_ctrl_c(whole, tmp_path):
    """Ctrl-C in step 3 of a stage: exit 130, how to go on, the checkpoint of step 2. The same
    command says what it goes on from. Killed later, it has the lines of before in its log."""
    out = tmp_path / "out"
    assert child(out, before=partial(signal_after, 3, signal.SIGINT)) == 130
    assert "train.py: stopped; the same command " in printed_by(out)
    assert keep.read(out / "seed0" / "teacher-sft.pt.partial")["step"] == 2
    assert child(out, before=partial(signal_after, 4, signal.SIGKILL)) == -signal.SIGKILL
    assert "teacher-sft: resumed at step 2" in printed_by(out)
    steps = [(line["stage"], line["step"]) for line in log_of(out)]
    assert steps == [*(("teacher-sft", step) for step in (1, 2, 3, 4)), ("teacher-dpo", 1)]
    assert child(out) == 0
    same_run(out, whole)


# --- whose folder it is --------------------------------------------------------------------------

def test_two_runs_in_one_folder(whole, out, tmp_path, capsys):
    """While one holds the folder, a second one ends with exit code 2 and changes nothing. In one
    process a run after a run that failed is free to go on, and nothing is computed twice: eight
    stages of training are kept."""
    before, held = bytes_of(out), lock(out)
    pairs = write_pairs(tmp_path / "pairs.jsonl", [Pair("a", "b", "c")])
    for argv in ([*OFTEN, "--teacher_sft_lr=1"], [f"--score={pairs}", "--device=cpu"]):
        assert f"--out: expected a folder that no other run uses: {out}" in refused(
            capsys, *argv, f"--out={out}")
    assert bytes_of(out) == before
    held.close()
    assert train.main([*OFTEN, f"--out={out}", "--teacher_sft_lr=1e6",
                       "--teacher_sft_steps=40"]) == 1
    capsys.readouterr()
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": kept in ") == 8 and "rebuilt" not in printed and " loss " not in printed
    same_run(out, whole)


@pytest.mark.parametrize("name", ["results.json", "report.html", "log.jsonl", "scores.jsonl",
                                  "seed17"])
def test_files_that_no_run_wrote_are_left_alone(tmp_path, capsys, name):
    """A folder with files of these names and without a run's .lock is somebody else's. Other files
    are no hindrance."""
    (tmp_path / name).write_text("mine", encoding="utf-8")
    error = refused(capsys, *OFTEN, f"--out={tmp_path}")
    assert f"with {name} and without the .lock of a run; choose another" in error
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / name).rename(tmp_path / "other")
    lock(tmp_path).close()


# --- what is made again --------------------------------------------------------------------------

def test_a_changed_file_is_noticed(whole, out, capsys):
    """One bit of every kept file, in its middle or in its last byte: rebuilt, to the same bytes.
    Rebuilt as well are plain values that no run wrote, with a right checksum; pickles are refused
    by load_safely (tests/system/test_weights.py)."""
    paths = sorted((out / "seed0").glob("*.pt"))
    assert len(paths) == 8 + 5 + 7 + 2                  # before the methods, methods, rows, psi
    for i, path in enumerate(paths):
        raw = bytearray(path.read_bytes())
        raw[-1 if i % 2 else len(raw) // 2] ^= 1        # the last one is of the checksum
        path.write_bytes(raw)
    for path, crafted in zip(paths, ([1], {}, {"key": "[1]"})):
        torch.save(crafted, path)
        raw = path.read_bytes()
        path.write_bytes(raw + hashlib.sha256(raw).hexdigest().encode())
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": expected a file as a run wrote it, got other bytes; ") == len(paths) - 3
    for path in paths:
        assert printed.count(f"; {path.name} rebuilt\n") == 1
    same_run(out, whole)


CHANGES = {"methods": "bc,dpo,tvkd", "seed": 1, "beta": 0.5, "value": "logits", "terminal": "zero",
           "vocab_size": 290, "train_pairs": 23, "student_pairs": 11, "teacher_heads": 1,
           "student_heads": 1, "teacher_width": 8, "student_width": 12, "batch_size": 7,
           "precision": "bfloat16", "micro_batch": 3, "block_size": 63, "save_interval": 5.0,
           "max_new_tokens": 4}
SAME = ("data", "out", "seeds", "device", "ask", "score", "export", "tokenizer",
        "teacher_init", "student_init", "teacher", "skip_bad")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name not in SAME])
def test_no_option_leaves_anything_stale(out, tmp_path, name):
    """Each option but SAME changed, in the folder of the run without it: the rows and the log of a
    run in an empty folder."""
    small = next((option.split("=")[1] for option in reversed(OFTEN)
                  if option.startswith(f"--{name}=")), getattr(Config, name))
    other = CHANGES.get(name) or (float(small) * 2 if "." in str(small) else int(small) + 1)
    for folder in (out, tmp_path / "fresh"):
        assert child(folder, f"--{name}={other}") == 0, printed_by(folder)
    assert rows_of(out) == rows_of(tmp_path / "fresh")
    assert log_of(out) == log_of(tmp_path / "fresh")


def test_what_another_option_replaces(out, capsys):
    """Said before training; scores.jsonl stays."""
    (out / "scores.jsonl").write_text("x", encoding="utf-8")
    assert train.main([*SMALL, f"--out={out}", "--samples=3"]) == 0
    assert (f"{out}: replaces the results of a run with --samples=2; a scores.jsonl there is of "
            "that run\n") in capsys.readouterr().out
    assert (out / "scores.jsonl").read_text(encoding="utf-8") == "x"


@dataclass(frozen=True)
class Scale:
    by: float
    texts: list


RAN = []


def double(x, scale):
    """A stage for the test below, which notes that it ran."""
    RAN.append(x)
    return 2 * scale.by * x


def test_keep_alone(tmp_path):
    """Computed once; again for another argument, seed or setting of the machine, and in all
    processes where one of them has no such file. It holds the folder until it is closed."""
    cache = Keep(tmp_path, CPU)
    assert cache.common.keys() == {"torch", "device", "threads", "processes"}
    for cache.seed, threads, x, by, text, agree, times in (
            (0, 1, 1.5, 1.0, "a", bool, 1), (0, 1, 1.5, 1.0, "a", bool, 0),
            (0, 1, 2.5, 1.0, "a", bool, 1), (0, 1, 2.5, 2.0, "a", bool, 1),
            (0, 1, 2.5, 2.0, "b", bool, 1), (0, 9, 2.5, 2.0, "b", bool, 1),
            (1, 9, 2.5, 2.0, "b", bool, 1), (0, 9, 2.5, 2.0, "b", bool, 0),
            (0, 9, 2.5, 2.0, "b", lambda flag: False, 1)):
        RAN.clear()
        cache.common["threads"] = threads
        assert cache("x", double, x, Scale(by, [text]), agree=agree) == 2 * by * x
        assert len(RAN) == times, (cache.seed, threads, x, by, text)
    with pytest.raises(UserError, match="no other run"):
        lock(tmp_path)
    cache.close()
    lock(tmp_path).close()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt")} == {
        "seed0/x.pt", "seed1/x.pt"}


def test_digests():
    """Of texts, ids and tensors; another border between two parts is another digest."""
    describe = Keep("", CPU).describe
    a, b = Example([1, 2], [3]), Example([1], [2, 3])
    zeros, pair = torch.zeros(2, 3), Pair("a", "b", "c")
    different = [[a], [b], [[a], [b]], [[a, b]], [[b, a]], [pair], zeros, zeros.view(3, 2),
                 zeros.int(), zeros + 1, -zeros, [zeros], [zeros, zeros], (a, b)]
    assert len({describe("x", value)["x"] for value in different}) == len(different)
    same = ((zeros, torch.zeros(2, 3)), ([pair._replace(values=(1.0, 2.0))], [pair]))
    assert all(describe("x", x) == describe("x", y) for x, y in same)   # psi holds the values


# --- which stages an edit makes again ------------------------------------------------------------

class Asking(Keep):
    """Tells which results would be made again, and trains nothing: what would be made again is the
    same with other numbers in it, so that what reads it is made again, too."""

    def __call__(self, name, f, *args):
        content, key = keep.read(self.out / "seed0" / file_of(name)), self.key(f, args)
        value = keep.unpack(content, CPU)
        if content["key"] != key:
            self.remade.add(name)
            if isinstance(value, tuple):
                value[0]["kl"] += 1                                     # a row
            elif isinstance(value, list) and isinstance(value[0], list):
                value[0].insert(0, 1)                                   # answers
            else:
                (value.lm_head.weight if isinstance(value, GPT) else value[0]).mul_(2)
        return value

    train = alone = __call__


def remade(whole, *options, change=lambda task: task):
    """Names of what another command, data or code would make again in the folder of a run."""
    config, asking = parse_args([*OFTEN, *options], train.METHODS), Asking(whole, CPU)
    task, asking.remade = change(load_task(config, 0)), set()
    models = train.experiment(config, 0, task, CPU, asking)
    for label, model in models.items():
        asking(f"{label}.row", evaluate, *model, HeldOut.of(task, "test", config, 0))
    return asking.remade


METHODS = {"bc", "kd", "dpo", "tvkd implicit/value", "tvkd logits/hold"}
ROWS = {f"{name}.row" for name in METHODS | {"teacher", "sft"}}
TVKD = {name for name in METHODS | ROWS if name.startswith("tvkd")}
SFT, REF_LOGPS = {"teacher-sft", "student-sft", "sft.row"}, {"teacher-ref-logps", "ref-logps"}
VALUES = {"values-implicit", "values-logits"}
ALL = SFT | REF_LOGPS | METHODS | ROWS | VALUES | {"teacher-dpo", "teacher-answers"}
DPO = ALL - SFT - REF_LOGPS             # the teacher's DPO and all that comes after it


def with_other_rejected(task):
    train = [pair._replace(rejected=[1, *pair.rejected[1:]]) for pair in task.ids.train]
    return task._replace(ids=task.ids._replace(train=train))


def test_what_an_option_or_other_data_make_again(whole):
    """Fine-tuning never reads the rejected responses, nor answers that it samples."""
    for option, expected in (("alpha=0.5", TVKD), ("gamma=0.5", TVKD), ("samples=3", ROWS),
                             ("log_interval=2", ALL), ("eval_interval=3", ALL),
                             ("max_new_tokens=4", DPO | ROWS)):
        assert remade(whole, f"--{option}") == expected, option
    assert remade(whole, change=with_other_rejected) == ALL - SFT


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project's code, which counts in place of the code that runs."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    code.definitions.cache_clear()
    yield tmp_path
    code.definitions.cache_clear()


def edit(project, name, old, new):
    text = (project / name).read_text(encoding="utf-8")
    assert old in text
    (project / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    code.definitions.cache_clear()


def test_edits_that_make_nothing_again(whole, project):
    """A new method, a change of one that was not asked for, comments, docstrings of a function, a
    class and a module, line breaks, the report and the table."""
    for name, old, new in (
            ("train.py", "METHODS = {\n", "class IPO(DPO):\n    def losses(self, logps, ids):\n"
             "        return dpo_loss(*logps, *logps, 1) ** 2\n\n\nMETHODS = {\n"
             "    'ipo': (IPO, 'lr'),\n"),
            ("train.py", "p = (self.psi", "p = 2 * (self.psi"),
            ("tvkd.py", "    return -F.logsigmoid(margin)  ",
             "    # why\n\n    return -F.logsigmoid(\n        margin)"),
            ("train.py", '"""Train a copy of', '"""Trains a copy of'),
            ("train.py", '"""What the losses', '"""All that losses'),
            ("model.py", '"""A nanoGPT-style', '"""A GPT'),
            ("harness/report.py", "\n\n\n", "\n\n\nX = 1\n\n\n"),
            ("harness/numbers.py", "\n\n\n", "\n\n\nX = 1\n\n\n")):
        edit(project, name, old, new)
    assert remade(whole) == set()


@pytest.mark.parametrize("name, old, new, expected", [
    ("tvkd.py", "-F.logsigmoid(margin)", "F.softplus(-margin)", DPO),           # dpo_loss
    ("tvkd.py", "beta * (chosen_logratio -", "beta * (-chosen_logratio +", DPO),    # which it calls
    ("tvkd.py", "margin - offset", "margin + offset", TVKD),                    # tvkd_loss
    ("train.py", "psi_chosen - psi_rejected))", "psi_rejected - psi_chosen))", TVKD),
    ("model.py", "soft_value(teacher", "-soft_value(teacher", VALUES | TVKD),
    ("tvkd.py", "return -logps[_non", "return -2 * logps[_non", ALL),           # nll_loss
    ("harness/steps.py", "0.875 *", "0.9 *", ALL),      # fit, gradient, cut, parts_of
    ("harness/evaluate.py", "policy.exp()", "2 * policy.exp()", DPO | {"sft.row"}),
    ("train.py", "METHODS = {\n", "torch.set_default_dtype(torch.float64)\nMETHODS = {\n", ALL),
    ("train.py", "from tvkd import dpo_loss, ", "from mine import dpo_loss\nfrom tvkd import ",
     DPO),
])
def test_an_edit_makes_again_what_reads_it(whole, project, name, old, new, expected):
    """By name, over any number of calls, from the function of a stage and the classes of its
    arguments; and all that comes after what is made again."""
    edit(project, name, old, new)
    assert remade(whole) == expected


def test_the_line_names_the_definition(out, project, capsys):
    """The code that runs is unchanged here, so what comes after the teacher is still the same."""
    edit(project, "tvkd.py", "-F.logsigmoid(margin)", "F.softplus(-margin)")
    assert train.main([*OFTEN, f"--out={out}", "--methods=dpo"]) == 0
    printed = capsys.readouterr().out
    for name in ("teacher-dpo", "dpo"):
        assert f"{out}/seed0/{name}.pt: rebuilt, because dpo_loss changed\n" in printed
    assert printed.count("rebuilt") == 2


def test_modules_of_ones_own_count(project):
    """What train.py imports from beside it, and what that imports in turn."""
    (project / "mine.py").write_text("from yours import g\nf = g\n", encoding="utf-8")
    (project / "yours.py").write_text("def g():\n    return 1\n", encoding="utf-8")
    edit(project, "train.py", "import copy\n", "import copy\nimport mine\n")
    edit(project, "train.py", "model = copy.deepcopy(start)", "model = mine.f(start)")
    before = code.reached(["fit"])
    edit(project, "yours.py", "1", "2")
    assert dict(code.reached(["fit"]).items() - before.items()).keys() == {"g"}


# --- no room -------------------------------------------------------------------------------------

def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    """A disk that is full at the last moment: one line, the old content, no temporary file."""
    files.write(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError, match="expected to write .*x: No sp"):
        files.write(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("room", [5_000, 100])
def test_no_room(tmp_path, capsys, room):
    """Files may not grow beyond `room` bytes, too few for a checkpoint or for a line of the log:
    exit code 2 and one line that says why."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = train.main([*OFTEN, f"--out={tmp_path / 'out'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "File too large" in error
    assert room == 100 or "teacher-sft.pt.partial" in error
