"""The tables and figures of the documents, from the records of evidence.run. Trains nothing.

    python -m evidence.tables   rebuild what stands between <!-- NAME --> and <!-- /NAME --> in
                                docs/results.md, docs/sweeps.md and README.md, and docs/*.svg

"minus DPO" is paired: the difference, seed by seed, to DPO from the same student, on the same pairs
and prompts; in a sweep at the same point. A note under each table says what its numbers rest on.
"""

import re
import sys
from pathlib import Path

from harness.errors import UserError
from evidence.cells import (COMPARED, EXPERIMENTS, FAMILIES, Picker, as_row, choices, identity,
                            without_setting)
from evidence.figures import figures
from evidence.records import (HEADINGS, Parser, built, grouped, holm, known, load, name_of, p_value,
                              plain_name, point)
from harness.command import exit_code
from harness.numbers import plus_minus, summary

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("docs/results.md", "docs/sweeps.md", "README.md")

COLUMNS = {"reward": ("true reward", ".2f"), "vs_dpo": ("minus DPO", "+.2f"),
           "pref_acc": ("accuracy, labels", ".3f"), "acc_vs_dpo": ("minus DPO", "+.3f"),
           "true_acc": ("accuracy, truth", ".3f"), "kl": ("KL", ".2f"), "length": ("tokens", ".1f"),
           "facts": ("facts", ".2f"), "manners": ("manners", "+.2f")}
TOY = ("reward", "vs_dpo", "pref_acc", "true_acc", "kl", "length")
TEXT = ("pref_acc", "acc_vs_dpo", "kl", "length")
DPO, TVKD, SOFT, KD = (name_of(as_row(cell)) for cell in COMPARED)
UNSEEN = ", pairs unseen by the teacher"
BETWEEN = (             # what is compared with what: record, teacher, minuend, subtrahend
    *(("main", "", left, right) for left, right in (
        (KD, TVKD), (SOFT, TVKD), ("bc", TVKD), ("dpo, teacher's labels", TVKD), ("kd+dpo", KD),
        ("kd+tvkd", KD), ("kd+tvkd", "kd+dpo"), (TVKD, f"{TVKD}, psi of other pairs"),
        (TVKD, "dpo, beta / 2"))),
    *(("noise", "", f"{SOFT}, {share} flipped", f"{TVKD}, {share} flipped")
      for share in ("20%", "40%")),
    ("unseen", "unseen", f"{SOFT}{UNSEEN}", f"{TVKD}{UNSEEN}"),
    ("unseen", "", f"{TVKD}, 40% flipped{UNSEEN}", f"{TVKD}, 40% flipped"),
    ("knowledge", "full", SOFT, TVKD), ("knowledge", "full", KD, TVKD),
    ("knowledge", "facts", KD, TVKD), ("knowledge", "facts", SOFT, TVKD),
    *(("wrong", f"flipped 0.{n}", name, TVKD) for n in (2, 4) for name in (KD, SOFT)),
    *(("wrong", f"flipped 0.{n}", f"{name}, {n}0% flipped", f"{TVKD}, {n}0% flipped")
      for n in (2, 4) for name in (KD, SOFT)),
    ("frontier", "", f"{SOFT}, beta 0.5", TVKD),
    ("frontier", "", f"{SOFT}, beta 0.5", f"{TVKD}, beta 0.5"),
    ("frontier", "", SOFT, f"{TVKD}, beta 2"))


# --------------------------------------------------------------------------------------------------
# Tables

