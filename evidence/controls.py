"""How a cell is trained and measured: every loss, teacher and label that train.py does not have.

The first block of imports is all that the experiments take of the method. Words of `Cell.control`:

    shuffled    psi of another pair, chosen and rejected in their places
    plus        the plus sign of psi: alpha below 0
    beta        DPO at beta / (1 + alpha)
    relabel     the label is the sign of the teacher's difference of summed psi
    soft, mean, evidence    the label is a probability: see `soft_label`
    noise       a share `dose` of the student's labels is flipped
    warm        KD at temperature `dose`

and `Cell.teacher`: nothing for the usual one, a name in LABELS for what its pairs are labelled by,
"unseen" for one that never saw the student's pairs, "flipped 0.2" for one in whose pairs that share
of the labels is flipped. Of a pair that both see, a teacher "flipped" and a student with "noise" of
the same share see the same label.
"""

import hashlib
import json
import math
import os
import statistics
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial

import torch

import data
from evidence.cells import defaults
from harness.command import new_model
from harness.evaluate import HeldOut, all_pair_logps, evaluate, is_correct, spoken
from harness.keep import Keep
from harness.options import Config
from harness.preferences import load_pairs
from harness.sampling import sample
from harness.texts import load_task
from model import both_responses, state_values, summed_psi
from train import DPO, KD, TVKD, Likelihood, OfPairs, fit, teacher_answers, train_teacher
from tvkd import dpo_loss, kd_loss

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Labels

# About one label in seven is wrong, so a label counts ln(6/7 / (1/7)) = ln 6 = 1.79 nats.
LABEL_NATS = math.log(6)


def soft_label(control, difference):
    """Probability that the chosen response is better: difference (N,) of the teacher's psi -> (N,).

    soft      the teacher's alone, sigmoid(dpsi)
    mean      of the label, which says 1, and of the teacher's
    evidence  the log-odds of label and teacher, added
    """
    if control == "soft":
        return difference.sigmoid()
    if control == "mean":
        return (1 + difference.sigmoid()) / 2
    return (difference + LABEL_NATS).sigmoid()


def flipped(where, pairs, *numbers):
    """Chosen and rejected exchanged where `where` (N,) is True: in the pairs, in (2, N) numbers."""
    pairs = [data.Pair(pair.prompt, pair.rejected, pair.chosen) if flip else pair
             for pair, flip in zip(pairs, where.tolist())]
    return pairs, *(x if x is None else torch.where(where, x.flip(0), x) for x in numbers)


def which_flip(n, share, seed):
    """Which of n labels are flipped, each with probability `share`: (n,) bool."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 2 ** 32)) < share


def psi_of_another_pair(psi, seed):
    """psi (2, N) permuted along one cycle, so that no pair keeps its own."""
    order = torch.randperm(psi.shape[1], generator=torch.Generator().manual_seed(seed + 2 ** 32))
    return psi[:, torch.empty_like(order).scatter(0, order, order.roll(1))]


def weighted(of_facts, of_manners, prompt, response):
    facts, manners = data.reward_parts(prompt, response)
    return of_facts * facts + of_manners * manners


# What labels the teacher's pairs, with draws of its own. The student's are always the full reward.
LABELS = {"full": partial(weighted, 1, 1), "facts": partial(weighted, 1, 0),
          "manners": partial(weighted, 0, 1), "contrary": partial(weighted, 1, -1),
          "opposite": partial(weighted, -1, -1)}


# --------------------------------------------------------------------------------------------------
# Losses, of the form that train.py describes

@dataclass(frozen=True, eq=False)
class Labelled(DPO):
    """DPO with soft labels: -p log sigmoid(margin) - (1 - p) log sigmoid(-margin), p (N,)."""
    probability: torch.Tensor

    def losses(self, logps, ids):
        (chosen, rejected), (ref_chosen, ref_rejected) = logps, self.ref_logps[:, ids]
        p = self.probability[ids]                                               # (B,)
        return (p * dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta)
                + (1 - p) * dpo_loss(rejected, chosen, ref_rejected, ref_chosen, self.beta))


@dataclass(frozen=True, eq=False)
class WarmKD(KD):
    """KD of the distributions at a temperature, times its square, as Hinton et al. (2015) do."""
    temperature: float

    def __call__(self, model, ids):
        tokens, mask = data.collate(both_responses([self.pairs[i] for i in ids]))
        with torch.no_grad():
            teacher_logits = self.teacher(tokens) / self.temperature            # (2B, T+1, V)
        loss, n = kd_loss(model(tokens) / self.temperature, teacher_logits, mask), mask.sum()
        return {"loss": loss * n * self.temperature ** 2, "n": n}


@dataclass(frozen=True, eq=False)
class Both(OfPairs):
    """KD's loss of a token plus another one's of a pair, as means over a batch."""
    kd: KD
    other: DPO

    @cached_property
    def tokens_of_pair(self):
        return statistics.fmean(len(p.chosen) + len(p.rejected) for p in self.pairs)

    def __call__(self, model, ids):
        kd, sums = self.kd(model, ids), self.other(model, ids)
        return {"loss": kd["loss"] / self.tokens_of_pair + sums["loss"], "n": sums["n"]}


# --------------------------------------------------------------------------------------------------
# One seed

TEXTS = ("data", "vocab_size", "block_size", "train_pairs", "val_pairs", "test_pairs", "batch_size")


def variant(config, who):
    """A text that names the options that the texts and the model `who` depend on."""
    options = {name: x for name, x in asdict(config).items()
               if name in TEXTS or name.startswith(f"{who}_") and name != "student_pairs"}
    text = json.dumps(options, sort_keys=True)
    return f"{who}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@cache
def keep_in(folder, seed):
    """The Keep of a model, in a folder of its own, which this process locks as long as it lives."""
    keep = Keep(folder, CPU)
    keep.seed = seed
    return keep


def quietly(f, *args):
    """f(*args). What training prints goes nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return f(*args)


