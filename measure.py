"""Reading models: log-probs and values of many rows, psi, sampled answers, and the numbers of the table.

One function, `score`, serves policy, reference and teacher: two code paths would differ at step 0, where the loss must be ln 2.
Each row of a file is scored once, in batches of like length, and looked up afterwards by its index. Left out: training, printing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from model import evaluating
from report import interval
from tvkd import action_logps, implicit_value, sequence_logps, shaping, soft_value


class Setup(NamedTuple):
    """What a run of one seed works with."""
    config: object              # options.Config
    seed: int
    device: torch.device
    tokenizer: object           # a tiktoken.Encoding
    texts: data.Splits
    ids: data.Splits            # the same items as ids, in the same order
    teacher_tokenizer: object   # the teacher's own; without --teacher_tokenizer the very same objects
    teacher_ids: data.Splits

    @property
    def teachers(self):
        """The Setup as the teacher reads it."""
        return self._replace(tokenizer=self.teacher_tokenizer, ids=self.teacher_ids)


def read_by(name, setup):
    """The Setup as the model of this name reads it: the teacher may have another tokenizer."""
    return setup.teachers if name == "teacher" else setup


def both_responses(pairs):
    """Pairs -> Rows: all chosen responses, then all rejected ones."""
    return [data.Row(p.prompt, p.chosen) for p in pairs] + [data.Row(p.prompt, p.rejected) for p in pairs]


def tokens_in(rows):
    return sum(len(row.prompt) + len(row.response) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------------
# Log-probs, values and psi of many rows

def score(model, tokens, mask):
    """tokens (B, T+1), mask (B, T) -> log-probs of the masked actions, 0 elsewhere: (B, T) nats. No other state meets the head."""
    logits = model(tokens, F.pad(mask, (0, 1)))                             # (n, V); the last state is never acted in
    logps = action_logps(logits, tokens[:, 1:][mask])                       # (n,)
    return torch.zeros(mask.shape, dtype=logps.dtype, device=mask.device).masked_scatter(mask, logps)


def batches(rows, batch_size, device):
    """Rows of ids -> (their indices, tokens, mask), every row once, rows of like length together: less padding."""
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for start in range(0, len(rows), batch_size):
        ids = order[start:start + batch_size]
        tokens, mask = data.collate([rows[i] for i in ids])
        yield ids, tokens.to(device), mask.to(device)


def response_logps(model, rows, batch_size, device):
    """Sequence log-probs of all rows, in their order: (len(rows),) nats."""
    order, logps = [], []
    for ids, tokens, mask in batches(rows, batch_size, device):
        order += ids
        logps.append(sequence_logps(score(model, tokens, mask), mask))
    return torch.cat(logps)[torch.tensor(order, device=device).argsort()]


@torch.no_grad()
def cached_logps(model, rows, batch_size, device):
    """What `response_logps` gives, once, to be looked up in every step."""
    with evaluating(model):
        return response_logps(model, rows, batch_size, device)


@torch.no_grad()
def cached_values(kind, teacher, teacher_ref, rows, beta, batch_size, device):
    """The teacher's value of every state of every row: a list of float32 tensors, one float per token of the row."""
    values = [None] * len(rows)
    for ids, tokens, mask in batches(rows, batch_size, device):
        if kind == "logits":
            states = F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))                                      # (B, T+1) s_p to s_end
            found = soft_value(teacher(tokens, states), beta)                                       # (n,)
            batch = torch.zeros(states.shape, dtype=found.dtype, device=device).masked_scatter(states, found)      # (B, T+1)
        else:
            batch = implicit_value(score(teacher, tokens, mask), score(teacher_ref, tokens, mask), mask, beta)
        for i, value in zip(ids, batch.cpu()):
            values[i] = value[:sum(map(len, rows[i]))].clone()                                      # without the padding
    return values


def cached_psi(values, rows, gamma, terminal):
    """psi of every action: values, a list of (tokens,) per row, -> (len(rows), T), 0 outside the response.

    In float64, on the CPU: summed in float32, what should cancel (--terminal=zero) would leave rounding errors behind.
    """
    _, mask = data.collate(rows)                                                                    # (N, T)
    padded = pad_sequence(values, batch_first=True).double()                                        # (N, T+1)
    return shaping(padded, mask, gamma, terminal)


