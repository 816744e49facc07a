"""A nanoGPT-style transformer, and what the method reads off it: log-probs, values, psi.

One class serves as teacher, student and reference. It follows Karpathy's nanoGPT
(github.com/karpathy/nanoGPT, model.py) and GPT-2 (Radford et al. 2019): pre-LayerNorm blocks,
learned positions, GELU, an output head tied to the token embedding. Parameters have nanoGPT's
names. Left out: dropout, because policy and reference must be scored alike; the loss and the
optimiser (train.py); keys and values kept while sampling (harness/sampling.py). B rows, T
positions, C = n_embd channels, H heads of D = C / H channels, V tokens in the vocabulary. In the
second half a row of a batch is `tokens` with T+1 ids, as in tvkd.py.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import Example, collate
from tvkd import action_logps, implicit_value, sequence_logps, shaping, soft_value


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64        # longest row, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 48
    bias: bool = True           # in Linears and LayerNorms, as in GPT-2
    bfloat16: bool = False      # matrix products of the blocks; weights and head stay float32
    gelu: str = "exact"         # or "tanh", the approximation that GPT-2 was trained with

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head={self.n_head}, "
                             f"got {self.n_embd}")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def heads(self, x):
        """x (B, T, C) -> queries, keys and values, (B, H, T, D) each."""
        B, T, C = x.shape
        return (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                for part in self.c_attn(x).split(C, dim=2))

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)      # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))          # heads side by side


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, states=None):
        x = x + self.attn(self.ln_1(x))
        x = x if states is None else x[states]          # (n, C): the MLP mixes no states
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight           # tied: one tensor, two names
        # GPT-2's 0.02 suits a width of 768; at 48 it leaves attention flat for hundreds of steps.
        std = config.n_embd ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):              # as in GPT-2: layers must not add up
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, states=None):
        """tokens (B, T) ids -> (B, T, V) logits; logits[:, t] predicts tokens[:, t+1].

        states (B, T) bool: only these go through the last MLP and the output head -> (n, V), row by
        row; at a large vocabulary the head takes most of the memory. Rows are padded on the RIGHT:
        attention is causal, so padding cannot reach the tokens before it.
        """
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"tokens: expected at most block_size={self.config.block_size} "
                             f"columns, got {T}")
        positions = torch.arange(T, device=tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            x = self.transformer.wte(tokens) + self.transformer.wpe(positions)      # (B, T, C)
            *blocks, last = self.transformer.h
            for block in blocks:
                x = block(x)
            x = last(x, states)                                     # (B, T, C) or (n, C)
        return self.lm_head(self.transformer.ln_f(x))               # (B, T, V) or (n, V)

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, eos, temperature=1.0, generator=None):
        """Sample a response to a non-empty list of ids -> list of ids, up to and without EOS.

        Ends at max_new_tokens or where the context is full. temperature 0: the most likely token.
        harness/sampling.py does the same for many prompts at once, faster.
        """
        tokens = torch.tensor([prompt], device=device_of(self))                     # (1, T)
        while tokens.shape[1] < min(len(prompt) + max_new_tokens, self.config.block_size):
            token = draw(self(tokens)[:, -1], temperature, generator)               # (1,)
            if token == eos:
                break
            tokens = torch.cat([tokens, token.unsqueeze(1)], 1)
        return tokens[0, len(prompt):].tolist()


def draw(logits, temperature, generator=None):
    """One token from each row of logits (B, V) -> (B,) ids; temperature 0: the most likely one.

    The first token at which the cumulated probability passes one uniform number; torch.multinomial
    would draw a number for every token of the vocabulary, which is slow.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = F.softmax(logits.float() / temperature, -1).cumsum(-1)              # (B, V)
    uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)                # where the product rounds up


def frozen_copy(model):
    """A copy that nothing trains: a policy's steps must not move its own reference."""
    return copy.deepcopy(model).requires_grad_(False)


def device_of(model):
    return next(model.parameters()).device


# --------------------------------------------------------------------------------------------------
# Log-probs. One function, `response_logps`, gives those of policy, reference and teacher: two code
# paths would differ at step 0, where DPO's loss must be ln 2.

