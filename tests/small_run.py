"""The smallest run of train.py that goes through every stage: a second or two."""

import json
import os
import re
import shutil
import signal
import sys

import train

SMALL = ["--train_pairs=24", "--student_pairs=12", "--val_pairs=6", "--test_pairs=10",
         "--batch_size=8", "--samples=2", "--max_new_tokens=12", "--teacher_layers=1",
         "--teacher_width=16", "--student_layers=1", "--student_width=8", "--teacher_heads=2",
         "--student_heads=2", "--teacher_sft_steps=4", "--teacher_dpo_steps=4",
         "--student_sft_steps=4", "--steps=4", "--log_interval=1", "--eval_interval=2",
         "--vocab_size=300", "--device=cpu"]
TINY = [*SMALL, "--test_pairs=4", "--val_pairs=2", "--samples=1", "--max_new_tokens=6"]


def rows_of(out):
    """results.json -> the rows by label, "dpo 1" for those of seed 1; strict JSON."""
    text = (out / "results.json").read_text(encoding="utf-8")
    return {f"{row['label']} {row['seed'] or ''}".strip(): row
            for row in json.loads(text, parse_constant=refuse)["rows"]}


def log_of(out):
    text = (out / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def run(out, *options, sizes=SMALL):
    """A run in an empty folder -> rows by label, lines of the log."""
    shutil.rmtree(out, ignore_errors=True)      # or the stages of an earlier run would be read
    assert train.main([*sizes, f"--out={out}", *options]) == 0
    return rows_of(out), log_of(out)


def refused(capsys, *options):
    """The line on stderr with which a command is refused, exit code 2, before any training."""
    status = train.main(list(options))
    printed = capsys.readouterr()
    assert status == 2 and not re.search(r" \d+/\d+  loss ", printed.out), printed
    assert printed.err.startswith("train.py: ") and printed.err.count("\n") == 1, printed.err
    assert printed.err[:-1].isprintable()
    return printed.err


def forked(printed, work, *args):
    """Start work(*args) in a process of its own, which adds what it prints to a file -> its id."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(600)           # a process that waits for ever fails, and does not hang
            with open(printed, "a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False)
                                      for n in (1, 2))
            os._exit(work(*args))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(99)
    return pid


def ended(pid):
    """The exit status of a process, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main_after(before, *options):
    before()
    return train.main(list(options))


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_pairs(path, pairs):
    """Pairs of text as a preference file."""
    names = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, pair))) + "\n" for pair in pairs),
                    encoding="utf-8")
    return path
