"""model.py against literal oracles: attention by loops, answers token by token. harness/sampling.py
against model.generate. Oracles are compared in float64, where rounding is below 1e-12."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import close
from harness.keep import pack, unpack
from harness.sampling import generate, sample
from model import GPT, GPTConfig, draw, frozen_copy

EOS = 10


def tiny(seed=0, n_layer=2, n_head=2, n_embd=8, **others):
    torch.manual_seed(seed)
    return GPT(GPTConfig(11, 12, n_layer, n_head, n_embd, **others))


def fixed(*probabilities):
    """A model whose next token has these probabilities in every state: ln_f gives (1, 0) there, and
    the embedding's first channel holds their logarithms."""
    model = GPT(GPTConfig(len(probabilities), 12, 1, 1, 2))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.transformer.wte.weight[:, 0] = torch.tensor(probabilities).clamp(min=1e-30).log()
    return model


def always(token):
    return fixed(*(float(i == token) for i in range(11)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def lively(seed):
    """Larger blocks, so that an answer does not repeat one token."""
    model = tiny(seed)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter *= 3
    return model


def random_tokens(rows=3, columns=9):
    return torch.randint(11, (rows, columns), generator=seeded(1))


# --- forward -------------------------------------------------------------------------------------

def test_attention_is_causal_so_right_padding_is_inert():
    """(3, 9) ids give (3, 9, 11) logits; another token 5 and 3 columns behind change them from
    position 5 on."""
    model, tokens = tiny().double(), random_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens), model(F.pad(changed, (0, 3), value=7))[:, :9]
    assert before.shape == (3, 9, 11)
    close(after[:, :5], before[:, :5], 1e-12)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-3).all()


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
    """One block written out, with GELU in either form. The weights have nanoGPT's names."""
    model, tokens = tiny(n_layer=1, gelu=gelu).double(), random_tokens(2, 5)
    with torch.no_grad():
        for parameter in model.parameters():                # no bias is 0, and the GELUs differ
            parameter += torch.randn_like(parameter)
        p, block = dict(model.named_parameters()), "transformer.h.0."
        for row, got in zip(tokens, model(tokens)):
            x = p["transformer.wte.weight"][row] + p["transformer.wpe.weight"][:5]      # (5, 8)
            q, k, v = linear(norm(x, p, f"{block}ln_1"), p, f"{block}attn.c_attn").chunk(3, -1)
            x = x + linear(attention(q, k, v, heads=2, size=4), p, f"{block}attn.c_proj")
            hidden = linear(norm(x, p, f"{block}ln_2"), p, f"{block}mlp.c_fc")
            x = x + linear(GELU[gelu](hidden), p, f"{block}mlp.c_proj")
            expected = norm(x, p, "transformer.ln_f") @ p["transformer.wte.weight"].T
            close(got, expected, 1e-12)


def test_selected_states_have_the_logits_they_have_among_all():
    """Rows of (B, T, V) in order. The last MLP and the head take those alone, the first MLP all."""
    model, tokens, taken = tiny().double(), random_tokens(), []
    states = tokens % 2 == 0
    expected = model(tokens)[states]
    for module in (*(block.mlp for block in model.transformer.h), model.lm_head):
        module.register_forward_hook(lambda module, taken_in, out: taken.append(out.shape[:-1]))
    close(model(tokens, states), expected, 1e-12)
    assert taken == [tokens.shape, *[(int(states.sum()),)] * 2]


def test_a_frozen_copy_is_tied_shares_nothing_and_takes_no_gradient():
    model = tiny()
    copied = frozen_copy(model)
    assert copied.lm_head.weight is copied.transformer.wte.weight
    pointers = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert pointers and pointers.isdisjoint(p.data_ptr() for p in copied.parameters())
    assert not any(p.requires_grad for p in copied.parameters())


def test_content_that_a_run_keeps_gives_the_model_back():
    """Config and weights as plain values: the same logits, tanh GELU and no biases included."""
    model = tiny(gelu="tanh", bias=False)
    again = unpack(pack(model), "cpu")
    assert again.config == model.config and again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again(random_tokens()), model(random_tokens()))
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_initial_scale():
    """Width 64: std 64^-1/2 = 1/8. 2 layers add to the residual stream twice each: 1/8 / sqrt(4).
    Biases 0, LayerNorm weights 1."""
    for name, parameter in tiny(n_embd=64).named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 2000:
            expected = 1 / 16 if "c_proj" in name else 1 / 8
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


