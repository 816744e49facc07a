"""What is trained: every experiment as data. evidence/controls.py says how.

A cell is one student of one seed, or one measurement on its teacher. An experiment is a list of
cells, trained for each of its seeds, seed by seed: a stopped record holds whole seeds and a part of
one. Steps and learning rate of a cell come from `picker`: those with the highest mean score on the
validation prompts of two further seeds. The tuning of a table gives every method the same number of
tries; `care` adds beta and temperature where a method has them.
"""

import json
import os
import statistics
from dataclasses import fields
from typing import NamedTuple

from harness.options import Config


class Cell(NamedTuple):
    method: str                 # "teacher", "sft", or one of evidence.controls.loss_of
    value: str | None = None    # whose psi is read
    terminal: str | None = None
    control: str = ""           # what is unusual about it, words of evidence.controls
    dose: float = 0             # how much of it
    options: tuple = ()         # (name, value) of every option of train.py not at its default
    split: str = "test"         # measured on; "choice": the test prompts of a split that only tunes
    teacher: str = ""           # which pairs and labels trained the teacher: evidence.controls


class Experiment(NamedTuple):
    seeds: tuple
    cells: list


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
TEACHER, SFT = Cell("teacher"), Cell("sft")
BC, KD, DPO, KD_DPO = Cell("bc"), Cell("kd"), Cell("dpo"), Cell("kd+dpo")
TVKD, LOGITS, KD_TVKD = Cell("tvkd", *IMPLICIT), Cell("tvkd", *HOLD), Cell("kd+tvkd", *IMPLICIT)
# At beta (1 + alpha) the optimum is a weighted mean of both rewards, not their sum.
TVKD_MEAN = with_options(TVKD, beta=2.0)
HALF = Cell("dpo", control="beta", options=(("beta", 0.5),))
HARD, SOFT, MEAN, EVIDENCE = (Cell("dpo", *IMPLICIT, control)
                              for control in ("relabel", "soft", "mean", "evidence"))
SHUFFLED = TVKD._replace(control="shuffled")
ZERO = Cell("tvkd", "implicit", "zero")
WARM = [KD._replace(control="warm", dose=t) for t in (2, 4)]


PLUS = with_options(TVKD._replace(control="plus"), alpha=-1.0)
# Cells that take the settings of another, to differ from it in one thing.
LIKE = {SHUFFLED: TVKD, PLUS: TVKD, ZERO: DPO}

# --------------------------------------------------------------------------------------------------
# The tuning experiments

TUNING_SEEDS = (100, 101)                               # in no table
TUNED = [BC, KD, DPO, TVKD, LOGITS, TVKD_MEAN, HALF, HARD, SOFT, KD_DPO, KD_TVKD]
THREE = (3e-4, 1e-3, 3e-3)
# A method's own window of rates: what copies the teacher at every token likes higher ones.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATE = {"bc": 2, "kd": 2, "kd+dpo": 1, "kd+tvkd": 1}
FAMILIES = {"dpo": [DPO, *sweep([DPO], "beta", (0.5, 2.0))],
            "tvkd implicit/value": [TVKD, *sweep([TVKD], "beta", (0.5, 2.0))],
            "dpo, teacher's soft labels": [SOFT, *sweep([SOFT], "beta", (0.25, 0.5))],
            "kd": [KD, *WARM], "bc": [BC], "kd+tvkd": [KD_TVKD], "tvkd logits/hold": [LOGITS]}
COMPARED = [DPO, TVKD, SOFT, KD]
TEACHERS = ("full", "facts", "manners", "contrary")
AGAINST = [BC, KD, TVKD, TVKD_MEAN, SOFT, MEAN, EVIDENCE, KD_DPO, KD_TVKD]      # all read a teacher
# DPO reads no teacher: one row serves all four. Two answers a prompt, for there are many cells.
KNOWLEDGE = [with_options(cell, samples=2) for cell in (
    DPO._replace(teacher="full"),
    *(cell._replace(teacher=teacher) for teacher in TEACHERS for cell in AGAINST))]
