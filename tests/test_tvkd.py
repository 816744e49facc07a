"""tvkd.py against values worked out by hand; the arithmetic is in the docstrings.

Exact: every value and gradient here. test_hidden.py compares with naive loops. Each test calls only
the function it is marked with, so a wrong function fails no other's tests; "all together" marks the
rest. "robustness" marks what a naive but correct function may get wrong: precision, padding, masks
of 0 and 1, gradients and arguments that stay as they are, refused arguments.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from conftest import as_text, close
from tvkd import (action_logps, dpo_loss, implicit_value, kd_loss, nll_loss, sequence_logps,
                  shaping, soft_value, token_logps, tvkd_loss)

LN2, LN3, LN4, LN5, LN6 = map(math.log, (2, 3, 4, 5, 6))
NAN = float("nan")
points = pytest.mark.points


def t(*values):
    return torch.tensor(values, dtype=torch.double)


def logs(*weights):
    """Logits whose softmax stands in these proportions."""
    return t(*weights).log()


def mixed(rows):
    """What comes out where rows that differ are not kept apart."""
    rows = torch.as_tensor(rows, dtype=torch.double)
    return {"row 0 is taken for every row": rows[:1].expand_as(rows),
            "the rows are averaged; each has a number of its own":
                rows.mean(0, keepdim=True).expand_as(rows),
            "the rows are added up; each has a number of its own":
                rows.sum(0, keepdim=True).expand_as(rows)}


def losses(*margins):
    """-log sigmoid of each."""
    return [math.log1p(math.exp(-margin)) for margin in margins]


def no_gradient(**tensors):
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            raise AssertionError(f"expected no gradient of {name}, got {as_text(tensor.grad)}")


def reads(got, text):
    """For -inf and NaN, which are `close` to nothing."""
    if as_text(got) != text:
        raise AssertionError(f"expected {text}\n     got {as_text(got)}")


def has_dtype(tensor, dtype):
    if tensor.dtype != dtype:
        raise AssertionError(f"expected {dtype}, got {tensor.dtype}")


# --- token_logps, sequence_logps ----------------------------------------------------------------

@points("action_logps")
def test_action_logps_by_hand():
    """Three states in proportions 1 : 3, 4 : 1 and 2 : 3, the second with 5 added to its logits;
    actions 1, 0, 0: log 3/4, log 4/5, log 2/5. Gradient: one-hot minus probabilities; weighted by
    1, 2, 3 it is (-1/4, 1/4), 2 (1/5, -1/5), 3 (3/5, -3/5)."""
    logits = torch.stack([logs(1, 3), logs(4, 1) + 5, logs(2, 3)]).requires_grad_()
    actions, expected = torch.tensor([1, 0, 0]), logs(3/4, 4/5, 2/5)
    logps = action_logps(logits, actions)
    close(logps, expected, mistakes={
        "the logit alone, without - logsumexp": [LN3, LN4 + 5, LN2], **mixed(expected),
        "probabilities, not logs": [3/4, 4/5, 2/5],
        "the log-prob of the other action, or of action 0 alone": logs(1/4, 1/5, 3/5),
        "the sign: the result is -log pi": -expected})
    (logps * t(1, 2, 3)).sum().backward()
    close(logits.grad, [[-1/4, 1/4], [2/5, -2/5], [9/5, -9/5]])
    close(action_logps(logits.detach().view(1, 3, 2), actions.view(1, 3)), expected.view(1, 3))


@points("action_logps", "robustness")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_action_logps_precision(half):
    """Half-precision logits are raised first: ln(1/3) to six digits."""
    logps = action_logps(torch.zeros(1, 3, dtype=half), torch.tensor([0]))
    has_dtype(logps, torch.float32)
    close(logps, [-LN3])


@points("token_logps")
def test_token_logps_shift():
    """Tokens 0 1 2 and 2 0 1. Row 0: state 0 in proportions 1 : 2 : 1, action 1: 2/4; state 1 in
    1 : 1 : 6, action 2: 6/8. Row 1: 3 : 1 : 1, action 0: 3/5; 1 : 4 : 5, action 1: 4/10. The last
    states, 1 : 1 : 8 and 7 : 1 : 2, are not acted in."""
    weights = [[[1, 2, 1], [1, 1, 6], [1, 1, 8]], [[3, 1, 1], [1, 4, 5], [7, 1, 2]]]
    logits = logs(*weights).requires_grad_()
    logps = token_logps(logits, torch.tensor([[0, 1, 2], [2, 0, 1]]))
    expected = logs([2/4, 6/8], [3/5, 4/10])
    close(logps, expected, mistakes={
        "no shift: logits[:, t] predict tokens[:, t+1]": logs([1/4, 1/8], [1/5, 1/10]),
        "no shift: the logits are those of the state after the action":
            logs([1/8, 8/10], [1/10, 1/10]),
        "the logit alone, without - logsumexp": logs([2, 6], [3, 4]), **mixed(expected),
        "probabilities, not logs": [[2/4, 6/8], [3/5, 4/10]]})
    (logps * t([1, 0], [0, 2])).sum().backward()
    close(logits.grad, [[[-1/4, 1/2, -1/4], [0, 0, 0], [0, 0, 0]],
                        [[0, 0, 0], [-1/5, 6/5, -1], [0, 0, 0]]])


@points("sequence_logps")
def test_sequence_logps_is_a_sum():
    """Row 0, mask (0, 1, 1, 0): -2 - 5 = -7. Row 1, mask (0, 0, 1, 1): -6 - 9 = -15. Row 2, mask
    (1, 0, 0, 0): -4. Gradient, weighted by 1, 2, 3: the weight where the mask is 1."""
    logps = t([-1, -2, -5, -8], [-3, -7, -6, -9], [-4, -10, -20, -40]).requires_grad_()
    total = sequence_logps(logps, torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool())
    close(total, [-7, -15, -4], mistakes={
        "the mean over response tokens, not the sum": [-3.5, -7.5, -4],
        "EOS is not scored": [-2, -6, 0], "the sign": [7, 15, 4],
        "prompt and padding are scored too": [-16, -25, -74],
        "the prompt is scored too": [-8, -25, -4], "padding is scored too": [-15, -15, -74],
        "the mean over all columns": [-1.75, -3.75, -1],
        "the mask is one column too far right": [-13, -9, -10],
        "the mask is one column too far left": [-3, -13, 0],
        **mixed([-7, -15, -4])})
    (total * t(1, 2, 3)).sum().backward()
    close(logps.grad, [[0, 1, 1, 0], [0, 0, 2, 2], [3, 0, 0, 0]])


@points("all together")
def test_first_response_token_and_eos_are_scored():
    """Prompt of 4, so the first response action is taken in state 3 (logits[:, 3]); EOS, token 6,
    in state 5. Logits of states 0 to 2 (the prompt's) and of state 6 (after EOS) are never read.
    V = 5: 3 ln(1/5) = -4.828314."""
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    base = torch.zeros(1, 7, 5)
    before = sequence_logps(token_logps(base, tokens), mask)
    close(before, [-4.828314])
    for state, read in enumerate([False, False, False, True, True, True, False]):
        nudged = base.clone()
        nudged[0, state] = torch.arange(5.0) * 3
        changed = sequence_logps(token_logps(nudged, tokens), mask) != before
        assert bool(changed) == read, f"state {state}"


@points("token_logps", "robustness")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_token_logps_precision(half):
    """Half-precision logits are raised first: 200 tokens sum to within 1e-3 of float64 on the same
    numbers. float64 stays."""
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(1, 201, 50, generator=generator)).to(half)
    tokens = torch.randint(50, (1, 201), generator=generator)
    high = token_logps(logits.double(), tokens)
    has_dtype(high, torch.float64)
    low = token_logps(logits, tokens)
    has_dtype(low, torch.float32)
    close(low.sum(), high.sum(), 1e-3)


@points("token_logps", "robustness")
def test_token_logps_of_garbage_padding():
    """Padding logits of -inf: value and gradient of the sum of the two real actions;
    d log p(2) = onehot(2) - 1/5."""
    logits = torch.zeros(1, 4, 5)
    logits[:, 2:] = -torch.inf                          # only padding acts in state 2
    logits.requires_grad_()
    logps = token_logps(logits, torch.tensor([[1, 2, 0, 0]]))[:, :2].sum()
    close(logps, 2 * math.log(1 / 5))
    logps.backward()
    close(logits.grad[0, 2:], torch.zeros(2, 5))
    close(logits.grad[0, 0], [-.2, -.2, .8, -.2, -.2])


# --- dpo_loss -----------------------------------------------------------------------------------

@points("dpo_loss")
def test_dpo_by_hand():
    """beta 1/2, log-ratios (ln 2, -ln 3, ln 5) and (-ln 2, ln 3, ln 5): margins ln 2, -ln 3 and 0,
    losses ln(3/2), ln 4, ln 2. Gradient for the chosen, weighted by 1, 2, 3: -1/2 (1/3), -2/2
    (3/4), -3/2 (1/2)."""
    ref_chosen, ref_rejected = t(-3, -4, -6), t(-5, -2, -7)
    chosen = (ref_chosen + t(LN2, -LN3, LN5)).requires_grad_()
    rejected = (ref_rejected + t(-LN2, LN3, LN5)).requires_grad_()
    got = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)
    right = [math.log(3/2), LN4, LN2]
    close(got, right, mistakes={
        **mixed(right), "chosen and rejected are swapped, or the sign": losses(-LN2, LN3, 0),
        "beta is not applied": losses(LN4, -2 * LN3, 0),
        "beta is applied twice": losses(LN2 / 2, -LN3 / 2, 0),
        "divided by beta": losses(2 * LN4, -4 * LN3, 0),
        "the rejected response is not read": losses(LN2 / 2, -LN3 / 2, LN5 / 2),
        "ref_rejected has the wrong sign, brackets are missing": losses(5 + LN2, 2 - LN3, 7),
        "the reference is not subtracted": losses(1 + LN2, -1 - LN3, .5),
        "the reference is added": losses(2 + LN2, -2 - LN3, 1)})
    (got * t(1, 2, 3)).sum().backward()
    close(chosen.grad, [-1/6, -3/4, -3/4])
    close(rejected.grad, [1/6, 3/4, 3/4])


@points("dpo_loss")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_at_the_reference(beta):
    """policy = reference = (-3, -7): loss ln 2 whatever beta, gradient -beta/2 for the chosen. Not
    zero: a start, not a plateau. Without the reference the margin would be beta (-3 + 7), with the
    reference added beta (-6 + 14)."""
    policy = t(-3, -7).requires_grad_()
    loss = dpo_loss(policy[:1], policy[1:], t(-3), t(-7), beta)
    close(loss, [LN2], mistakes={
        "the reference is not subtracted": losses(4 * beta),
        "the reference is added, or its two responses are swapped": losses(8 * beta)})
    loss.sum().backward()
    close(policy.grad, [-beta / 2, beta / 2])


# --- the teacher's value ------------------------------------------------------------------------

@points("soft_value")
def test_soft_value():
    """logsumexp(1, 2, 3) = 3 + ln(1 + 1/e + 1/e^2) = 3.407606. At beta 2 twice that (V = beta
    logsumexp, not logsumexp/beta). Of log-probabilities 0. Two rows of logits ln(1, 2, 3),
    ln(1, 1, 2) and ln(2, 5, 5), ln(1, 1, 1), beta 2: 2 ln 6, 2 ln 4 and 2 ln 12, 2 ln 3."""
    logits = t(1, 2, 3).view(1, 1, 3)
    close(soft_value(logits, 1.0), [[3.407606]], mistakes={
        "log_softmax before logsumexp gives 0 in every state": [[0]], "the largest logit": [[3]],
        "the mean of exp, not the sum": [[3.407606 - LN3]], "the mean of the logits": [[2]]})
    close(soft_value(logits, 2.0), [[6.815212]], mistakes={
        "beta is not applied": [[3.407606]], "divided by beta": [[3.407606 / 2]],
        "logits are already Q/beta": [[2 * math.log(sum(math.exp(x / 2) for x in (1, 2, 3)))]]})
    close(soft_value(logits.log_softmax(-1), 1.0), [[0.0]])
    right = 2 * logs([6, 4], [12, 3])
    close(soft_value(logs([[1, 2, 3], [1, 1, 2]], [[2, 5, 5], [1, 1, 1]]), 2.0), right,
          mistakes={**mixed(right), "the largest logit": 2 * logs([3, 2], [5, 1])})


@points("soft_value", "robustness")
def test_soft_value_of_large_logits():
    """Logits (1000, 1000) and (-1000, -1000): 1000 + ln 2 and -1000 + ln 2. exp(1000) is inf and
    exp(-1000) is 0, so log(sum(exp)) would be inf and -inf. Half precision is raised first."""
    close(soft_value(t(1000, 1000, -1000, -1000).view(2, 2), 1.0), [1000 + LN2, -1000 + LN2],
          mistakes={"exp overflows, and logsumexp does not": [math.inf, -math.inf]})
    has_dtype(soft_value(torch.zeros(2, 3).bfloat16(), 1.0), torch.float32)
    has_dtype(soft_value(torch.zeros(2, 3).double(), 1.0), torch.float64)


@points("soft_value")
def test_soft_value_is_not_identified():
    """7t added to all logits of state t: same policy, value up by beta 7t = 14t at beta 2."""
    logits, shifted = with_and_without_shift()
    close(shifted.softmax(-1), logits.softmax(-1))
    close(soft_value(shifted, 2.0) - soft_value(logits, 2.0), [[0, 14, 28, 42]])


@points("all together")
def test_implicit_value_is_identified():
    """The same 7t: the implicit value does not move."""
    tokens, mask = torch.tensor([[1, 2, 3, 0]]), torch.ones(1, 3).bool()
    ref = torch.zeros(1, 3).double()
    before, after = (implicit_value(token_logps(logits, tokens), ref, mask, 2.0)
                     for logits in with_and_without_shift())
    close(after, before)


def with_and_without_shift():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 5, generator=generator, dtype=torch.double)
    return logits, logits + 7 * torch.arange(4).view(1, 4, 1)


@points("implicit_value")
def test_implicit_value_by_hand():
    """Log-ratios (9, 2, -3, 6), mask (0, 1, 1, 0), beta 2. States 0 and 1 are the prompt's: 0.
    Then 2*2 = 4, then 4 + 2*(-3) = -2 at s_end, and -2 on through the padding. Row 1, (1, -4, 5, 2)
    and (0, 0, 1, 1): 0 0 0, 2*5 = 10, 10 + 2*2 = 14. Row 2, (3, 7, 7, 7) and (1, 0, 0, 0): 0, then
    6 from state 1 on."""
    teacher = t([9, 3, -1, 5], [0, -5, 4, 3], [4, 8, 8, 6])
    ref = t([0, 1, 2, -1], [-1, -1, -1, 1], [1, 1, 1, -1])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    right = [[0, 0, 4, -2, -2], [0, 0, 0, 10, 14], [0, 6, 6, 6, 6]]
    close(implicit_value(teacher, ref, mask, 2.0), right, mistakes={
        "prompt and padding are counted too":
            [[0, 18, 22, 16, 28], [0, 2, -6, 4, 8], [0, 6, 20, 34, 48]],
        "the prompt is counted: mask the log-ratios before they are added up":
            [[0, 0, 22, 16, 0], [0, 0, 0, 4, 8], [0, 6, 0, 0, 0]],
        "the values are one state early": [[0, 4, -2, -2, 0], [0, 0, 10, 14, 0], [6, 6, 6, 6, 0]],
        "the values are one state early, and the last one stands twice":
            [[0, 4, -2, -2, -2], [0, 0, 10, 14, 14], [6, 6, 6, 6, 6]],
        "beta is not applied": [[0, 0, 2, -1, -1], [0, 0, 0, 5, 7], [0, 3, 3, 3, 3]],
        "beta is applied twice": [[0, 0, 8, -4, -4], [0, 0, 0, 20, 28], [0, 12, 12, 12, 12]],
        "each state has its own log-ratio, not the sum so far":
            [[0, 0, 4, -6, 0], [0, 0, 0, 10, 4], [0, 6, 0, 0, 0]],
        "after s_end the value is 0; it keeps that of s_end":
            [[0, 0, 4, -2, 0], [0, 0, 0, 10, 14], [0, 6, 0, 0, 0]],
        "the teacher's reference is not subtracted":
            [[0, 0, 6, 4, 4], [0, 0, 0, 8, 14], [0, 8, 8, 8, 8]],
        "the sign: teacher - reference": [[-x for x in row] for row in right], **mixed(right)})


@points("implicit_value", "robustness")
def test_implicit_value_of_garbage_padding():
    """Log-ratios (NaN, 2, -3, NaN), mask (0, 1, 1, 0), beta 1: 0, 0, 2, 2 - 3 = -1, -1."""
    teacher, ref = torch.tensor([[NAN, 3.0, -1.0, NAN]]), torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    values = implicit_value(teacher, ref, torch.tensor([[0, 1, 1, 0]]).bool(), 1.0)
    close(values, [[0, 0, 2, -1, -1]])


# --- shaping ------------------------------------------------------------------------------------

ALL = torch.ones(1, 3).bool()
HAND = [
    (1.0, "zero", [3, -2, -3]),             # 5-2, 3-5, 0-3
    (1.0, "value", [3, -2, 1]),             # ..., 4-3
    (1.0, "hold", [3, -2, 0]),              # ..., 3-3
    (0.9, "zero", [2.5, -2.3, -3]),         # .9*5-2, .9*3-5, -3
    (0.9, "value", [2.5, -2.3, 0.6]),       # ..., .9*4-3
    (0.9, "hold", [2.5, -2.3, -0.3]),       # ..., .9*3-3
]


@pytest.mark.parametrize("gamma, terminal, psi", [
    pytest.param(*row, marks=points("shaping", "equation", part)) for row, part in zip(
        HAND, ("terminal", "along", "terminal", "rows", "gamma", "rows"))])
def test_shaping_by_hand(gamma, terminal, psi):
    """Potentials (2, 5, 3), the finished answer's value 4. With gamma 1 and "value": 5-2, 3-5, 4-3.
    "zero" ends with 0-3, "hold" with 3-3. With gamma 0.9: .9*5-2, .9*3-5, .9*4-3; "hold" ends
    with .9*3-3. If s_end were one state early, "zero" and "hold" would replace the 3, by 0 or 5."""
    end = {"zero": 0.0, "hold": 3.0, "value": 4.0}[terminal]
    early = {"zero": 0.0, "hold": 5.0, "value": 3.0}[terminal]
    close(shaping(t(2, 5, 3, 4).view(1, 4), ALL, gamma, terminal), [psi], mistakes={
        "gamma is on Phi(s_t), it belongs on Phi(s_{t+1})": [
            [5 - 2 * gamma, 3 - 5 * gamma, end - 3 * gamma]],
        "the sign: Phi(s_t) - gamma Phi(s_{t+1})": [[-x for x in psi]],
        "gamma is not applied": [[3, -2, end - 3]],
        "gamma multiplies both potentials; only Phi(s_{t+1}) is discounted":
            [[3 * gamma, -2 * gamma, (end - 3) * gamma]],
        "psi is 0 at the end; with \"zero\" it is Phi(s_end) that is 0":
            [[*psi[:2], 0 if terminal == "zero" else psi[2]]],
        "gamma belongs on Phi(s_end), too": [[*psi[:2], end - 3]],
        "Phi(s_end) is read one state too early": [[*psi[:2], gamma * early - 3]],
        "s_end is one state too early": [[psi[0], gamma * early - 5, 4 * gamma - early]],
        "`terminal` has no effect": [[5 * gamma - 2, 3 * gamma - 5, 4 * gamma - 3]]})


@points("shaping", "equation", "rows")
def test_gamma_below_one_is_a_length_bias():
    """Constant potential 10, gamma 0.7, terminal 0. One token: -10 (7 - 10 = -3 if the last column
    is taken for s_end). Three tokens: -3 -3 -10 = -16. The longer answer is shaped down by 6 though
    nothing was learned."""
    values, mask = torch.full((2, 4), 10.0), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    close(shaping(values, mask, 0.7, "zero").sum(-1), [-10, -16], mistakes={
        "s_end is taken from the last column, which may be padding": [-3, -16]})


@points("shaping", "equation", "rows")
@pytest.mark.parametrize("terminal, psi, mistakes", [
    ("value", [[0, 4, -3, 0], [2, -4, 6, 2], [0, 0, 0, -4]], {
        "prompt and padding have a psi, too": [[-5, 4, -3, 5], [2, -4, 6, 2], [0, 0, -4, -4]]}),
    ("zero", [[0, 4, -6, 0], [2, -4, 6, -8], [0, 0, 0, -5]], {
        "s_end is taken from the last column, which may be padding":
            [[0, 4, -3, 0], [2, -4, 6, -8], [0, 0, 0, -5]],
        "s_end of row 0 is taken for every row": [[0, 4, -6, 0], [2, -4, -2, 2], [0, 0, 0, -4]],
        "s_end of row 0 is taken for every row, as Phi(s_t) too":
            [[0, 4, -6, 0], [2, -4, -2, 10], [0, 0, 0, 1]],
        "s_end is taken from the length of the response, without the prompt's":
            [[0, -2, -3, 0], [2, -4, 6, -8], [0, 0, 0, -4]],
        "s_end is taken from the length of the response alone, as Phi(s_t) too":
            [[0, -2, 3, 0], [2, -4, 6, -8], [0, 0, 0, -4]]}),
    ("hold", [[0, 4, 0, 0], [2, -4, 6, 0], [0, 0, 0, 0]], {
        "s_end is taken from the last column, which may be padding":
            [[0, 4, -3, 0], [2, -4, 6, 0], [0, 0, 0, 0]]}),
])
def test_shaping_of_three_rows(terminal, psi, mistakes):
    """Values (7, 2, 6, 3, 8), (4, 6, 2, 8, 10), (9, 9, 9, 5, 1), masks (0, 1, 1, 0), (1, 1, 1, 1),
    (0, 0, 0, 1), gamma 1. Row 0 goes 2 -> 6 -> 3: 4, then 3-6, 0-6 or 6-6. Row 1: 6-4, 2-6, 8-2,
    then 10-8, 0-8 or 8-8. Row 2: 1-5, 0-5 or 5-5."""
    values = t([7, 2, 6, 3, 8], [4, 6, 2, 8, 10], [9, 9, 9, 5, 1])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    close(shaping(values, mask, 1.0, terminal), psi, mistakes={**mistakes, **mixed(psi)})


def random_rows(seed, rows=6, width=9):
    """Random values with response masks of every kind: at the left edge, at the right, one token,
    all tokens."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width + 1, generator=draw, dtype=torch.double)
    mask = torch.zeros(rows, width).bool()
    spans = ((0, width), (0, 1), (width - 1, width), (3, 7), (2, 3), (4, width))
    for row, (start, end) in zip(mask, spans):
        row[start:end] = True
    return values, mask


@points("shaping", "robustness")
@pytest.mark.parametrize("terminal", ["zero", "hold", "value"])
def test_shaping_never_reads_padding(terminal):
    """The same rows with 0 and with 17 more columns of NaN and inf: the same psi. So too with NaN
    in the prompt before s_p."""
    values, mask = random_rows(2)
    clean = shaping(values, mask, 1.0, terminal)
    for garbage in (NAN, float("inf"), -7.0):
        noisy = F.pad(values, (0, 17), value=garbage)
        for row, (m, v) in enumerate(zip(mask, noisy)):
            p, end = int(m.nonzero()[0]), int(m.nonzero()[-1]) + 1
            v[:p], v[end + 1:] = garbage, garbage
        psi = shaping(noisy, F.pad(mask, (0, 17)), 1.0, terminal)
        close(psi[:, :mask.shape[1]], clean, 0)
        close(psi[:, mask.shape[1]:], torch.zeros(6, 17), 0)


@points("shaping", "robustness")
def test_shaping_gives_no_gradient():
    """psi carries no graph, even where the values do."""
    if shaping(t(2, 5, 3, 4).view(1, 4).requires_grad_(), ALL).requires_grad:
        raise AssertionError("expected no gradient of the values, got a psi with a graph")


# --- tvkd_loss ----------------------------------------------------------------------------------

@points("tvkd_loss")
@pytest.mark.parametrize("alpha, loss, weight", [
    (0.0, math.log(3 / 2), 1 / 3),          # margin ln 2: DPO
    (0.5, LN2, 1 / 2),                      # margin ln 2 - ln 4 / 2 = 0
    (1.0, LN3, 2 / 3),                      # margin ln 2 - ln 4 = -ln 2: sigmoid 1/3
    (-2.0, math.log(33 / 32), 1 / 33),      # margin ln 2 + 2 ln 4 = ln 32: sigmoid 32/33
])
def test_tvkd_by_hand(alpha, loss, weight):
    """beta 1, log-ratios ln 4 and ln 2, summed psi ln 4 and 0. Margins for alpha 0, 1/2, 1: ln 2,
    0, -ln 2. Weight: minus the gradient by log pi(y_w), sigmoid(-margin). alpha -2 is the plus
    reading: margin ln 2 + 2 ln 4 = ln 32, loss -ln(32/33) = ln(33/32), weight 1/33."""
    policy = t(LN4 - 5, LN2 - 6).requires_grad_()
    ref, psi = t(-5, -6), t(LN4, 0)
    got = tvkd_loss(policy[:1], policy[1:], ref[:1], ref[1:], psi[:1], psi[1:], 1.0, alpha)
    close(got, [loss], mistakes={
        "a plus before alpha, where a minus belongs" if alpha > 0 else "the sign of alpha is lost":
            losses(LN2 + alpha * LN4),
        "alpha is not applied": [LN3], "alpha is outside the sigmoid": [LN3 - LN2 - alpha * LN4]})
    got.sum().backward()
    close(policy.grad, [-weight, weight])


@points("tvkd_loss")
def test_tvkd_of_three_pairs():
    """beta 1/2 and the log-ratios of DPO's three pairs: ln 2, -ln 3, 0. alpha 3, psi (1 + ln(4)/3,
    1 - ln(6)/3, ln(3)/3) and (1, 1, 0), so 3 (psi_w - psi_l) is ln 4, -ln 6, ln 3. Margins -ln 2,
    ln 2, -ln 3: losses ln 3, ln(3/2), ln 4. Gradient for the chosen, weighted by 1, 2, 3:
    -1/2 (2/3), -2/2 (1/3), -3/2 (3/4)."""
    ref_chosen, ref_rejected = t(-3, -4, -6), t(-5, -2, -7)
    chosen = (ref_chosen + t(LN2, -LN3, LN5)).requires_grad_()
    rejected = (ref_rejected + t(-LN2, LN3, LN5)).requires_grad_()
    psi_chosen, psi_rejected = t(1 + LN4 / 3, 1 - LN6 / 3, LN3 / 3), t(1, 1, 0)
    got = tvkd_loss(chosen, rejected, ref_chosen, ref_rejected, psi_chosen, psi_rejected, 0.5, 3.0)
    right = [LN3, math.log(3/2), LN4]
    close(got, right, mistakes={
        **mixed(right), "psi of row 0 is taken for every row": losses(-LN2, -LN3 - LN4, -LN4),
        "a plus before alpha, where a minus belongs": losses(LN2 + LN4, -LN3 - LN6, LN3),
        "beta scales psi too; it belongs to the log-ratios": losses(0, LN6 / 2 - LN3, -LN3 / 2),
        "beta is applied twice": losses(LN2 / 2 - LN4, LN6 - LN3 / 2, -LN3),
        "beta is not applied": losses(0, LN6 - 2 * LN3, -LN3),
        "alpha is not applied": losses(LN2 - LN4 / 3, LN6 / 3 - LN3, -LN3 / 3),
        "psi is not applied: this is DPO": losses(LN2, -LN3, 0),
        "psi of the rejected response is not subtracted": losses(-LN2 - 3, LN2 - 3, -LN3)})
    (got * t(1, 2, 3)).sum().backward()
    close(chosen.grad, [-1/3, -1/3, -9/8])
    close(rejected.grad, [1/3, 1/3, 9/8])


# dpo_loss, and tvkd_loss at alpha 1
LOSSES = [
    pytest.param(lambda *x: dpo_loss(*x[:4], 1.0), marks=points("dpo_loss", "robustness")),
    pytest.param(lambda *x: tvkd_loss(*x, 1.0, 1.0), marks=points("tvkd_loss", "robustness"))]


@pytest.mark.parametrize("call", LOSSES)
def test_reference_and_psi_get_no_gradient(call):
    """Both are constants of the data, even where they come with a graph."""
    policy = t(LN4 - 5, LN2 - 6).requires_grad_()
    ref, psi = t(-5, -6).requires_grad_(), t(LN4, 0).requires_grad_()
    call(*policy.split(1), *ref.split(1), *psi.split(1)).sum().backward()
    no_gradient(reference=ref, psi=psi)


@pytest.mark.parametrize("call", LOSSES)
@pytest.mark.parametrize("margin, loss, gradient", [(-900, 900, -1), (900, 0, 0)])
def test_extreme_margins(call, margin, loss, gradient):
    """beta 1, psi 900 for both. Margin -900: loss 900, gradient -1 (log(sigmoid(x)) would be
    -inf). Margin 900: loss 0, gradient 0."""
    policy, zero = t(margin).requires_grad_(), t(0)
    got = call(policy, zero, zero, zero, zero + 900, zero + 900)
    close(got, [loss], mistakes={"log(sigmoid(x)) instead of logsigmoid(x)": [math.inf]})
    got.sum().backward()
    close(policy.grad, [gradient])


@points("all together")
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_lemma_strict_shaping_is_invisible(alpha):
    """The prompt's state s_p is the same for both answers. With gamma 1 and terminal "zero" loss
    and gradient are DPO's, for random values, different lengths and any alpha. With "value" they
    are not. The proof: docs/theory.md."""
    generator = torch.Generator().manual_seed(3)
    values = 10 * torch.randn(2, 8, generator=generator, dtype=torch.double)
    values[:, 2] = 6.0                                          # V(s_p), s_p = state 2
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]]).bool()
    outcomes = {}
    for terminal in ("zero", "value", None):
        policy = t(-4, -5).requires_grad_()
        if terminal is None:
            loss = dpo_loss(policy[:1], policy[1:], t(-5), t(-4.5), 0.3)
        else:
            psi = shaping(values, mask, 1.0, terminal).sum(-1)
            loss = tvkd_loss(policy[:1], policy[1:], t(-5), t(-4.5), psi[:1], psi[1:], 0.3, alpha)
        loss.sum().backward()
        outcomes[terminal] = (loss.detach(), policy.grad)
    close(outcomes["zero"][0], outcomes[None][0], 1e-12)
    close(outcomes["zero"][1], outcomes[None][1], 1e-12)
    assert (outcomes["value"][0] - outcomes[None][0]).abs() > 0.1


