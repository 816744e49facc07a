"""What is measured on held-out pairs: sampled answers, true reward, accuracy, KL; and what the page
shows of them, psi token by token."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

import data
from harness.numbers import interval
from harness.sampling import sample
from harness.steps import two_at_once
from harness.tokenizers import text_of
from model import action_psi, batches, both_responses, device_of, rows_logps, state_values

SHOWN = 6               # pairs of the page
UNKNOWN = dict.fromkeys("reward_ci true_acc_ci vs_dpo vs_dpo_ci acc_vs_dpo acc_vs_dpo_ci".split())


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out pairs of a split, and how models answer their prompts."""
    pairs: list             # of ids
    texts: list             # the same pairs as text
    tokenizer: object       # a tiktoken.Encoding
    toy: bool               # whether the true reward is known
    samples: int            # answers to each prompt
    max_new_tokens: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, task, split, config, seed):
        """The split "val" or "test" of a Task. On validation prompts one answer each is enough."""
        return cls(getattr(task.ids, split), getattr(task.texts, split), task.tokenizer,
                   not config.data, config.samples if split == "test" else 1,
                   config.max_new_tokens, config.batch_size, seed)


@dataclass(frozen=True, eq=False)
class Validation:
    """validate(model) -> {"val_...": number}, against what the model started from."""
    ref: object
    beta: float
    held_out: HeldOut

    def __call__(self, model):
        metrics, _ = evaluate(model, self.ref, self.beta, self.held_out)
        return {f"val_{name}": x for name, x in metrics.items()}


def is_correct(margins):
    """1 where the chosen response has the larger implicit reward, 0 where not, 1/2 for a tie. A
    model ties with itself; at step 1, against cached log-probs, it does so only up to rounding."""
    return (margins > 0) + 0.5 * (margins == 0)


def spoken(response, tokenizer):
    """Response ids -> text, without EOS."""
    return text_of([token for token in response if token != tokenizer.eot_token], tokenizer)


def summed_kl(model, ref, batch):
    """KL(model || ref), exact over the vocabulary, summed over the states of a batch: nats."""
    _, tokens, mask = batch
    states = F.pad(mask, (0, 1))                                                # (B, T+1)
    policy = F.log_softmax(model(tokens, states).float(), -1)                   # (n, V)
    reference = F.log_softmax(ref(tokens, states).float(), -1)
    return (policy.exp() * (policy - reference)).sum().item()


@torch.no_grad()
def all_pair_logps(model, pairs, batch_size):
    """log pi(y|x) of the chosen and the rejected responses, (2, N): two threads take a row each."""
    rows = both_responses(pairs)
    halves = rows[:len(pairs)], rows[len(pairs):]
    logps_of = partial(rows_logps, model, batch_size=batch_size)
    return torch.stack(two_at_once(logps_of, halves, device_of(model)))


@lru_cache(maxsize=4)
def reference_logps(ref, held_out):
    """Log-probs of the held-out responses under a frozen reference, which many models share."""
    return all_pair_logps(ref, held_out.pairs, held_out.batch_size)


@torch.no_grad()
def evaluate(model, ref, beta, held_out):
    """One model -> (metrics, {"reward": of each prompt, "pref_acc": of each pair, "true_acc"}).
    pref_acc: whether the implicit reward orders a pair as its label does; true_acc: as the true
    reward does, where the two answers differ in it. ref, beta: what the model started from and the
    beta of its implicit reward. The true reward is known on the toy task alone."""
    texts, samples, device = held_out.texts, held_out.samples, device_of(model)
    logps = all_pair_logps(model, held_out.pairs, held_out.batch_size)              # (2, pairs)
    chosen, rejected = (logps - reference_logps(ref, held_out)).cpu()               # log-ratios
    margins = beta * (chosen - rejected)                                            # (pairs,)
    prompts = [pair.prompt for pair in held_out.pairs for _ in range(samples)]
    responses = sample(model, prompts, held_out.tokenizer.eot_token, held_out.max_new_tokens,
                       held_out.seed)
    rows = [data.Example(*row) for row in zip(prompts, responses)]
    kl = two_at_once(partial(summed_kl, model, ref),
                     list(batches(rows, held_out.batch_size, device)), device)
    each = {"pref_acc": is_correct(margins)}
    if held_out.toy:
        asked = [pair.prompt for pair in texts for _ in range(samples)]
        rewards = [data.reward(prompt, spoken(response, held_out.tokenizer))
                   for prompt, response in zip(asked, responses)]
        each["reward"] = torch.tensor(rewards).double().view(-1, samples).mean(1)   # (prompts,)
        gaps = torch.tensor([data.reward(pair.prompt, pair.chosen)
                             - data.reward(pair.prompt, pair.rejected) for pair in texts])
        each["true_acc"] = is_correct(margins * gaps.sign())[gaps != 0]     # (pairs that differ,)
    means = {name: x.mean().item() if len(x) else None for name, x in each.items()}
    metrics = {"reward": None, "true_acc": None, **means, "pref_margin": margins.mean().item(),
               "kl": sum(kl) / len(rows), "length": sum(map(len, responses)) / len(responses)}
    for name, x in metrics.items():
        if x is not None and not math.isfinite(x):
            raise FloatingPointError(f"{name} {x} on held-out pairs; expected finite numbers: the "
                                     "weights are too large, try a lower learning rate")
    return metrics, each