# Settings are chosen under the teacher of facts and used under all four.
TUNED_KNOWLEDGE = [cell for cell in KNOWLEDGE if cell == KNOWLEDGE[0] or cell.teacher == "facts"]
LIKE |= {cell: cell._replace(teacher="facts") for cell in KNOWLEDGE if cell not in TUNED_KNOWLEDGE}
STUDENTS = [{"student_width": 24}, {}, {"student_width": 96}, {"student_layers": 4}]
SIZES = [with_options(cell, **sizes, **({"teacher_width": width} if cell != DPO else {}))
         for sizes in STUDENTS for width in (96, 192) for cell in COMPARED
         if cell != DPO or width == 96]

# On files. Batches of 8 pairs on the first two, as train.py has them.
ON_FILES = [DPO, TVKD, SOFT, KD, BC]
ON_HUMAN = [*ON_FILES, KD_TVKD]
REAL = {"block_size": 256, "student_sft_steps": 200, "teacher_sft_steps": 200,
        "teacher_dpo_steps": 60, "steps": 120, "val_pairs": 150, "test_pairs": 250}
HUMAN = {"block_size": 64, "batch_size": 64, "teacher_layers": 3, "teacher_heads": 8,
         "teacher_width": 128, "student_layers": 2, "student_heads": 4, "student_width": 64,
         "teacher_sft_steps": 600, "teacher_dpo_steps": 180, "teacher_dpo_lr": 3e-4,
         "student_sft_steps": 400, "val_pairs": 100, "test_pairs": 1400, "max_new_tokens": 32}
HUMAN_STEPS = {300: (30, 60, 120), 3000: (60, 120, 240)}
# Three more tries each, beyond the edges of that grid: (steps, rate).
HUMAN_BEYOND = {
    300: [(DPO, ((15, 1e-4), (30, 3e-5), (15, 3e-5))),
          (TVKD, ((240, 1e-4), (120, 3e-5), (240, 3e-5))),
          (SOFT, ((60, 3e-5), (30, 3e-5), (240, 3e-4))),
          (KD, ((60, 3e-2), (240, 1e-3), (15, 1e-2))),
          (BC, ((15, 1e-3), (30, 3e-4), (15, 3e-4))),
          (KD_TVKD, ((60, 1e-2), (30, 1e-2), (15, 1e-2)))],
    3000: [(DPO, ((120, 3e-3), (60, 3e-3), (30, 1e-3))),
           (TVKD, ((240, 3e-3), (480, 1e-3), (120, 3e-3))),
           (SOFT, ((240, 3e-3), (480, 1e-3), (120, 3e-3))),
           (KD, ((30, 3e-3), (30, 1e-2), (15, 1e-2))),
           (BC, ((30, 1e-2), (60, 3e-2), (120, 3e-2))),
           (KD_TVKD, ((120, 1e-2), (60, 1e-2), (240, 1e-2)))]}


def tuning(cells, all_steps, rates=None, seeds=TUNING_SEEDS, split="val", first=0, n=4):
    """Every cell at each number of steps with each rate: those given, or n of the cell's own."""
    tried = []
    for cell in cells:
        start = FIRST_RATE.get(cell.method, 0) + first
        tried += [with_options(cell, steps=steps, lr=lr)._replace(split=split)
                  for steps in all_steps for lr in rates or RATES[start:start + n]]
    return Experiment(seeds, tried)


def on_file(cells, file, options=REAL):
    return [with_options(cell, data=file, **options) for cell in cells]


def human(cells, file, n):
    return on_file(cells, file, {**HUMAN, "student_pairs": n})


def record_name(kind, file):
    return f"{kind}_{os.path.splitext(os.path.basename(file))[0]}"