def reward_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Implicit reward of the chosen minus that of the rejected response, beta times log-ratio each: (B,)."""
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)).detach()


def is_correct(margins):
    """1 where the chosen response has the larger implicit reward, 0 where not, 1/2 for a tie: (B,).

    A model against itself ties; a policy at step 1 against cached log-probs does so only up to rounding.
    """
    return (margins > 0) + 0.5 * (margins == 0)


def summed_psi(values, pairs, gamma, terminal, device, at_once=1000):
    """Sum of psi of each response of `pairs`, the teacher's ids: (2, pairs) float32, all that TVKD reads of the teacher.

    at_once: rows padded to one width at a time, so that memory does not grow with the pairs.
    """
    both = both_responses(pairs)
    sums = [cached_psi(values[i:i + at_once], both[i:i + at_once], gamma, terminal).sum(-1) for i in range(0, len(both), at_once)]
    return torch.cat(sums).float().view(2, -1).to(device)


def psi_of_pairs(kind, terminal, teacher, teacher_ref, setup, most=6):
    """The first held-out pairs, token by token -> list of {"prompt", "value", "terminal", "chosen": {...}, "rejected": {...}}.

    Each response: "tokens" as text, "psi" of each, and "values", V(s) of the states from s_p to s_end (one more than tokens).
    """
    config, pairs = setup.config, setup.ids.test[:most]
    rows = both_responses(pairs)
    values = cached_values(kind, teacher, teacher_ref, rows, config.teacher_beta, config.batch_size, setup.device)
    responses = []
    for row, value, psi in zip(rows, values, cached_psi(values, rows, config.gamma, terminal)):
        first, end = len(row.prompt) - 1, len(row.prompt) + len(row.response) - 1               # s_p and s_end
        responses.append({"tokens": [setup.tokenizer.decode([token]) for token in row.response],
                          "psi": psi[first:end].tolist(), "values": value[first:end + 1].tolist()})
    return [{"seed": setup.seed, "prompt": text.prompt, "value": kind, "terminal": terminal, "chosen": chosen,
             "rejected": rejected} for text, chosen, rejected in zip(setup.texts.test, responses, responses[len(pairs):])]


# ---------------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def sample(model, prompts, setup):
    """One response at temperature 1 to each prompt of ids -> list of ids, with EOS where the model ended it."""
    config, eos, responses = setup.config, setup.tokenizer.eot_token, []
    generator = torch.Generator(setup.device).manual_seed(setup.seed)       # its own: the order of batches is not moved by it
    for start in range(0, len(prompts), 4 * config.batch_size):
        batch = prompts[start:start + 4 * config.batch_size]
        for prompt, ids in zip(batch, model.generate(batch, config.max_new_tokens, eos, generator=generator)):
            ended = len(ids) < config.max_new_tokens and len(prompt) + len(ids) < config.block_size
            responses.append(ids + [eos] if ended else ids)
    return responses


def spoken(response, tokenizer):
    """Response ids -> text, without EOS."""
    return tokenizer.decode([token for token in response if token != tokenizer.eot_token])


@torch.no_grad()
def policy_kl(model, ref, rows, batch_size, device):
    """KL(model || ref) in nats per response: summed over the vocabulary and over the states of the model's own responses."""
    total = 0.0
    with evaluating(model):
        for _, tokens, mask in batches(rows, batch_size, device):
            policy, reference = (F.log_softmax(m(tokens, F.pad(mask, (0, 1))).float(), -1) for m in (model, ref))
            total += (policy.exp() * (policy - reference)).sum().item()
    return total / len(rows)


def cached_margins(model, ref, beta, pairs, setup):
    """Implicit reward margin of every pair under one model, in batches: (len(pairs),)."""
    both, size = both_responses(pairs), setup.config.batch_size
    return reward_margins(*(logps for m in (model, ref) for logps in cached_logps(m, both, size, setup.device).chunk(2)), beta)


def evaluate(model, ref, beta, split, samples, setup):
    """One model on "val" or "test" -> (metrics, {"reward": of each prompt, "pref_acc": 1, 1/2 or 0 of each pair, "true_acc"}).

    pref_acc: whether the implicit reward orders a pair as its label does; true_acc: as the true reward does, where it differs.

    ref and beta: what the model started from and the beta of its implicit reward. `samples` responses to each prompt; the true
    reward is known on the toy task alone.
    """
    pairs, config = getattr(setup.ids, split), setup.config
    margins = cached_margins(model, ref, beta, pairs, setup)
    prompts = [pair.prompt for pair in pairs for _ in range(samples)]
    responses = sample(model, prompts, setup)
    each = {"pref_acc": is_correct(margins)}
    if not config.data:
        asked = [pair.prompt for pair in getattr(setup.texts, split) for _ in range(samples)]
        rewards = [data.reward(prompt, spoken(response, setup.tokenizer)) for prompt, response in zip(asked, responses)]
        each["reward"] = torch.tensor(rewards, dtype=torch.double).view(-1, samples).mean(1)        # (prompts,)
        gaps = [data.reward(p.prompt, p.chosen) - data.reward(p.prompt, p.rejected) for p in getattr(setup.texts, split)]
        gaps = torch.tensor(gaps, device=setup.device)                                              # (pairs,)
        each["true_acc"] = is_correct(margins * gaps.sign())[gaps != 0]                             # (pairs that differ,)
    rows = [data.Row(*row) for row in zip(prompts, responses)]
    means = {name: x.mean().item() for name, x in each.items()}
    return {"reward": None, "true_acc": None, **means, "pref_margin": margins.mean().item(),
            "kl": policy_kl(model, ref, rows, config.batch_size, setup.device),
            "length": sum(map(len, responses)) / len(responses)}, each


def table_row(row, model, origin, beta, setup, split="test"):
    """A row of the table -> (row, {"reward": of each prompt, ...}). origin, beta: what `evaluate` takes as ref and beta."""
    metrics, each = evaluate(model, origin, beta, split, setup.config.samples, setup)
    intervals = {f"{key}_ci": interval(x.tolist()) for key, x in each.items()}
    return {**row, "seed": setup.seed, "pref_n": len(getattr(setup.ids, split)), "reward_ci": None, "true_acc_ci": None,
            "vs_dpo": None, "vs_dpo_ci": None, **metrics, **intervals}, each


def against_dpo(row, rewards, dpo_rewards):
    """The row with its difference to DPO; true rewards (prompts,) of both, paired by prompt."""
    difference = rewards - dpo_rewards
    return {**row, "vs_dpo": difference.mean().item(), "vs_dpo_ci": interval(difference.tolist())}
