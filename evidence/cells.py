"""What is trained: every experiment as data. evidence/controls.py says how.

A cell is one student of one seed, or one measurement on its teacher. An experiment is a list of
cells, trained for each of its seeds. Steps and learning rate of a cell come from `picker`: those
with the highest mean score on the validation prompts of two further seeds. Every method of a tuning
experiment has the same grid, and so the same number of tries.
"""

import json
import os
import statistics
from dataclasses import fields
from typing import NamedTuple

from harness.options import Config


class Cell(NamedTuple):
    method: str                 # "teacher", "sft", "values", or one of evidence.controls.loss_of
    value: str | None = None    # whose psi is read
    terminal: str | None = None
    control: str = ""           # what is unusual about it, words of evidence.controls
    dose: float = 0             # how much of it
    options: tuple = ()         # (name, value) of every option of train.py not at its default
    split: str = "test"         # the prompts it is measured on
    teacher: str = ""           # which pairs and labels trained the teacher: evidence.controls


class Experiment(NamedTuple):
    seeds: range | tuple
    cells: list
    swept: str = ""             # a cell is compared with the DPO of the same value of this


def defaults(with_data):
    """Every option of train.py at its default -> dict. With --data they are others."""
    return {field.name: field.metadata["with_data"] if with_data else field.default
            for field in fields(Config)}


def with_options(cell, **changes):
    """The cell with other options. Those at their defaults are left out: equal cells are equal."""
    options = {**dict(cell.options), **changes}
    usual = defaults("data" in options)
    return cell._replace(options=tuple(sorted(
        (name, x) for name, x in options.items() if x != usual[name])))


def sweep(cells, option, values):
    """Every cell at every value of an option."""
    return [with_options(cell, **{option: value}) for value in values for cell in cells]


# --------------------------------------------------------------------------------------------------
# The methods

IMPLICIT, HOLD = ("implicit", "value"), ("logits", "hold")
BC, KD, DPO, KD_DPO = Cell("bc"), Cell("kd"), Cell("dpo"), Cell("kd+dpo")
TVKD, LOGITS, KD_TVKD = Cell("tvkd", *IMPLICIT), Cell("tvkd", *HOLD), Cell("kd+tvkd", *IMPLICIT)
# At beta (1 + alpha) the optimum is a weighted mean of both rewards, not their sum.
TVKD_MEAN = with_options(TVKD, beta=2.0)
HALF = Cell("dpo", control="beta", options=(("beta", 0.5),))
HARD, SOFT, MEAN, EVIDENCE = (Cell("dpo", *IMPLICIT, control)
                              for control in ("relabel", "soft", "mean", "evidence"))
KD_SOFT = KD_DPO._replace(value="implicit", terminal="value", control="soft")
TOP = Cell("kd", control="top", dose=1)
FEW = sweep([KD], "student_pairs", (1, 10, 30))
SHUFFLED = TVKD._replace(control="shuffled")
ZERO = Cell("tvkd", "implicit", "zero")
TUNED = [BC, KD, DPO, TVKD, LOGITS, TVKD_MEAN, HALF, HARD, SOFT, KD_DPO, KD_SOFT, KD_TVKD, TOP]


def plus(cell):
    """The same with the plus sign."""
    return with_options(cell._replace(control=f"{cell.control} plus".strip()), alpha=-1.0)


PLUS = plus(TVKD)

# Forms of the released code, full vocabulary in place of its 50 stored tokens. "normalised": the
# value temperature * logsumexp(log p / temperature) of normalised log-probs; dose: the temperature.
LENGTH = Cell("tvkd", "logits", "zero", options=(("gamma", 0.7),))
FLAT, TEMPERED = (LENGTH._replace(control="normalised", dose=t) for t in (1, 2))
# "entropy": the shipped recipe, log pi(y|x) - dose * entropies of the student's next states
RECIPE, RECIPE_PLUS = (Cell("released", control="entropy", dose=sign) for sign in (1, -1))

# Cells that take the settings of another, to differ from it in one thing.
LIKE = {SHUFFLED: TVKD, PLUS: TVKD, ZERO: DPO, plus(LOGITS): LOGITS,
        **dict.fromkeys((LENGTH, plus(LENGTH), FLAT, TEMPERED, plus(TEMPERED), RECIPE,
                         RECIPE_PLUS), DPO)}

