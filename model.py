"""A nanoGPT-style transformer: one class serves as teacher, student and reference.

After Karpathy's nanoGPT (github.com/karpathy/nanoGPT, model.py) and GPT-2 (Radford et al. 2019): pre-LayerNorm blocks, learned
positions, GELU, output head tied to the token embedding. Parameter names are nanoGPT's, so the `model` entry of one of its
checkpoints loads (see `load_weights`). Unlike nanoGPT, forward returns the logits of every position asked for and no loss, and
`generate` takes a batch of prompts of unequal length and keeps keys and values. Left out: losses, optimiser, HuggingFace
import.

B rows, T positions, C = n_embd channels, H heads of D = C / H channels, S = block_size.
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64        # longest row, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 48
    dropout: float = 0.0        # keep 0 for preference training: policy and reference must be scored alike
    bias: bool = True           # in Linears and LayerNorms, as in GPT-2
    bfloat16: bool = False      # matrix products of the blocks in bfloat16; weights, residual, head and logits stay float32

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head={self.n_head}, got {self.n_embd}")


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; a class of its own only to give the parameters nanoGPT's names."""

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
                   for part in self.c_attn(x).split(C, dim=2))              # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            keys, values = cache                                            # each (B, H, S, D)
            rows = torch.arange(B, device=x.device).unsqueeze(1)            # (B, 1) against positions (B, T)
            keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)     # (B, T, H, D) written where each row stands
            values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
            seen = torch.arange(keys.shape[2], device=x.device) <= positions.unsqueeze(-1)      # (B, T, S)
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen.unsqueeze(1))
        y = y.transpose(1, 2).reshape(B, T, C)                              # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, cache=None):
        x = x + self.attn(self.ln_1(x), positions, cache)
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
        self.lm_head.weight = self.transformer.wte.weight                   # tied: one tensor, two names
        # GPT-2's std of 0.02 suits its width of 768; at a width of 48 it leaves attention flat for hundreds of steps.
        std = config.n_embd ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):                              # as in GPT-2: so that layers do not add up
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, states=None, positions=None, caches=None):
        """tokens (B, T) ids -> (B, T, V) logits; logits[:, t] predicts tokens[:, t+1].

        states (B, T) bool: only these go through the output head -> (n, V), row by row; at a large vocabulary the head is
        most of the memory. Rows are padded on the RIGHT: attention is causal, so padding cannot reach the tokens before it.
        positions (B, T) and caches are for `generate`; without them position t is column t. Raises ValueError for T >
        block_size.
        """
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"tokens: expected at most block_size={self.config.block_size} columns, got {T}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            x = self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))  # (B, T, C)
            for layer, block in enumerate(self.transformer.h):
                x = block(x, positions, caches[layer] if caches else None)
        x = x if states is None else x[states]                              # (n, C)
        return self.lm_head(self.transformer.ln_f(x))                       # (B, T, V) or (n, V), float32

    def load_weights(self, state_dict):
        """Load a state dict with nanoGPT's names, such as checkpoint["model"]. Raises RuntimeError naming what does not fit.

        A torch.compile prefix is dropped, and so are the causal masks that nanoGPT keeps on torch < 2.
        """
        self.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()
                              if not name.endswith(".attn.bias")})

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
        """Sample one response to each prompt.

        prompts: list of non-empty lists of ids, of any lengths; eos: the id that ends a response; temperature 0 takes the most
        likely token; generator: a torch.Generator on the model's device. Returns a list of lists of ids, each up to and
        without EOS. A response that has not ended stops at max_new_tokens or where the context is full. Raises ValueError for
        an empty prompt and for one that leaves no room in the context.
        """
        S, device = self.config.block_size, self.lm_head.weight.device
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < S:
                raise ValueError(f"prompts[{i}]: expected 1 to {S - 1} tokens (block_size={S}), got {len(prompt)}")
        B, config = len(prompts), self.config
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tokens = torch.zeros(B, int(lengths.max()), dtype=torch.long, device=device)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        columns = min(S, tokens.shape[1] + max_new_tokens)
        shape = (B, config.n_head, columns, config.n_embd // config.n_head)
        empty = torch.zeros(shape, device=device, dtype=self.lm_head.weight.dtype)
        caches = [(empty.clone(), empty.clone()) for _ in self.transformer.h]               # keys and values of each layer
        # Each row's next token goes right behind its own prompt, over the keys and values of its padding; a query sees the
        # columns up to its own position, so padding that is not yet overwritten is never seen.
        positions = torch.arange(tokens.shape[1], device=device).expand(B, -1)             # (B, longest prompt)
        last = positions == lengths.unsqueeze(1) - 1                                        # the state to act in, one a row
        responses, running = [[] for _ in prompts], torch.ones(B, dtype=torch.bool, device=device)
        with evaluating(self):
            for step in range(max_new_tokens):
                logits = self(tokens, last, positions, caches).float()                      # (B, V)
                if temperature == 0:
                    drawn = logits.argmax(-1)
                else:
                    drawn = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator).squeeze(1)
                running &= drawn != eos
                for response, token, keep in zip(responses, drawn.tolist(), running.tolist()):
                    if keep:
                        response.append(token)
                positions = (lengths + step).clamp(max=columns - 1).unsqueeze(1)            # (B, 1)
                running &= lengths + step < S - 1                                           # after this one the row is full
                if not running.any():
                    break
                tokens, last = drawn.unsqueeze(1), torch.ones(B, 1, dtype=torch.bool, device=device)
        return responses


@contextmanager
def evaluating(model):
    """Dropout off inside the block; the mode the model was in comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def from_content(content):
    """{"config": fields of GPTConfig, "model": state dict} -> GPT."""
    model = GPT(GPTConfig(**content["config"]))
    model.load_weights(content["model"])
    return model


def frozen(model):
    """A copy that nothing trains: another object, so that the policy's steps cannot move its own reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)
