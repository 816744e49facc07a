"""When does the teacher's value help, by how much, and what does it know? Every table and figure of README "Results".

    python evidence.py                      run whatever the records in results/ still lack, and print the tables
    python evidence.py main alpha           these experiments only (and `tune`, from which they take their settings)
    python evidence.py --results=FOLDER     records of your own in another folder: everything again, from nothing
    python figures.py                       rebuild the README's tables and figures from results/

A *cell* is one student of one seed, or one measurement on its teacher. Each finished cell is kept at once in work/ of the
results folder (not committed), so that a run which was stopped goes on where it was, and a cell that two experiments share is
trained once. The record of an experiment, results/NAME.json, has a row for each (cell, seed) and what produced it. Seeds go to
--jobs processes of one thread each, so the numbers do not depend on how many there are.
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import train
from figures import choices, identity, load, tables, without_setting
from measure import (against_dpo, batches, both_responses, cached_logps, cached_psi, cached_values, is_correct, psi_of_pairs,
                     read_by, response_logps, summed_psi, table_row, tokens_in)
from model import from_content, frozen
from options import Config
from store import Store, fingerprint
from tvkd import dpo_loss

SEEDS, SWEEP_SEEDS, TUNING_SEEDS, SPLITS = range(8), range(5), (100, 101), range(5)
GRID = [(("steps", steps), ("lr", lr)) for steps in (60, 120) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]


class Cell(NamedTuple):
    method: str                     # "teacher", "sft", "values", one of options.METHODS, or "kd+tvkd"
    value: str | None = None        # whose psi is read
    terminal: str | None = None
    control: str = ""               # what is unusual about it: see `trained`
    dose: float = 0.0               # how much of it
    options: tuple = ()             # (name, value) of every option of train.py that is not the default
    split: str = "test"             # the prompts it is measured on


def with_options(cell, **changes):
    """The cell with other options of train.py; those at their defaults are left out, so that equal cells are equal."""
    options = {**dict(cell.options), **changes}
    return cell._replace(options=tuple(sorted((name, x) for name, x in options.items() if x != getattr(Config, name))))


# ---------------------------------------------------------------------------------------------------------------------------
# The experiments: name -> (seeds, cells). `pick` gives the steps and learning rate chosen for a cell on validation prompts.

IMPLICIT, LOGITS = ("implicit", "value"), ("logits", "hold")
TUNED = [Cell("bc"), Cell("kd"), Cell("dpo"), Cell("tvkd", *IMPLICIT), Cell("tvkd", *LOGITS),
         Cell("dpo", control="beta", options=(("beta", 0.5),)), Cell("dpo", *IMPLICIT, "relabel"), Cell("dpo", *IMPLICIT, "soft"),
         Cell("kd+tvkd", *IMPLICIT), Cell("kd", control="top", dose=1), Cell("kd", options=(("student_pairs", 1),))]
BC, KD, DPO, TVKD, PAPER, _, _, SOFT, _, TOP, _ = TUNED
FEW = [Cell("kd", options=(("student_pairs", n),)) for n in (1, 10, 30)]
TUNE = (TUNING_SEEDS, [with_options(cell, **dict(setting))._replace(split="val")
                       for cell in dict.fromkeys((*TUNED, *FEW)) for setting in GRID], None)
OTHER = Cell("tvkd", *IMPLICIT, "vocabulary", options=(("teacher_tokenizer", "384"),))
SHUFFLED, PLUS = Cell("tvkd", *IMPLICIT, "shuffled"), Cell("tvkd", *IMPLICIT, "plus", options=(("alpha", -1.0),))
ZERO, OTHER_BC = Cell("tvkd", "implicit", "zero"), Cell("bc", control="vocabulary", options=OTHER.options)
LIKE = {SHUFFLED: TVKD, PLUS: TVKD, OTHER: TVKD, OTHER_BC: BC, ZERO: DPO}          # the same settings: to differ in one thing


def experiments(pick, preferences=None):
    """-> name: (seeds, cells, the option that is swept, whose equals are compared). preferences: the file of `real`."""
    tvkd, dpo, kd, soft, paper = map(pick, (TVKD, DPO, KD, SOFT, PAPER))

    def sweep(cells, option, values):
        return [with_options(cell, **{option: value}) for value in values for cell in cells]
    found = {
        "main": (SEEDS, [Cell("teacher"), Cell("sft"), *map(pick, (*TUNED, *LIKE))], None),
        "values": (SEEDS, [Cell("values", *kind, split=part) for kind in (IMPLICIT, LOGITS) for part in ("train", "test")], None)}
    if preferences:
        # The defaults of --data, not tuned; a seed is another split of the same pairs.
        found["real"] = (SPLITS, [with_options(cell, data=preferences) for cell in (
            Cell("sft"), Cell("dpo"), Cell("tvkd", *IMPLICIT))], None)
    return found | {
        "gauge": (SWEEP_SEEDS, [dpo, tvkd, paper] + [cell._replace(control="gauge", dose=dose)
                                                     for cell in (tvkd, paper) for dose in (-0.5, 0.5)], None),
        "alpha": (SWEEP_SEEDS, [dpo, *sweep([tvkd], "alpha", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0))], None),
        "pairs": (SWEEP_SEEDS, sweep([dpo, tvkd, kd], "student_pairs", (100, 300, 1000, 3000)), "student_pairs"),
        "bytes": (SWEEP_SEEDS, [dpo, tvkd, soft, *(pick(TOP)._replace(dose=k) for k in (1, 4, 16)),
                                *map(pick, FEW), *sweep([kd], "student_pairs", (100, 300))], None),
        "noise": (SWEEP_SEEDS, [dpo, tvkd] + [cell._replace(control="noise", dose=dose) for dose in (0.1, 0.2, 0.4)
                                              for cell in (dpo, tvkd)], "dose"),
        "frontier": (SWEEP_SEEDS, sweep([dpo, tvkd, soft], "beta", (0.5, 1.0, 2.0, 4.0)), "beta"),
        "length": (SWEEP_SEEDS, sweep([dpo, tvkd], "steps", (15, 30, 60, 120, 240)), "steps"),
        "width": (SWEEP_SEEDS, sweep([Cell("sft"), dpo, tvkd, kd], "student_width", (16, 32, 48, 96)), "student_width"),
    }


def picker(record):
    """The record of `tune` -> pick(cell): the cell with the steps and learning rate of the highest mean validation reward."""
    found = choices(record)

    def pick(cell):
        scores = found[without_setting(as_row(LIKE.get(cell, cell)))]
        steps, lr = max(scores, key=scores.get)
        return with_options(cell, steps=steps, lr=lr)
    return pick


# ---------------------------------------------------------------------------------------------------------------------------
# One cell

TEXTS = ("data", "tokenizer", "vocab_size", "block_size", "train_pairs", "val_pairs", "test_pairs")      # what ids depend on


class Bench:
    """Models and setups of one seed, trained when first asked for and kept in the seed's folder."""

    def __init__(self, seed, folder):
        self.seed, self.folder, self.setups, self.store = seed, folder, {}, Store(folder, {})
        folder.mkdir(parents=True, exist_ok=True)

    def config(self, cell):
        options = dict(cell.options)
        defaults = {f.name: f.metadata["with_data"] for f in fields(Config)} if "data" in options else {}
        return replace(Config(**defaults), **options)

    def setup(self, cell):
        config = self.config(cell)
        texts = tuple(getattr(config, name) for name in (*TEXTS, "teacher_tokenizer"))
        if texts not in self.setups:
            self.setups[texts] = train.prepare(replace(config, student_pairs=0), self.seed, torch.device("cpu"))
        return self.setups[texts]._replace(config=config)

    def model(self, stage, setup):
        """ "teacher-sft", "teacher-dpo" or "student-sft" of this setup. Its file is named after all it depends on."""
        who = stage.split("-")[0]
        depends = {name: value for name, value in asdict(setup.config).items() if name in (*TEXTS, "batch_size")
                   or name.startswith(f"{who}_") and name != "student_pairs" or name == "teacher_tokenizer" and value}
        digest = hashlib.sha256(json.dumps([stage, torch.__version__, depends], sort_keys=True).encode()).hexdigest()[:12]
        reader = setup.teachers if who == "teacher" else setup
        made_from = {"seed": self.seed, "corpus": fingerprint(reader.ids.sft), "pairs": fingerprint(reader.ids.train)}

        def make(noted, partial):
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log_file:
                if stage == "teacher-dpo":
                    model, _ = train.dpo_teacher(self.model("teacher-sft", setup), noted.teachers, log_file)
                else:
                    model, _ = train.fine_tuned(who, noted.teachers if who == "teacher" else noted, log_file)
            return {"config": asdict(model.config), "model": model.state_dict()}
        content, _ = self.store.keep(f"{stage}-{digest}.pt", setup, made_from, make)
        return frozen(from_content(content))


