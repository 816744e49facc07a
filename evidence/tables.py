"""The tables and figures of docs/results.md, from the records of evidence.run. Trains nothing.

    python -m evidence.tables   rebuild what stands between <!-- NAME --> and <!-- /NAME --> in
                                docs/results.md and README.md, and docs/*.svg

Every mean is over seeds, every interval a 95% interval of that mean over seeds (Student's t).
"Minus DPO" is paired: the difference, seed by seed, to DPO from the same student, on the same pairs
and prompts; in a sweep at the same point. The row of "kd, on n pairs" is compared with DPO on all.
"""

import argparse
import re
import sys
from pathlib import Path

from harness.errors import UserError
from evidence.cells import TEACHERS, choices, identity, without_setting
from evidence.figures import figures
from evidence.records import (SWEEPS, built, cell, exit_code, grouped, load, mean_text, name_of,
                              option_of, plain_name, summary)

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("docs/results.md", "docs/sweeps.md", "README.md")

COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"),
           ("accuracy, labels", "pref_acc", ".3f"), ("minus DPO", "acc_vs_dpo", "+.3f"),
           ("accuracy, truth", "true_acc", ".3f"), ("KL", "kl", ".2f"), ("tokens", "length", ".1f"))
# What is swept: the first column of its table.
SWEPT = {"alpha": "alpha", "beta": "beta",
         "student_pairs": "student's pairs (the teacher's: 3,000)",
         "dose": "share of the student's labels turned round"}
HEADINGS = {"full": "all", "facts": "facts", "manners": "manners", "contrary": "facts, bad manners"}
# Which methods are compared with each other: record, teacher, minuend, subtrahend.
TVKD, SOFT = "tvkd implicit/value", "dpo, teacher's soft labels"
UNSEEN, NOISE = "pairs unseen by the teacher", "turned round"
BETWEEN = (*(("main", "", left, right) for left, right in (
    ("kd", TVKD), (SOFT, TVKD), ("bc", TVKD), ("dpo, teacher's labels", TVKD), ("kd, top 1", TVKD),
    ("kd, top 1", "kd"), ("kd+dpo", "kd"), ("kd+tvkd", "kd"), ("kd+tvkd", "kd+dpo"),
    (TVKD, f"{TVKD}, psi of other pairs"))),
    *(("noise", "", f"{SOFT}, {share} {NOISE}", f"{TVKD}, {share} {NOISE}")
      for share in ("20%", "40%")),
    ("unseen", "unseen", f"{SOFT}, {UNSEEN}", f"{TVKD}, {UNSEEN}"),
    ("knowledge", "full", SOFT, TVKD), ("knowledge", "facts", "kd", TVKD),
    ("knowledge", "facts", SOFT, TVKD),
    ("bytes", "", "kd, top 4", "kd"), ("bytes", "", "kd, on 100 pairs", "kd"))


# --------------------------------------------------------------------------------------------------
# Tables

