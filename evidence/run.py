"""Train what the records of the experiments still lack.

    python -m evidence.run                              all experiments but those on files
    python -m evidence.run main wrong                   these, and the tuning they read settings of
    python -m evidence.run human real --data=FILE.jsonl on files; --data can be given more than once
    python -m evidence.run main --seeds=4               the first four seeds of each; go on later
    python -m evidence.run --plan                       what is left to do, and how long it takes
    python -m evidence.tables                           the tables and figures from the records

The record of an experiment is evidence/results/NAME.json, a row for each cell and seed. It is
written after every cell, seed by seed, so a stopped run goes on where it was, and what there is can
be committed. A row that is there is not trained again, even if the code has changed since (it holds
the digest); delete the record to repeat the experiment. Models that cells share are kept in work/
beside the records. All is on one thread; for another core, give a second command other experiments
and another --results, and move its records here.
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import hashlib
import json
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from harness.errors import UserError, printable
from evidence import controls
from evidence.cells import (EXPERIMENTS, Experiment, Picker, as_row, defaults, experiment, identity,
                            record_name, tuning_experiment, tunings_of, with_options)
from evidence.records import Parser
from harness.code import definitions
from harness.command import exit_code
from harness.files import write
from harness.keep import lock
from harness.preferences import load_pairs

RESULTS = Path(__file__).resolve().parent / "results"
ON_FILES = ("human", "real")
MATTERS = (*controls.TEXTS, "teacher_", "student_", "alpha", "beta", "gamma", "steps", "lr",
           "samples", "max_new_tokens")             # beginnings of the options that cells read


# --------------------------------------------------------------------------------------------------
# Cells

def run(name, planned, results):
    """Do what the record lacks, and write it after every cell."""
    path, code = results / f"{name}.json", digest_of_code()
    rows = rows_in(path, planned)
    tasks = [task for task in tasks_of(planned) if task not in rows]
    left, spent, expected, at = sum(map(seconds, tasks)), 0.0, 0.0, None
    for number, task in enumerate(tasks, 1):
        seed, cell = task
        at = at if at and at.seed == seed else controls.Seed(results / "work", seed)
        row = {**as_row(cell), "seed": seed, **controls.numbers_of(cell, at), "code": code}
        rows[task] = row
        write_record(path, planned, rows)
        left, spent = left - seconds(task), spent + row["seconds"]
        expected += seconds(task)
        score = row["pref_acc"] if row["reward"] is None else row["reward"]
        what = printable(" ".join(str(x) for x in cell if x))
        print(f"{name} seed {seed}  {what}  {score:.3f}  {row['seconds']:.0f} s; "
              f"{len(tasks) - number} cells left, about {left * spent / expected / 60:.0f} min",
              flush=True)


def digest_of_code():
    """Of all definitions that make numbers. Those of the method count without their comments."""
    parts = sorted(digest for digest, _ in definitions().values())
    parts.append(Path(controls.__file__).read_text(encoding="utf-8"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def tasks_of(planned):
    """[(seed, cell)], seed by seed."""
    return [(seed, cell) for seed in planned.seeds for cell in planned.cells]


def rows_in(path, planned):
    """(seed, cell) -> row, of a record that may not be there. Refuses rows that nobody planned."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    usual = json.loads(json.dumps(defaults("data" in dict(planned.cells[0].options))))
    of_cell = {identity(as_row(cell)): cell for cell in planned.cells}
    rows, then = {}, record["options"]
    changed = [name for name, x in usual.items() if name.startswith(MATTERS)
               and then.get(name, x) != x and not all(name in dict(cell.options) for cell in
                                                      planned.cells if cell.method in STEP)]
    if changed:
        raise UserError(f"{path}: expected rows made with today's defaults, got others of "
                        f"{', '.join(changed)}; move it away to begin anew")
    for row in record["rows"]:
        if identity(row) not in of_cell:
            raise UserError(f"{path}: expected rows of today's plan, got {row['method']} "
                            f"{row['control']} {row['options']}; move it away to begin anew")
        row.setdefault("code", record["made"]["code"][:12])
        rows[row["seed"], of_cell[identity(row)]] = row
    return rows


