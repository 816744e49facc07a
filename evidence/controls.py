"""How a cell is trained and measured: every loss, teacher and label that train.py does not have.

All that makes a number of the experiments is here, in train.py or in harness/evaluate.py; the
digest of these files is part of the key of every kept cell. Words of `Cell.control`:

    shuffled    psi of another pair, chosen and rejected in their places
    plus        the plus sign of psi: alpha below 0
    beta        DPO at beta / (1 + alpha)
    relabel     the label is the sign of the teacher's difference of summed psi
    soft, mean, evidence    the label is a probability: see `soft_label`
    noise       a share `dose` of the student's labels turned round; the teacher keeps its own
    gauge       c(s_t) = dose * t added to all logits of the teacher: the same policy
    normalised  log-probs in place of the teacher's logits, at temperature `dose`
    top         KD from the teacher's `dose` likeliest tokens and one bin for the rest
    entropy     the recipe of the released code: see `NextEntropy`
"""

import math
import statistics
import time
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from harness.evaluate import evaluate, is_correct, pair_logps, sample, spoken
from harness.psi import token_kinds
from model import batches, both_responses, action_psi, state_values, device_of, summed_psi
from train import (DPO, KD, TVKD, Likelihood, OfPairs, fit, four_logps, part_size,
                   teacher_answers, tokens_in, with_metrics)
from tvkd import action_logps, dpo_loss

# --------------------------------------------------------------------------------------------------
# Labels

# About one label in seven is wrong, so a label counts ln(6/7 / (1/7)) = ln 6 = 1.79 nats.
LABEL_NATS = math.log(6)


def soft_label(control, difference):
    """Probability that the chosen response is better: difference (N,) of the teacher's psi -> (N,).

    soft      the teacher's alone, sigmoid(dpsi)
    mean      of the label, which says 1, and of the teacher's
    evidence  label and teacher as independent evidence: their log-odds are added
    """
    if control == "soft":
        return difference.sigmoid()
    if control == "mean":
        return (1 + difference.sigmoid()) / 2
    return (difference + LABEL_NATS).sigmoid()


def swapped(where, pairs, ref_logps, psi):
    """Chosen and rejected exchanged where `where` (N,) is True: in the pairs and in both (2, N)."""
    pairs = [data.Pair(pair.prompt, pair.rejected, pair.chosen) if turn else pair
             for pair, turn in zip(pairs, where.tolist())]
    return pairs, torch.where(where, ref_logps.flip(0), ref_logps), \
        None if psi is None else torch.where(where, psi.flip(0), psi)


def turned_labels(n, share, generator):
    """Which of n labels are turned round, each with probability `share`: (n,) bool."""
    return torch.rand(n, generator=generator) < share


def psi_of_another_pair(psi, generator):
    """psi (2, N) dealt anew along one cycle, so that no pair keeps its own."""
    order = torch.randperm(psi.shape[1], generator=generator)
    return psi[:, torch.empty_like(order).scatter(0, order, order.roll(1))]


# --------------------------------------------------------------------------------------------------
# Teachers

def facts_alone(prompt, response):
    return data.reward_parts(prompt, response)[0]


def manners_alone(prompt, response):
    return data.reward_parts(prompt, response)[1]


def contrary_manners(prompt, response):
    """Facts, and a liking for rude answers."""
    facts, manners = data.reward_parts(prompt, response)
    return facts - manners


# What labels the teacher's pairs, with draws of its own. The student's are always the full reward.
LABELS = {"full": data.reward, "facts": facts_alone, "manners": manners_alone,
          "contrary": contrary_manners}


class Gauge(nn.Module):
    """A model with slope * t added to every logit of state s_t: same policy, another "value".

    In float64 and with logits rounded to multiples of 2^-30, so that the sum is exact and the
    policy the very same bits.
    """

    def __init__(self, model, slope):
        super().__init__()
        self.model, self.slope = model, slope

    def forward(self, tokens, states=None):
        logits = (self.model(tokens).double() * 2 ** 30).round() / 2 ** 30      # (B, T+1, V)
        logits = logits + self.slope * torch.arange(tokens.shape[1]).view(1, -1, 1)
        return logits if states is None else logits[states]


