"""store.py and what it is for: a run that is killed, stopped or changed ends as one that never was."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

import data
import store
import train
from conftest import ROOT
from options import Config
from test_train import SMALL

TINY = [*SMALL, "--test_pairs=4", "--val_pairs=2", "--samples=1", "--max_new_tokens=6", "--save_interval=0"]


def child(out, *options, before=lambda: None):
    """The id of a process of its own that does train.main; what it prints goes to out.log."""
    pid = os.fork()
    if pid == 0:
        try:
            with open(f"{out}.log", "a", encoding="utf-8") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
                before()
                os._exit(train.main([*TINY, f"--out={out}", *options]))
        finally:
            os._exit(99)
    return pid


def ended(pid):
    """Exit status; 128 + signal for a killed process, as in a shell."""
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def rows(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]


def same_run(one, other):
    """The same rows, log and bytes of every file; nothing half done is left."""
    assert rows(one) == rows(other)
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    files, others = ({path.name: path.read_bytes() for path in (out / "seed0").iterdir()} for out in (one, other))
    assert files.keys() == others.keys() and not any(name.endswith((".tmp", ".partial")) for name in files)
    assert [name for name in files if files[name] != others[name]] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to. In this process, so that the children find imported what training imports."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train.main([*TINY, f"--out={out}"]) == 0
    return out


def copy_of(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


# --- killed, stopped --------------------------------------------------------------------------------------------------------

def test_killed_at_random_moments(whole, tmp_path):
    """kill -9 after a random time, ten times; then the same command ends as the run that was never killed."""
    out, rng, kills, stages = tmp_path / "out", random.Random(0), 0, set()
    while kills < 10:
        pid = child(out)
        time.sleep(rng.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == 128 + signal.SIGKILL
        stages.add(len(list((out / "seed0").glob("*.pt"))) if out.exists() else 0)
        if (out / "results.json").exists():                                 # done: begin again
            shutil.rmtree(out)
    assert ended(child(out)) == 0
    assert len(stages) > 3
    same_run(out, whole)


def test_killed_while_writing(whole, tmp_path):
    """A process that kills itself in one of its writes, with half of the bytes written, all of them, or under the new name already."""
    out, write, rng, kills = tmp_path / "out", store.write, random.Random(0), 0

    def deadly():
        left, moment = rng.randrange(2, 12), rng.randrange(3)

        def killing(path, content):
            nonlocal left
            left -= 1
            if left == 0:
                path.with_name(f"{path.name}.tmp").write_bytes(content[:len(content) // 2] if moment == 0 else content)
                if moment == 2:
                    write(path, content)
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)
        store.write = killing

    while (status := ended(child(out, before=deadly))) != 0:
        assert status == 128 + signal.SIGKILL and kills < 30
        kills, _ = kills + 1, rng.random()                                  # the child drew from a copy
    assert kills >= 5
    same_run(out, whole)


def test_ctrl_c(whole, tmp_path):
    """Ctrl-C in the middle of a stage: exit 130, how to go on, a checkpoint of that very step; the same command goes on from it."""
    out = tmp_path / "out"
    slow = ("--save_interval=1000", "--teacher_sft_steps=2000")
    pid = child(out, *slow)
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    said = out.with_suffix(".log").read_text(encoding="utf-8")
    assert "stopping after this step" in said and "train.py: stopped; the same command goes on from here" in said
    step = store.read(out / "seed0" / "teacher-sft.pt.partial")["step"]
    assert step == (out / "log.jsonl").read_bytes().count(b"\n") and f"teacher-sft {step}/2000" in said
    pid = child(out, *slow)
    while f"teacher-sft: going on from step {step}" not in out.with_suffix(".log").read_text(encoding="utf-8"):
        time.sleep(0.01)
    while (out / "log.jsonl").read_bytes().count(b"\n") < step:             # the lines of before are there again
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines[:step]] == list(range(1, step + 1))


def test_ctrl_c_twice_stops_at_once():
    with pytest.raises(KeyboardInterrupt), store.ctrl_c_held() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed == [True]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    """A learning rate that blows up in the second stage: exit 1; the first stage's file and a checkpoint of finite weights stay."""
    out = tmp_path / "out"
    assert ended(child(out, "--teacher_dpo_lr=1e30", "--teacher_dpo_steps=40")) == 1
    said = out.with_suffix(".log").read_text(encoding="utf-8")
    assert "train.py: teacher-dpo: loss" in said and "; batch [" in said and "Traceback" not in said
    store.read(out / "seed0" / "teacher-sft.pt")
    kept = store.read(out / "seed0" / "teacher-dpo.pt.partial")
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