# --- kd_loss, nll_loss --------------------------------------------------------------------------

def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@points("kd_loss")
def test_kd_by_hand():
    """Row 0 scores one state, row 1 two. KL((1/2, 1/4, 1/4) || (1/8, 1/8, 3/4)) = 1/2 ln 4 + 1/4
    ln 2 + 1/4 ln(1/3) = .591781; KL((1/4, 1/4, 1/2) || (1/2, 1/4, 1/4)) = 1/4 ln 2 = .173287;
    KL((2/3, 1/6, 1/6) || thirds) = 2/3 ln 2 - 1/3 ln 2 = .231049. Mean: .996117/3 = .332039. Logits
    of the teacher have 9 added: no matter. The other states are the prompt's, padding, or the last.
    Gradient: (student - teacher)/3 in the three states."""
    p = [(1/2, 1/4, 1/4), (1/4, 1/4, 1/2), (2/3, 1/6, 1/6)]             # the teacher
    q = [(1/8, 1/8, 3/4), (1/2, 1/4, 1/4), (1/3, 1/3, 1/3)]             # the student
    other, student_other = (.1, .1, .8), (.6, .2, .2)
    teacher = 9 + logs([other, p[0], other, other], [other, p[1], p[2], other])
    student = logs([student_other, q[0], student_other, student_other],
                   [student_other, q[1], q[2], student_other]).requires_grad_()
    a, b, c, x = *map(kl, p, q), kl(other, student_other)
    right = (a + b + c) / 3
    assert right == pytest.approx(0.332039, abs=1e-6)
    loss = kd_loss(student, teacher, torch.tensor([[0, 1, 0], [0, 1, 1]]).bool())
    close(loss, right, mistakes={
        "the other direction, KL(student || teacher)": sum(map(kl, q, p)) / 3,
        "the mean over the vocabulary too; KL sums over it": right / 3,
        "the logits are shifted: logits[:, t] belong to mask[:, t]": (x + c + x) / 3,
        "the sum, not the mean": 3 * right, "divided by rows, not by states": 1.5 * right,
        "prompt and padding are counted too": (a + b + c + 3 * x) / 6,
        "every state is counted, the last too": (a + b + c + 5 * x) / 8,
        "divided by all columns": right / 2, "row 0 alone": a, "the last row alone": (b + c) / 2,
        "the mean of the rows' means; every state counts the same": (a + (b + c) / 2) / 2,
        "cross-entropy: the teacher's entropy is not subtracted":
            -sum(u * math.log(v) for row in zip(p, q) for u, v in zip(*row)) / 3,
        "the sign": -right})
    loss.backward()
    expected = torch.zeros(2, 4, 3).double()
    for row, state, i in ((0, 1, 0), (1, 1, 1), (1, 2, 2)):
        expected[row, state] = (t(*q[i]) - t(*p[i])) / 3
    close(student.grad, expected)