def rows_of(measured, seed):
    """{label: what `evaluate` gives} -> the rows of the table, as they stand in results.json. The
    differences from DPO are paired: by prompt for the true reward, by pair for the accuracy."""
    rows, (_, dpo) = [], measured.get("dpo", ({}, {}))
    for label, (metrics, each) in measured.items():
        method, _, kind = label.partition(" ")
        value, _, terminal = kind.partition("/")
        differences = {name: each[key] - dpo[key] for name, key in (
            ("vs_dpo", "reward"), ("acc_vs_dpo", "pref_acc")) if label != "dpo" and key in dpo}
        rows.append({
            "label": label, "method": method, "value": value or None, "terminal": terminal or None,
            "seed": seed, **UNKNOWN, "pref_n": len(each["pref_acc"]), **metrics,
            **{name: x.double().mean().item() for name, x in differences.items()},
            **{f"{name}_ci": interval(x.double().tolist())
               for name, x in (each | differences).items()}})
    return rows


def psi_of_pairs(kind, terminal, gamma, teacher, teacher_ref, beta, held_out):
    """The first held-out pairs under one kind of value -> a dict each. beta: the teacher's."""
    rows, shown = both_responses(held_out.pairs[:SHOWN]), []
    values = state_values(kind, teacher, teacher_ref, rows, beta, held_out.batch_size)
    psi = action_psi(values, rows, gamma, terminal)
    for i, text in enumerate(held_out.texts[:SHOWN]):
        pair = {"seed": held_out.seed, "value": kind, "terminal": terminal, "prompt": text.prompt}
        for name, j in (("chosen", i), ("rejected", i + len(rows) // 2)):
            response, first = getattr(text, name), len(rows[j].prompt) - 1          # s_p
            end = first + len(rows[j].response)                                     # s_end
            V = values[j][first:end + 1].tolist()
            last = {"zero": 0.0, "hold": V[-2], "value": V[-1]}[terminal]
            tokens = [text_of([token], held_out.tokenizer) for token in rows[j].response]
            pair[name] = {"tokens": tokens, "psi": psi[j][first:end].tolist(),
                          "phi": [*V[:-1], last], "kinds": [""] * (len(tokens) - 1) + ["EOS"]}
            if held_out.toy:
                pair[name] |= {"kinds": token_kinds(text.prompt, response, tokens),
                               "reward": data.reward(text.prompt, response)}
        shown.append(pair)
    return shown


def token_kinds(prompt, response, tokens):
    """A "right" or "wrong" fact or thing, "polite", "rude" or "" of each token; then "EOS"."""
    asked, marks, kinds = re.findall("[a-z]+", prompt.lower()), [""] * len(response), []
    kind_of = {word: "right" if word in asked else "wrong"
               for word in (*data.THINGS, *data.ALL_FACTS)}
    kind_of |= dict.fromkeys(data.POLITE_OPENINGS + data.POLITE_CLOSINGS, "polite")
    kind_of |= dict.fromkeys(data.RUDE_OPENINGS + data.RUDE_CLOSINGS, "rude")
    for found in re.finditer("|".join(map(re.escape, kind_of)), response):
        marks[slice(*found.span())] = [kind_of[found[0]]] * len(found[0])       # by character
    for token in tokens[:-1]:
        kinds.append(max(marks[:len(token)], default=""))       # any kind is greater than ""
        marks = marks[len(token):]
    return [*kinds, "EOS"]