class Seed:
    """What the cells of one seed have in common, computed when a cell first asks for it.

    Models are kept in a folder, so that a stopped run and another experiment find them there.
    """

    def __init__(self, out, seed):
        self.out, self.seed, self.known = out / f"seed{seed}", seed, {}

    def once(self, name, f, *args):
        """f(*args), remembered under `name`."""
        if name not in self.known:
            self.known[name] = quietly(f, *args)
        return self.known[name]

    def keep(self, config, who):
        return keep_in(self.out / variant(config, who), self.seed)

    def task(self, config):
        return self.once(variant(config, "task"), self._task, config)

    def student(self, config):
        return self.once(variant(config, "student"), self._student, config)

    def teacher(self, config, labels):
        """(reference, teacher), trained on the pairs and labels of `Cell.teacher`."""
        more = config.student_pairs * (labels == "unseen")
        return self.once((variant(config, "teacher"), labels, more), self._teacher, config, labels)

    def _task(self, config):
        pairs = load_pairs(config.data) if config.data else None
        return load_task(replace(config, student_pairs=0), self.seed, pairs)

    def _student(self, config):
        task = self.task(config)
        return self.keep(config, "student").train(
            "sft", fit, new_model("student", config, task, self.seed, CPU),
            Likelihood([[row] for row in task.ids.sft]),
            config.recipe("student_sft_steps", "student_sft_lr"), self.seed)

    def _teacher(self, config, labels):
        task, val = self.task(config), self.held_out(config, "val")
        few = replace(val, pairs=val.pairs[:1], texts=val.texts[:1])
        ids = task.ids._replace(train=self.pairs_of_teacher(config, labels))
        return train_teacher(config, self.seed, task._replace(ids=ids), CPU, few,
                             self.keep(config, "teacher"))

    def pairs_of_teacher(self, config, labels):
        task, (kind, _, share) = self.task(config), labels.partition(" ")
        pairs = task.ids.train
        if kind in LABELS:
            texts = data.toy_splits(config.train_pairs, config.val_pairs, config.test_pairs,
                                    self.seed, LABELS[kind])
            return data.encode(texts.train, task.tokenizer, config.block_size)[1]
        if kind == "flipped":
            return flipped(which_flip(len(pairs), float(share), self.seed), pairs)[0]
        return pairs[config.student_pairs:] if kind == "unseen" else pairs

    def held_out(self, config, split):
        texts, ids, tokenizer = self.task(config)
        return HeldOut(getattr(ids, split), getattr(texts, split), tokenizer, not config.data,
                       config.samples, config.max_new_tokens, config.batch_size, self.seed)


# --------------------------------------------------------------------------------------------------
# From a cell to its loss

