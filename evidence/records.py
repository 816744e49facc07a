"""Records as evidence.run writes them: what is read of them, rows by name, means, significance."""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np

from harness.errors import UserError
from evidence.cells import SWEPT, identity, option_of
from harness.numbers import summary

CONTROLS = {"shuffled": "psi of other pairs", "plus": "plus sign", "beta": "beta / 2",
            "relabel": "teacher's labels", "soft": "teacher's soft labels",
            "mean": "mean of label and soft label", "evidence": "label and teacher as evidence"}
HEADINGS = {"full": "all", "facts": "facts", "manners": "manners", "contrary": "facts, bad manners"}


def load(folder):
    """Name -> record, of every record in the folder. Raises UserError for what is none.

    Rows get their differences from DPO. Of a record that is still being made only those seeds
    count that have as many rows as any: a mean over some seeds is compared with one over the same.
    """
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            made, rows = record["made"], record["rows"]
            codes = {row.get("code", made["code"])[:8] for row in rows}
            of_seeds = grouped(rows, lambda row: row["seed"])
            most = max(len({identity(row) for row in rows}) for rows in of_seeds.values())
            full = [[{**row, "usual": record["options"]} for row in of_seed]
                    for of_seed in of_seeds.values() if len(of_seed) == most]
            rows = sum((paired(rows, SWEPT.get(path.stem.split("_")[0], ())) for rows in full), [])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: expected a record of evidence.run, got another content "
                            f"({type(error).__name__}: {error})") from None
        records[path.stem] = {"rows": rows, "codes": codes}
    return records


def paired(rows, swept):
    """The rows of one seed, each with its differences from the DPO of the same swept values."""
    dpo = {}
    for row in rows:
        if row["method"] == "dpo" and row["control"] in ("", "noise"):
            dpo.setdefault(point(row, swept), row)
    differences = []
    for row in rows:
        base, row = dpo.get(point(row, swept)), dict(row)
        for key, name in (("vs_dpo", "reward"), ("acc_vs_dpo", "pref_acc")):
            known = base and identity(base) != identity(row) \
                and None not in (row.get(name), base.get(name))
            row[key] = row[name] - base[name] if known else None
        differences.append(row)
    return differences


def point(row, options):
    """The values of some options, or of the dose, in a row."""
    return tuple(row["dose"] if name == "dose" else option_of(row, name) for name in options)


def built(name, build, *args):
    """build(*args), from a record of this name. Raises UserError where rows are missing."""
    try:
        return build(*args)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(f"{name}.json: expected all rows of the experiment, got others "
                        f"({type(error).__name__}: {error})") from None


def name_of(row):
    """A row of a record by name, as the tables have it."""
    words, options = row["control"].split(), row["options"]
    name = f"tvkd {row['value']}/{row['terminal']}" if row["method"] == "tvkd" else row["method"]
    parts = [CONTROLS[word] for word in words if word in CONTROLS]
    if "warm" in words:
        parts.append(f"temperature {row['dose']:g}")
    if "noise" in words:
        parts.append(f"{row['dose']:.0%} flipped")
    if row["method"] in ("dpo", "tvkd") and "beta" not in words:
        parts += [f"beta {options['beta']:g}"] if "beta" in options else []
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


# --------------------------------------------------------------------------------------------------
# Means and significance

def known(rows, key):
    return [row[key] for row in rows if row.get(key) is not None]


def mean(rows, key):
    """Mean over seeds and half-width of its interval; None where unknown."""
    return summary(known(rows, key))


def p_value(numbers):
    """Two-sided p of Student's t-test that the mean is 0; 1 where it cannot be tested."""
    n = len(numbers) - 1
    deviation = statistics.stdev(numbers) if n > 0 else 0
    if n < 1 or not any(numbers):
        return 1.0
    if deviation == 0:
        return 0.0
    t = abs(statistics.fmean(numbers)) / deviation * math.sqrt(n + 1)
    # With t = sqrt(n) tan(angle), the density of the angle goes with cos(angle)^(n - 1).
    beyond, all_of_it = (np.linspace(start, math.pi / 2, 100_001)
                         for start in (math.atan(t / math.sqrt(n)), 0))
    areas = (np.trapezoid(np.cos(x) ** (n - 1), x) for x in (beyond, all_of_it))
    return float(next(areas) / next(areas))


def holm(tests, level=0.05):
    """{name: p} -> the names that Holm's step-down correction keeps at the level.

    The smallest of m p-values must be below level / m, the next below level / (m - 1), and so on
    until one is not.
    """
    kept = set()
    for rank, (name, p) in enumerate(sorted(tests.items(), key=lambda item: item[1])):
        if p > level / (len(tests) - rank):
            break
        kept.add(name)
    return kept


# --------------------------------------------------------------------------------------------------
# The commands

class Parser(argparse.ArgumentParser):
    """One line for a mistake, in place of argparse's usage."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; try --help")