class Gauge(torch.nn.Module):
    """A model with c(s_t) = slope * t added to every logit of state s_t: the same policy, another "value".

    In float64 and with logits rounded to multiples of 2^-30, so that the sum is exact and the policy the very same bits.
    """
    def __init__(self, model, slope):
        super().__init__()
        self.model, self.slope = model, slope

    def forward(self, tokens, states=None):
        logits = (self.model(tokens).double() * 2 ** 30).round() / 2 ** 30                         # (B, T+1, V)
        logits = logits + self.slope * torch.arange(tokens.shape[1]).view(1, -1, 1)
        return logits if states is None else logits[states]


def swapped(where, pairs, ref_logps, psi):
    """Labels turned round: chosen and rejected exchanged where `where` (pairs,) is True, in all three."""
    pairs = [data.Pair(p.prompt, p.rejected, p.chosen) if turn else p for p, turn in zip(pairs, where.tolist())]
    return pairs, *(x if x is None else torch.where(where, x.flip(0), x) for x in (ref_logps, psi))


def soft_preference(pairs, ref_logps, beta, probability):
    """loss_of for DPO with soft labels: -p log sigmoid(margin) - (1 - p) log sigmoid(-margin), p (pairs,) that chosen wins."""
    def loss_of(model, ids):
        both = both_responses([pairs[i] for i in ids])                                       # 2B rows
        logps = response_logps(model, both, train.part_size(both), torch.device("cpu"))
        (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref_logps[:, ids]         # (B,) each
        p = probability[ids]
        losses = (p * dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
                  + (1 - p) * dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta))
        return {"loss": losses.sum(), "n": len(ids), "tokens": tokens_in(both)}
    return loss_of


