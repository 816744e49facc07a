"""Train what the records of the experiments still lack, and print their tables.

    python -m evidence.run                          all experiments but those on real preferences
    python -m evidence.run main alpha               these, and the tuning they take settings from
    python -m evidence.run real --data=FILE.jsonl   on real preferences; --data may stand repeatedly
    python -m evidence.run --plan                   cells and minutes of each, from nothing
    python -m evidence.tables                       rebuild the tables and figures from the records

The record of an experiment is evidence/results/NAME.json, a row for each cell and seed. A record
that has all of them is left alone, even if the code has changed since (it holds the digest); delete
it to repeat the experiment. Every stage and every finished cell is kept in the folder work/ beside
the records (not committed), so a stopped run continues where it was, and no cell is trained twice.
Each seed belongs to one of --jobs processes of one thread: their number changes no result.
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from data import encode, toy_splits
from harness.errors import printable, UserError
from evidence import controls
from evidence.cells import (NAMES, as_row, defaults, experiment, identity, picker, real_name,
                            tuning_of, tunings, with_options)
from evidence.records import exit_code, load
from evidence.tables import tables
from harness.evaluate import HeldOut
from harness.keep import Keep, digest_of_code, digest_of_this_code, file_of, lock, write
from harness.options import Config
from harness.preferences import load_pairs
from harness.texts import load_task
from train import Likelihood, fit, new_model, train_teacher

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# One seed

@cache
def digest_of_controls():
    """Of evidence/controls.py as this process imported it: it may be edited during a long run."""
    return digest_of_code(["evidence/controls.py"])


class KeepVariants(Keep):
    """A Keep in which variants of a stage coexist: the name of a file carries its key's digest."""

    def __init__(self, out, seed):
        super().__init__(out, CPU, quiet=True)
        self.seed = seed
        self.common["the controls"] = digest_of_controls()

    def open(self):
        """No lock: the process that started this one holds that of the results."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name, key):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / file_of(f"{name}-{digest}")


class Stages:
    """What the cells of one seed have in common, computed when a cell first asks for it."""

    def __init__(self, out, seed):
        self.seed, self.keep, self.known = seed, KeepVariants(out, seed), {}

    def once(self, f, who, config, *args):
        """f(config, *args), remembered for the options that texts and the model `who` depend on."""
        names = ("data", "vocab_size", "block_size", "train_pairs", "val_pairs", "test_pairs",
                 "batch_size")
        key = (f, *args, *(x for name, x in asdict(config).items()
                           if name in names or who and name.startswith(f"{who}_")))
        if key not in self.known:
            self.known[key] = f(config, *args)
        return self.known[key]

    def task(self, config):
        return self.once(self._task, None, config)

    def student(self, config):
        return self.once(self._student, "student", replace(config, student_pairs=0))

    def teacher(self, labels, config):
        """(reference, teacher), trained on the pairs and labels of `Cell.teacher`."""
        return self.once(self._teacher, "teacher", config, labels,
                         config.student_pairs if labels == "unseen" else 0)

    def _task(self, config):
        pairs = load_pairs(config.data) if config.data else None
        return load_task(replace(config, student_pairs=0), self.seed, pairs)

    def _student(self, config):
        task = self.task(config)
        model = new_model("student", config, task.tokenizer.n_vocab, self.seed, CPU)
        return self.keep("student-sft", fit, model, Likelihood([[row] for row in task.ids.sft]),
                         config.recipe("student_sft_steps", "student_sft_lr"), self.seed)

    def _teacher(self, config, labels, unseen):
        task, ids = self.task(config), self.task(config).ids
        if labels in controls.LABELS:
            texts = toy_splits(config.train_pairs, config.val_pairs, config.test_pairs, self.seed,
                               controls.LABELS[labels])
            ids = ids._replace(train=encode(texts.train, task.tokenizer, config.block_size)[1])
        ids = ids._replace(train=ids.train[unseen:])
        model = new_model("teacher", config, task.tokenizer.n_vocab, self.seed, CPU)
        few = replace(self.held_out("val", config), pairs=ids.val[:1], texts=task.texts.val[:1])
        return train_teacher(config, self.seed, ids, model, few, self.keep)

    def held_out(self, split, config):
        texts, ids, tokenizer = self.task(config)
        return HeldOut(getattr(ids, split), getattr(texts, split), tokenizer, not config.data,
                       config.samples, config.max_new_tokens, config.batch_size, self.seed)


def row_of(cell, stages):
    """Train and measure one cell, or read what is kept of it -> its row of a record."""
    config = replace(Config(**defaults("data" in dict(cell.options))), **dict(cell.options))
    held_out, keep = stages.held_out(cell.split, config), stages.keep
    with_parts = cell.teacher in controls.LABELS
    if cell.method == "values":
        teacher_ref, teacher = stages.teacher(cell.teacher, config)
        if cell.split == "train":
            held_out = replace(held_out, pairs=held_out.pairs[:config.student_pairs],
                               texts=held_out.texts[:config.student_pairs])
        numbers = keep("knows", controls.knows, cell.value, cell.terminal, teacher, teacher_ref,
                       held_out, config.teacher_beta)
    elif cell.method == "teacher":
        teacher_ref, teacher = stages.teacher(cell.teacher, config)
        numbers = keep("cell", controls.measured, teacher, teacher_ref, held_out,
                       config.teacher_beta, with_parts)
    elif cell.method == "sft":
        student = stages.student(config)
        numbers = keep("cell", controls.measured, student, student, held_out, config.beta,
                       with_parts)
    else:
        loss = controls.loss_of(cell, config, stages)
        numbers = keep("cell", controls.trained, stages.student(config), loss,
                       config.recipe("steps", "lr"), stages.seed, held_out, config.beta, with_parts)
    if cell.method not in ("teacher", "values"):
        task, n = stages.task(config), config.student_pairs
        usual = defaults("data" in dict(cell.options))["student_pairs"]
        labelled = task.ids.train[:max(n, usual) or None]
        numbers["bytes"] = controls.stored_bytes(cell, task.ids.train[:n or None], labelled,
                                                 task.tokenizer.n_vocab)
    return {**as_row(cell), "seed": stages.seed, **numbers}


# --------------------------------------------------------------------------------------------------
# Many cells

STAGES = {}             # of this process: seed -> Stages


def start_process():
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's
    torch.set_num_threads(1)


def work(out, seed, cell):
    """One task of a process -> row, seconds it took now: few, if an earlier run finished it."""
    started, stages = time.perf_counter(), STAGES.setdefault(seed, Stages(out, seed))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return row_of(cell, stages), time.perf_counter() - started


def dealt(tasks, jobs):
    """seed -> which of `jobs` processes has it, for loads as equal as they can be."""
    count, loads, owner = Counter(seed for seed, _ in tasks), [0] * jobs, {}
    for seed in sorted(count, key=count.get, reverse=True):
        owner[seed] = loads.index(min(loads))
        loads[owner[seed]] += count[seed]
    return owner


def do(tasks, out, jobs):
    """[(seed, cell)] -> yields (task, its row) as they end. Prints how long the rest takes."""
    context, owner = multiprocessing.get_context("spawn"), dealt(tasks, jobs)
    pools = [ProcessPoolExecutor(1, context, start_process) for _ in range(jobs)]
    left, spent, expected = sum(map(seconds, tasks)), 0.0, 0.0
    try:
        futures = {pools[owner[task[0]]].submit(work, out, *task): task for task in tasks}
        for number, future in enumerate(as_completed(futures), 1):
            task, (row, now) = futures[future], future.result()
            left -= seconds(task)
            if now > row["seconds"] / 2:        # trained now; cells read from work/ show no pace
                spent, expected = spent + now, expected + seconds(task)
            minutes = left * (spent / expected if spent else 1) / jobs / 60
            print(f"seed {task[0]}  {title(task[1])}  {score_text(row)}  {row['seconds']:.0f} s; "
                  f"{len(tasks) - number} cells left, about {minutes:.0f} min", flush=True)
            yield task, row
    except BaseException:                               # finished stages and cells stay in work/
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def title(cell):
    options = " ".join(f"--{name}={os.path.basename(str(x))}" for name, x in cell.options)
    words = (cell.method, cell.value, cell.terminal, cell.control, cell.teacher, cell.split)
    return printable(f"{' '.join(filter(None, words))} {options}".strip())


def score_text(row):
    name = "reward" if row.get("reward") is not None else "pref_acc"
    return f"{name} {row[name]:.2f}" if name in row else ""


def run(plan, results, jobs):
    """Do what the records lack; write a record as soon as it has all rows. plan: of Experiments."""
    records, waiting, rows = load(results), {}, {}
    for name, (seeds, cells, _) in plan.items():
        if not complete(records.get(name), plan[name]):
            waiting[name] = {(seed, cell) for seed in seeds for cell in cells}
    tasks = list({(seed, cell): None for name in waiting for seed in plan[name].seeds
                  for cell in plan[name].cells})
    for task, row in do(tasks, results / "work", jobs) if tasks else ():
        rows[task] = row
        for name in [name for name in waiting if waiting[name] <= rows.keys()]:
            del waiting[name]
            write_record(results / f"{name}.json", plan[name], rows)


def write_record(path, planned, rows):
    """rows: (seed, cell) -> row."""
    of_seeds = [paired([rows[seed, cell] for cell in planned.cells], planned.swept)
                for seed in planned.seeds]
    made = {"torch": torch.__version__, "python": platform.python_version(), "machine": machine(),
            "threads": 1, "code": digest_of_this_code()}
    record = {"experiment": path.stem, "made": made,
              "options": defaults("data" in dict(planned.cells[0].options)),
              "rows": sum(of_seeds, [])}
    text = json.dumps(record).replace('{"method"', '\n{"method"')       # a row a line
    write(path, f"{text}\n".encode())
    print(f"{path.stem}: {len(record['rows'])} rows in {printable(path)}", flush=True)


def complete(record, planned):
    """Whether a record has a row for every cell and seed, made with the defaults of today."""
    if record is None:
        return False
    now = json.loads(json.dumps(defaults("data" in dict(planned.cells[0].options))))
    wanted = {(seed, identity(as_row(cell))) for seed in planned.seeds for cell in planned.cells}
    return ({(row["seed"], identity(row)) for row in record["rows"]} == wanted
            and all(now.get(name, x) == x for name, x in record["options"].items()))


def paired(rows, swept):
    """The rows of one seed, each with its differences to the DPO of the same swept value."""
    dpo = {}
    for row in rows:
        if row["method"] == "dpo" and row["control"] in ("", "noise") and row["split"] == "test":
            dpo.setdefault(swept_value(row, swept), row)
    differences = []
    for row in rows:
        base, row = dpo.get(swept_value(row, swept)), dict(row)
        for key, name in (("vs_dpo", "reward"), ("acc_vs_dpo", "pref_acc")):
            known = base and identity(base) != identity(row) \
                and None not in (row.get(name), base.get(name))
            row[key] = row[name] - base[name] if known else None
        differences.append(row)
    return differences


def swept_value(row, swept):
    usual = defaults("data" in row["options"])
    return row["dose"] if swept == "dose" else row["options"].get(swept, usual.get(swept))


def machine():
    """Processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------