class Normalised(nn.Module):
    """A model that gives log p / temperature, so that `soft_value` of these logits at beta =
    temperature is temperature * logsumexp(log p / temperature): 0 everywhere at temperature 1.
    """

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens, states=None):
        # float64: at temperature 1 rounding would be all that is left
        return F.log_softmax(self.model(tokens, states).double(), -1) / self.temperature


def check_same_policy(model, moved, pairs, batch_size):
    """Raise RuntimeError unless both give bit-identical log-probabilities of every response."""
    for _, tokens, mask in batches(both_responses(pairs), batch_size, device_of(model)):
        with torch.no_grad():
            one, other = (F.log_softmax(m(tokens), -1)[:, :-1][mask] for m in (model, moved))
        if not torch.equal(one, other):
            raise RuntimeError("gauge: expected the same policy, bit for bit")


# --------------------------------------------------------------------------------------------------
# Losses, of the form that train.py describes

@dataclass(frozen=True, eq=False)
class SoftDPO(OfPairs):
    """DPO with soft labels: -p log sigmoid(margin) - (1 - p) log sigmoid(-margin), p (N,)."""
    ref_logps: torch.Tensor
    probability: torch.Tensor
    beta: float

    def __call__(self, model, ids):
        both, p = self.rows(ids.tolist()), self.probability[ids]
        logps = four_logps(model, both, self.ref_logps[:, ids])                 # four of (B,)
        chosen, rejected, ref_chosen, ref_rejected = logps
        losses = (p * dpo_loss(*logps, self.beta)
                  + (1 - p) * dpo_loss(rejected, chosen, ref_rejected, ref_chosen, self.beta))
        return with_metrics(losses, logps, self.beta, both)


@dataclass(frozen=True, eq=False)
class TopKD(OfPairs):
    """KD from the teacher's k likeliest tokens of each state and one bin for all others."""
    teacher: nn.Module
    k: int

    def __call__(self, model, ids):
        rows, loss, n = self.rows(ids.tolist()), 0.0, 0
        for _, tokens, mask in batches(rows, part_size(rows), ids.device):
            with torch.no_grad():
                teacher_logits = self.teacher(tokens)                           # (B, T+1, V)
            loss = loss + top_k_kd_loss(model(tokens), teacher_logits, mask, self.k) * mask.sum()
            n = n + mask.sum()
        return {"loss": loss, "n": n, "tokens": tokens_in(rows)}


def top_k_kd_loss(student_logits, teacher_logits, mask, k):
    """KL(teacher || student) over k tokens and a bin, averaged over masked tokens -> nats.

    logits (B, T+1, V), mask (B, T). What a teacher of which k ids and probabilities a token are
    stored can teach; k = V is tvkd.kd_loss.
    """
    teacher = F.log_softmax(teacher_logits.detach()[:, :-1][mask], -1)          # (n, V)
    teacher, ids = teacher.topk(k)                                              # (n, k)
    student = F.log_softmax(student_logits[:, :-1][mask], -1).gather(-1, ids)
    teacher, student = with_rest(teacher.exp()), with_rest(student.exp())       # (n, k + 1)
    return (teacher * (teacher.log() - student.log())).sum(-1).mean()


def with_rest(probabilities):
    """Probabilities (n, k) and one column for what is missing to 1."""
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp_min(1e-8)
    return torch.cat([probabilities, rest], -1)


@dataclass(frozen=True, eq=False)
class NextEntropy(OfPairs):
    """The shipped recipe of the released code: -log sigmoid(R_w - R_l), without pi_ref and beta.

    R(y) = sum_t [log pi(a_t|s_t) - sign * H(pi(.|s_{t+1}))], with gradient through both, H = 0
    after the end. No number of the teacher is in it.
    """
    sign: float

    def __call__(self, model, ids):
        rows = self.rows(ids.tolist())
        order, rewards = [], []
        for at, tokens, mask in batches(rows, part_size(rows), ids.device):
            order += at
            rewards.append(entropy_rewards(model, tokens, mask, self.sign))
        rewards = torch.cat(rewards)[torch.tensor(order, device=ids.device).argsort()]      # (2B,)
        chosen, rejected = rewards.chunk(2)
        return {"loss": -F.logsigmoid(chosen - rejected).sum(), "n": len(ids),
                "tokens": tokens_in(rows)}


