"""Records as evidence.run writes them: what is read of them, rows by name, means over seeds."""

import json
import os
import statistics
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from harness.errors import printable, UserError
from harness.report import check
from harness.table import interval

CONTROLS = {"shuffled": "psi of other pairs", "plus": "plus sign", "beta": "beta / 2",
            "relabel": "teacher's labels", "soft": "teacher's soft labels",
            "mean": "mean of label and soft label", "evidence": "label and teacher as evidence"}
SWEEPS = {"alpha": "alpha", "frontier": "beta", "pairs": "student_pairs", "noise": "dose"}

NUMBERS = ("reward", "true_acc", "pref_acc", "kl", "length", "bytes", "vs_dpo", "acc_vs_dpo",
           "correlation", "agrees", "facts", "manners")
WORD = {"n": "whole number", "psi": "number"}
OPTIONS = {f"{name}?": "number"
           for name in ("alpha", "beta", "gamma", "steps", "lr", "student_pairs")}
RECORD = {
    "made": {"torch": "text", "python": "text", "machine": "text", "code?": "text"},
    "options": OPTIONS,
    "rows": [{"method": "text", "value?": "text", "terminal?": "text", "control": "text",
              "dose": "number", "options": OPTIONS, "split": "text", "teacher?": "text",
              "seed": "whole number", "seconds": "number", "n?": "whole number",
              "pref_n?": "whole number", **{f"{name}?": "number" for name in NUMBERS},
              "words?": {kind: WORD for kind in ("right", "wrong", "polite", "rude")}}]}


def load(results):
    """Name -> record, of every record in the folder. Raises UserError for what is none."""
    records = {}
    for path in sorted(Path(results).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            check(record, RECORD, "record")
            if not record["rows"]:
                raise ValueError("record.rows: expected at least one row, got none")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: expected a record of evidence.run: {error}") from None
        records[path.stem] = record
    return records


def built(name, build, *args):
    """build(*args), from a record of this name. Raises UserError where rows are missing."""
    try:
        return build(*args)
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"{name}.json: expected all rows of the experiment, got others "
                        f"({type(error).__name__}: {error})") from None


def name_of(row):
    """A row of a record by name, as the tables have it."""
    words, options = row["control"].split(), row["options"]
    name = f"tvkd {row['value']}/{row['terminal']}" if row["method"] == "tvkd" else row["method"]
    if row["method"] == "released":
        name = f"recipe: log pi {'-' if row['dose'] > 0 else '+'} entropy"
    parts = [CONTROLS[word] for word in words if word in CONTROLS]
    if "top" in words:
        parts.append(f"top {row['dose']:g}")
    if "gauge" in words:
        parts.append(f"c(s_t) = {row['dose']:+g} t")
    if "normalised" in words:
        parts.append(f"log-probs at temperature {row['dose']:g}")
    if "noise" in words:
        parts.append(f"{row['dose']:.0%} turned round")
    if row["method"] == "kd" and "student_pairs" in options:
        n = options["student_pairs"]
        parts.append(f"on {n} pair{'s' * (n > 1)}")
    if row["method"] == "tvkd":
        parts += [f"{key} {options[key]:g}" for key in ("beta", "gamma") if key in options]
    if row.get("teacher") == "unseen":
        parts.append("pairs unseen by the teacher")
    return ", ".join((name, *parts))


def plain_name(row):
    """The name of a row in a sweep, whatever is swept."""
    words = [word for word in row["control"].split() if word in CONTROLS]
    return name_of({**row, "control": " ".join(words), "options": {}})


def grouped(rows, of=name_of):
    """Rows of all seeds -> {name: rows}, in the order of the record."""
    groups = {}
    for row in rows:
        groups.setdefault(of(row), []).append(row)
    return groups


def option_of(row, name, record):
    """A row's value of an option, or its dose."""
    return row["dose"] if name == "dose" else row["options"].get(name, record["options"].get(name))


def summary(rows, key):
    """Mean over seeds and half-width of its interval; None where unknown."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return (statistics.fmean(known), interval(known)) if known else (None, None)


def mean_text(numbers, form):
    """Numbers of the seeds -> "2.36 ± 0.46"."""
    half = interval(numbers)
    margin = "" if half is None else f" ± {half:{form.strip('+')}}"
    return f"{statistics.fmean(numbers):{form}}{margin}"


def cell(rows, key, form):
    """`mean_text` of one number of the rows; "-" where it is unknown."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return mean_text(known, form) if known else "-"


def exit_code(command, argv):
    """command(argv) -> 0, or one line on stderr and an exit code."""
    try:
        command(argv)
        sys.stdout.flush()                              # here, where a closed pipe can be told
        return 0
    except UserError as error:
        status, message = 2, error
    except OSError as error:
        if isinstance(error, BrokenPipeError):          # the reader, such as head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        status, message = 2, f"expected files that can be read and written: {error}"
    except (FloatingPointError, BrokenProcessPool) as error:
        status, message = 1, error
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command goes on from here"
    print(f"evidence: {printable(message)}", file=sys.stderr)
    return status