def top_k_kd_loss(student_logits, teacher_logits, mask, k):
    """KL(teacher || student) over the teacher's k likeliest tokens and one bin for all others, averaged over masked tokens.

    logits (B, T+1, V), mask (B, T) -> nats. What a teacher of which k ids and probabilities a token are stored can teach;
    k = V is tvkd.kd_loss.
    """
    teacher, ids = F.log_softmax(teacher_logits.detach()[:, :-1][mask], -1).topk(k)                # (response tokens, k)
    student = F.log_softmax(student_logits[:, :-1][mask], -1).gather(-1, ids)
    teacher, student = (torch.cat([kept.exp(), (1 - kept.exp().sum(-1, keepdim=True)).clamp_min(1e-8)], -1)
                        for kept in (teacher, student))                                            # (response tokens, k + 1)
    return (teacher * (teacher.log() - student.log())).sum(-1).mean()


def sum_of_losses(first, second):
    """loss_of for the sum of two mean losses."""
    def loss_of(model, ids):
        one, other = first(model, ids), second(model, ids)
        return {"loss": one["loss"] / one["n"] + other["loss"] / other["n"], "n": 1, "tokens": one["tokens"]}
    return loss_of


def trained(cell, setup, bench):
    """The student of one cell -> (model, bytes of teacher signal stored per response token).

    Controls: "shuffled" psi of another pair, chosen and rejected in their places; "plus" (alpha = -1) the wrong sign; "beta" DPO
    at beta / (1 + alpha); "relabel" DPO, labels by the sign of the difference of summed psi; "soft" DPO, labels by its sigmoid;
    "noise" a share `dose` of labels turned round, the teacher's own training untouched; "gauge" c(s) of slope `dose` in the
    teacher's logits; "top" KD from `dose` probabilities a token; "vocabulary" another tokenizer for the teacher.
    """
    config, generator = setup.config, torch.Generator().manual_seed(setup.seed + 2 ** 32)           # not that of the batches
    ref = bench.model("student-sft", setup)
    if cell.method == "sft":
        return ref, 0.0
    pairs, teacher_pairs = (ids.train[:config.student_pairs or None] for ids in (setup.ids, setup.teacher_ids))
    ref_logps = cached_logps(ref, both_responses(pairs), config.batch_size, setup.device).view(2, -1)
    teacher = teacher_ref = psi = None
    if cell.method in ("bc", "kd", "kd+tvkd") or cell.value:
        teacher, teacher_ref = (bench.model(stage, setup) for stage in ("teacher-dpo", "teacher-sft"))
    if cell.control == "gauge":
        for model in (teacher, teacher_ref):
            check_same_policy(Gauge(model, 0.0), Gauge(model, cell.dose), teacher_pairs, config.batch_size)
        teacher, teacher_ref = (Gauge(model, cell.dose) for model in (teacher, teacher_ref))
    if cell.value:
        values = cached_values(cell.value, teacher, teacher_ref, both_responses(teacher_pairs), config.teacher_beta,
                               config.batch_size, setup.device)
        psi = summed_psi(values, teacher_pairs, config.gamma, cell.terminal, setup.device)         # (2, pairs)
    if cell.control == "shuffled":
        order = torch.randperm(len(pairs), generator=generator)
        psi = psi[:, torch.empty_like(order).scatter(0, order, order.roll(1))]      # one cycle: no pair keeps its own
    if cell.control == "noise":
        turned = torch.rand(len(pairs), generator=generator) < cell.dose
        pairs, ref_logps, psi = swapped(turned, pairs, ref_logps, psi)
    if cell.control == "relabel":
        pairs, ref_logps, psi = swapped(psi[0] < psi[1], pairs, ref_logps, psi)

    policy = copy.deepcopy(ref).requires_grad_(True)
    if cell.control == "soft":
        loss_of = soft_preference(pairs, ref_logps, config.beta, torch.sigmoid(psi[0] - psi[1]))
    elif cell.control == "top":
        loss_of = train.distillation(teacher, pairs, setup.device, partial(top_k_kd_loss, k=int(cell.dose)))
    elif cell.method == "kd+tvkd":
        loss_of = sum_of_losses(*(train.student_loss(method, policy, pairs, ref_logps, setup, teacher, psi)
                             for method in ("kd", "tvkd")))
    else:
        psi_of = psi if cell.method == "tvkd" else None
        loss_of = train.student_loss(cell.method, policy, pairs, ref_logps, setup, teacher, psi_of)
    with open(bench.folder / "log.jsonl", "a", encoding="utf-8") as log_file:
        train.fit(key(cell), policy, loss_of, len(pairs), config.steps, config.lr, config, setup.seed, log_file)
    labelled = setup.ids.train[:max(len(pairs), Config.student_pairs)]
    return policy, stored_bytes(cell, pairs, labelled, setup.tokenizer.n_vocab)