def entropy_rewards(model, tokens, mask, sign):
    """R(y) of `NextEntropy` of each row: tokens (B, T+1), mask (B, T) -> (B,)."""
    logits = model(tokens, F.pad(mask, (0, 1)))                                 # (n, V)
    logps = F.log_softmax(logits, -1)
    entropies = -(logps.exp() * logps).sum(-1)                                  # (n,)
    # Every state that is acted in follows another action, except for s_p.
    follows = mask & F.pad(mask, (1, 0))[:, :-1]                                # (B, T)
    gains = action_logps(logits, tokens[:, 1:][mask]) - sign * entropies * follows[mask]
    return gains.new_zeros(mask.shape).masked_scatter(mask, gains).sum(-1)


@dataclass(frozen=True, eq=False)
class Both:
    """The sum of two mean losses, of a whole batch: evidence.run trains on one thread."""
    first: object
    second: object

    def __len__(self):
        return len(self.first)

    def rows(self, ids):
        return self.first.rows(ids)

    def __call__(self, model, ids):
        first, second = self.first(model, ids), self.second(model, ids)
        return {"loss": first["loss"] / first["n"] + second["loss"] / second["n"], "n": 1,
                "tokens": first["tokens"] + second["tokens"]}


# --------------------------------------------------------------------------------------------------
# From a cell to its loss

def loss_of(cell, config, stages):
    """The loss of a cell. stages: evidence.run.Stages, the models of its seed."""
    generator = torch.Generator().manual_seed(stages.seed + 2 ** 32)    # not that of the batches
    task, words = stages.task(config), cell.control.split()
    pairs = task.ids.train[:config.student_pairs or None]
    ref_logps = pair_logps(stages.student(config), pairs, config.batch_size)
    teacher = teacher_ref = psi = None
    if cell.value or cell.method in ("bc", "kd", "kd+dpo"):
        teacher_ref, teacher = stages.teacher(cell.teacher, config)
    if cell.value:
        psi = psi_of(cell, config, pairs, teacher, teacher_ref)                 # (2, N)
    if "shuffled" in words:
        psi = psi_of_another_pair(psi, generator)
    if "noise" in words:
        turned = turned_labels(len(pairs), cell.dose, generator)
        pairs, ref_logps, psi = swapped(turned, pairs, ref_logps, psi)
    if "relabel" in words:
        pairs, ref_logps, psi = swapped(psi[0] < psi[1], pairs, ref_logps, psi)

    if cell.method == "bc":
        return Likelihood(teacher_answers(config, stages.seed, pairs, task.tokenizer, teacher,
                                          stages.keep))
    if cell.method == "released":
        return NextEntropy(pairs, cell.dose)
    kd = TopKD(pairs, teacher, cell.dose) if "top" in words else KD(pairs, teacher)
    if cell.method == "kd":
        return kd
    if cell.method.endswith("tvkd"):
        loss = TVKD(pairs, ref_logps, psi, config.beta, config.alpha)
    elif {"soft", "mean", "evidence"} & set(words):
        probability = soft_label(words[0], psi[0] - psi[1])
        loss = SoftDPO(pairs, ref_logps, probability, config.beta)
    else:
        loss = DPO(pairs, ref_logps, config.beta)
    return Both(kd, loss) if cell.method.startswith("kd+") else loss


def psi_of(cell, config, pairs, teacher, teacher_ref):
    """Sum of psi over each response of the pairs, (2, N)."""
    beta, words = config.teacher_beta, cell.control.split()
    if "gauge" in words:
        for model in (teacher, teacher_ref):
            check_same_policy(Gauge(model, 0.0), Gauge(model, cell.dose), pairs, config.batch_size)
        teacher, teacher_ref = Gauge(teacher, cell.dose), Gauge(teacher_ref, cell.dose)
    if "normalised" in words:
        teacher, beta = Normalised(teacher, cell.dose), cell.dose
    rows = both_responses(pairs)
    values = state_values(cell.value, teacher, teacher_ref, rows, beta, config.batch_size)
    return summed_psi(values, rows, config.gamma, cell.terminal).view(2, -1)