# --------------------------------------------------------------------------------------------------
# The tuning experiments

TUNING_SEEDS = (100, 101)                               # in no table
RATES = (3e-4, 1e-3, 3e-3)
GRID = [{"steps": steps, "lr": lr} for steps in (60, 120) for lr in RATES]
EDGES = [{"steps": steps, "lr": lr} for steps in (60, 120) for lr in (1e-4, 1e-2)]
SHORT_GRID = [{"lr": lr} for lr in RATES]               # at the steps the cell has
REAL_GRID = [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3)]   # batches of 8 pairs, not 64
TEACHERS = ("full", "facts", "manners", "contrary")
AGAINST = [BC, KD, TVKD, TVKD_MEAN, SOFT, MEAN, EVIDENCE, KD_DPO, KD_TVKD]      # all read a teacher
# DPO reads no teacher: one row serves all four. Two answers a prompt, for there are many cells.
KNOWLEDGE = [with_options(cell, samples=2) for cell in (
    DPO._replace(teacher="full"),
    *(cell._replace(teacher=teacher) for teacher in TEACHERS for cell in AGAINST))]
# Settings are chosen under the teacher of facts and used under all four.
TUNED_KNOWLEDGE = [cell for cell in KNOWLEDGE if cell == KNOWLEDGE[0] or cell.teacher == "facts"]
LIKE |= {cell: cell._replace(teacher="facts") for cell in KNOWLEDGE if cell not in TUNED_KNOWLEDGE}
ON_FILES = [DPO, TVKD, SOFT, KD, BC]
REAL = {"block_size": 256, "student_sft_steps": 200, "teacher_sft_steps": 200,
        "teacher_dpo_steps": 60, "steps": 120, "val_pairs": 150, "test_pairs": 250}


def tuning(cells, grid, seeds=TUNING_SEEDS):
    return Experiment(seeds, [with_options(cell, **setting)._replace(split="val")
                              for cell in cells for setting in grid])


def on_file(cells, file):
    return [with_options(cell, data=file, **REAL) for cell in cells]


def real_name(file):
    return f"real_{os.path.splitext(os.path.basename(file))[0]}"


def tunings(files=()):
    """name -> Experiment: what chooses settings."""
    return {"tune": tuning([*TUNED, *FEW], GRID),
            "tune_knowledge": tuning(TUNED_KNOWLEDGE, SHORT_GRID),
            **{f"tune_{real_name(file)}": tuning(on_file(ON_FILES, file), REAL_GRID, (100,))
               for file in files}}


def tuning_of(name):
    """Which tuning experiment an experiment takes its settings from."""
    return f"tune_{name}" if name == "knowledge" or name.startswith("real_") else "tune"


# --------------------------------------------------------------------------------------------------
# The experiments

SEEDS, KNOWLEDGE_SEEDS, SWEEP_SEEDS = range(16), range(12), range(8)


def experiment(name, pick, file=None):
    """The Experiment of this name. pick(cell) -> the cell with its steps and learning rate."""
    if name == "knowledge":
        return Experiment(KNOWLEDGE_SEEDS, list(map(pick, KNOWLEDGE)))
    if file:
        cells = map(pick, on_file(ON_FILES, file))
        return Experiment(SWEEP_SEEDS, [*on_file([Cell("sft")], file), *cells])
    return EXPERIMENTS[name](pick)


def main_table(pick):
    cells = [*TUNED, FEW[0], SHUFFLED, PLUS, ZERO]
    return Experiment(SEEDS, [Cell("teacher"), Cell("sft"), *map(pick, cells)])


def values(pick):
    return Experiment(SEEDS, [Cell("values", *kind, split=split)
                              for kind in (IMPLICIT, HOLD) for split in ("train", "test")])


def unseen(pick):
    """Students' pairs that the teacher never saw, with clean labels and with noise."""
    dpo, *others = map(pick, (DPO, TVKD, HARD, SOFT, KD, BC))
    noisy = [noise(cell, 0.4) for cell in (dpo, others[0])]
    return Experiment(SWEEP_SEEDS, [
        dpo, *others, *(cell._replace(teacher="unseen") for cell in others),
        *noisy, noisy[1]._replace(teacher="unseen")], "dose")


