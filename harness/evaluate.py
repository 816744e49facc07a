"""The numbers of the table: sampled answers, true reward, accuracy on held-out pairs, KL."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

import data
from harness.numbers import interval
from harness.sampling import sample
from harness.steps import two_at_once
from harness.tokenizers import text_of
from model import batches, both_responses, device_of, rows_logps


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
        pairs, texts = getattr(task.ids, split), getattr(task.texts, split)
        samples = config.samples if split == "test" else 1
        return cls(pairs, texts, task.tokenizer, not config.data, samples, config.max_new_tokens,
                   config.batch_size, seed)


@dataclass(frozen=True, eq=False)
class Validation:
    """validate(model) -> {"val_...": number}, against what the model started from."""
    ref: object
    beta: float
    held_out: HeldOut

    def __call__(self, model):
        metrics, _ = evaluate(model, self.ref, self.beta, self.held_out)
        return {f"val_{name}": x for name, x in metrics.items()}


def reward_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Implicit reward of the chosen minus that of the rejected response: (B,), in beta * nats."""
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)).detach()


def is_correct(margins):
    """1 where the chosen response has the larger implicit reward, 0 where not, 1/2 for a tie.

    A model ties with itself; at step 1, against cached log-probs, it does so only up to rounding.
    """
    return (margins > 0) + 0.5 * (margins == 0)


def spoken(response, tokenizer):
    """Response ids -> text, without EOS."""
    return text_of([token for token in response if token != tokenizer.eot_token], tokenizer)


def policy_kl(model, ref, rows, batch_size):
    """KL(model || ref), nats per response: exact over the vocabulary, on the states of `rows`.

    rows: the model's own samples.
    """
    device = device_of(model)
    sums = two_at_once(summed_kl, list(batches(rows, batch_size, device)), device, model, ref)
    return sum(sums) / len(rows)


@torch.no_grad()
def summed_kl(model, ref, batch):
    """The sum of KL(model || ref) over the states of a batch, nats."""
    _, tokens, mask = batch
    states = F.pad(mask, (0, 1))                                                # (B, T+1)
    policy = F.log_softmax(model(tokens, states).float(), -1)                   # (n, V)
    reference = F.log_softmax(ref(tokens, states).float(), -1)
    return (policy.exp() * (policy - reference)).sum().item()


def held_out_margins(model, ref, beta, held_out):
    """Implicit reward margin of every held-out pair: (pairs,)."""
    policy = all_pair_logps(model, held_out.pairs, held_out.batch_size)             # (2, pairs)
    return reward_margins(*policy, *reference_logps(ref, held_out), beta)


@lru_cache(maxsize=4)
def reference_logps(ref, held_out):
    """Log-probs of the held-out responses under a frozen reference, which many models share."""
    return all_pair_logps(ref, held_out.pairs, held_out.batch_size)


def all_pair_logps(model, pairs, batch_size):
    """log pi(y|x) of the chosen and the rejected responses, (2, N): two threads take a row each."""
    rows = both_responses(pairs)
    halves = rows[:len(pairs)], rows[len(pairs):]
    return torch.stack(two_at_once(half_logps, halves, device_of(model), model, batch_size))


@torch.no_grad()
def half_logps(model, batch_size, rows):
    return rows_logps(model, rows, batch_size)


def evaluate(model, ref, beta, held_out):
    """One model -> (metrics, {"reward": of each prompt, "pref_acc": of each pair, "true_acc"}).

    pref_acc: whether the implicit reward orders a pair as its label does; true_acc: as the true
    reward does, where the two answers differ in it. ref, beta: what the model started from and the
    beta of its implicit reward. The true reward is known on the toy task alone.
    """
    pairs, texts, samples = held_out.pairs, held_out.texts, held_out.samples
    margins = held_out_margins(model, ref, beta, held_out)
    prompts = [pair.prompt for pair in pairs for _ in range(samples)]
    responses = sample(model, prompts, held_out.tokenizer.eot_token, held_out.max_new_tokens,
                       held_out.seed)
    each = {"pref_acc": is_correct(margins)}
    if held_out.toy:
        asked = [pair.prompt for pair in texts for _ in range(samples)]
        rewards = [data.reward(prompt, spoken(response, held_out.tokenizer))
                   for prompt, response in zip(asked, responses)]
        each["reward"] = torch.tensor(rewards).double().view(-1, samples).mean(1)   # (prompts,)
        gaps = [data.reward(p.prompt, p.chosen) - data.reward(p.prompt, p.rejected) for p in texts]
        gaps = torch.tensor(gaps, device=margins.device)                            # (pairs,)
        each["true_acc"] = is_correct(margins * gaps.sign())[gaps != 0]     # (pairs that differ,)
    rows = [data.Example(*row) for row in zip(prompts, responses)]
    means = {name: x.mean().item() if len(x) else None for name, x in each.items()}
    metrics = {"reward": None, "true_acc": None, **means, "pref_margin": margins.mean().item(),
               "kl": policy_kl(model, ref, rows, held_out.batch_size),
               "length": sum(map(len, responses)) / len(responses)}
    for name, x in metrics.items():
        if x is not None and not math.isfinite(x):
            raise FloatingPointError(f"{name} {x} on held-out pairs; expected finite numbers: the "
                                     "weights are too large, try a lower learning rate")
    return metrics, each


def measure(model, ref, beta, held_out):
    """`evaluate`, for a row of the table -> {"numbers": with intervals, "reward": of each prompt or
    None, "pref_acc": of each pair}."""
    metrics, each = evaluate(model, ref, beta, held_out)
    intervals = {f"{key}_ci": interval(x.tolist()) for key, x in each.items()}
    numbers = {"pref_n": len(held_out.pairs), "reward_ci": None, "true_acc_ci": None,
               "vs_dpo": None, "vs_dpo_ci": None, "acc_vs_dpo": None, "acc_vs_dpo_ci": None,
               **metrics, **intervals}
    return {"numbers": numbers, "reward": each.get("reward"), "pref_acc": each["pref_acc"].cpu()}


def fill(rows, measured):
    """The numbers of every Row from {label: what `measure` gives}, with its differences from DPO.

    They are paired: by prompt for the true reward, by pair for the held-out accuracy.
    """
    dpo = measured.get("dpo", {})
    for row in rows:
        row.numbers = dict(measured[row.label]["numbers"])
        for name, key in (("vs_dpo", "reward"), ("acc_vs_dpo", "pref_acc")):
            if row.label != "dpo" and dpo.get(key) is not None:
                difference = (measured[row.label][key] - dpo[key]).double()
                row.numbers |= {name: difference.mean().item(),
                                f"{name}_ci": interval(difference.tolist())}