def stored_bytes(cell, pairs, labelled, n_vocab):
    """Bytes that the loss reads of the teacher for `pairs`, per response token of `labelled`.

    labelled: the pairs that DPO learns from. bc: as if the teacher's answers were as long.
    """
    words = cell.control.split()
    per_pair = 0 if cell.value is None else 1 / 8 if "relabel" in words else 4      # a bit, a float
    per_token = 2 if cell.method == "bc" else 4 * n_vocab if "kd" in cell.method.split("+") else 0
    if "top" in words:
        per_token = (2 + 4) * cell.dose                                 # an id and its float
    return (per_pair * len(pairs) + per_token * response_tokens(pairs)) / response_tokens(labelled)


def response_tokens(pairs):
    return sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


# --------------------------------------------------------------------------------------------------
# What a kept cell is made by

def trained(start, loss, recipe, seed, held_out, beta, with_parts, progress=None):
    """Train a student and measure it -> its numbers."""
    started = time.perf_counter()
    model = fit(start, loss, recipe, seed, progress=progress)
    numbers = measured(model, start, held_out, beta, with_parts)
    return {**numbers, "seconds": round(time.perf_counter() - started, 1)}


def measured(model, ref, held_out, beta, with_parts=False):
    """Numbers of one model. with_parts: those of the true reward, too, of the same answers."""
    started = time.perf_counter()
    numbers, _ = evaluate(model, ref, beta, held_out)
    if with_parts:
        prompts = [pair.prompt for pair in held_out.pairs for _ in range(held_out.samples)]
        asked = [pair.prompt for pair in held_out.texts for _ in range(held_out.samples)]
        answers = sample(model, prompts, held_out.tokenizer.eot_token, held_out.max_new_tokens,
                         held_out.seed)
        both = [data.reward_parts(prompt, spoken(answer, held_out.tokenizer))
                for prompt, answer in zip(asked, answers)]
        numbers["facts"], numbers["manners"] = map(statistics.fmean, zip(*both))
    return {**numbers, "pref_n": len(held_out.pairs),
            "seconds": round(time.perf_counter() - started, 1)}


# --------------------------------------------------------------------------------------------------
# What the value knows

def knows(kind, terminal, teacher, teacher_ref, held_out, beta):
    """Does the value order the pairs, and does psi point at the right words? -> numbers.

    correlation: Pearson, of the difference of summed psi and that of the true reward; agrees: how
    often their signs do, where the truth differs; words: mean psi of the words of each kind.
    """
    started, rows = time.perf_counter(), both_responses(held_out.pairs)
    values = state_values(kind, teacher, teacher_ref, rows, beta, held_out.batch_size)
    psi, texts = action_psi(values, rows, 1.0, terminal), held_out.texts        # (2 pairs, T)
    chosen, rejected = psi.sum(-1).view(2, -1)
    truth = torch.tensor([data.reward(p.prompt, p.chosen) - data.reward(p.prompt, p.rejected)
                          for p in texts]).double()
    both = torch.stack([chosen - rejected, truth])
    words = {}
    for text, row, of_row in zip(both_responses(texts), rows, psi):
        tokens = [held_out.tokenizer.decode([token]) for token in row.response]
        of_response = of_row[len(row.prompt) - 1:][:len(tokens)].tolist()
        for word, total in by_kind(token_kinds(*text, tokens), of_response):
            words.setdefault(word, []).append(total)
    return {"n": len(texts), "correlation": torch.corrcoef(both)[0, 1].item(),
            "agrees": is_correct((chosen - rejected) * truth)[truth != 0].mean().item(),
            "words": {word: {"n": len(totals), "psi": statistics.fmean(totals)}
                      for word, totals in sorted(words.items())},
            "seconds": round(time.perf_counter() - started, 1)}


def by_kind(kinds, psi):
    """(kind, psi) of every fact and thing, and of every opening and closing as a whole.

    kinds: harness.psi.token_kinds; psi: one number a token.
    """
    runs = groupby(zip(kinds, psi), key=itemgetter(0))
    return [(kind, sum(x for _, x in run)) for kind, run in runs if kind]