def tuning_experiment(name, file=None):
    """The Experiment that chooses settings, by name."""
    if name.startswith("tune_human"):
        parts = [tuning(human(ON_HUMAN, file, n), steps, split="choice", n=3).cells
                 for n, steps in HUMAN_STEPS.items()]
        beyond = [with_options(cell, steps=steps, lr=lr)._replace(split="choice")
                  for n, methods in HUMAN_BEYOND.items() for method, tries in methods
                  for cell in human([method], file, n) for steps, lr in tries]
        return Experiment(TUNING_SEEDS, sum([*parts, beyond], []))
    if name.startswith("tune_real"):
        return tuning(on_file(ON_FILES, file), (120,), (1e-4, 3e-4, 1e-3), seeds=(100,))
    if name == "tune_care":
        planned = tuning(sum(FAMILIES.values(), []), (30, 60, 120, 240))
        known = set(tuning_experiment("tune").cells)
        return planned._replace(cells=[cell for cell in planned.cells if cell not in known])
    return {"tune": tuning(TUNED, (60, 120), THREE),
            "tune_knowledge": tuning(TUNED_KNOWLEDGE, (60,), THREE),
            "tune_sizes": tuning(SIZES, (60,)),
            "tune_epochs": tuning(COMPARED, EPOCHS, first=1)}[name]


def tunings_of(name):
    """Names of the tuning experiments that an experiment takes its settings from."""
    if name == "care":
        return ["tune", "tune_care"]
    own = name in ("knowledge", "sizes", "epochs") or name.startswith(("real_", "human_"))
    return [f"tune_{name}" if own else "tune"]


# --------------------------------------------------------------------------------------------------
# The experiments. pick(cell, family, **setting) -> the cell with its chosen settings

SEEDS, KNOWLEDGE_SEEDS, SWEEP_SEEDS = tuple(range(16)), tuple(range(12)), tuple(range(8))
EPOCHS = (5, 10, 15)            # one, two and three epochs of 300 pairs, in batches of 64


def experiment(name, pick, file=None):
    """The Experiment of this name."""
    if name.startswith("real_"):
        return Experiment(SWEEP_SEEDS, [*on_file([TEACHER, SFT], file),
                                        *map(pick, on_file(ON_FILES, file))])
    if name.startswith("human_"):
        cells = [pick(cell) for n in HUMAN_STEPS for cell in human(ON_HUMAN, file, n)]
        cells += [cell._replace(method=KD_DPO.method, value=None, terminal=None)    # without psi
                  for cell in cells if cell.method == KD_TVKD.method]
        return Experiment(SWEEP_SEEDS, [*on_file([TEACHER, SFT], file, HUMAN), *cells])
    return EXPERIMENTS[name](pick)


def main_table(pick):
    return Experiment(SEEDS, [TEACHER, SFT, *map(pick, [*TUNED, SHUFFLED, PLUS, ZERO])])


def care(pick):
    """The main methods, each at its own best settings and at its best ones of 60 steps."""
    return Experiment(SWEEP_SEEDS, list(dict.fromkeys(
        pick(family[0], family, **setting) for setting in ({}, {"steps": 60})
        for family in FAMILIES.values())))


def noise(cell, share):
    return cell._replace(control=f"{cell.control} noise".strip(), dose=share) if share else cell


def noisy_labels(pick):
    return Experiment(SWEEP_SEEDS, [noise(pick(cell), share) for share in (0, 0.2, 0.4)
                                    for cell in (DPO, TVKD, HARD, SOFT)])


def wrong(pick):
    """Teachers with a share of their labels flipped, and of the opposite reward; students with
    clean labels, and with the very labels of the teacher, flipped ones among them. 60 steps."""
    usual = [pick(cell, steps=60) for cell in COMPARED]
    taught = [cell._replace(teacher=f"flipped {share:g}") for share in (0.1, 0.2, 0.4)
              for cell in usual[1:]]
    return Experiment(SWEEP_SEEDS, [
        TEACHER, *usual, *(TEACHER._replace(teacher=f"flipped {share:g}") for share in (0.2, 0.4)),
        *taught, *(cell._replace(teacher="opposite") for cell in usual[1:]),
        *(noise(cell, share)._replace(teacher="" if cell == usual[0] else f"flipped {share:g}")
          for share in (0.2, 0.4) for cell in usual)])