# --- changed ----------------------------------------------------------------------------------------------------------------

def test_nothing_is_made_twice(whole, tmp_path, capsys):
    out = copy_of(whole, tmp_path)
    assert train.main([*TINY, f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": kept in ") == 8 and "made anew" not in shown and "loss" not in shown
    same_run(out, whole)


@pytest.mark.parametrize("where", ["weights", "checksum"])
def test_a_changed_byte_is_noticed(whole, tmp_path, capsys, where):
    """One bit of every kept file, in its middle or in its last byte: each is named and made anew, to the same bytes."""
    out = copy_of(whole, tmp_path)
    kept = sorted((out / "seed0").glob("*.pt"))
    assert len(kept) == 18
    for path in kept:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 if where == "weights" else -1] ^= 1
        path.write_bytes(raw)
    assert train.main([*TINY, f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{path}: expected a file as a run wrote it, got other bytes; made anew" in shown for path in kept)
    same_run(out, whole)


@pytest.mark.parametrize("name", ["gamma", "alpha"])
def test_only_what_depends_is_made_anew(whole, tmp_path, capsys, name):
    """--gamma, --alpha: the two TVKD students and their rows, nothing else, and the option is named."""
    out = copy_of(whole, tmp_path)
    assert train.main([*TINY, f"--out={out}", f"--{name}=0.5"]) == 0
    anew = [line for line in capsys.readouterr().out.splitlines() if "made anew" in line]
    assert len(anew) == 4 and anew[0].endswith(f"tvkd-implicit-value.pt: made anew, because --{name} was 1.0, is 0.5")
    assert sum("row.pt" in line for line in anew) == 2


def test_data_that_changed_is_noticed(tmp_path, capsys):
    """One rejected response of a file of preferences is edited. The supervised stages never read it and are kept; DPO is not."""
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    lines = [json.dumps(pair._asdict()) + "\n" for pair in data.toy_splits(40, 1, 1, 0).train]
    options = [*TINY, f"--data={path}", f"--out={out}", "--methods=dpo", "--train_pairs=0", "--vocab_size=257", "--block_size=200"]
    for change in (lambda line: line, lambda line: line.replace('", "rejected": " ', '", "rejected": " Well. ')):
        path.write_text("".join(map(change, lines)), encoding="utf-8")
        assert train.main(options) == 0
    shown = capsys.readouterr().out
    assert "teacher-sft: kept" in shown and "student-sft: kept" in shown
    for name in ("teacher-dpo.pt", "ref-logps.pt", "dpo.pt"):
        assert re.search(f"{name}: made anew, because .*pairs is another", shown), name
    assert shown.count("teacher-dpo.pt: made anew") == 1


def test_the_store_alone(tmp_path):
    """Kept once; made anew for another digest, another common entry or another value of an option that was read, not of one that
    was not. A process that does not write leaves nothing."""
    setup = train.Setup(Config(), 0, None, None, None, None, None, None)

    def kept(common, digest, config, **process):
        def make(setup, partial):
            partial.save({"half": 1})
            return {"alpha": setup.config.alpha}
        return store.Store(tmp_path, common, **process).keep("x.pt", setup._replace(config=config), {"d": digest}, make)
    assert kept({"c": 1}, 1, Config(), writes=False) == ({"alpha": 1.0}, True) and list(tmp_path.iterdir()) == []
    found = [kept(common, digest, config)[1] for common, digest, config in (
        ({"c": 1}, 1, Config()), ({"c": 1}, 1, Config(beta=2.0)), ({"c": 2}, 1, Config()), ({"c": 2}, 2, Config()),
        ({"c": 2}, 2, Config(alpha=2.0)))]
    assert found == [True, False, True, True, True]
    assert kept({"c": 2}, 2, Config(alpha=2.0), in_all=lambda flag: False)[1]   # another process has not found it
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


CHANGES = {"methods": "bc,dpo,tvkd", "seed": 1, "beta": 0.5, "value": "logits", "terminal": "zero", "vocab_size": 290,
           "teacher_tokenizer": "280", "train_pairs": 23, "student_pairs": 11, "teacher_heads": 1, "student_heads": 1,
           "teacher_width": 8, "student_width": 12, "batch_size": 7, "precision": "bfloat16", "micro_batch": 3, "block_size": 63,
           "save_interval": 5.0}
SAME = ("data", "out", "seeds", "device", "ask", "score", "tokenizer", "compile", "teacher_init", "student_init")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name not in SAME])
def test_no_option_leaves_anything_stale(whole, tmp_path, name):
    """Each option but SAME changed, in the folder of the run without it: the rows of a run in an empty folder."""
    small = next((arg.split("=")[1] for arg in reversed(TINY) if arg.startswith(f"--{name}=")), getattr(Config, name))
    other = CHANGES.get(name) or (float(small) * 2 if "." in str(small) else int(small) + 1)
    methods = ("--methods=bc,dpo,tvkd",) if name == "teacher_tokenizer" else ()
    out = copy_of(whole, tmp_path)
    for folder in (out, tmp_path / "fresh"):
        assert ended(child(folder, f"--{name}={other}", *methods)) == 0, folder.with_suffix(".log").read_text(encoding="utf-8")
    assert rows(out) == rows(tmp_path / "fresh")