# How long it takes: seconds of one thread on the machine of the records, two side by side

TEACHER, SFT = 60, 25           # to train a seed's teacher and starting student
STEP = {"bc": 0.06, "dpo": 0.05, "tvkd": 0.05, "released": 0.1, "kd": 0.1, "kd+dpo": 0.17,
        "kd+tvkd": 0.17}
MEASURE = {"val": 1, "test": 2.5, "train": 1}


def seconds(task):
    """What one (seed, cell) takes, without its teacher and starting student."""
    cell = task[1]
    options = {name: x for name, x in cell.options}
    if "data" in options:
        return 15
    few = min(1, options.get("student_pairs", 300) / 64)
    training = STEP.get(cell.method, 0) * options.get("steps", Config.steps) * few
    return training + MEASURE[cell.split]


def estimate(plan, jobs):
    """name -> Experiment, in order -> lines with the cells of each and the minutes they take."""
    lines, known, models = [], set(), {}
    for name, (seeds, cells, _) in plan.items():
        tasks = {(seed, cell) for seed in seeds for cell in cells} - known
        new = {}
        for seed, cell in tasks:
            options = dict(cell.options)
            file = options.get("data")
            new[seed, file, "student"] = SFT
            new[seed, file, "teacher"] = TEACHER
            if cell.teacher:
                new[seed, file, cell.teacher] = TEACHER / 3         # its DPO alone
        minutes = (sum(map(seconds, tasks)) + sum(new[x] for x in new.keys() - models)) / 60
        known |= tasks
        models |= new
        lines.append((name, len(tasks), minutes))
    total = sum(minutes for _, _, minutes in lines)
    return [*(f"{name:<20}{n:>6} new cells {minutes:>6.0f} min" for name, n, minutes in lines),
            f"{'all':<20}{len(known):>6} cells     {total:>6.0f} min of one thread, "
            f"{total / jobs / 60:.1f} h with --jobs={jobs}"]


