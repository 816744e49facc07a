"""Answers to many prompts at once: what GPT.generate gives, without reading the text again.

Keys and values of the states read so far are kept, rows that have ended are dropped, and two
threads take half of the prompts each. The forward pass is written out once more, with these caches;
tests hold it against GPT.generate token by token.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from harness.steps import two_at_once
from model import device_of, draw


def sample(model, prompts, eos, max_new_tokens, seed):
    """One response to each prompt of ids -> ids, with EOS where one ended."""
    config = model.config
    # As many rows as have keys and values of 1/2 GiB, for two threads at once; at most 1,024.
    floats = 2 * config.n_layer * config.block_size * config.n_embd
    at_once = max(1, min(1024, 2 ** 27 // floats, math.ceil(len(prompts) / 2)))
    groups = [(start, prompts[start:start + at_once]) for start in range(0, len(prompts), at_once)]
    answer = partial(sample_group, model, eos, max_new_tokens, seed)
    return sum(two_at_once(answer, groups, device_of(model)), [])


def sample_group(model, eos, max_new_tokens, seed, group):
    """`sample` for some of the prompts: group is (the first one's index, prompts)."""
    start, prompts = group
    # A generator of its own, so sampling never moves the order of training batches, and threads
    # that sample at the same time do not take each other's numbers.
    generator = torch.Generator(device_of(model)).manual_seed(seed + start)
    return generate(model, prompts, max_new_tokens, eos, 1.0, generator)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
    """One response to each prompt, all of 1 to block_size - 1 tokens -> lists of ids, with EOS
    where one was drawn."""
    S, device, config = model.config.block_size, device_of(model), model.config
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], True).to(device)    # (B, T)
    columns = min(S, tokens.shape[1] + max_new_tokens)
    shape = (len(prompts), config.n_head, columns, config.n_embd // config.n_head)
    caches = [torch.zeros(2, *shape, device=device) for _ in model.transformer.h]   # keys, values
    # Each row's next token goes right behind its own prompt, over the keys and values of its
    # padding. A query sees the columns up to its own position, so it never sees padding.
    positions = torch.arange(tokens.shape[1], device=device).expand(len(prompts), -1)       # (B, T)
    last = positions == lengths.unsqueeze(1) - 1                # the state to act in, one a row
    responses = [[] for _ in prompts]
    open_rows = list(responses)                                 # those whose caches are still here
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        width = min(columns, tokens.shape[1] if step == 0 else int(lengths.max()) + step)
        logits = next_logits(model, tokens, last, positions, [c[:, :, :, :width] for c in caches])
        drawn = draw(logits, temperature, generator)                                        # (B,)
        for response, token, keep in zip(open_rows, drawn.tolist(), running.tolist()):
            if keep:
                response.append(token)
        running &= (drawn != eos) & (lengths + step < S - 1)    # after this one the row is full
        if 2 * int(running.sum()) <= len(running):              # half have ended: drop them
            open_rows = [row for row, keep in zip(open_rows, running.tolist()) if keep]
            caches = [cache[:, running] for cache in caches]
            drawn, lengths, running = (x[running] for x in (drawn, lengths, running))
        if not open_rows:
            break
        tokens = drawn.unsqueeze(1)                                                         # (B, 1)
        positions = (lengths + step).clamp(max=columns - 1).unsqueeze(1)
        last = torch.ones_like(tokens, dtype=torch.bool)
    return responses


def next_logits(model, tokens, last, positions, caches):
    """GPT.forward with caches: tokens and positions (B, T), last (B, T) bool, one True a row.
    caches: keys and values of each block, (2, B, H, width, D); those of `tokens` are written into
    them. Returns the logits of the states `last`, (B, V)."""
    parts = model.transformer
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)                     # (B, 1)
    columns = torch.arange(caches[0].shape[3], device=tokens.device)
    visible = (columns <= positions.unsqueeze(-1)).unsqueeze(1)             # (B, 1, T, width)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=model.config.bfloat16):
        x = parts.wte(tokens) + parts.wpe(positions)                                # (B, T, C)
        for block, (keys, values) in zip(parts.h, caches):
            q, k, v = block.attn.heads(block.ln_1(x))                               # (B, H, T, D)
            keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)             # (B, T, H, D)
            values[rows, :, positions] = v.transpose(1, 2).to(keys.dtype)
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=visible)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(x.shape))
            if block is parts.h[-1]:
                x = x[last]                                                         # (B, C)
            x = x + block.mlp(block.ln_2(x))
    return model.lm_head(parts.ln_f(x)).float()