def markdown(header, lines):
    lines = (header, ["---"] + ["---:"] * (len(header) - 1), *lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def note(records, tested=0):
    """What stands under a table of these records, with `tested` differences in it."""
    seeds = sorted({len(rows) for record in records
                    for rows in grouped(record["rows"], identity).values()})
    codes = sorted({code for record in records for code in record["codes"]})
    bold = f" Bold: not 0 by Holm's correction over the {tested} differences here, at 5%." \
        if tested else ""
    return (f"\n\n*n = {' or '.join(map(str, seeds))} seeds; ±: 95% interval of the mean over "
            f"seeds, Student's t.{bold} Code {', '.join(codes)}.*")


def texts_of(numbers):
    """{(line, column, key): numbers of the seeds} -> their texts, and how many differences.

    Bold: the differences from DPO that survive Holm's correction over all of them.
    """
    tests = {place: p_value(x) for place, x in numbers.items()
             if place[-1].endswith("vs_dpo") and len(x) > 1}
    kept, texts = holm(tests), {}
    for place, x in numbers.items():
        text = plus_minus(*summary(x), COLUMNS[place[-1]][1])
        texts[place] = f"**{text}**" if place in kept else text
    return texts, len(tests)


def pivot(record, corner, down, across, keys):
    """A line for each down(row); for each across(row) the columns `keys`, as far as known."""
    lines, columns, numbers = {}, {}, {}
    for row in record["rows"]:
        line, column = down(row), across(row) if across else ""
        lines[line] = columns[column] = None
        for key in keys:
            numbers.setdefault((line, column, key), []).extend(known([row], key))
    columns = [(column, key) for column in columns for key in keys
               if any(numbers.get((line, column, key)) for line in lines)]
    texts, tested = texts_of(numbers)
    head = [": ".join(filter(None, (column, COLUMNS[key][0]))) for column, key in columns]
    body = [[line, *(texts.get((line, *place), "-") for place in columns)] for line in lines]
    return markdown([corner, *head], body) + note([record], tested)


def comparison(record, keys=TOY):
    """A line a setting, over all seeds."""
    return pivot(record, "model", name_of, None, keys)


def sweep(record, options, corner, keys=("reward", "vs_dpo")):
    """A line for each combination of the values of the swept options, columns for each method."""
    rows = sorted(record["rows"], key=lambda row: point(row, options))      # stable
    return pivot({**record, "rows": rows}, corner,
                 lambda row: ", ".join(f"{x:g}" for x in point(row, options)), plain_name, keys)


def taught(row):
    return f"taught {HEADINGS[row['teacher']]}"


def knowledge(record):
    return pivot({**record, "rows": [row for row in record["rows"] if name_of(row) != DPO]},
                 "teacher", name_of, taught, ("vs_dpo",))


def parts(record):
    return pivot(record, "teacher", name_of, taught, ("facts", "manners"))


def condition(row):
    """What is wrong with teacher or labels in a row of `wrong`."""
    kind, _, share = row["teacher"].partition(" ")
    if row["control"].endswith("noise"):
        return f"{row['dose']:.0%} of the labels flipped, those the student sees too"
    if kind == "flipped":
        return f"{float(share):.0%} of the teacher's labels flipped"
    return "teacher of the opposite reward" if kind else "usual teacher"


def wrong(record):
    return pivot(record, "condition", condition, plain_name, ("reward", "vs_dpo"))


def size(row):
    """Student and teacher of a row of `sizes`; DPO's and the teacher's rows have one of them."""
    width, layers, teacher = point(row, ("student_width", "student_layers", "teacher_width"))
    if row["method"] == "teacher":
        return f"teacher {teacher} wide"
    student = f"student {width} wide, {layers} layers"
    return student if row["method"] == "dpo" and not row["control"] else \
        f"{student}; teacher {teacher} wide"


def sizes(record):
    return pivot(record, "size", size, plain_name, ("reward", "vs_dpo"))


def on_files(records, kind):
    """A table for each preference file, and for each number of the student's pairs in it."""
    blocks = []
    for name, record in records.items():
        if name.startswith(f"{kind}_"):
            n = [row["pref_n"] for row in record["rows"]]
            span = f"{min(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}"
            of_pairs = grouped(record["rows"], lambda row: row["options"].get("student_pairs", 0))
            for pairs, rows in of_pairs.items():
                which = f", the student has {pairs:,} pairs" if pairs else ""
                blocks.append(f"`{name.removeprefix(f'{kind}_')}`{which}; {span} held-out pairs in "
                              f"each split:\n\n{comparison({**record, 'rows': rows}, TEXT)}")
    return "\n\n".join(blocks)


def gap(left, right):
    """Rows of two models -> the differences of their true rewards, seed by seed."""
    rewards = {row["seed"]: row["reward"] for row in right}
    return [row["reward"] - rewards[row["seed"]] for row in left]


def between(records):
    """A line a pair of methods: the difference of their true rewards, seed by seed."""
    numbers = {}
    for name, teacher, left, right in BETWEEN:
        if name in records:
            groups = grouped([row for row in records[name]["rows"]
                              if not teacher or row.get("teacher") == teacher])
            of = f", taught {HEADINGS[teacher]}" if teacher in HEADINGS else f", teacher {teacher}"
            title = name + of * (teacher not in ("", name))
            numbers[left, right, title, "vs_dpo"] = gap(groups[left], groups[right])
    texts, tested = texts_of(numbers)
    return markdown(["method", "minus", "record", "true reward"],
                    [[*place[:3], text] for place, text in texts.items()]) \
        + note([records[name] for name in {line[0] for line in BETWEEN} & set(records)], tested)


def care(records):
    """The main methods at their own best settings and at 60 steps, each minus DPO there."""
    pick = Picker(records["tune"]["rows"] + records["tune_care"]["rows"])
    at, numbers, chosen = grouped(records["care"]["rows"], identity), {}, {}
    for which, setting in (("own best", {}), ("at 60 steps", {"steps": 60})):
        bases = []
        for name, family in FAMILIES.items():
            cell = pick(family[0], family, **setting)
            rows, row = at[identity(as_row(cell))], as_row(cell)
            bases = [*bases, rows][:2]                      # DPO and TVKD, which come first
            steps, lr, beta = point(row, ("steps", "lr", "beta"))
            chosen[name, which] = f"{steps}, {lr:g}, beta {beta:g}" \
                + (f", temperature {cell.dose:g}" if "warm" in cell.control else "")
            numbers[name, which, "reward"] = known(rows, "reward")
            for base, place in ((bases[0], which), (bases[-1], f"{which}, TVKD")):
                numbers[name, place, "vs_dpo"] = gap(rows, base) if rows is not base else []
    (texts, tested), whiches = texts_of(numbers), ("own best", "at 60 steps")
    return markdown(
        ["model", *(f"{which}{part}" for which in whiches for part in (
            ": steps, rate", ", true reward", ", minus DPO", ", minus TVKD"))],
        [[name, *(x for which in whiches for x in (
            chosen[name, which], texts[name, which, "reward"], texts[name, which, "vs_dpo"],
            texts[name, f"{which}, TVKD", "vs_dpo"]))]
         for name in FAMILIES]) + note([records["care"]], tested)


def settings(rows, mark):
    """A line a method: for each number of steps its best score and the rate of it; * at an edge."""
    names = {without_setting(row): name_of(row) + (
        f", {row['options']['student_pairs']} pairs" if "data" in row["options"] else "") + (
        f", {size(row)}" if mark == "tune_sizes" else "") for row in rows}
    scores = choices(rows)
    all_steps = sorted({steps for of_kind in scores.values() for steps, _ in of_kind})
    lines = []
    for kind, of_kind in scores.items():
        line = [names[kind]]
        for steps in all_steps:
            tried = {lr: score for (at, lr), score in of_kind.items() if at == steps}
            text = "-"
            if tried:
                best = max(tried, key=tried.get)
                edge = "*" if best in (min(tried), max(tried)) else ""
                text = f"{tried[best]:.3f} ({best:g}{edge})"
                if len(all_steps) > 1 and tried[best] == max(of_kind.values()):
                    text = f"**{text}**"
            line.append(text)
        lines.append(line)
    return markdown(["best score (its rate)", *(f"{steps} steps" for steps in all_steps)], lines)


def readme(record):
    """The README's rows of the main table."""
    groups = grouped(record["rows"])
    rows = sum((groups[name] for name in (DPO, TVKD, "tvkd logits/hold", SOFT, KD)), [])
    return comparison({**record, "rows": rows}, ("reward", "vs_dpo", "true_acc", "kl"))


PLANNED = (*EXPERIMENTS, "human", "real", "tune_human", "tune_sizes", "tune_epochs")
PAIRS = "steps, student's pairs (the teacher's: 3,000)"
FLIPPED = "share of the student's labels flipped"
TABLES = {      # mark: what builds it from the record of this name, and its arguments
    "main": (comparison,), "unseen": (comparison, TOY[:2]), "knowledge": (knowledge,),
    "wrong": (wrong,), "sizes": (sizes,),
    "alpha": (sweep, ("alpha",), "alpha", ("reward", "vs_dpo", "kl")),
    "frontier": (sweep, ("beta",), "beta", ("reward", "vs_dpo", "kl")),
    "pairs": (sweep, ("steps", "student_pairs"), PAIRS), "noise": (sweep, ("dose",), FLIPPED),
    "epochs": (sweep, ("steps",), "steps (5, 10, 15: one, two, three epochs)")}


def tables(records):
    """Mark -> the text that stands there, for the records there are."""
    texts = {mark: built(mark, table, records[mark], *args)
             for mark, (table, *args) in TABLES.items() if mark in records}
    for kind in ("human", "real"):
        if any(name.startswith(f"{kind}_") for name in records):
            texts[kind] = built(kind, on_files, records, kind)
    if "knowledge" in records:
        texts["parts"] = built("knowledge", parts, records["knowledge"])
    if "main" in records:
        texts["readme"] = built("main", readme, records["main"])
        texts["between"] = built("main", between, records)
    if "care" in records:
        texts["care"] = built("care", care, records)
    for mark in ("tune", "tune_human", "tune_sizes", "tune_epochs"):
        rows = [row for name, record in records.items() if name.startswith(mark)
                and (mark != "tune" or name in ("tune", "tune_care")) for row in record["rows"]]
        if rows:
            texts[mark] = built(mark, settings, rows, mark)
    return texts


# --------------------------------------------------------------------------------------------------
# The documents

def filled(text, texts, where):
    """The text with what stands between each pair of marks replaced."""
    def replacement(match):
        if match[1] not in texts:
            raise UserError(f"{where}: expected a record for the mark {match[1]}, got "
                            f"{', '.join(texts) or 'none'}")
        return f"<!-- {match[1]} -->\n{texts[match[1]]}\n<!-- /{match[1]} -->"
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", replacement, text, flags=re.DOTALL)


def rebuild(root=ROOT):
    """Rewrite the documents and figures under `root` from the records there."""
    records = load(root / "evidence" / "results")
    texts, files = {**dict.fromkeys(PLANNED, "*No record yet.*"), **tables(records)}, {}
    for name in DOCS:
        text = (root / name).read_text(encoding="utf-8")
        files[name] = filled(text, texts, name)
    files |= {f"docs/{name}.svg": svg for name, svg in figures(records).items()}
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")


def command(argv, root=ROOT):
    Parser("python -m evidence.tables", __doc__).parse_args(argv)
    rebuild(root)


def main(argv=None):
    return exit_code(command, argv, program="evidence")


if __name__ == "__main__":
    sys.exit(main())