# --- answers, one token after the other ----------------------------------------------------------

def test_draw_by_hand(monkeypatch):
    """Logits ln 1, ln 2, ln 1: probabilities 1/4, 1/2, 1/4; at temperature 1/2 they are squared
    first: 1/6, 2/3, 1/6. Temperature 0 takes the largest. A token of probability 0 never comes."""
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0]).log().expand(60_000, -1)
    for temperature, expected in ((1.0, [1 / 4, 1 / 2, 1 / 4, 0]), (0.5, [1 / 6, 2 / 3, 1 / 6, 0])):
        frequency = draw(logits, temperature, seeded(0)).bincount(minlength=4) / len(logits)
        close(frequency, expected, 0.01)        # five standard deviations: 0.002 each
        assert frequency[3] == 0
    assert draw(logits[:2], 0).tolist() == [1, 1]
    for uniform, token in ((0.0, 1), (1.0, 3)):     # the ends; a number below 1 may round up to it
        monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, uniform))
        assert draw(logits[:1].flip(1), 1.0).item() == token        # of 0, 1/4, 1/2, 1/4


def test_generate_takes_the_most_likely_token_of_the_whole_prefix():
    """Read again at once, every state of the answer predicts its next token."""
    model = lively(5)
    answer = model.generate([3], 20, eos=-1, temperature=0)
    predicted = model(torch.tensor([[3, *answer]]))[0].argmax(-1)
    assert len(answer) == 11 and predicted[:-1].tolist() == answer and len(set(answer)) > 3


def test_generate_ends():
    """At EOS, without it; at max_new_tokens; where the context of 12 is full: 12 - 5 = 7 tokens."""
    assert always(EOS).generate([1, 2, 3, 4, 5], 20, EOS) == []
    assert always(4).generate([1, 2, 3, 4, 5], 2, EOS) == [4] * 2
    assert always(4).generate([1, 2, 3, 4, 5], 20, EOS) == [4] * 7


# --- harness/sampling.py: many prompts at once ---------------------------------------------------

PROMPTS = [[3], [1, 2, 3, 4, 5], [6, 7, 8], [2, 2], [7], [4, 0, 4, 1]]      # the context is 12 long


def without(eos, answers):
    return [[token for token in answer if token != eos] for answer in answers]


@pytest.mark.parametrize("eos", range(8))
def test_many_greedy_answers_are_those_of_generate(eos):
    """Prompts of unequal length to the end of the context, every id as EOS in turn: rows end at
    different steps and leave the batch; each as alone."""
    for model in (lively(4), lively(5)):
        expected = [model.generate(prompt, 20, eos, 0) for prompt in PROMPTS]
        assert without(eos, generate(model, PROMPTS, 20, eos, 0)) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_answers_are_those_of_generate(monkeypatch, temperature):
    """Alone with the same generator; many with one uniform number for every draw."""
    model = lively(4)
    for seed, prompt in enumerate(PROMPTS):
        expected = model.generate(prompt, 20, EOS, temperature, seeded(seed))
        answers = generate(model, [prompt], 20, EOS, temperature, seeded(seed))
        assert without(EOS, answers) == [expected]
    for uniform in (0.2, 0.6, 0.9):
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
        expected = [model.generate(prompt, 20, EOS, temperature) for prompt in PROMPTS]
        assert without(EOS, generate(model, PROMPTS, 20, EOS, temperature)) == expected
        assert len(set(sum(expected, []))) > 2


def test_sample_by_hand():
    """Three prompts as 2 + 1, of which the second group's generator has seed + 2. EOS (here 1) is
    written where the model drew it: not at 3 tokens, the most, nor in a full context of 12."""
    model, prompts = fixed(0.5, 0.5), [[0] * 2, [0] * 10, [0] * 3]
    answers = [[0, 0, 0], [0, 0], [1]]
    assert generate(model, prompts[2:], 3, 1, 1.0, seeded(5)) == answers[2:]
    assert sample(model, prompts, 1, 3, seed=3) == answers


# --- errors --------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: tiny(n_head=3), "n_embd: expected a multiple of n_head=3, got 8"),
    (lambda: tiny(n_layer=0), "n_layer: expected at least 1, got 0"),
    (lambda: tiny()(random_tokens(1, 13)), "expected at most block_size=12 columns, got 13"),
])
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