@points("kd_loss", "robustness")
def test_kd_of_garbage_padding():
    """KL((1/2, 1/2) || (.9, .1)) = .510826 in state 0; state 1 is padding and holds NaN. Gradient
    (.9 - .5, .1 - .5) in state 0 and 0 in state 1; none reaches the teacher."""
    student = torch.stack([t(.9, .1).log(), t(NAN, 0), t(0, 0)]).unsqueeze(0).requires_grad_()
    teacher = torch.stack([t(.5, .5).log(), t(0, NAN), t(0, 0)]).unsqueeze(0).requires_grad_()
    loss = kd_loss(student, teacher, torch.tensor([[True, False]]))
    close(loss, 0.510826)
    loss.backward()
    close(student.grad[0], [[.4, -.4], [0, 0], [0, 0]])
    no_gradient(teacher=teacher)


@points("kd_loss", "robustness")
@pytest.mark.parametrize("student, teacher, expected", [
    (t(0, 0), t(0, -math.inf), LN2), (t(0, -100), t(0, 0), 50 - LN2),
    (t(0, 0), torch.tensor([0, 2.5]).bfloat16(), 0.424612)])
def test_kd_of_extreme_and_rounded_logits(student, teacher, expected):
    """Teacher (1, 0), student (1/2, 1/2): KL = ln 2; 0 ln 0 counts as 0. Teacher (1/2, 1/2),
    student (1, e^-100): ln(1/2) + 100/2 = 49.306853. Teacher of bfloat16 logits 0 and 2.5, raised
    first: p = 1/(1 + e^-2.5) = .924142, ln 2 + p ln p + (1 - p) ln(1 - p) = .424612."""
    student, teacher = (x.expand(1, 2, 2) for x in (student, teacher))
    close(kd_loss(student, teacher, ALL[:, :1]), expected)