def markdown(header, rows):
    lines = (header, ["---"] + ["---:"] * (len(header) - 1), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(record, keys=None):
    """A line a setting, over all seeds."""
    truth_known = any(row.get("reward") is not None for row in record["rows"])
    without = ("acc_vs_dpo",) if truth_known else ("reward", "vs_dpo", "true_acc")
    columns = [column for column in COLUMNS if column[1] not in without
               and (keys is None or column[1] in keys)]
    lines = []
    for name, rows in grouped(record["rows"]).items():
        stored, _ = summary(rows, "bytes")
        stored = "-" if stored is None or name == "teacher" else \
            f"{stored:,.0f}" if stored >= 10 else f"{stored:.2g}"
        lines.append([name, *(cell(rows, key, form) for _, key, form in columns), stored])
    return markdown(["model", *(heading for heading, _, _ in columns), "bytes"], lines)


def settings(record):
    """A line a method, a column a setting of the grid; the best score in bold."""
    scores, names, lines = choices(record), tuned_names(record), []
    grid = list(next(iter(scores.values())))
    for kind, of_kind in scores.items():
        best = max(of_kind, key=of_kind.get)
        lines.append([names[kind], *(f"**{of_kind[setting]:.2f}**" if setting == best
                                     else f"{of_kind[setting]:.2f}" for setting in grid)])
    return markdown(["steps, learning rate", *(f"{steps}, {lr:g}" for steps, lr in grid)], lines)


def tuned_names(record):
    """What `choices` tells the methods apart by -> their names."""
    return {without_setting(row): name_of(row) + (f", teacher: {row['teacher']}"
                                                  if row.get("teacher") else "")
            for row in record["rows"]}


def edges(records):
    """A line a method: its best score within the grid, and those beyond it; bold: a higher one."""
    within, beyond, lines = choices(records["tune"]), choices(records["edges"]), []
    names, grid = tuned_names(records["edges"]), list(next(iter(beyond.values())))
    for kind, of_kind in beyond.items():
        best = max(within[kind].values())
        lines.append([names[kind], f"{best:.2f}",
                      *(f"**{of_kind[setting]:.2f}**" if of_kind[setting] > best
                        else f"{of_kind[setting]:.2f}" for setting in grid)])
    return markdown(["steps, learning rate", "best within the grid",
                     *(f"{steps}, {lr:g}" for steps, lr in grid)], lines)


def values(record):
    """Correlation and agreement with the true reward, on the student's and on held-out pairs."""
    lines, groups = [], grouped(record["rows"], lambda row: (row["value"], row["split"]))
    for (kind, split), rows in groups.items():
        where = "the student's pairs" if split == "train" else "held-out pairs"
        lines.append([f"{kind}, {where}", str(rows[0]["n"]), cell(rows, "correlation", "+.2f"),
                      cell(rows, "agrees", ".3f")])
    return markdown(["value", "pairs a seed", "correlation", "same sign"], lines)


def words(record):
    """Mean psi of words by kind, on held-out pairs."""
    kinds = (("right", "a right fact or thing", "+1"), ("wrong", "a wrong fact or thing", "-1"),
             ("polite", "a polite sentence", "+0.5"), ("rude", "a rude sentence", "-0.5"))
    groups = grouped([row for row in record["rows"] if row["split"] == "test"],
                     lambda row: row["value"])
    lines = [[title, worth, *(mean_text([row["words"][kind]["psi"] for row in rows], "+.2f")
                              for rows in groups.values())] for kind, title, worth in kinds]
    return markdown(["after", "true reward", *(f"psi, {kind}" for kind in groups)], lines)


def sweep_table(record, option, keys):
    """A line a value of the swept option; of every model trained at several, the columns `keys`."""
    of_column = {key: (heading, form) for heading, key, form in COLUMNS}
    at = grouped(record["rows"], lambda row: option_of(row, option, record))
    names = [name for name, rows in grouped(record["rows"], plain_name).items()
             if len({option_of(row, option, record) for row in rows}) > 1]
    columns = [(name, key) for name in names for key in keys if (name, key) != ("dpo", "vs_dpo")]
    lines = []
    for x in sorted(at):
        by_name = grouped(at[x], plain_name)
        lines.append([f"{x:g}", *(cell(by_name.get(name, []), key, of_column[key][1])
                                  for name, key in columns)])
    return markdown([SWEPT[option], *(f"{name}, {of_column[key][0]}" for name, key in columns)],
                    lines)


def gap(left, right):
    """Rows of two models -> the mean difference of their true rewards, paired by seed."""
    rewards = [{row["seed"]: row["reward"] for row in rows} for rows in (left, right)]
    return mean_text([x - rewards[1][seed] for seed, x in rewards[0].items()], "+.2f")


def between(records):
    """A line a pair of methods: the difference of their true rewards, seed by seed."""
    lines = []
    for name, teacher, left, right in BETWEEN:
        if name in records:
            of_teacher = [row for row in records[name]["rows"]
                          if not teacher or row.get("teacher") == teacher]
            groups = grouped(of_teacher)
            title = f"{name}, taught {HEADINGS[teacher]}" if teacher in HEADINGS else name
            lines.append([left, right, title, gap(groups[left], groups[right])])
    return markdown(["method", "minus", "record", "true reward"], lines)


def unseen(record):
    """A line a method: the difference from DPO, under the usual teacher and under the other one."""
    groups, lines = grouped(record["rows"]), []
    for name, rows in groups.items():
        other = groups.get(f"{name}, {UNSEEN}")
        if other:
            lines.append([name, *(cell(x, "vs_dpo", "+.2f") for x in (rows, other))])
    return markdown(["minus DPO", "usual teacher", UNSEEN], lines)


def distance(record):
    """Soft labels against tvkd at the same beta, and at the beta whose mean KL is nearest, if it is
    within a factor of 1.5."""
    at = grouped(record["rows"], lambda row: (plain_name(row), option_of(row, "beta", record)))
    kl = {key: summary(rows, "kl")[0] for key, rows in at.items()}
    lines = []
    for key in sorted(key for key in at if key[0] == "dpo, teacher's soft labels"):
        ratios = {other: max(kl[key] / kl[other], kl[other] / kl[key]) for other in at
                  if other[0] == "tvkd implicit/value"}
        nearest = min(ratios, key=ratios.get)
        for other in sorted(ratios):
            if other[1] == key[1] or other == nearest and ratios[nearest] <= 1.5:
                lines.append([f"soft labels at {key[1]:g}, tvkd at {other[1]:g}",
                              *(cell(at[x], "kl", ".2f") for x in (key, other)),
                              gap(at[key], at[other])])
    return markdown(["beta", "KL, soft labels", "KL, tvkd", "soft labels minus tvkd"], lines)


def knowledge(record):
    """A line a method, a column a teacher: the difference from DPO, bold where it is clear of 0."""
    at, lines = of_teachers(record), []
    for name in dict.fromkeys(name for name, _ in at):
        if name != "dpo":
            lines.append([name, *(marked(at[name, teacher]) for teacher in TEACHERS)])
    return markdown(["what the teacher was taught", *(HEADINGS[t] for t in TEACHERS)], lines)


def of_teachers(record):
    """(name, teacher) -> rows. DPO reads no teacher: its one row stands for all."""
    at = grouped(record["rows"], lambda row: (name_of(row), row["teacher"]))
    dpo = next(rows for (name, _), rows in at.items() if name == "dpo")
    return {**{("dpo", teacher): dpo for teacher in TEACHERS}, **at}


def marked(rows):
    """The difference from DPO; bold where its interval leaves out 0."""
    mean, half = summary(rows, "vs_dpo")
    text = cell(rows, "vs_dpo", "+.2f")
    return f"**{text}**" if half is not None and abs(mean) > half else text


def reward_and_parts(record):
    """A line a method, a column a teacher: true reward = facts + manners, KL."""
    at, lines = of_teachers(record), []
    for name in dict.fromkeys(name for name, _ in at):
        texts = []
        for teacher in TEACHERS:
            reward, facts, manners, kl = (summary(at[name, teacher], key)[0]
                                          for key in ("reward", "facts", "manners", "kl"))
            texts.append(f"{reward:.2f} = {facts:.2f} {manners:+.2f}, KL {kl:.1f}")
        lines.append([name, *texts])
    return markdown(["what the teacher was taught", *(HEADINGS[t] for t in TEACHERS)], lines)


def real(records):
    """A table for each preference file."""
    texts = []
    for name, record in records.items():
        if name.startswith("real_"):
            n, splits = [row["pref_n"] for row in record["rows"]], record["rows"]
            splits = len({row["seed"] for row in splits})
            span = f"{min(n)}" if min(n) == max(n) else f"{min(n)} to {max(n)}"
            texts.append(f"`{name.removeprefix('real_')}`, {splits} splits, {span} held-out pairs "
                         f"each:\n\n{comparison(record)}")
    return "\n\n".join(texts)


def readme(records):
    """The README's rows; with a record of `knowledge`, also what other teachers are worth."""
    groups, lines = grouped(records["main"]["rows"]), []
    at = of_teachers(records["knowledge"]) if "knowledge" in records else {}
    columns = [column for column in COLUMNS if column[1] in ("reward", "vs_dpo", "true_acc", "kl")]
    for name in ("dpo", "tvkd implicit/value", "tvkd logits/hold", "dpo, teacher's soft labels",
                 "kd"):
        numbers = [marked(groups[name]) if key == "vs_dpo" else cell(groups[name], key, form)
                   for _, key, form in columns]
        lines.append([name, *numbers, *(marked(at.get((name, teacher), []))
                                        for teacher in TEACHERS[1:] if at)])
    return markdown(["model", *(heading for heading, _, _ in columns),
                     *(f"minus DPO, teacher taught {HEADINGS[t]}" for t in TEACHERS[1:] if at)],
                    lines)


def cost(records):
    """What the records took to make, on what, and how many differences from DPO they show."""
    seconds, compared = {}, 0
    for name, record in records.items():
        seconds |= {(row["seed"], identity(row)): row["seconds"] for row in record["rows"]}
        key = "acc_vs_dpo" if name.startswith("real_") else "vs_dpo"
        compared += sum(summary(rows, key)[0] is not None
                        for rows in grouped(record["rows"], identity).values())
    machines = sorted({f"{m['machine']}, Python {m['python']}, torch {m['torch']}"
                   for m in (record["made"] for record in records.values())})
    return (f"{len(seconds):,} cells took {sum(seconds.values()) / 60:.0f} minutes of one thread: "
            f"{'; '.join(machines)}. The tables show {compared} differences from DPO.")


TABLES = {      # mark: its record and what builds it
    **{name: (name, comparison) for name in ("main", "bytes", "gauge", "released")},
    "unseen": ("unseen", unseen),
    "values": ("values", values), "words": ("values", words), "distance": ("frontier", distance),
    "knowledge": ("knowledge", knowledge), "parts": ("knowledge", reward_and_parts)}


def tables(records):
    """Mark -> the text that stands there, for the records there are."""
    texts = {mark: built(name, table, records[name]) for mark, (name, table) in TABLES.items()
             if name in records}
    for name, record in records.items():
        if name.startswith("tune"):
            texts[name] = built(name, settings, record)
        if name in SWEEPS:
            keys = ("kl",) if name in ("alpha", "frontier") else ()
            texts[name] = built(name, sweep_table, record, SWEEPS[name],
                                ("reward", "vs_dpo", *keys))
    if any(name.startswith("real_") for name in records):
        texts["real"] = built("real", real, records)
    if "main" in records:
        texts["readme"] = built("main", readme, records)
        texts["between"] = built("main", between, records)
    if {"tune", "edges"} <= set(records):
        texts["edges"] = built("edges", edges, records)
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
    texts, files = {**tables(records), "cost": cost(records)}, {}
    for name in DOCS:
        text = (root / name).read_text(encoding="utf-8")
        files[name] = filled(text, texts, name)
    files |= {f"docs/{name}.svg": svg for name, svg in figures(records).items()}
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")


def main(argv=None, root=ROOT):
    argparse.ArgumentParser(prog="python -m evidence.tables", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    return exit_code(lambda _: rebuild(root), argv)


if __name__ == "__main__":
    sys.exit(main())
