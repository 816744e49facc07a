"""model.py against literal oracles: attention by loops, generation without a cache."""

import copy
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from conftest import close
from model import GPT, GPTConfig, draw, evaluating, from_content, frozen_copy

EOS = 10


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8)
    return GPT(GPTConfig(**{**sizes, **changes}))


def random_tokens(rows=3, columns=9):
    return torch.randint(11, (rows, columns), generator=torch.Generator().manual_seed(1))


# --- forward -------------------------------------------------------------------------------------

def test_logits_of_every_position_and_causality():
    """(3, 9) ids give (3, 9, 11) logits; another token 5 changes the logits from position 5 on."""
    model, tokens = tiny(), random_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 9, 11)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def norm(x, p, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attention(q, k, v, heads, size):
    """Each (T, C) -> (T, C), by loops over heads and positions."""
    y = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(q)):
            scores = [q[i, part] @ k[j, part] / math.sqrt(size) for j in range(i + 1)]
            for weight, value in zip(torch.stack(scores).softmax(0), v):
                y[i, part] += weight * value[part]
    return y


GELU = {
    "exact": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
}


@pytest.mark.parametrize("gelu", GELU)
def test_forward_oracle(gelu):
    """One block written out: pre-LayerNorm, attention, GELU in either form, tied head."""
    model, tokens = tiny(n_layer=1, gelu=gelu), random_tokens(2, 5)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight *= 5         # so far out, the two GELUs differ
        p, block = dict(model.named_parameters()), "transformer.h.0."
        for row, got in zip(tokens, model(tokens)):
            x = p["transformer.wte.weight"][row] + p["transformer.wpe.weight"][:5]      # (5, 8)
            q, k, v = linear(norm(x, p, f"{block}ln_1"), p, f"{block}attn.c_attn").chunk(3, -1)
            x = x + linear(attention(q, k, v, heads=2, size=4), p, f"{block}attn.c_proj")
            hidden = linear(norm(x, p, f"{block}ln_2"), p, f"{block}mlp.c_fc")
            x = x + linear(GELU[gelu](hidden), p, f"{block}mlp.c_proj")
            expected = norm(x, p, "transformer.ln_f") @ p["transformer.wte.weight"].T
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_selected_states_have_the_logits_they_have_among_all():
    """states picks rows of (B, T, V) in order: the last MLP and the head take those alone, the MLP
    before them and attention all."""
    model, tokens, taken = tiny(), random_tokens(), []
    states = tokens % 2 == 0
    for module in (*(block.mlp for block in model.transformer.h), model.lm_head):
        module.register_forward_hook(lambda module, taken_in, out: taken.append(out.shape[:-1]))
    expected = model(tokens)[states]
    assert set(taken) == {tokens.shape}
    del taken[:]
    torch.testing.assert_close(model(tokens, states), expected, atol=1e-6, rtol=0)
    assert taken == [tokens.shape, *[(int(states.sum()),)] * 2]


def test_right_padding_is_inert_and_left_padding_is_not():
    """Rows alone, with 3 columns on the right, and on the left: only there the logits differ."""
    model, tokens = tiny(), random_tokens()
    right, left = F.pad(tokens, (0, 3), value=7), F.pad(tokens, (3, 0), value=7)
    torch.testing.assert_close(model(right)[:, :9], model(tokens), atol=1e-6, rtol=0)
    assert (model(left)[:, 3:] - model(tokens)).abs().max() > 0.01


# --- weights -------------------------------------------------------------------------------------