def check_same_policy(model, moved, pairs, batch_size):
    """Raise unless the two give bit-identical log-probabilities of every response."""
    for _, tokens, mask in batches(both_responses(pairs), batch_size, torch.device("cpu")):
        with torch.no_grad():
            one, other = (F.log_softmax(m(tokens), -1)[:, :-1][mask] for m in (model, moved))
        if not torch.equal(one, other):
            raise RuntimeError("gauge: expected the same policy, bit for bit")


def stored_bytes(cell, pairs, labelled, n_vocab):
    """Bytes of teacher signal that the loss reads of `pairs`, per response token of all the pairs that DPO learns from.

    For bc as if the teacher's answers were as long as the pair's own.
    """
    def count(pairs):
        return sum(len(p.chosen) + len(p.rejected) for p in pairs)
    per_pair = 0 if cell.value is None else 1 / 8 if cell.control == "relabel" else 8       # a bit; a float of each response
    per_token = {"bc": 2, "kd": 4 * n_vocab, "kd+tvkd": 4 * n_vocab}.get(cell.method, 0)    # ids of 2 bytes; floats of 4
    if cell.control == "top":
        per_token = (2 + 4) * cell.dose                                                     # an id and its float
    return (per_pair * len(pairs) + per_token * count(pairs)) / count(labelled)