def loss_of(cell, config, at):
    """The loss of a cell. at: the Seed."""
    task, words = at.task(config), cell.control.split()
    pairs = task.ids.train[:config.student_pairs or None]
    ref_logps = all_pair_logps(at.student(config), pairs, config.batch_size)    # (2, N)
    teacher = psi = None
    if cell.value or cell.method in ("bc", "kd", "kd+dpo"):
        teacher_ref, teacher = at.teacher(config, cell.teacher)
    if cell.value:
        psi = psi_of(cell, config, pairs, teacher, teacher_ref)                 # (2, N)
    if "shuffled" in words:
        psi = psi_of_another_pair(psi, at.seed)
    if "noise" in words:
        where = which_flip(len(task.ids.train), cell.dose, at.seed)[:len(pairs)]
        pairs, ref_logps, psi = flipped(where, pairs, ref_logps, psi)
    if "relabel" in words:
        pairs, ref_logps, psi = flipped(psi[0] < psi[1], pairs, ref_logps, psi)

    if cell.method == "bc":
        return Likelihood(quietly(teacher_answers, config, at.seed, pairs, task, teacher,
                                  at.keep(config, "teacher")))
    kd = WarmKD(pairs, teacher, cell.dose) if "warm" in words else KD(pairs, teacher)
    if cell.method == "kd":
        return kd
    if cell.method.endswith("tvkd"):
        loss = TVKD(pairs, ref_logps, config.beta, psi, config.alpha)
    elif {"soft", "mean", "evidence"} & set(words):
        loss = Labelled(pairs, ref_logps, config.beta, soft_label(words[0], psi[0] - psi[1]))
    else:
        loss = DPO(pairs, ref_logps, config.beta)
    return Both(pairs, kd, loss) if cell.method.startswith("kd+") else loss


def psi_of(cell, config, pairs, teacher, teacher_ref):
    """Sum of psi over each response of the pairs, (2, N)."""
    rows = both_responses(pairs)
    values = state_values(cell.value, teacher, teacher_ref, rows, config.teacher_beta,
                          config.batch_size)
    return summed_psi(values, rows, config.gamma, cell.terminal).view(2, -1)


# --------------------------------------------------------------------------------------------------
# From a cell to its numbers

def numbers_of(cell, at):
    """Train and measure one cell -> its numbers."""
    config = replace(Config(**defaults("data" in dict(cell.options))), **dict(cell.options))
    held_out = at.held_out(config, "test" if cell.split == "choice" else cell.split)
    if cell.method == "teacher":
        ref, model = at.teacher(config, cell.teacher)
    else:
        model = ref = at.student(config)
        loss = None if cell.method == "sft" else loss_of(cell, config, at)
    started = time.perf_counter()           # without what the cells of a seed have in common
    if cell.method not in ("teacher", "sft"):
        model = quietly(fit, ref, loss, config.recipe("steps", "lr"), at.seed)
    numbers = measured(model, ref, config, held_out, cell, at)
    return {**numbers, "seconds": round(time.perf_counter() - started, 1)}


def measured(model, ref, config, held_out, cell, at):
    """Numbers of one model."""
    if config.data and cell.split != "test":            # settings are chosen by accuracy alone
        reference = at.once(("held out", id(ref), cell.split), all_pair_logps, ref, held_out.pairs,
                            config.batch_size)
        logps = all_pair_logps(model, held_out.pairs, config.batch_size)
        chosen, rejected = logps - reference
        margins = chosen - rejected
        return {"reward": None, "pref_acc": is_correct(margins).mean().item(),
                "pref_n": len(margins)}
    beta = config.teacher_beta if cell.method == "teacher" else config.beta
    numbers, _ = evaluate(model, ref, beta, held_out)
    if cell.teacher in LABELS:                          # the parts of the true reward, too
        prompts, asked = ([pair.prompt for pair in pairs for _ in range(held_out.samples)]
                          for pairs in (held_out.pairs, held_out.texts))
        answers = sample(model, prompts, held_out.tokenizer.eot_token, held_out.max_new_tokens,
                         held_out.seed)
        parts = [data.reward_parts(prompt, spoken(answer, held_out.tokenizer))
                 for prompt, answer in zip(asked, answers)]
        numbers["facts"], numbers["manners"] = map(statistics.fmean, zip(*parts))
    return {**numbers, "pref_n": len(held_out.pairs)}