def test_other_code_is_not_mixed(whole, tmp_path, capsys, monkeypatch):
    """What another tvkd.py made is made anew: a reader who edits an equation sees what it does. Every module
    that makes what is kept counts."""
    assert set(store.SOURCES) == {f"{name}.py" for name in (
        "data", "measure", "model", "options", "report", "store", "train", "tvkd")}
    shutil.copytree(ROOT, tmp_path / "code", ignore=lambda folder, names: [name for name in names if not name.endswith(".py")])
    monkeypatch.setattr(store, "__file__", str(tmp_path / "code" / "store.py"))
    prints = {store.fingerprint_of_code()}
    for name in store.SOURCES:
        with open(tmp_path / "code" / name, "a", encoding="utf-8") as file:
            file.write("#")
        prints.add(store.fingerprint_of_code())
    assert len(prints) == 1 + len(store.SOURCES)
    out = copy_of(whole, tmp_path)
    monkeypatch.setattr(train, "fingerprint_of_code", lambda: "another")
    assert train.main([*TINY, f"--out={out}", "--methods=dpo"]) == 0
    assert "teacher-sft.pt: made anew, because the code is another" in capsys.readouterr().out


def test_fingerprints():
    """Of texts and of ids; another border between two parts is another fingerprint."""
    assert store.fingerprint([("ab", "c")]) != store.fingerprint([("a", "bc")]) 
    assert store.fingerprint([("a", "bc")]) != store.fingerprint([("a",), ("bc",)])
    assert store.fingerprint([([1, 2], [3])]) == store.fingerprint([([1, 2], [3])]) != store.fingerprint([([1], [2, 3])])


# --- safe -------------------------------------------------------------------------------------------------------------------

class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def evil_files(path, marker):
    """A plain pickle and a torch file, both of which would make the folder `marker` if their pickle were run."""
    for number, save in enumerate((lambda file: pickle.dump(Evil(marker), file), lambda file: torch.save({"model": Evil(marker)}, file))):
        with open(path, "wb") as file:
            save(file)
        raw = path.read_bytes()
        path.write_bytes(raw + hashlib.sha256(raw).hexdigest().encode())    # with a right checksum
        yield number


def test_crafted_pickles_run_nothing(whole, tmp_path, capsys):
    """In place of a kept file it is named and made anew; asked for by --ask it is refused. Nothing is run."""
    out, marker = copy_of(whole, tmp_path), tmp_path / "ran"
    for _ in evil_files(out / "seed0" / "dpo.pt", marker):
        assert train.main([f"--out={out}", "--ask=hi", "--device=cpu"]) == 2
        assert "dpo.pt: expected a file of tensors and plain values" in capsys.readouterr().err
    assert train.main([*TINY, f"--out={out}"]) == 0
    assert "dpo.pt: expected a file of tensors and plain values" in capsys.readouterr().out
    same_run(out, whole)
    assert not marker.exists()


def test_a_foreign_tokenizer_is_noticed(whole, tmp_path, capsys):
    """--ask with another vocabulary file than the weights were trained with."""
    out = copy_of(whole, tmp_path)
    path = out / "seed0" / "tokenizer.tiktoken"
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="ascii")
    assert train.main([f"--out={out}", "--ask=hi", "--device=cpu"]) == 2
    assert "expected weights that were trained with the tokenizer beside them" in capsys.readouterr().err


# --- no room ----------------------------------------------------------------------------------------------------------------

def test_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    """A disk that is full at the last moment: one line, the old content, no temporary file."""
    store.write(tmp_path / "x", b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.UserError, match="--out: expected a folder with room to write .*x: No space left on device"):
        store.write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("room", [100, 5_000])
def test_no_room(tmp_path, room):
    """Files may not grow beyond `room` bytes, too few for the vocabulary or for weights: exit 2 and one line."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, f"--out={tmp_path / 'out'}"], capture_output=True, timeout=60,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)), text=True)
    assert done.returncode == 2 and re.fullmatch("train.py: --out: expected a folder with room .*File too large\n", done.stderr)