def write_record(path, planned, rows):
    """rows: (seed, cell) -> row. They stand seed by seed, a row a line."""
    place = {cell: i for i, cell in enumerate(planned.cells)}
    order = sorted(rows, key=lambda task: (task[0], place[task[1]]))
    made = {"torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "threads": 1, "code": rows[order[-1]]["code"]}
    record = {"experiment": path.stem, "made": made,
              "options": defaults("data" in dict(planned.cells[0].options)),
              "rows": [rows[task] for task in order]}
    text = json.dumps(record).replace('{"method"', '\n{"method"')
    write(path, f"{text}\n".encode())


# --------------------------------------------------------------------------------------------------
# How long it takes: seconds of one thread on the machine of the records

STEP = {"bc": 0.06, "dpo": 0.05, "tvkd": 0.05, "kd": 0.1, "kd+dpo": 0.17, "kd+tvkd": 0.17}
MODELS, MEASURE = 90, 2.5       # of a toy seed's teacher and starting student; of a cell


def seconds(task):
    """What one (seed, cell) takes, without its teacher and starting student."""
    cell, options = task[1], dict(task[1].options)
    usual = defaults("data" in options)
    steps, batch = (options.get(name, usual[name]) for name in ("steps", "batch_size"))
    size = 2.5 if "data" in options else options.get("student_width", 48) / 48
    return MEASURE + STEP.get(cell.method, 0) * steps * batch / 64 * size


def estimate(name, planned, results):
    """Print the cells that are left and their minutes, with those of the models that they need."""
    rows = rows_in(results / f"{name}.json", planned)
    tasks = [task for task in tasks_of(planned) if task not in rows]
    models = {(seed, cell.teacher, *(dict(cell.options).get(x) for x in (
        "data", "teacher_width", "student_width", "student_layers"))) for seed, cell in tasks}
    minutes = (sum(map(seconds, tasks)) + MODELS * len(models)) / 60
    print(f"{name:<32}{len(rows):>6} of {len(tasks_of(planned)):>5} cells done, at most "
          f"{minutes:>4.0f} min left")


# --------------------------------------------------------------------------------------------------
# The command line

def parse(argv):
    names = (*EXPERIMENTS, *ON_FILES)
    parser = Parser("python -m evidence.run", __doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(names)}")
    parser.add_argument("--data", action="append", default=[], metavar="FILE",
                        help="JSONL file of preferences, for human and real")
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=RESULTS,
                        help="of the records (default: evidence/results)")
    parser.add_argument("--seeds", type=int, default=None, metavar="N",
                        help="only the first N seeds of every experiment and of its tuning")
    parser.add_argument("--plan", action="store_true", help="train nothing; print what is left")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in names:
            raise UserError(f"expected some of {', '.join(names)}, got {name}")
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {options.seeds}")
    if bool(options.data) != bool({*ON_FILES} & {*options.names}):
        raise UserError(f"--data: expected a file beside {' or '.join(ON_FILES)}, and none without")
    return options


def picker(choosing, results, plan):
    """The Picker of these tuning experiments; for a plan, `longest` where one has not ended."""
    rows = {of: rows_in(results / f"{of}.json", planned) for of, planned in choosing.items()}
    if plan and any(set(tasks_of(planned)) - set(rows[of]) for of, planned in choosing.items()):
        return longest
    return Picker([row for of in rows for row in rows[of].values()])


def longest(cell, family=None, steps=None):         # for a plan before settings are chosen
    return with_options(cell, **({"steps": steps} if steps else {}))


def command(argv):
    options = parse(argv)
    for file in options.data:
        load_pairs(file)                                # refused now rather than after an hour
    names = {name: None for name in EXPERIMENTS if name in options.names or not options.names}
    names |= {record_name(kind, file): file for kind in ON_FILES if kind in options.names
              for file in options.data}
    torch.set_num_threads(1)
    with nullcontext() if options.plan else locked(options.results):
        for name, file in names.items():
            choosing = {of: first(options.seeds, tuning_experiment(of, file))
                        for of in tunings_of(name)}
            do = estimate if options.plan else run
            for of, planned in choosing.items():
                do(of, planned, options.results)
            pick = picker(choosing, options.results, options.plan)
            do(name, first(options.seeds, experiment(name, pick, file)), options.results)


def locked(results):
    try:
        (results / "work").mkdir(parents=True, exist_ok=True)
        return lock(results / "work")
    except UserError:
        raise UserError(f"--results: expected a folder that no other run is using, got {results}"
                        ) from None


def first(n, planned):
    return Experiment(planned.seeds[:n], planned.cells)


def main(argv=None):
    return exit_code(command, argv, program="evidence")


if __name__ == "__main__":
    sys.exit(main())