SHAPES = {
    "transformer.wte.weight": (11, 8), "transformer.wpe.weight": (12, 8),
    "transformer.h.0.ln_1.weight": (8,), "transformer.h.0.ln_1.bias": (8,),
    "transformer.h.0.attn.c_attn.weight": (24, 8), "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.attn.c_proj.weight": (8, 8), "transformer.h.0.attn.c_proj.bias": (8,),
    "transformer.h.0.ln_2.weight": (8,), "transformer.h.0.ln_2.bias": (8,),
    "transformer.h.0.mlp.c_fc.weight": (32, 8), "transformer.h.0.mlp.c_fc.bias": (32,),
    "transformer.h.0.mlp.c_proj.weight": (8, 32), "transformer.h.0.mlp.c_proj.bias": (8,),
    "transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,), "lm_head.weight": (11, 8)}


def test_nanogpt_weights_load():
    """nanoGPT's names, shapes and tie; its files may have a compile prefix and causal masks."""
    model, generator = tiny(n_layer=1), torch.Generator().manual_seed(2)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == SHAPES
    state = {f"_orig_mod.{name}": torch.randn(shape, generator=generator)
             for name, shape in SHAPES.items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    model.load_weights(state)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(model.state_dict()[name], state[f"_orig_mod.{name}"])
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_weights({})


def test_tie_survives_a_copy_and_nothing_is_shared():
    model = tiny()
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert len(list(other.parameters())) == len(list(model.parameters())) == 2 + 2 * 12 + 2
    pointers = {p.data_ptr() for p in model.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in other.parameters())


def test_frozen_is_a_copy_that_takes_no_gradient():
    model = tiny(dropout=0.5).train()
    copied = frozen_copy(model)
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert copied.transformer.wte.weight.any()


def test_content_that_a_run_keeps_gives_the_model_back():
    """Config and weights as plain values: the same logits, tanh GELU and no biases included."""
    model = tiny(gelu="tanh", bias=False)
    again = from_content({"config": asdict(model.config), "model": model.state_dict()})
    assert again.config == model.config and again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again(random_tokens()), model(random_tokens()))


def test_initial_scale():
    """Width 64: std 64^-1/2 = 1/8. 2 layers add to the residual stream twice each: 1/8 / sqrt(4).

    Biases 0, LayerNorm weights 1.
    """
    for name, parameter in tiny(n_embd=64).named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 2000:
            expected = 1 / 16 if "c_proj" in name else 1 / 8
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


# --- generate ------------------------------------------------------------------------------------

PROMPTS = [[3], [1, 2, 3, 4, 5], [6, 7, 8]]                     # unequal lengths; S = 12


def generate_oracle(model, prompt, max_new_tokens, temperature, generator, eos=EOS):
    """Run the whole prefix again for every token."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_new_tokens, model.config.block_size):
        logits = model(torch.tensor([tokens]))[0, -1]
        if temperature == 0:
            token = logits.argmax()
        else:
            uniform, token = torch.rand(1, 1, generator=generator).item(), 0
            probabilities = (logits / temperature).softmax(-1).tolist()
            while uniform > sum(probabilities[:token + 1]):
                token += 1
        if token == eos:
            break
        tokens.append(int(token))
    return tokens[len(prompt):]


@pytest.mark.parametrize("seed", range(5))
def test_generate_with_cache_equals_full_prefix(seed):
    """Greedy, prompts of unequal length in one batch, to the end of the context: each as alone."""
    model = tiny(seed)
    expected = [generate_oracle(model, prompt, 20, 0, None) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 20, EOS, temperature=0) == expected


@pytest.mark.parametrize("eos", range(8))
def test_rows_that_end_early_leave_the_others_alone(eos):
    """Every id as EOS in turn: rows end at different steps and leave the batch; each as alone."""
    model = tiny(3)
    prompts = PROMPTS + [[2, 2], [7], [4, 0, 4, 1]]
    expected = [generate_oracle(model, prompt, 20, 0, None, eos) for prompt in prompts]
    assert model.generate(prompts, 20, eos, temperature=0) == expected


def test_draw_by_hand():
    """Logits ln 1, ln 2, ln 1: probabilities 1/4, 1/2, 1/4; at temperature 1/2 they are squared
    first: 1/6, 2/3, 1/6. Temperature 0 takes the largest. A token of probability 0 never comes."""
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0]).log().expand(60_000, -1)
    for temperature, expected in ((1.0, [1 / 4, 1 / 2, 1 / 4, 0]), (0.5, [1 / 6, 2 / 3, 1 / 6, 0])):
        drawn = draw(logits, temperature, torch.Generator().manual_seed(0))
        frequency = drawn.bincount(minlength=4) / len(drawn)
        close(frequency, expected, 0.01)
        assert frequency[3] == 0
    assert draw(logits[:2], 0).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generate_samples_the_distribution(temperature):
    """With one prompt the draws are the oracle's; the same generator state repeats them."""
    model, prompt = tiny(), PROMPTS[2]
    for seed in range(10):
        got, again = (model.generate([prompt], 5, EOS, temperature,
                                     torch.Generator().manual_seed(seed))[0] for _ in range(2))
        generator = torch.Generator().manual_seed(seed)
        assert got == again == generate_oracle(model, prompt, 5, temperature, generator)


def always(token):
    """A model that predicts one token everywhere: its embedding lies along ln_f's bias."""
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(8)[0])
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wte.weight[token, 0] = 100
    return model


def test_generate_ends():
    """At EOS, without it; at max_new_tokens; where the context of 12 is full: 12 - 5 = 7 tokens."""
    assert always(EOS).generate(PROMPTS, 20, EOS) == [[], [], []]
    assert always(4).generate(PROMPTS, 2, EOS) == [[4, 4]] * 3
    assert [len(response) for response in always(4).generate(PROMPTS, 20, EOS)] == [11, 7, 9]


def test_generate_switches_dropout_off_and_back():
    model, tokens = tiny(dropout=0.5), random_tokens()
    for training in (True, False):
        model.train(training)
        one, other = (model.generate(PROMPTS, 5, EOS, temperature=0) for _ in range(2))
        assert one == other and model.training == training
    with evaluating(model.train()):
        assert torch.equal(model(tokens), model(tokens))
    assert model.training and not torch.equal(model(tokens), model(tokens))


# --- errors --------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: tiny(n_head=3), "n_embd: expected a multiple of n_head=3, got 8"),
    (lambda: tiny(n_layer=0), "n_layer: expected at least 1, got 0"),
    (lambda: tiny(gelu="fast"), "gelu: expected \"exact\" or \"tanh\", got 'fast'"),
    (lambda: tiny()(random_tokens(1, 13)), "expected at most block_size=12 columns, got 13"),
    (lambda: tiny().generate([[1], []], 5, EOS),
     r"prompts\[1\]: expected 1 to 11 tokens \(block_size=12\), got 0"),
    (lambda: tiny().generate([[1] * 12], 5, EOS), r"prompts\[0\]: expected 1 to 11 tokens"),
])
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