def unseen(pick):
    """Students' pairs that the teacher never saw, with clean labels and with noise."""
    dpo, *others = map(pick, (DPO, TVKD, HARD, SOFT, KD, BC))
    noisy = [noise(cell, 0.4) for cell in (dpo, others[0])]
    return Experiment(SWEEP_SEEDS, [
        dpo, *others, *(cell._replace(teacher="unseen") for cell in others),
        *noisy, noisy[1]._replace(teacher="unseen")])


def sizes(pick):
    teachers = [with_options(TEACHER, **size) for size in ({}, {"teacher_width": 192})]
    return Experiment(SWEEP_SEEDS, [*teachers, *map(pick, SIZES)])


def frontier(pick):
    cells = sweep([*map(pick, (DPO, TVKD, SOFT))], "beta", (0.5, 1.0, 2.0, 4.0))
    return Experiment(SWEEP_SEEDS, [*cells, with_options(pick(SOFT), beta=0.25)])


# In the order in which a sceptical reader asks; on files: human and real.
EXPERIMENTS = {
    "main": main_table, "care": care, "wrong": wrong, "sizes": sizes,
    "epochs": lambda pick: Experiment(
        SWEEP_SEEDS, [pick(cell, steps=steps) for steps in EPOCHS for cell in COMPARED]),
    "knowledge": lambda pick: Experiment(KNOWLEDGE_SEEDS, list(map(pick, KNOWLEDGE))),
    "noise": noisy_labels, "unseen": unseen,
    "pairs": lambda pick: Experiment(
        SWEEP_SEEDS, sweep([pick(cell, steps=n) for n in (60, 120) for cell in (DPO, TVKD, KD)],
                           "student_pairs", (100, 300, 1000, 3000))),
    "alpha": lambda pick: Experiment(
        SWEEP_SEEDS, [pick(DPO), *sweep([pick(TVKD)], "alpha", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0))]),
    "frontier": frontier}
# A cell is compared with the DPO of the same values of these.
SWEPT = {"pairs": ("student_pairs", "steps"), "noise": ("dose",), "unseen": ("dose",),
         "wrong": ("dose",), "human": ("student_pairs",), "frontier": ("beta",),
         "epochs": ("steps",), "sizes": ("student_width", "student_layers")}


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


def option_of(row, name):
    """The value of an option: a row has those not at the defaults of its record, its "usual" ones.
    """
    usual = row.get("usual") or defaults("data" in row["options"])
    return row["options"].get(name, usual[name])


def without_setting(row):
    """What a row trains, whatever its steps and learning rate."""
    options = {name: x for name, x in row["options"].items() if name not in ("steps", "lr")}
    return identity({**row, "options": options, "split": ""})


def choices(rows):
    """Rows of tuning -> {without_setting: {(steps, learning rate): mean validation score}}.

    The score is the true reward, or on real preferences the accuracy.
    """
    scores = {}
    for row in rows:
        setting = option_of(row, "steps"), option_of(row, "lr")
        score = row["pref_acc"] if row["reward"] is None else row["reward"]
        scores.setdefault(without_setting(row), {}).setdefault(setting, []).append(score)
    return {kind: {setting: statistics.fmean(x) for setting, x in of_kind.items()}
            for kind, of_kind in scores.items()}


class Picker:
    """pick(cell): the cell with the settings of the highest mean score in the rows of tuning."""

    def __init__(self, rows):
        self.scores = choices(rows)

    def __call__(self, cell, family=None, steps=None):
        """family: variants of the cell, of which the best is taken; steps: only settings of these.
        """
        tried = {}
        for one in family or [cell]:
            of_one = self.scores[without_setting(as_row(LIKE.get(one, one)))]
            tried |= {(one, *setting): score for setting, score in of_one.items()
                      if steps in (None, setting[0])}
        best, steps, lr = max(tried, key=tried.get)
        return with_options(best, steps=steps, lr=lr)