@points("nll_loss")
def test_nll_by_hand():
    """Rows ([-16], -1, -2, [-10]) and ([-14], -6, [-20], [-30]); brackets are prompt and padding:
    (1 + 2 + 6) / 3 = 3. The mean of row means would be (1.5 + 6) / 2 = 3.75; by rows 9/2 = 4.5;
    with the prompt (9 + 30) / 5 = 7.8; with all columns 99 / 8."""
    logps = t([-16, -1, -2, -10], [-14, -6, -20, -30]).requires_grad_()
    loss = nll_loss(logps, torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool())
    close(loss, 3.0, mistakes={
        "the mean of the rows' means; every token counts the same": 3.75,
        "prompt and padding are scored too": 99 / 8, "the prompt is scored too": 7.8,
        "padding is scored too": 69 / 6, "the sum, not the mean": 9.0,
        "divided by rows, not by tokens": 4.5, "divided by all columns": 9 / 8, "the sign": -3.0,
        "EOS is not scored": 1.0, "row 0 alone": 1.5, "the last row alone": 6.0})
    loss.backward()
    close(logps.grad, [[0, -1/3, -1/3, 0], [0, -1/3, 0, 0]])


@pytest.mark.parametrize("function, expected, gradient", [
    pytest.param(sequence_logps, [-4], 1, marks=points("sequence_logps", "robustness")),
    pytest.param(nll_loss, 2, -1/2, marks=points("nll_loss", "robustness"))])