def measured(cell, bench):
    """One cell -> its row."""
    started, setup = time.perf_counter(), bench.setup(cell)
    row, each = {**as_row(cell), "seed": setup.seed}, {}
    if cell.method == "values":
        row.update(knows(cell, setup, bench))
    else:
        origin, beta, bytes_ = bench.model("student-sft", setup), setup.config.beta, 0.0
        if cell.method == "teacher":
            model, origin, beta = bench.model("teacher-dpo", setup), bench.model("teacher-sft", setup), setup.config.teacher_beta
        else:
            model, bytes_ = trained(cell, setup, bench)
        row, each = table_row(row, model, origin, beta, read_by(cell.method, setup), cell.split)
        row["bytes"] = bytes_
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row, {name: x.tolist() for name, x in each.items()}


def machine():
    """Processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name")) + f", {os.cpu_count()} cores"
    except (OSError, StopIteration):
        return f"{platform.machine()}, {os.cpu_count()} cores"


# ---------------------------------------------------------------------------------------------------------------------------
# What the value knows

def knows(cell, setup, bench):
    """Does the teacher's value order the pairs, and does psi point at the right words? Of the student's pairs, or held-out ones.

    correlation: Pearson, of the difference of summed psi with that of the true reward; agrees: how often their signs do, where
    the truth differs; words: mean psi of the words of each kind (for openings and closings: of the whole sentence).
    """
    n = setup.config.student_pairs if cell.split == "train" else None
    pairs, texts = getattr(setup.ids, cell.split)[:n], getattr(setup.texts, cell.split)[:n]
    models, both = [bench.model(stage, setup) for stage in ("teacher-dpo", "teacher-sft")], both_responses(pairs)
    values = cached_values(cell.value, *models, both, setup.config.teacher_beta, setup.config.batch_size, setup.device)
    psi = cached_psi(values, both, 1.0, cell.terminal)                                       # (2 * pairs, T)
    chosen, rejected = psi.sum(-1).view(2, -1)
    truth = torch.tensor([data.reward(p.prompt, p.chosen) - data.reward(p.prompt, p.rejected) for p in texts]).double()
    words = {}
    responses = [p.chosen for p in texts] + [p.rejected for p in texts]
    for prompt, response, row, of_row in zip([p.prompt for p in texts] * 2, responses, both, psi):
        pieces = [setup.tokenizer.decode([token]) for token in row.response]
        for kind, total in by_kind(prompt, response, pieces, of_row[len(row.prompt) - 1:][:len(pieces)].tolist()):
            words.setdefault(kind, []).append(total)
    found = {"n": len(pairs), "correlation": torch.corrcoef(torch.stack([chosen - rejected, truth]))[0, 1].item(),
             "agrees": is_correct((chosen - rejected) * truth)[truth != 0].mean().item(),
             "words": {kind: {"n": len(totals), "psi": statistics.fmean(totals)} for kind, totals in sorted(words.items())}}
    if cell.split == "test" and setup.seed == 0:
        found["pairs"] = psi_of_pairs(cell.value, cell.terminal, *models, setup, most=3)
    return found


def by_kind(prompt, response, pieces, psi):
    """(kind, psi) of every fact and thing of a toy response, and of its opening and closing as a whole.

    pieces: the tokens as text, EOS last; psi: one number each. Kinds: right, wrong, polite, rude. (The corpus repeats no fact.)
    """
    asked, at = re.findall("[a-z]+", prompt.lower()), 0
    spans = [(kind, found, found + len(sentence)) for kind, sentences in (
        ("polite", data.POLITE_OPENINGS + data.POLITE_CLOSINGS), ("rude", data.RUDE_OPENINGS + data.RUDE_CLOSINGS))
        for sentence in sentences for found in [response.find(sentence)] if found >= 0]
    totals, kinds = {span: 0.0 for span in spans}, []
    for piece, x in zip(pieces[:-1], psi):
        middle, word, at = at + len(piece) / 2, piece.strip().lower(), at + len(piece)
        inside = [span for span in spans if span[1] <= middle <= span[2]]
        if inside:
            totals[inside[0]] += x
        elif word in data.ALL_FACTS or word in data.THINGS:
            kinds.append(("right" if word in asked else "wrong", x))
    return kinds + [(kind, total) for (kind, _, _), total in totals.items()]


# ---------------------------------------------------------------------------------------------------------------------------
# Running

def key(cell):
    return json.dumps(cell)


def kept(results, seed):
    """Folder of what is done of a seed: another one for other defaults of train.py or another torch. Code is not looked at."""
    made = json.dumps([asdict(Config()), torch.__version__], sort_keys=True)
    return results / "work" / hashlib.sha256(made.encode()).hexdigest()[:12] / f"seed{seed}"


def done(folder):
    """What cells.jsonl in a seed's folder has: key -> (row, each). A line that a kill cut off is left out: done again."""
    found = {}
    path = folder / "cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            name, row, each = json.loads(line)
        except ValueError:
            continue
        found[name] = row, each
    return found