def response_logps(model, tokens, mask):
    """Log-probs of the response tokens: tokens (B, T+1), mask (B, T) -> (B, T) nats, 0 elsewhere.

    Only these states meet the last MLP and the output head: prompts would cost as much.
    """
    logits = model(tokens, F.pad(mask, (0, 1)))             # (n, V); nobody acts in the last state
    logps = action_logps(logits, tokens[:, 1:][mask])       # (n,)
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps)


def both_responses(pairs):
    """Pairs -> 2N Examples: all chosen responses, then all rejected ones."""
    return ([Example(pair.prompt, pair.chosen) for pair in pairs]
            + [Example(pair.prompt, pair.rejected) for pair in pairs])


def batches(rows, batch_size, device):
    """Examples of ids -> (their indices, tokens, mask), rows of like length in a batch.

    Every row comes once. Sorting by length leaves less padding.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    for start in range(0, len(rows), batch_size):
        ids = order[start:start + batch_size]
        yield ids, *collate([rows[i] for i in ids], device)


def rows_logps(model, rows, batch_size):
    """log pi(y|x) of many rows, `batch_size` at a time, in the rows' order: (len(rows),) nats."""
    order, logps = [], []
    for ids, tokens, mask in batches(rows, batch_size, device_of(model)):
        order += ids
        logps.append(sequence_logps(response_logps(model, tokens, mask), mask))
    return torch.cat(logps)[torch.tensor(order).argsort().to(device_of(model))]


def pair_logps(model, pairs):
    """log pi(y|x) of the chosen and the rejected responses, (2, B) nats: the short rows at once,
    then the long ones."""
    return rows_logps(model, both_responses(pairs), len(pairs)).view(2, -1)


# --------------------------------------------------------------------------------------------------
# The teacher's values and psi. To add a value, write its function here: (teacher, its reference,
# tokens (B, T+1), mask (B, T), the teacher's beta) -> (B, T+1), of which s_p to s_end are read.
# Then give it a line in VALUES.

def log_ratio_values(teacher, teacher_ref, tokens, mask, beta):
    logps, ref_logps = (response_logps(model, tokens, mask) for model in (teacher, teacher_ref))
    return implicit_value(logps, ref_logps, mask, beta)


def logit_values(teacher, teacher_ref, tokens, mask, beta):
    states = F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))                  # (B, T+1) s_p to s_end
    soft = soft_value(teacher(tokens, states), beta)                    # (n,)
    return soft.new_zeros(states.shape).masked_scatter(states, soft)


VALUES = {      # name on the command line: (function, usual potential of the finished answer)
    "implicit": (log_ratio_values, "value"),
    "logits": (logit_values, "hold"),       # the output after EOS was never trained
}


@torch.no_grad()
def state_values(kind, teacher, teacher_ref, rows, beta, batch_size):
    """The teacher's value of every state of every row, one float a token: a list of (tokens,).

    kind: a name in VALUES; beta: that of the teacher's DPO.
    """
    values, (value_of, _) = [None] * len(rows), VALUES[kind]
    for ids, tokens, mask in batches(rows, batch_size, device_of(teacher)):
        batch = value_of(teacher, teacher_ref, tokens, mask, beta).cpu()            # (B, T+1)
        for i, value in zip(ids, batch):
            values[i] = value[:len(rows[i].prompt) + len(rows[i].response)].clone()     # no padding
    return values


def action_psi(values, rows, gamma, terminal):
    """psi of every action: values, a list of (tokens,), -> (len(rows), T), 0 outside the response.

    In float64 on the CPU: float32 would leave rounding errors where psi must cancel.
    """
    _, mask = collate(rows)                                                 # (N, T)
    padded = pad_sequence(values, batch_first=True).double()                # (N, T+1)
    return shaping(padded, mask, gamma, terminal)


def summed_psi(values, rows, gamma, terminal, at_once=1000):
    """Sum of psi of each row: (len(rows),) float32. This is all that TVKD reads of the teacher.

    at_once: rows padded to one width at a time, so that memory does not grow with the rows.
    """
    sums = [action_psi(values[i:i + at_once], rows[i:i + at_once], gamma, terminal).sum(-1)
            for i in range(0, len(rows), at_once)]
    return torch.cat(sums).float()