def test_logps_of_garbage_padding(function, expected, gradient):
    """Log-probs (-1, -3, [NaN]): the sum is -4, the mean of -log pi 2; gradient 1 and -1/2 for two
    tokens, 0 in the padding."""
    logps = t([-1, -3, NAN]).requires_grad_()
    result = function(logps, torch.tensor([[True, True, False]]))
    close(result, expected)
    result.sum().backward()
    close(logps.grad, [[gradient, gradient, 0]])


# --- masks --------------------------------------------------------------------------------------

MASKS = [
    ("sequence_logps", lambda mask: sequence_logps(t([-1, -2, -4]), mask), [-5]),     # -1 - 4
    ("implicit_value", lambda mask: implicit_value(t([2, 5, 3]), t([1, 1, 1]), mask, 1.0),
     [[0, 1, 1, 3]]),
    ("shaping", lambda mask: shaping(t([2, 5, 3, 4]), mask), [[3, 0, 1]]),            # 5-2, 4-3
    ("shaping", lambda mask: shaping(t([2, 5, 3, 4]), mask, 1.0, "zero"), [[3, 0, -3]]),    # 0-3
    ("kd_loss", lambda mask: kd_loss(torch.zeros(1, 4, 2), t(0, LN3).repeat(1, 4, 1), mask),
     .75 * LN3 - LN2),
    ("nll_loss", lambda mask: nll_loss(t([-1, -9, -4]), mask), 2.5),                  # (1 + 4)/2
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
@pytest.mark.parametrize("call, expected", [
    pytest.param(call, expected, marks=points(name, "robustness"), id=name)
    for name, call, expected in MASKS])
def test_masks_of_zeros_and_ones(call, expected, dtype):
    """The mask (1, 0, 1) as bool, int and float. Implicit value: 0, +(2-1), +0, +(3-1).
    KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2."""
    close(call(torch.tensor([[1, 0, 1]]).to(dtype)), expected)


# --- -inf and NaN in the response ----------------------------------------------------------------

INF, HALVES = math.inf, t(0, 0).repeat(1, 2, 1)
INSIDE = [
    ("action_logps", lambda: action_logps(t([1000, -1000], [1000, -1000], [0, -INF], [NAN, 0]),
                                          torch.tensor([1, 0, 1, 0])), "[-2000.0, 0.0, -inf, nan]"),
    ("token_logps", lambda: token_logps(t([[0, -INF], [0, NAN], [0, 0]]),
                                        torch.tensor([[0, 1, 1]])), "[[-inf, nan]]"),
    ("sequence_logps", lambda: sequence_logps(t([-1, -INF, -2], [-1, NAN, -2]),
                                              torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()),
     "[-inf, nan]"),
    ("implicit_value", lambda: implicit_value(t([3, -INF, NAN]), t([1, 2, 2]), ALL, 1.0),
     "[[0.0, 2.0, -inf, nan]]"),
    ("shaping", lambda: shaping(t([2, 5, NAN, 4], [2, 5, 3, -INF]), ALL.repeat(2, 1), 1.0, "value"),
     "[[3.0, nan, nan], [3.0, -2.0, -inf]]"),
    ("kd_loss", lambda: kd_loss(t([[0, -INF], [0, 0]]), HALVES, ALL[:, :1]), "inf"),
    ("kd_loss", lambda: kd_loss(t([[0, NAN], [0, 0]]), HALVES, ALL[:, :1]), "nan"),
    ("nll_loss", lambda: nll_loss(t([-1, -INF]), ALL[:, :2]), "inf"),
    ("nll_loss", lambda: nll_loss(t([-1, NAN]), ALL[:, :2]), "nan"),
]


@pytest.mark.parametrize("call, text", [
    pytest.param(call, text, marks=points(name, "robustness"), id=f"{name}-{i}")
    for i, (name, call, text) in enumerate(INSIDE)])
def test_infinite_and_nan_in_the_response(call, text):
    """They stay what they are: log 0 = -inf, and what is added to -inf or NaN is that. KL((1/2,
    1/2) || (1, 0)) = inf. From logits 1000 and -1000: -1000 - 1000 = -2000, and 0."""
    reads(call(), text)


# --- arguments stay as they are ------------------------------------------------------------------

TWO, FOUR = t(-1, -2), t([-1, -2, -3, -4], [-5, -6, -7, -8])
PARTLY = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
STATES = t([0, 0], [1, 0], [0, 2], [-torch.inf, -torch.inf], [1, 1]).repeat(2, 1, 1)
CALLS = [
    ("action_logps", STATES[0, :3], torch.tensor([0, 1, 0])),
    ("token_logps", STATES, torch.ones(2, 5).long()),
    ("sequence_logps", FOUR, PARTLY),
    ("dpo_loss", TWO, TWO - 1, TWO, TWO + 1, 0.5),
    ("soft_value", STATES, 2.0),
    ("implicit_value", FOUR, FOUR - 1, PARTLY, 0.5),
    ("shaping", FOUR[:, :3], PARTLY[:, 1:3], 0.9, "zero"),
    ("shaping", FOUR, PARTLY[:, 1:], 0.9, "hold"),
    ("tvkd_loss", TWO, TWO - 1, TWO, TWO, TWO, TWO + 1, 0.5, 2.0),
    ("kd_loss", STATES, STATES + 1, PARTLY),
    ("nll_loss", FOUR, PARTLY),
]


@pytest.mark.parametrize("name, inputs", [
    pytest.param(name, inputs, marks=points(name, "robustness"), id=f"{name}-{i}")
    for i, (name, *inputs) in enumerate(CALLS)])
def test_arguments_stay_as_they_are(name, inputs):
    """A caller may use its tensors again; and twice the same call gives twice the same result."""
    given = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    first, second = (as_text(globals()[name](*given)) for _ in range(2))
    if list(map(as_text, given)) != list(map(as_text, inputs)):
        raise AssertionError("expected the arguments unchanged, got\n"
                             + "\n".join(map(as_text, given)))
    if first != second:
        raise AssertionError(f"expected {first}, as in the call before\n     got {second}")


# --- errors -------------------------------------------------------------------------------------

one, two, odd, three = (torch.zeros(*n) for n in ((1,), (2,), (2, 3), (1, 3)))
logits5, four = torch.zeros(1, 4, 5), torch.zeros(2, 4)
NOT_ALL = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()

ERRORS = [
    ("action_logps", torch.zeros(2, 2), torch.tensor([0, 1, 1]),
     "actions: expected shape (2,), got (3,)"),
    ("token_logps", torch.zeros(2, 4, 5), odd.long(), "tokens: expected shape (2, 4), got (2, 3)"),
    ("sequence_logps", odd, four, "mask: expected shape (2, 3), got (2, 4)"),
    ("dpo_loss", one, two, two, two, 1.0, "policy_rejected: expected shape (1,), got (2,)"),
    ("implicit_value", odd, odd, three, 1.0, "mask: expected shape (2, 3), got (1, 3)"),
    ("implicit_value", odd, four, odd, 1.0, "teacher_ref_logps: expected shape (2, 3), got (2, 4)"),
    ("implicit_value", four, odd, odd, 1.0, "teacher_ref_logps: expected shape (2, 4), got (2, 3)"),
    ("shaping", three, ALL, "values: expected shape (1, 4), got (1, 3)"),
    ("shaping", torch.zeros(1, 4), ALL, 1.0, "end",
     'terminal: expected "zero", "hold" or "value", got \'end\''),
    ("shaping", four, NOT_ALL, "at least one response token in every row"),
    ("kd_loss", logits5, torch.zeros(1, 4, 6), ALL,
     "teacher_logits: expected shape (1, 4, 5), got (1, 4, 6)"),
    ("kd_loss", logits5, logits5, ~ALL, "at least one response token, got none"),
    ("kd_loss", logits5, logits5, torch.ones(1, 4), "mask: expected shape (1, 3), got (1, 4)"),
    ("nll_loss", odd, torch.ones(2).bool(), "mask: expected shape (2, 3), got (2,)"),
    ("nll_loss", three, ~ALL, "at least one response token, got none"),
]
PAIRS = "policy_chosen policy_rejected ref_chosen ref_rejected psi_chosen psi_rejected".split()
ERRORS += [(name, *[one if x == wrong else two for x in PAIRS[:n]], *numbers,
            f"{wrong}: expected shape (2,), got (1,)")
           for name, n, *numbers in (("dpo_loss", 4, 1.0), ("tvkd_loss", 6, 1.0, 1.0))
           for wrong in PAIRS[1:n]]


@pytest.mark.parametrize("name, inputs", [
    pytest.param(name, inputs, marks=points(name, "robustness"), id=f"{name}-{i}")
    for i, (name, *inputs, _) in enumerate(ERRORS)])
def test_wrong_arguments_are_refused(name, inputs):
    """Shapes that do not match, an unknown `terminal` or a missing response: ValueError."""
    with pytest.raises(ValueError):
        globals()[name](*inputs)


@pytest.mark.parametrize("name, inputs, text", [
    pytest.param(name, inputs, text, id=f"{name}-{i}")
    for i, (name, *inputs, text) in enumerate(ERRORS)])
def test_errors_say_what_was_expected(name, inputs, text):
    """The texts of tvkd.py's errors. Not graded: of a solution only the type is asked."""
    with pytest.raises(ValueError, match=re.escape(text)):
        globals()[name](*inputs)