# --------------------------------------------------------------------------------------------------
# The command line

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m evidence.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(NAMES)}; with --data: real")
    parser.add_argument("--data", action="append", default=[], metavar="FILE",
                        help="JSONL file of preferences, an experiment of its own")
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=RESULTS,
                        help="of the records (default: evidence/results)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="processes of one thread each (default: one a core)")
    parser.add_argument("--plan", action="store_true",
                        help="train nothing; print cells and minutes")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in (*NAMES, "real"):
            raise UserError(f"expected some of {', '.join(NAMES)}, or real with --data, got {name}")
    if options.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {options.jobs}")
    if options.data and options.names and "real" not in options.names:
        raise UserError("--data: expected real among the experiments, which alone reads it")
    if "real" in options.names and not options.data:
        raise UserError("real: expected --data=FILE.jsonl beside it")
    return options


def main(argv=None):
    return exit_code(command, argv)


def command(argv):
    options = parse(argv)
    files = {real_name(file): file for file in options.data}
    for file in options.data:
        load_pairs(file)                                # refused now rather than after an hour
    names = [name for name in NAMES if name in options.names or not options.names]
    names += files
    choosing = {name: planned for name, planned in tunings(options.data).items()
                if name in map(tuning_of, names)}
    if options.plan:
        plan = {**choosing, **{name: experiment(name, longest, files.get(name)) for name in names}}
        print("\n".join(estimate(plan, options.jobs)))
        return
    try:
        (options.results / "work").mkdir(parents=True, exist_ok=True)
        held = lock(options.results / "work")
    except UserError:
        raise UserError(f"--results: expected a folder that no other run is using, "
                        f"got {options.results}") from None
    with held:
        run(choosing, options.results, options.jobs)
        records = load(options.results)
        plan = {name: experiment(name, picker(records[tuning_of(name)]), files.get(name))
                for name in names}
        run(plan, options.results, options.jobs)
    records = load(options.results)
    for mark, text in tables({name: records[name] for name in (*choosing, *names)}).items():
        print(f"\n{mark}\n{text}")
    note_other_code(records)


def longest(cell):
    """For an estimate before settings are chosen: no knowledge cell trains longer than 60 steps."""
    return cell if cell.teacher or "data" in dict(cell.options) else with_options(cell, steps=120)


def note_other_code(records):
    """Say which records were made by another code than today's."""
    today = digest_of_this_code()
    others = [name for name, record in records.items() if record["made"].get("code") != today]
    if others:
        print(f"\nmade by other code than today's: {', '.join(others)}")


if __name__ == "__main__":
    sys.exit(main())