def noise(cell, share):
    return cell._replace(control=f"{cell.control} noise".strip(), dose=share) if share else cell


def noisy_labels(pick):
    return Experiment(SWEEP_SEEDS, [noise(pick(cell), share) for share in (0, 0.2, 0.4)
                                    for cell in (DPO, TVKD, HARD, SOFT)], "dose")


def gauge(pick):
    tvkd, logits = pick(TVKD), pick(LOGITS)
    return Experiment(SWEEP_SEEDS, [pick(DPO), tvkd, logits, *(
        cell._replace(control="gauge", dose=dose)
        for cell in (tvkd, logits) for dose in (-0.5, 0.5))])


def stored_bytes(pick):
    return Experiment(SWEEP_SEEDS, [
        *map(pick, (DPO, TVKD, SOFT)), *(pick(TOP)._replace(dose=k) for k in (1, 4, 16)),
        *map(pick, FEW), *sweep([pick(KD)], "student_pairs", (100, 300))])


def frontier(pick):
    cells = sweep([*map(pick, (DPO, TVKD, SOFT))], "beta", (0.5, 1.0, 2.0, 4.0))
    return Experiment(SWEEP_SEEDS, [*cells, with_options(pick(SOFT), beta=0.25)], "beta")


def released(pick):
    return Experiment(SWEEP_SEEDS, [pick(cell) for cell in (
        DPO, LOGITS, plus(LOGITS), LENGTH, plus(LENGTH), FLAT, TEMPERED, plus(TEMPERED), TVKD, PLUS,
        RECIPE, RECIPE_PLUS)])


EXPERIMENTS = {
    "main": main_table, "values": values, "unseen": unseen, "noise": noisy_labels,
    "frontier": frontier, "bytes": stored_bytes, "released": released, "gauge": gauge,
    "edges": lambda pick: tuning([*TUNED, *FEW], EDGES),    # rates beyond GRID; chooses nothing
    "alpha": lambda pick: Experiment(
        SWEEP_SEEDS, [pick(DPO), *sweep([pick(TVKD)], "alpha", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0))]),
    "pairs": lambda pick: Experiment(
        SWEEP_SEEDS, sweep([*map(pick, (DPO, TVKD, KD))], "student_pairs", (100, 300, 1000, 3000)),
        "student_pairs")}
NAMES = (*EXPERIMENTS, "knowledge")                     # all but those that need --data


# --------------------------------------------------------------------------------------------------
# Cells and rows of a record

def as_row(cell):
    """The fields of a row that say which cell it is of."""
    options = {name: os.path.basename(x) if name == "data" else x for name, x in cell.options}
    return {**cell._asdict(), "options": options}


def identity(row):
    """Which cell a row is of: the same text in every record that has it."""
    parts = {name: row.get(name, "") for name in Cell._fields}
    return json.dumps({**parts, "dose": float(row["dose"])}, sort_keys=True)


def without_setting(row):
    """What a row trains, whatever its steps and learning rate."""
    options = {name: x for name, x in row["options"].items() if name not in ("steps", "lr")}
    return identity({**row, "options": options, "split": "", "dose": 0})


def choices(record):
    """A tuning record -> {without_setting: {(steps, learning rate): mean validation score}}.

    The score is the true reward, or on real preferences the accuracy.
    """
    scores = {}
    for row in record["rows"]:
        setting = tuple(row["options"].get(name, record["options"][name])
                        for name in ("steps", "lr"))
        score = row["pref_acc"] if row["reward"] is None else row["reward"]
        scores.setdefault(without_setting(row), {}).setdefault(setting, []).append(score)
    return {kind: {setting: statistics.fmean(x) for setting, x in of_kind.items()}
            for kind, of_kind in scores.items()}


def picker(record):
    """A tuning record -> pick(cell): the cell with the setting of the highest mean score."""
    scores = choices(record)

    def pick(cell):
        of_cell = scores[without_setting(as_row(LIKE.get(cell, cell)))]
        steps, lr = max(of_cell, key=of_cell.get)
        return with_options(cell, steps=steps, lr=lr)
    return pick
