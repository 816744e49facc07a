"""model.py against literal oracles: attention by loops, generation by re-running the whole prefix for every token."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, evaluating

EOS = 10


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8), **changes}))


def random_tokens(rows=3, columns=9):
    return torch.randint(11, (rows, columns), generator=torch.Generator().manual_seed(1))


def test_logits_of_every_position_and_causality():
    """(3, 9) ids give (3, 9, 11) logits; changing token 5 changes logits from position 5 on and none before."""
    model, tokens = tiny(), random_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 9, 11)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_forward_oracle():
    """One block written out: attention as a loop over rows, heads and positions, pre-LN, GELU, tied head."""
    model, tokens = tiny(n_layer=1), random_tokens(2, 5)
    p = dict(model.named_parameters())

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    block, heads, size = "transformer.h.0.", 2, 4
    for row, got in zip(tokens, model(tokens)):
        x = p["transformer.wte.weight"][row] + p["transformer.wpe.weight"][:5]                  # (5, 8)
        q, k, v = linear(norm(x, block + "ln_1"), block + "attn.c_attn").chunk(3, -1)
        y = torch.zeros(5, 8)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(5):
                weights = torch.stack([q[i, part] @ k[j, part] / math.sqrt(size) for j in range(i + 1)]).softmax(0)
                y[i, part] = sum(weight * v[j, part] for j, weight in enumerate(weights))
        x = x + linear(y, block + "attn.c_proj")
        hidden = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), block + "mlp.c_proj")
        torch.testing.assert_close(got, norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T, atol=1e-5, rtol=1e-5)


def test_right_padding_is_inert_and_left_padding_is_not():
    """A row alone, padded on the right by 3 columns, and on the left: only the last one's logits differ."""
    model, tokens = tiny(), random_tokens()
    padded = F.pad(tokens, (0, 3), value=7)
    torch.testing.assert_close(model(padded)[:, :9], model(tokens), atol=1e-6, rtol=0)
    assert (model(F.pad(tokens, (3, 0), value=7))[:, 3:] - model(tokens)).abs().max() > 0.01


def test_nanogpt_checkpoint_loads():
    """Parameter names, shapes and tying as in nanoGPT, whose checkpoints may carry a compile prefix and causal masks."""
    model = tiny(n_layer=1)
    shapes = {
        "transformer.wte.weight": (11, 8), "transformer.wpe.weight": (12, 8),
        "transformer.h.0.ln_1.weight": (8,), "transformer.h.0.ln_1.bias": (8,),
        "transformer.h.0.attn.c_attn.weight": (24, 8), "transformer.h.0.attn.c_attn.bias": (24,),
        "transformer.h.0.attn.c_proj.weight": (8, 8), "transformer.h.0.attn.c_proj.bias": (8,),
        "transformer.h.0.ln_2.weight": (8,), "transformer.h.0.ln_2.bias": (8,),
        "transformer.h.0.mlp.c_fc.weight": (32, 8), "transformer.h.0.mlp.c_fc.bias": (32,),
        "transformer.h.0.mlp.c_proj.weight": (8, 32), "transformer.h.0.mlp.c_proj.bias": (8,),
        "transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,), "lm_head.weight": (11, 8)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    checkpoint = {f"_orig_mod.{name}": torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in shapes.items()}
    checkpoint["_orig_mod.lm_head.weight"] = checkpoint["_orig_mod.transformer.wte.weight"]
    checkpoint["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    model.load_weights(checkpoint)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, checkpoint["_orig_mod.transformer.h.0.mlp.c_fc.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_weights({})


def test_tie_survives_deepcopy_and_nothing_is_shared():
    model = tiny()
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert len(list(other.parameters())) == len(list(model.parameters())) == 2 + 2 * 12 + 2
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in other.parameters())


def test_initial_scale():
    """Width 64: weights of std 1/8; what is added to the residual stream, in 2 layers of 2 additions each, 1/8 / sqrt(4) = 1/16."""
    model = tiny(n_embd=64)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(1 / 16 if "c_proj" in name else 1 / 8, rel=0.1), name


# --- generate --------------------------------------------------------------------------------------------------------------

PROMPTS = [[3], [1, 2, 3, 4, 5], [6, 7, 8]]                     # unequal lengths; S = 12


def generate_oracle(model, prompt, max_new_tokens, temperature, generator):
    """Re-run the whole prefix for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and len(tokens) < model.config.block_size:
        logits = model(torch.tensor([tokens]))[0, -1]
        token = logits.argmax() if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if token == EOS:
            break
        tokens.append(int(token))
    return tokens[len(prompt):]


@pytest.mark.parametrize("seed", range(5))
def test_generate_with_cache_equals_full_prefix(seed):
    """Greedy, three prompts of unequal length in one batch, up to the end of the context: each as if alone and without a cache."""
    model = tiny(seed)
    assert model.generate(PROMPTS, 20, EOS, temperature=0) == [generate_oracle(model, p, 20, 0, None) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generate_samples_the_distribution(temperature):
    """With one prompt the draws are the oracle's draws; the same generator state gives the same response again."""
    model = tiny()
    for seed in range(10):
        got, again, expected = (f(torch.Generator().manual_seed(seed)) for f in (
            lambda g: model.generate(PROMPTS[2:], 5, EOS, temperature, g)[0],
            lambda g: model.generate(PROMPTS[2:], 5, EOS, temperature, g)[0],
            lambda g: generate_oracle(model, PROMPTS[2], 5, temperature, g)))
        assert got == again == expected


def always(token):
    """A model that predicts one token everywhere: its embedding points along the last LayerNorm's bias."""
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(8)[0])
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wte.weight[token, 0] = 100
    return model


def test_generate_ends():
    """At EOS, without it; at max_new_tokens; where the context of 12 is full: 12 - 5 = 7 tokens behind a prompt of 5."""
    assert always(EOS).generate(PROMPTS, 20, EOS) == [[], [], []]
    assert always(4).generate(PROMPTS, 2, EOS) == [[4, 4]] * 3
    assert [len(response) for response in always(4).generate(PROMPTS, 20, EOS)] == [11, 7, 9]


def test_generate_switches_dropout_off_and_back():
    model = tiny(dropout=0.5)
    for training in (True, False):
        model.train(training)
        assert model.generate(PROMPTS, 5, EOS, temperature=0) == model.generate(PROMPTS, 5, EOS, temperature=0)
        assert model.training == training
    with evaluating(model.train()):
        assert torch.equal(model(random_tokens()), model(random_tokens()))
    assert model.training and not torch.equal(model(random_tokens()), model(random_tokens()))


# --- errors ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, said", [
    (lambda: tiny(n_head=3), "n_embd: expected a multiple of n_head=3, got 8"),
    (lambda: tiny(n_layer=0), "n_layer: expected at least 1, got 0"),
    (lambda: tiny()(random_tokens(1, 13)), "expected at most block_size=12 columns, got 13"),
    (lambda: tiny().generate([[1], []], 5, EOS), r"prompts\[1\]: expected 1 to 11 tokens \(block_size=12\), got 0"),
    (lambda: tiny().generate([[1] * 12], 5, EOS), r"prompts\[0\]: expected 1 to 11 tokens"),
])
def test_errors_say_what_was_expected(call, said):
    with pytest.raises(ValueError, match=said):
        call()