def work(tasks, results, part):
    """Do (seed, cell) after (seed, cell) in this process, and say how long the rest will take."""
    torch.set_num_threads(1)
    started, benches = time.perf_counter(), {}
    for number, (seed, cell) in enumerate(tasks, 1):
        bench = benches.setdefault(seed, Bench(seed, kept(results, seed)))
        with open(os.devnull, "w", encoding="utf-8") as quiet, redirect_stdout(quiet):
            row, each = measured(cell, bench)
        with open(bench.folder / "cells.jsonl", "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([key(cell), row, each]))            # a line that a kill cut off is not glued to it
        found = f"reward {row['reward']:.2f}" if row.get("reward") is not None else ""
        left = (time.perf_counter() - started) / number * (len(tasks) - number)
        print(f"[{part}] seed {seed}  {' '.join(filter(None, cell[:4]))} {dict(cell.options)}  {found}  {row['seconds']:.0f} s; "
              f"{len(tasks) - number} left here, about {left / 60:.0f} min", flush=True)


def run(plan, results, jobs):
    """Do the cells that no record and no earlier run has, then write the record of each experiment. plan: as `experiments`."""
    plan = {name: experiment for name, experiment in plan.items() if not complete(results / f"{name}.json", *experiment[:2])}
    tasks = {(seed, cell): None for seeds, cells, _ in plan.values() for seed in seeds for cell in cells}
    have = {seed: done(kept(results, seed)) for seed in {seed for seed, _ in tasks}}
    tasks = [(seed, cell) for seed, cell in tasks if key(cell) not in have[seed]]
    # A seed belongs to one process, which trains its teacher; the seeds of many cells are dealt out first, for equal loads.
    count, loads = Counter(seed for seed, _ in tasks), [[] for _ in range(jobs)]
    for seed in sorted(count, key=count.get, reverse=True):
        min(loads, key=lambda load: sum(count[s] for s in load)).append(seed)
    parts = [[task for task in tasks if task[0] in load] for load in loads]
    if tasks:
        context, quietly = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)         # Ctrl-C: no traceback
        with ProcessPoolExecutor(jobs, context, signal.signal, quietly) as pool:
            try:
                list(pool.map(work, parts, [results] * jobs, range(1, jobs + 1)))
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    for name, (seeds, cells, swept) in plan.items():
        rows = [row for seed in seeds for row in paired(done(kept(results, seed)), cells, swept)]
        record = {"experiment": name, "made": {"torch": torch.__version__, "python": platform.python_version(),
                                               "machine": machine(), "threads": 1},
                  "seconds": round(sum(row["seconds"] for row in rows)), "options": asdict(Config()), "rows": rows}
        text = json.dumps(record).replace('{"method"', '\n{"method"')          # a row a line
        part = results / f"{name}.tmp"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(results / f"{name}.json")
        print(f"{name}: {len(rows)} rows in {results / f'{name}.json'}", flush=True)


