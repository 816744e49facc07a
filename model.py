"""A nanoGPT-style transformer, and what the method reads off it: log-probs, values, psi.

One class serves as teacher, student and reference. It follows Karpathy's nanoGPT
(github.com/karpathy/nanoGPT, model.py) and GPT-2 (Radford et al. 2019): pre-LayerNorm blocks,
learned positions, GELU, an output head tied to the token embedding. Parameters have nanoGPT's
names. Unlike nanoGPT, `forward` returns logits and no loss, and `generate` takes prompts of unequal
length and caches keys and values. Left out: losses, optimiser, files.

B rows, T positions, C = n_embd channels, H heads of D = C / H channels, S = block_size, V tokens in
the vocabulary. In the second half a row of a batch is `tokens` with T+1 ids, as in tvkd.py.
"""

import copy
import math
from contextlib import contextmanager
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
    dropout: float = 0.0        # keep 0 here: policy and reference must be scored alike
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
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f'gelu: expected "exact" or "tanh", got {self.gelu!r}')


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; a class only to give the parameters nanoGPT's names."""

    def __init__(self, size, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, positions=None, cache=None):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))          # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            keys, values = cache                                        # each (B, H, S, D)
            rows = torch.arange(B, device=x.device).unsqueeze(1)        # (B, 1), positions (B, T)
            keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)         # (B, T, H, D)
            values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
            columns = torch.arange(keys.shape[2], device=x.device)
            visible = columns <= positions.unsqueeze(-1)                # (B, T, S)
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values,
                                               attn_mask=visible.unsqueeze(1))
        y = y.transpose(1, 2).reshape(B, T, C)                          # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, cache=None, states=None):
        x = x + self.attn(self.ln_1(x), positions, cache)
        x = x if states is None else x[states]          # (n, C): the MLP mixes no states
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, config.bias),
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

    def forward(self, tokens, states=None, positions=None, caches=None):
        """tokens (B, T) ids -> (B, T, V) logits; logits[:, t] predicts tokens[:, t+1].

        states (B, T) bool: only these go through the last MLP and the output head -> (n, V), row by
        row. At a large vocabulary the head takes most of the memory. Rows are padded on the RIGHT:
        attention is causal, so padding cannot reach the tokens before it. positions (B, T), caches:
        for `generate`; else position t is column t. Raises ValueError for T > block_size.
        """
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"tokens: expected at most block_size={self.config.block_size} "
                             f"columns, got {T}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            embedded = self.transformer.wte(tokens) + self.transformer.wpe(positions)
            x = self.transformer.drop(embedded)                         # (B, T, C)
            for layer, block in enumerate(self.transformer.h):
                last = layer == self.config.n_layer - 1
                x = block(x, positions, caches[layer] if caches else None, states if last else None)
        return self.lm_head(self.transformer.ln_f(x))                   # (B, T, V) or (n, V)

    def load_weights(self, state_dict):
        """Load a state dict with nanoGPT's names. Raises RuntimeError naming what does not fit.

        A torch.compile prefix is dropped, and so are nanoGPT's causal masks.
        """
        self.load_state_dict({name.removeprefix("_orig_mod."): tensor
                              for name, tensor in state_dict.items()
                              if not name.endswith(".attn.bias")})

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
        """Sample one response to each prompt.

        prompts: list of non-empty lists of ids, of any lengths; eos: the id that ends a response;
        temperature 0 takes the most likely token; generator: a torch.Generator on the model's
        device. Returns a list of lists of ids, each up to and without EOS. A response that has not
        ended stops at max_new_tokens or where the context is full. Raises ValueError for an empty
        prompt and for one that leaves no room in the context.
        """
        S, device = self.config.block_size, self.lm_head.weight.device
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < S:
                raise ValueError(f"prompts[{i}]: expected 1 to {S - 1} tokens (block_size={S}), "
                                 f"got {len(prompt)}")
        B, config = len(prompts), self.config
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], True).to(device)
        columns = min(S, tokens.shape[1] + max_new_tokens)
        shape = (B, config.n_head, columns, config.n_embd // config.n_head)
        empty = torch.zeros(shape, device=device, dtype=self.lm_head.weight.dtype)
        caches = [(empty.clone(), empty.clone()) for _ in self.transformer.h]   # keys, values
        # Each row's next token goes right behind its own prompt, over the keys and values of its
        # padding. A query sees the columns up to its own position, so it never sees padding.
        positions = torch.arange(tokens.shape[1], device=device).expand(B, -1)  # (B, longest)
        last = positions == lengths.unsqueeze(1) - 1            # the state to act in, one a row
        responses = [[] for _ in prompts]
        open_rows = list(responses)                             # those whose caches are still here
        running = torch.ones(B, dtype=torch.bool, device=device)
        with evaluating(self):
            for step in range(max_new_tokens):
                width = min(columns, tokens.shape[1] if step == 0 else int(lengths.max()) + step)
                visible = [(keys[:, :, :width], values[:, :, :width]) for keys, values in caches]
                logits = self(tokens, last, positions, visible).float()         # (B, V)
                drawn = draw(logits, temperature, generator)                    # (B,)
                running &= drawn != eos
                for response, token, keep in zip(open_rows, drawn.tolist(), running.tolist()):
                    if keep:
                        response.append(token)
                running &= lengths + step < S - 1               # after this one the row is full
                if 2 * int(running.sum()) <= len(running):      # half have ended: drop them
                    open_rows = [row for row, keep in zip(open_rows, running.tolist()) if keep]
                    caches = [(keys[running], values[running]) for keys, values in caches]
                    drawn, lengths, running = (x[running] for x in (drawn, lengths, running))
                if not open_rows:
                    break
                tokens = drawn.unsqueeze(1)                                     # (B, 1)
                positions = (lengths + step).clamp(max=columns - 1).unsqueeze(1)
                last = torch.ones_like(tokens, dtype=torch.bool)
        return responses


def draw(logits, temperature, generator=None):
    """One token from each row of logits (B, V) -> (B,) ids; temperature 0: the most likely one.

    The first token at which the cumulated probability passes a uniform number. torch.multinomial
    would draw a random number for every token of the vocabulary, which is slow.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = F.softmax(logits / temperature, -1).cumsum(-1)                  # (B, V)
    uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)                # where the product rounds up


@contextmanager
def evaluating(model):
    """Dropout off inside the block; the mode the model was in comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def frozen_copy(model):
    """A copy that nothing trains: a policy's steps must not move its own reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def from_content(content):
    """{"config": fields of GPTConfig, "model": state dict}, as a run keeps it -> GPT."""
    model = GPT(GPTConfig(**content["config"]))
    model.load_weights(content["model"])
    return model


def device_of(model):
    return next(model.parameters()).device


# --------------------------------------------------------------------------------------------------
# Log-probs, values and psi of many rows. One function, `score`, gives the log-probs of policy,
# reference and teacher: two code paths would differ at step 0, where DPO's loss must be ln 2.

def both_responses(pairs):
    """Pairs -> 2N Examples: all chosen responses, then all rejected ones."""
    return ([Example(pair.prompt, pair.chosen) for pair in pairs]
            + [Example(pair.prompt, pair.rejected) for pair in pairs])


def batches(rows, batch_size, device):
    """Examples of ids -> (their indices, tokens, mask), rows of like length together.

    Every row comes once. Sorting by length leaves less padding.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    for start in range(0, len(rows), batch_size):
        ids = order[start:start + batch_size]
        tokens, mask = collate([rows[i] for i in ids])
        yield ids, tokens.to(device), mask.to(device)


def part_size(rows):
    """How many rows of a batch to pass through the model at once: same loss, less padding.

    The rows, sorted by length, are cut into at most eight parts: the fewest of up to some 1,500
    tokens each (more at once run no faster) that keep the padding within an eighth.
    """
    lengths = sorted(len(row.prompt) + len(row.response) for row in rows)
    for parts in range(min(8, 1 + sum(lengths) // 1500), 9):
        size = math.ceil(len(rows) / parts)
        longest = [lengths[min(i + size, len(rows)) - 1] for i in range(0, len(rows), size)]
        padded = sum(longest) * size - longest[-1] * (-len(rows) % size)
        if sum(lengths) >= 0.875 * padded:
            break
    return size


def tokens_in(rows):
    return sum(len(row.prompt) + len(row.response) for row in rows)


def response_logps(model, tokens, mask):
    """Log-probs of the response tokens: tokens (B, T+1), mask (B, T) -> (B, T) nats, 0 elsewhere.

    Only these states meet the last MLP and the output head: prompts would cost as much.
    """
    logits = model(tokens, F.pad(mask, (0, 1)))             # (n, V); nobody acts in the last state
    logps = action_logps(logits, tokens[:, 1:][mask])       # (n,)
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps)


def rows_logps_with_grad(model, rows, batch_size):
    """log pi(y|x) of every row, in the rows' order: (len(rows),) nats."""
    order, logps = [], []
    for ids, tokens, mask in batches(rows, batch_size, device_of(model)):
        order += ids
        logps.append(sequence_logps(response_logps(model, tokens, mask), mask))
    logps = torch.cat(logps)
    return logps[torch.tensor(order, device=logps.device).argsort()]


@torch.no_grad()
def rows_logps(model, rows, batch_size):
    """What `rows_logps_with_grad` gives, computed once and looked up by index in every step."""
    with evaluating(model):
        return rows_logps_with_grad(model, rows, batch_size)


@torch.no_grad()
def state_values(kind, teacher, teacher_ref, rows, beta, batch_size):
    """The teacher's value of every state of every row, one float a token: a list of (tokens,).

    kind: "implicit" or "logits" (tvkd.implicit_value, tvkd.soft_value); beta: the teacher's.
    """
    values = [None] * len(rows)
    for ids, tokens, mask in batches(rows, batch_size, device_of(teacher)):
        if kind == "logits":
            states = F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))              # (B, T+1) s_p to s_end
            soft = soft_value(teacher(tokens, states), beta)                # (n,)
            batch = soft.new_zeros(states.shape).masked_scatter(states, soft)       # (B, T+1)
        else:
            logps, ref_logps = (response_logps(m, tokens, mask) for m in (teacher, teacher_ref))
            batch = implicit_value(logps, ref_logps, mask, beta)                # (B, T+1)
        for i, value in zip(ids, batch.cpu()):
            values[i] = value[:len(rows[i].prompt) + len(rows[i].response)].clone()     # no padding
    return values


def action_psi(values, rows, gamma, terminal):
    """psi of every action: values, a list of (tokens,), -> (len(rows), T), 0 outside the response.

    In float64 on the CPU: float32 sums would leave rounding errors where psi should cancel
    (--terminal=zero).
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
