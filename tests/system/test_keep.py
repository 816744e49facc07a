"""harness/keep.py and what it is for: a killed, stopped or changed run ends as one that never was.

Nothing here depends on time: a child process is killed at a file event, a write or a step of
training that is counted, and by itself.
"""

import errno
import hashlib
import itertools
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

import data
import train
from conftest import ROOT
from data import Example, Pair
from harness.errors import UserError
from harness import keep, outcome
from harness.keep import SOURCES, Keep, digest_of_code, digest_of_items, digest_of_tensors, lock
from harness.options import Config
from harness.progress import Progress, ctrl_c_held
from model import GPT, GPTConfig
from small_run import TINY, log_of, refused, rows_of, write_pairs

OFTEN = [*TINY, "--save_interval=0"]        # a checkpoint after every step


# --- processes that die --------------------------------------------------------------------------

def child(out, *options, before=lambda: None):
    """train.main in a process of its own, after before() -> its exit status, -9 if it was killed.

    What it prints is added to out.log.
    """
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(600)           # a process that waits for ever fails, and does not hang
            with open(f"{out}.log", "a", encoding="utf-8") as printed:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1)
                                      for n in (1, 2))
            before()
            os._exit(train.main([*OFTEN, f"--out={out}", *options]))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def printed_by(out):
    return Path(f"{out}.log").read_text(encoding="utf-8")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """Called as before() in a child, it prepares the child's death at an event that is counted."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def strikes(self):
        self.count += 1
        return self.count == self.at


class AtFileEvent(Deadly):
    """Killed when it is about to open, rename, remove or create the at-th file of --out.

    Prints which files it opens for writing. events, ending: of those that count.
    """

    def __init__(self, at, out, events=("open", "os.rename", "os.remove", "os.mkdir"), ending=""):
        super().__init__(at)
        self.out, self.events, self.ending = str(out), events, ending

    def __call__(self):
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        name = str(args[0]) if args else ""
        if name.startswith(f"{self.out}/"):
            if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                print(f"writes {Path(name).name}")
            if event in self.events and name.endswith(self.ending) and self.strikes():
                kill()


class InWrite(Deadly):
    """Killed in its at-th write: with half of the bytes, with all, or under the new name already.

    Two modules write; their writes are counted together.
    """

    def __init__(self, at, moment):
        super().__init__(at)
        self.moment = moment

    def __call__(self):
        self.write, keep.write, outcome.write = keep.write, self.dying, self.dying

    def dying(self, path, content):
        if not self.strikes():
            return self.write(path, content)
        half = content[:len(content) // 2]
        path.with_name(f"{path.name}.tmp").write_bytes(half if self.moment == 0 else content)
        if self.moment == 2:
            self.write(path, content)
        kill()


class AfterStep(Deadly):
    """Sends itself a signal after the at-th step of training, before anything else is done."""

    def __init__(self, at, number):
        super().__init__(at)
        self.number, self.after = number, Progress.after

    def __call__(self):
        Progress.after = lambda progress, *args: self.dying(progress, *args)

    def dying(self, progress, *args):
        if self.strikes():
            os.kill(os.getpid(), self.number)
        self.after(progress, *args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to; in this process, so that children find all imports made."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    return out


def copy_of(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


def same_run(one, other):
    """The same rows, log and bytes of every file; nothing half done is left."""
    assert rows_of(one) == rows_of(other)
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    files, others = ({path.name: path.read_bytes() for path in (out / "seed0").iterdir()}
                     for out in (one, other))
    assert files.keys() == others.keys()
    assert not any(name.endswith((".tmp", ".partial")) for name in files)
    assert [name for name in files if files[name] != others[name]] == []


@pytest.mark.slow
def test_killed_at_file_events(whole, tmp_path):
    """kill -9 at a file event, over and over, until the run is through: as if never killed."""
    out, stages, kills = tmp_path / "out", set(), 0
    for at in itertools.count(3, 7):
        status = child(out, before=AtFileEvent(at, out))
        if status == 0:
            break
        assert status == -signal.SIGKILL and kills < 40, printed_by(out)
        kills += 1
        stages.add(len(list(out.glob("seed0/*.pt"))))
    assert kills > 6 and len(stages) > 3                # at many points of the run
    assert (out / ".lock").exists()                     # left by all of them, it blocked none
    same_run(out, whole)
    written = set(re.findall("^writes (.*)$", printed_by(out), re.MULTILINE))
    assert "dpo.pt.tmp" in written and "results.json.tmp" in written
    assert {name for name in written if not name.endswith(".tmp")} == {"log.jsonl", ".lock"}


def test_killed_between_a_result_and_the_removal_of_its_checkpoint(tmp_path):
    out = tmp_path / "out"
    before = AtFileEvent(1, out, events=("os.remove",), ending="student-sft.pt.partial")
    assert child(out, "--methods=dpo", before=before) == -signal.SIGKILL
    assert {path.name for path in out.glob("seed0/student-sft*")} == {
        "student-sft.pt", "student-sft.pt.partial"}
    assert child(out, "--methods=dpo") == 0 and not list(out.glob("seed0/*.partial"))
    assert "student-sft: kept in" in printed_by(out)


@pytest.mark.slow
def test_killed_while_writing(whole, tmp_path):
    out, kills = tmp_path / "out", 0
    for at, moment in zip(itertools.cycle((9, 4, 11, 7)), itertools.cycle((0, 1, 2))):
        status = child(out, before=InWrite(at, moment))
        if status == 0:
            break
        assert status == -signal.SIGKILL and kills < 40, printed_by(out)
        kills += 1
    assert kills > 5
    same_run(out, whole)


def test_ctrl_c(whole, tmp_path):
    """Ctrl-C after step 3 of a stage: exit 130, how to go on, a checkpoint of that very step.

    The same command says what it goes on from. Killed later, it has the lines of before in its log.
    """
    out, rare = tmp_path / "out", "--save_interval=1000"
    assert child(out, rare, before=AfterStep(3, signal.SIGINT)) == 130
    assert "stopping after this step" in printed_by(out)
    assert "train.py: stopped; the same command continues from here" in printed_by(out)
    assert keep.read(out / "seed0" / "teacher-sft.pt.partial")["step"] == 3
    assert child(out, rare, before=AfterStep(4, signal.SIGKILL)) == -signal.SIGKILL
    assert (f"{out / 'seed0'}: an interrupted run left nothing finished and part of teacher-sft; "
            "what still fits is used\n") in printed_by(out)
    assert "teacher-sft: going on from step 3" in printed_by(out)
    steps = [(line["stage"], line["step"]) for line in log_of(out)]
    assert steps == [("teacher-sft", step) for step in (1, 2, 3, 4)] + [
        ("teacher-dpo", step) for step in (1, 2)]
    assert child(out) == 0
    assert "an interrupted run left teacher-ref-logps, teacher-sft; what" in printed_by(out)
    same_run(out, whole)


def test_a_finished_run_that_is_stopped_in_a_change_says_so(whole, tmp_path):
    """Stopped in the first stage that another option rebuilds, when the old table still stands."""
    out = copy_of(whole, tmp_path)
    stop = AfterStep(2, signal.SIGINT)
    assert child(out, "--teacher_sft_lr=0.1", before=stop) == 130
    assert (out / "results.json").exists()
    assert child(out, "--teacher_sft_lr=0.1", before=AfterStep(1, signal.SIGKILL)) < 0
    assert "and part of teacher-sft; what still fits is used" in printed_by(out)
    assert "teacher-sft: going on from step 2" in printed_by(out)


def test_ctrl_c_twice_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ctrl_c_held() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed == [True]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_not_finite_leaves_the_last_good_checkpoint(tmp_path, capsys):
    """A learning rate too high for the second stage: exit 1. The first stage's file and a
    checkpoint of finite weights stay."""
    assert train.main([*OFTEN, f"--out={tmp_path}", "--teacher_dpo_lr=1e6",
                       "--teacher_dpo_steps=40"]) == 1
    assert "train.py: teacher-dpo: " in capsys.readouterr().err
    keep.read(tmp_path / "seed0" / "teacher-sft.pt")
    content = keep.read(tmp_path / "seed0" / "teacher-dpo.pt.partial")
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


# --- one run at a time ---------------------------------------------------------------------------

def test_two_runs_in_one_folder(whole, tmp_path, capsys):
    """While one holds the folder, a second one ends with exit code 2 and changes nothing. In one
    process a run after a run, failed or not, is free to go on."""
    out = copy_of(whole, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    held = lock(out)
    message = f"--out: expected a folder that no other run is using, got {out}"
    assert message in refused(capsys, *OFTEN, f"--out={out}", "--teacher_sft_lr=1")
    pairs = write_pairs(tmp_path / "pairs.jsonl", [Pair("a", "b", "c")])
    assert message in refused(capsys, f"--out={out}", f"--score={pairs}", "--device=cpu")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    held.close()
    for options, status in ((["--teacher_sft_lr=1e6", "--teacher_sft_steps=40"], 1), ([], 0),
                            ([], 0)):
        assert train.main([*OFTEN, f"--out={out}", *options]) == status
    same_run(out, whole)


class AfterEveryStep:
    """Prints after every step of training whether the folder is locked."""

    def __init__(self, out):
        self.out, self.after = out, Progress.after

    def __call__(self):
        Progress.after = lambda progress, *args: self.trying(progress, *args)

    def trying(self, progress, *args):
        try:
            lock(self.out).close()
            print("free")
        except UserError:
            print("locked")
        self.after(progress, *args)


def test_a_process_that_trains_holds_the_lock(tmp_path):
    """In each of the 4 * 4 steps. The lock is one even for the process that has it."""
    out = tmp_path / "out"
    assert child(out, "--methods=dpo", before=AfterEveryStep(out)) == 0
    lines = printed_by(out).splitlines()
    assert (lines.count("locked"), lines.count("free")) == (16, 0)


# --- what is rebuilt -----------------------------------------------------------------------------

def rebuilt(printed):
    """Names of the files that were rebuilt, in order, from the lines that say so."""
    return [Path(path).name for path in re.findall(r"^(.*): rebuilt, because ", printed,
                                                   re.MULTILINE)]


STUDENTS = ["bc.pt", "kd.pt", "dpo.pt", "tvkd-implicit-value.pt", "tvkd-logits-hold.pt"]
TVKD_FILES = [f"tvkd-{kind}{ending}" for kind in ("implicit-value", "logits-hold")
              for ending in (".psi.pt", ".pt", ".row.pt")]


def test_nothing_is_computed_twice(whole, tmp_path, capsys):
    """The same command again: eight stages of training are kept, and nothing is trained."""
    out = copy_of(whole, tmp_path)
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": kept in ") == 8
    assert "rebuilt" not in printed and " loss " not in printed and "interrupted" not in printed
    same_run(out, whole)


def test_a_changed_byte_is_noticed(whole, tmp_path, capsys):
    """One bit of every kept file, in its middle or in its last byte: rebuilt, to the same bytes."""
    out = copy_of(whole, tmp_path)
    files = sorted((out / "seed0").glob("*.pt"))
    assert len(files) == 8 + 5 + 7 + 2                  # before the methods, methods, rows, psi
    for i, path in enumerate(files):
        raw = bytearray(path.read_bytes())
        raw[-1 if i % 2 else len(raw) // 2] ^= 1        # the last one is of the checksum
        path.write_bytes(raw)
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    for path in files:
        line = f"{path}: expected a file as a run wrote it, got other bytes; rebuilt\n"
        assert printed.count(line) == 1
    same_run(out, whole)


@pytest.mark.parametrize("name", ["gamma", "alpha"])
def test_only_what_depends_is_rebuilt(whole, tmp_path, capsys, name):
    """alpha: the two TVKD students, what is measured and shown of them; gamma: as well, by psi."""
    out = copy_of(whole, tmp_path)
    assert train.main([*OFTEN, f"--out={out}", f"--{name}=0.5"]) == 0
    printed = capsys.readouterr().out
    assert sorted(rebuilt(printed)) == sorted(TVKD_FILES)
    because = "loss.alpha was 1.0, is 0.5" if name == "alpha" else "loss.psi changed"
    assert f"tvkd-implicit-value.pt: rebuilt, because {because}\n" in printed


def test_data_that_changed_is_noticed(tmp_path, capsys):
    """The rejected responses of a file are edited. Fine-tuning never reads them; DPO does."""
    pairs, out = data.toy_splits(40, 1, 1, 0).train, tmp_path / "out"
    edited = [pair._replace(rejected=f" Well.{pair.rejected}") for pair in pairs]
    for items in (pairs, edited):
        path = write_pairs(tmp_path / "pairs.jsonl", items)
        assert train.main([*OFTEN, f"--data={path}", f"--out={out}", "--methods=dpo",
                           "--train_pairs=0", "--vocab_size=257", "--block_size=200"]) == 0
    printed = capsys.readouterr().out
    assert "teacher-sft: kept" in printed and "student-sft: kept" in printed
    assert rebuilt(printed)[:4] == ["teacher-ref-logps.pt", "teacher-dpo.pt", "ref-logps.pt",
                                    "dpo.pt"]
    assert re.search(r"\bdpo.pt: rebuilt, because loss.pairs changed, loss.ref_logps ch", printed)


@dataclass(frozen=True)
class Recipe:
    scale: float
    texts: list


def double(x, recipe, *, aside=None):
    """A stage for the tests below: notes that it ran."""
    aside.append(x)
    return 2 * recipe.scale * x


def test_keep_alone(tmp_path):
    """Computed once; again for another argument, seed or setting of the machine, not for what is
    aside. A process that does not write leaves nothing behind."""
    ran, cache = [], Keep(tmp_path, torch.device("cpu"), quiet=True)
    cache.writes = False
    assert cache("x", double, 1.5, Recipe(1.0, ["a"]), aside=ran) == 3.0 and ran == [1.5]
    assert list(tmp_path.iterdir()) == []
    cache.writes = True
    cases = [({}, 1.5, 1.0, "a", 1), ({}, 1.5, 1.0, "a", 0), ({}, 2.5, 1.0, "a", 1),
             ({}, 2.5, 2.0, "a", 1), ({}, 2.5, 2.0, "b", 1), ({}, 2.5, 2.0, "b", 0),
             ({"threads": 99}, 2.5, 2.0, "b", 1), ({"threads": 99}, 2.5, 2.0, "b", 0)]
    for common, x, scale, text, times in cases:
        ran.clear()
        cache.common |= common
        assert cache("x", double, x, Recipe(scale, [text]), aside=ran) == 2 * scale * x
        assert len(ran) == times, (common, x, scale, text)
    cache.seed = 1
    assert cache("x", double, 2.5, Recipe(2.0, ["b"]), aside=ran) == 10.0 and ran == [2.5]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt")) == [
        "seed0/x.pt", "seed1/x.pt"]


def test_another_process_has_not_found_it(tmp_path, monkeypatch):
    """All processes read, or all of them compute: here the other one has no such file."""
    ran, cache = [], Keep(tmp_path, torch.device("cpu"), quiet=True)
    for agree, times in ((bool, 1), (lambda flag: False, 2), (bool, 2)):
        monkeypatch.setattr(keep, "in_all", agree)
        cache("x", double, 1.0, Recipe(1.0, []), aside=ran)
        assert len(ran) == times


CHANGES = {"methods": "bc,dpo,tvkd", "seed": 1, "beta": 0.5, "value": "logits", "terminal": "zero",
           "vocab_size": 290, "train_pairs": 23, "student_pairs": 11, "teacher_heads": 1,
           "student_heads": 1, "teacher_width": 8, "student_width": 12, "batch_size": 7,
           "precision": "bfloat16", "micro_batch": 3, "block_size": 63, "save_interval": 5.0}
SAME = ("data", "out", "seeds", "device", "ask", "score", "export", "tokens", "tokenizer",
        "teacher_init", "student_init", "trust_code")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name not in SAME])
def test_no_option_leaves_anything_stale(whole, tmp_path, name):
    """Each option but SAME changed, in the folder of the run without it: the rows of a run in an
    empty folder."""
    small = next((option.split("=")[1] for option in reversed(OFTEN)
                  if option.startswith(f"--{name}=")), getattr(Config, name))
    other = CHANGES.get(name) or (float(small) * 2 if "." in str(small) else int(small) + 1)
    out = copy_of(whole, tmp_path)
    for folder in (out, tmp_path / "fresh"):
        assert child(folder, f"--{name}={other}") == 0, printed_by(folder)
    assert rows_of(out) == rows_of(tmp_path / "fresh")


def test_what_a_model_change_makes_stale_is_removed(whole, tmp_path):
    """scores.jsonl, results.json and the report stay while the models stay, and go with them."""
    out, pairs = copy_of(whole, tmp_path), write_pairs(tmp_path / "pairs", [Pair("a", "b", "c")])
    assert train.main([f"--out={out}", f"--score={pairs}", "--device=cpu"]) == 0
    assert train.main([*OFTEN, f"--out={out}"]) == 0 and (out / "scores.jsonl").exists()
    stop = AfterStep(6, signal.SIGKILL)                 # in the second of the stages rebuilt
    assert child(out, "--student_sft_lr=0.1", "--methods=dpo", before=stop) == -signal.SIGKILL
    assert not any((out / name).exists() for name in ("scores.jsonl", "results.json",
                                                      "report.html"))


# --- what counts as code -------------------------------------------------------------------------

@pytest.fixture
def sources(tmp_path):
    """A copy of the modules that count."""
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def edited(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_edit_that_changes_no_code_rebuilds_nothing(sources):
    """A comment, a docstring of a module, class and function, blank lines and line breaks."""
    before = digest_of_code(root=sources)
    assert before == digest_of_code()
    for name in SOURCES:
        with open(sources / name, "a", encoding="utf-8") as file:
            file.write("\n\n# a comment\n")
    for name, old, new in (
            ("tvkd.py", '"""Teacher Value-based', '"""A line more.\n\nTeacher Value-based'),
            ("tvkd.py", "def soft_value(logits, beta):\n    \"\"\"Soft value",
             "def soft_value(\n        logits, beta):\n\n    # why\n    \"\"\"The soft value"),
            ("model.py", '"""LayerNorm with an optional bias;', '"""Layer norm;')):
        edited(sources / name, old, new)
    assert digest_of_code(root=sources) == before


def test_an_edit_of_code_is_noticed_in_every_module(sources):
    """A sign in an equation, a name, a default, a text that is not a docstring; a line anywhere."""
    digests = {digest_of_code(root=sources)}
    for name, old, new in (("tvkd.py", "margin - offset", "margin + offset"),
                           ("tvkd.py", "gamma=1.0", "gamma=0.9"),
                           ("tvkd.py", 'terminal == "hold"', 'terminal == "held"'),
                           *((name, "\n\n\n", "\n\n\nX = 1\n\n\n") for name in SOURCES)):
        edited(sources / name, old, new)
        digests.add(digest_of_code(root=sources))
    assert len(digests) == 1 + 3 + len(SOURCES)


def test_what_makes_weights_and_numbers_counts_and_the_report_does_not():
    assert {"tvkd.py", "model.py", "data.py", "train.py", "harness/evaluate.py",
            "harness/processes.py"} <= set(SOURCES)
    assert not {"harness/report.py", "harness/options.py", "harness/ask.py"} & set(SOURCES)


def test_other_code_is_not_mixed(whole, tmp_path, capsys, monkeypatch):
    """A reader who edits an equation sees what it does: everything is rebuilt."""
    out = copy_of(whole, tmp_path)
    monkeypatch.setattr(keep, "digest_of_this_code", lambda: "0" * 64)
    assert train.main([*OFTEN, f"--out={out}", "--methods=dpo"]) == 0
    printed = capsys.readouterr().out
    assert "teacher-sft.pt: rebuilt, because the code changed\n" in printed
    assert "kept" not in printed and len(rebuilt(printed)) == 6 + 3      # stages; rows


def test_trust_code_keeps_what_comes_before_the_methods(whole, tmp_path, capsys, monkeypatch):
    """Teacher, starting student and values stay, with a line each. The methods are trained and
    measured again; here to the same numbers, because only the digest of the code changed. The
    stages that stay are still those of the old code: without the option they would be rebuilt."""
    out = copy_of(whole, tmp_path)
    monkeypatch.setattr(keep, "digest_of_this_code", lambda: "0" * 64)
    assert train.main([*OFTEN, f"--out={out}", "--trust_code=1"]) == 0
    printed = capsys.readouterr().out
    before = ["teacher-sft", "teacher-ref-logps", "teacher-dpo", "student-sft", "ref-logps",
              "teacher-answers", "values-implicit", "values-logits"]
    assert re.findall(r"^  (\S+): kept although the code changed \(--trust_code\)$", printed,
                      re.MULTILINE) == before
    names = rebuilt(printed)
    assert names[:5] == STUDENTS and len(names) == 5 + 7 + 2
    assert set(re.findall(r"rebuilt, (.*)", printed)) == {"because the code changed"}
    assert rows_of(out) == rows_of(whole)
    code = {path: keep.read(path)["key"]["the code"] for path in (
        whole / "seed0" / "dpo.pt", out / "seed0" / "dpo.pt", out / "seed0" / "teacher-sft.pt")}
    old, new, teacher = code.values()
    assert new == "0" * 64 and teacher == old != new


def test_trust_code_trusts_the_code_alone(whole, tmp_path, capsys, monkeypatch):
    """With another option as well, the teacher is rebuilt all the same."""
    out = copy_of(whole, tmp_path)
    monkeypatch.setattr(keep, "digest_of_this_code", lambda: "0" * 64)
    assert train.main([*OFTEN, f"--out={out}", "--methods=dpo", "--trust_code=1",
                       "--teacher_sft_lr=0.1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"teacher-sft.pt: rebuilt, because recipe.lr was 0.003, is 0.1, the code chan",
                     printed)
    assert "  student-sft: kept although the code changed (--trust_code)\n" in printed


def test_digests():
    """Of texts, ids and tensors; another border between two parts is another digest."""
    assert digest_of_items([("ab", "c")]) != digest_of_items([("a", "bc")])
    assert digest_of_items([("a", "bc")]) != digest_of_items([("a",), ("bc",)])
    ids = [Example([1, 2], [3])]
    assert digest_of_items(ids) == digest_of_items([([1, 2], [3])])
    assert digest_of_items(ids) != digest_of_items([Example([1], [2, 3])])
    assert digest_of_items([(ids[0],), (ids[0],)]) != digest_of_items([(ids[0], ids[0])])
    pair = Pair("a", "b", "c")                          # a loss reads the values as psi
    assert digest_of_items([pair._replace(values=(1.0, 2.0))]) == digest_of_items([pair])
    zeros = torch.zeros(2, 3)
    assert digest_of_tensors([zeros]) == digest_of_tensors([torch.zeros(2, 3)])
    assert len({digest_of_tensors([x]) for x in (zeros, zeros.view(3, 2), zeros.int(),
                                                 zeros + 1, -zeros)}) == 5


# --- files that no run wrote ---------------------------------------------------------------------

class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def evil_files(path, marker):
    """A pickle and a torch file that would make the folder `marker`, with a right checksum."""
    for number in (0, 1):
        with open(path, "wb") as file:
            if number == 0:
                pickle.dump(Evil(marker), file, protocol=2)
            else:
                torch.save({"model": Evil(marker)}, file)
        raw = path.read_bytes()
        path.write_bytes(raw + hashlib.sha256(raw).hexdigest().encode())
        yield number


def test_crafted_pickles_run_nothing(whole, tmp_path, capsys):
    """In place of a kept file it is named and rebuilt; asked for by --ask it is refused."""
    out, marker = copy_of(whole, tmp_path), tmp_path / "ran"
    for _ in evil_files(out / "seed0" / "dpo.pt", marker):
        assert train.main([f"--out={out}", "--ask=hi", "--device=cpu"]) == 2
        assert "dpo.pt: expected a file of tensors and plain values" in capsys.readouterr().err
    assert train.main([*OFTEN, f"--out={out}"]) == 0
    assert "dpo.pt: expected a file of tensors and plain values" in capsys.readouterr().out
    same_run(out, whole)
    assert not marker.exists()


def test_plain_values_without_a_key_are_refused(tmp_path):
    """A right checksum and nothing that could run, but not what a run writes."""
    for content in ([1], {"key": 1}, {"value": 2}):
        torch.save(content, tmp_path / "x.pt")
        raw = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "x.pt").write_bytes(raw + hashlib.sha256(raw).hexdigest().encode())
        with pytest.raises(UserError, match="x.pt: expected a file as a run .* other content"):
            keep.read(tmp_path / "x.pt")


def test_a_foreign_tokenizer_is_noticed(whole, tmp_path, capsys):
    """--ask with another vocabulary than the weights were trained with, and with other weights."""
    out = copy_of(whole, tmp_path)
    path = out / "seed0" / "tokenizer.tiktoken"
    text = path.read_text(encoding="ascii")
    path.write_text("".join(text.splitlines(keepends=True)[:-1]), encoding="ascii")
    ask = [f"--out={out}", "--ask=hi", "--device=cpu"]
    expected = "expected weights that were trained with the tokenizer beside them"
    assert train.main(ask) == 2 and expected in capsys.readouterr().err
    path.write_text(text, encoding="ascii")
    assert train.main(ask) == 0
    Keep(out, torch.device("cpu")).put(out / "seed0" / "dpo.pt", {
        "key": {}, "log": [], **keep.pack(GPT(GPTConfig(299, 64, 1, 2, 8)))})
    capsys.readouterr()
    assert train.main(ask) == 2
    assert f"{out / 'seed0' / 'dpo.pt'}: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed0/dpo.pt", "seed0/dpo.pt.partial", "results.json",
                                  "report.html", "scores.jsonl"])
def test_a_folder_where_a_file_belongs(whole, tmp_path, capsys, name):
    """Refused by its name before anything is trained for it; what is kept stays."""
    out = copy_of(whole, tmp_path)
    path = out / name
    path.unlink(missing_ok=True)
    path.mkdir()
    error = refused(capsys, *OFTEN, f"--out={out}", "--methods=dpo", "--lr=0.1") \
        if "partial" in name else refused(capsys, *OFTEN, f"--out={out}")
    assert f"{path}: expected a file as a run wrote it or nothing, got a folder" in error


# --- no room -------------------------------------------------------------------------------------

def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    """A disk that is full at the last moment: one line, the old content, no temporary file."""
    keep.write(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError, match="--out: expected a folder with room to write .*x: No sp"):
        keep.write(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("room, name", [(5_000, "teacher-sft.pt.partial"), (100, "log.jsonl")])
def test_no_room(tmp_path, capsys, room, name):
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
    assert name in error or name == "log.jsonl"


def test_no_room_for_the_report_names_it(whole, tmp_path, capsys, monkeypatch):
    """The models are kept: with room again, the same command has only to write."""
    out = copy_of(whole, tmp_path)
    # Full from here on.
    monkeypatch.setattr(outcome, "page", lambda *_: monkeypatch.setattr(os, "fsync", no_room) or "")
    assert train.main([*OFTEN, f"--out={out}"]) == 2
    assert capsys.readouterr().err == (
        f"train.py: --out: expected a folder with room to write {out / 'report.html'}: No space "
        "left on device\n")
    monkeypatch.undo()
    assert train.main([*OFTEN, f"--out={out}"]) == 0 and " loss " not in capsys.readouterr().out
    same_run(out, whole)