def complete(path, seeds, cells):
    """Whether a record has a row for every cell and seed of its experiment, made with the defaults that train.py has now."""
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(Config())))
    wanted = {(seed, identity(as_row(cell))) for seed in seeds for cell in cells}
    return ({(row["seed"], identity(row)) for row in record["rows"]} == wanted
            and all(now.get(name, value) == value for name, value in record["options"].items()))


def as_row(cell):
    """The fields of a row that say which cell it is."""
    options = {name: os.path.basename(x) if name == "data" else x for name, x in cell.options}
    return {**cell._asdict(), "options": options}


def paired(found, cells, swept):
    """The rows of one seed, each with its difference to DPO: the one with the same value of the swept option."""
    def at(row):
        return row["dose"] if swept == "dose" else row["options"].get(swept, getattr(Config, swept or "", None))

    def is_dpo(row):
        return row["method"] == "dpo" and row["control"] in ("", "noise") and row["split"] == "test"

    of = [found[key(cell)] for cell in cells]
    dpo = {at(row): (row, each) for row, each in reversed(of) if is_dpo(row)}
    rows = []
    for row, each in of:
        base, base_each = dpo.get(at(row), (row, {}))
        if each:
            row = {**row, "acc_vs_dpo": None}
        if base_each and base_each is not each:
            row["acc_vs_dpo"] = row["pref_acc"] - base["pref_acc"]
            if "reward" in each:
                row = against_dpo(row, *(torch.tensor(x["reward"], dtype=torch.double) for x in (each, base_each)))
        rows.append(row)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments; none: all, and with --data also real")
    parser.add_argument("--data", metavar="FILE", help="JSONL file of preferences, for the experiment real")
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=Path("results"), help="of records (default: results)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each (default: one a core)")
    options = parser.parse_args(argv)
    known = list(experiments(lambda cell: cell, options.data))
    if options.jobs < 1:
        parser.exit(2, f"evidence.py: --jobs: expected at least 1, got {options.jobs}\n")
    if options.data and options.names and "real" not in options.names:
        parser.exit(2, "evidence.py: --data: expected real among the experiments, which alone reads it\n")
    for name in options.names:
        if name not in (*known, "tune"):
            parser.exit(2, f"evidence.py: expected some of tune, {', '.join(known)} (and real, with --data), got {name}\n")
    try:
        (options.results / "work").mkdir(parents=True, exist_ok=True)
        if options.data:
            data.load_pairs(options.data)                                   # refused now rather than after an hour
        run({"tune": TUNE}, options.results, options.jobs)
        tuned = load(options.results)["tune"]
        plan = experiments(picker(tuned), options.data)
        plan = {name: plan[name] for name in plan if name in options.names or not options.names}
        run(plan, options.results, options.jobs)
    except (FloatingPointError, BrokenProcessPool) as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nevidence.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (OSError, data.UserError, ValueError, KeyError) as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2
    records = load(options.results)
    for name in (*plan, *(("tune",) if "tune" in options.names else ())):
        for text in tables({name: records[name]}).values():
            print(f"\n{name}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
