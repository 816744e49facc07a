"""tvkd.py against values worked out by hand; the arithmetic is in the docstrings.

Exact: every value and gradient here. Oracles: a double loop for the two functions whose indices
are subtle. Each test calls only the function it is marked with, so a wrong function fails no
other's tests; "all together" marks the rest. "robustness" marks what a naive but correct function
may get wrong: precision, padding, masks of 0 and 1, detached inputs, refused arguments.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import as_text, close
from tvkd import (action_logps, dpo_loss, implicit_value, kd_loss, nll_loss, sequence_logps,
                  shaping, soft_value, token_logps, tvkd_loss)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
NAN = float("nan")
points = pytest.mark.points


def t(*values):
    return torch.tensor(values, dtype=torch.double)


def no_gradient(**tensors):
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            raise AssertionError(f"expected no gradient of {name}, got {as_text(tensor.grad)}")


def has_dtype(tensor, dtype):
    if tensor.dtype != dtype:
        raise AssertionError(f"expected {dtype}, got {tensor.dtype}")


# --- token_logps, sequence_logps ----------------------------------------------------------------

@points("action_logps")
def test_action_logps_by_hand():
    """Logits (ln 1, ln 3), twice: log 3/4 of action 1 and log 1/4 of action 0, in any shape.
    Gradient of the first: one-hot minus probabilities, (-1/4, 1/4)."""
    logits = torch.tensor([[0.0, LN3]] * 2, dtype=torch.double, requires_grad=True)
    logps = action_logps(logits, torch.tensor([1, 0]))
    close(logps, [math.log(0.75), math.log(0.25)], mistakes={
        "the logit alone, without - logsumexp": [LN3, 0], "probabilities, not logs": [.75, .25]})
    close(torch.autograd.grad(logps[0], logits)[0], [[-0.25, 0.25], [0, 0]])
    close(action_logps(logits.view(1, 2, 2), torch.tensor([[1, 0]])),
          [[math.log(0.75), math.log(0.25)]])


@points("action_logps", "robustness")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_action_logps_precision(half):
    """Half-precision logits are raised first: ln(1/3) to six digits."""
    logps = action_logps(torch.zeros(1, 3, dtype=half), torch.tensor([0]))
    has_dtype(logps, torch.float32)
    close(logps, [-LN3])


@points("token_logps")
def test_token_logps_shift():
    """Logits of +50 on token (x+1) mod 5 at input x; tokens 0 1 2 3 4: every action has probability
    1 to 1e-20. Without the shift each would have about -50."""
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    logits = 50.0 * F.one_hot((tokens + 1) % 5, 5)
    close(token_logps(logits, tokens), [[0, 0, 0, 0]], mistakes={
        "no shift: logits[:, t] predict tokens[:, t+1]": [[-50, -50, -50, -50]]})


@points("sequence_logps")
def test_sequence_logps_is_a_sum():
    """Log-probs (-1, -2, -5, -8), mask (0, 1, 1, 0): -2 - 5 = -7. The mean: -3.5; with prompt and
    padding: -16; without the last response token, EOS: -2."""
    logps, mask = t(-1, -2, -5, -8).view(1, 4), torch.tensor([[0, 1, 1, 0]]).bool()
    close(sequence_logps(logps, mask), [-7], mistakes={
        "the mean over response tokens, not the sum": [-3.5], "EOS is not scored": [-2],
        "prompt and padding are scored too": [-16], "the mean over all columns": [-1.75],
        "the mask is one column too far right": [-13], "the mask is one column too far left": [-3]})


@points("all together")
def test_uniform_sequence():
    """V = 5, prompt of 4, response of 2 and EOS: 3 scored actions of ln(1/5) = -1.609438 each; sum
    -4.828314 (not the mean)."""
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()            # actions 3, 4, 5 = tokens 4, 5, 6
    close(sequence_logps(token_logps(torch.zeros(1, 7, 5), tokens), mask), [-4.828314])


@points("all together")
def test_first_response_token_and_eos_are_scored():
    """Prompt of 4, so the first response action is taken in state 3 (logits[:, 3]); EOS, token 6,
    in state 5. Logits of states 0 to 2 (the prompt's) and of state 6 (after EOS) are never read."""
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    base = torch.zeros(1, 7, 5)
    before = sequence_logps(token_logps(base, tokens), mask)
    for state, read in enumerate([False, False, False, True, True, True, False]):
        nudged = base.clone()
        nudged[0, state] = torch.arange(5.0) * 3
        changed = sequence_logps(token_logps(nudged, tokens), mask) != before
        assert bool(changed) == read, f"state {state}"


@points("token_logps")
def test_token_logps_equals_log_softmax_with_gradient():
    """gather - logsumexp is gather of log_softmax; d log p(a) / d logits = onehot(a) - softmax, at
    logits (0, ln 3): (-1/4, 1/4) for the second action, i.e. 1 - 3/4."""
    logits = t(0, LN3).view(1, 1, 2).repeat(1, 2, 1).requires_grad_()
    logps = token_logps(logits, torch.tensor([[0, 1]]))
    close(logps, [[math.log(3 / 4)]])
    logps.sum().backward()
    close(logits.grad, [[[-1 / 4, 1 / 4], [0, 0]]])             # the last state is not acted in
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3, 6, 7, generator=generator)
    tokens = torch.randint(7, (3, 6), generator=generator)
    expected = F.log_softmax(random, -1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    close(token_logps(random, tokens), expected)


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


@points("sequence_logps", "robustness")
def test_sequence_logps_of_garbage_padding():
    """Padding log-probs of NaN: -1 - 2 = -3, gradient (1, 1, 0)."""
    noisy = torch.tensor([[-1.0, -2.0, NAN]], requires_grad=True)
    total = sequence_logps(noisy, torch.tensor([[True, True, False]]))
    close(total, [-3])
    total.sum().backward()
    close(noisy.grad, [[1, 1, 0]])


@points("all together", "robustness")
def test_garbage_padding_stays_out():
    """Both, one after another: logits of -inf where padding acts, and a mask that leaves it out.
    2 ln(1/5)."""
    logits = torch.zeros(1, 4, 5)
    logits[:, 2:] = -torch.inf
    logits.requires_grad_()
    logps = sequence_logps(token_logps(logits, torch.tensor([[1, 2, 0, 0]])),
                           torch.tensor([[1, 1, 0]]).bool())
    close(logps, [2 * math.log(1 / 5)])
    logps.sum().backward()
    close(logits.grad[0, 2:], torch.zeros(2, 5))


# --- dpo_loss -----------------------------------------------------------------------------------

@points("dpo_loss")
def test_dpo_by_hand():
    """Policy (-10, -12), reference (-11, -11), beta 0.1: x = 0.1 (1 - (-1)) = 0.2; loss -ln
    sigmoid(0.2) = 0.598139. The pair swapped: x = -0.2, loss 0.798139 = 0.598139 + 0.2.
    Gradient: -beta sigmoid(-0.2) = -0.1 * 0.450166 for the chosen. Without the brackets x would be
    0.1 (-10 + 11 + 12 + 11) = 2.4."""
    policy = t(-10, -12).requires_grad_()
    ref = t(-11, -11)
    loss = dpo_loss(policy[:1], policy[1:], ref[:1], ref[1:], 0.1)
    close(loss, [0.598139], mistakes={
        "chosen and rejected are swapped, or the sign": [0.798139],
        "beta is applied twice": [math.log1p(math.exp(-0.02))],
        "beta is not applied": [math.log1p(math.exp(-2))],
        "ref_rejected has the wrong sign, brackets are missing": [math.log1p(math.exp(-2.4))]})
    close(dpo_loss(policy[1:], policy[:1], ref[1:], ref[:1], 0.1), [0.798139])
    loss.sum().backward()
    close(policy.grad, [-0.0450166, 0.0450166])


@points("dpo_loss", "robustness")
def test_dpo_gives_the_reference_no_gradient():
    """The reference is frozen, even where its log-probs come with a graph."""
    policy, ref = t(-10, -12).requires_grad_(), t(-11, -11).requires_grad_()
    dpo_loss(policy[:1], policy[1:], ref[:1], ref[1:], 0.1).sum().backward()
    no_gradient(reference=ref)


@points("dpo_loss")
def test_dpo_theory_case():
    """beta 1, log-ratios ln 4 and ln 2: margin ln 2, sigmoid 2/3, loss ln(3/2), weight 1/3."""
    policy = t(LN4, LN2).requires_grad_()
    loss = dpo_loss(policy[:1], policy[1:], t(0), t(0), 1.0)
    close(loss, [math.log(3 / 2)])
    loss.sum().backward()
    close(policy.grad, [-1 / 3, 1 / 3])


@points("dpo_loss")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_at_the_reference(beta):
    """policy = reference = (-3, -7): loss ln 2 whatever beta, gradient -beta/2 for the chosen. Not
    zero: a start, not a plateau. Without the reference the margin would be beta (-3 + 7), with the
    reference added beta (-6 + 14)."""
    policy = t(-3, -7).requires_grad_()
    loss = dpo_loss(policy[:1], policy[1:], t(-3), t(-7), beta)
    close(loss, [LN2], mistakes={
        "the reference is not subtracted": [math.log1p(math.exp(-4 * beta))],
        "the reference is added, or its two responses are swapped":
            [math.log1p(math.exp(-8 * beta))]})
    loss.sum().backward()
    close(policy.grad, [-beta / 2, beta / 2])


@points("dpo_loss", "robustness")
def test_dpo_extreme_margins():
    """Margin -900: loss 900, gradient -1 (log(sigmoid(x)) would be -inf). Margin 900: loss 0,
    gradient 0."""
    zero = torch.zeros(1)
    for margin, loss, gradient in ((-900.0, 900.0, -1.0), (900.0, 0.0, 0.0)):
        policy = torch.tensor([margin], requires_grad=True)
        got = dpo_loss(policy, zero, zero, zero, 1.0)
        close(got, [loss], mistakes={"log(sigmoid(x)) instead of logsigmoid(x)": [math.inf]})
        got.sum().backward()
        close(policy.grad, [gradient])


# --- the teacher's value ------------------------------------------------------------------------

@points("soft_value")
def test_soft_value():
    """logsumexp(1, 2, 3) = 3 + ln(1 + 1/e + 1/e^2) = 3.407606. At beta 2 twice that (V = beta
    logsumexp, not logsumexp/beta). Of log-probabilities 0. The theory's tree at state a, logits
    (ln 1/2 + ln 3, ln 1/2): ln(3/2 + 1/2) = ln 2."""
    logits = t(1, 2, 3).view(1, 1, 3)
    close(soft_value(logits, 1.0), [[3.407606]], mistakes={
        "log_softmax before logsumexp gives 0 in every state": [[0]], "the largest logit": [[3]]})
    close(soft_value(logits, 2.0), [[6.815212]], mistakes={
        "beta is not applied": [[3.407606]], "divided by beta": [[3.407606 / 2]],
        "logits are already Q/beta": [[2 * math.log(sum(math.exp(x / 2) for x in (1, 2, 3)))]]})
    close(soft_value(logits.log_softmax(-1), 1.0), [[0.0]])
    close(soft_value(t(math.log(3 / 2), math.log(1 / 2)), 1.0), LN2)


@points("soft_value", "robustness")
def test_soft_value_precision():
    """Half-precision logits are raised first: float32 out; float64 stays."""
    has_dtype(soft_value(torch.zeros(2, 3).bfloat16(), 1.0), torch.float32)
    has_dtype(soft_value(torch.zeros(2, 3).double(), 1.0), torch.float64)


@points("soft_value", "robustness")
def test_soft_value_of_large_logits():
    """Logits (1000, 1000) and (-1000, -1000): 1000 + ln 2 and -1000 + ln 2. exp(1000) is inf and
    exp(-1000) is 0, so log(sum(exp)) would be inf and -inf."""
    close(soft_value(t(1000, 1000, -1000, -1000).view(2, 2), 1.0), [1000 + LN2, -1000 + LN2],
          mistakes={"exp overflows, and logsumexp does not": [math.inf, -math.inf]})


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
    Then 2*2 = 4, then 4 + 2*(-3) = -2 at s_end, and -2 on through the padding."""
    teacher, ref = t(9, 3, -1, 5).view(1, 4), t(0, 1, 2, -1).view(1, 4)
    mask = torch.tensor([[0, 1, 1, 0]]).bool()
    close(implicit_value(teacher, ref, mask, 2.0), [[0, 0, 4, -2, -2]], mistakes={
        "prompt and padding are counted too": [[0, 18, 22, 16, 28]],
        "the values are one state early": [[0, 4, -2, -2, 0]],
        "beta is not applied": [[0, 0, 2, -1, -1]], "beta is applied twice": [[0, 0, 8, -4, -4]],
        "each state has its own log-ratio, not the sum so far": [[0, 0, 4, -6, 0]]})


@points("implicit_value", "robustness")
def test_implicit_value_of_garbage_padding():
    """Log-ratios (NaN, 2, -3, NaN), mask (0, 1, 1, 0), beta 1: 0, 0, 2, 2 - 3 = -1, -1."""
    teacher = torch.tensor([[NAN, 3.0, -1.0, NAN]])
    ref = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    mask = torch.tensor([[0, 1, 1, 0]]).bool()
    close(implicit_value(teacher, ref, mask, 1.0), [[0, 0, 2, -1, -1]])


def implicit_value_oracle(teacher, ref, mask, beta):
    """V_phi(s_{p+k}) - V_phi(s_p) = sum over i < k of
    beta log pi_phi(a_{p+i}|s_{p+i}) / pi_phi,ref(...), literally."""
    values = torch.zeros(teacher.shape[0], teacher.shape[1] + 1, dtype=teacher.dtype)
    for b in range(teacher.shape[0]):
        p = int(mask[b].nonzero()[0])
        end = int(mask[b].nonzero()[-1]) + 1
        for state in range(p, values.shape[1]):
            for i in range(min(state, end) - p):
                values[b, state] += beta * (teacher[b, p + i] - ref[b, p + i])
    return values


def random_rows(seed, rows=6, width=9):
    """Random per-state and per-action tensors with response masks of every kind: at the left edge,
    at the right, one token, all tokens."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, width, generator=generator, dtype=torch.double)
    values = torch.randn(rows, width + 1, generator=generator, dtype=torch.double)
    mask = torch.zeros(rows, width).bool()
    spans = ((0, width), (0, 1), (width - 1, width), (3, 7), (2, 3), (4, width))
    for row, (start, end) in zip(mask, spans):
        row[start:end] = True
    return values, a, b, mask


@points("implicit_value")
def test_implicit_value_oracle():
    """Six rows against the sum of the equation, one term at a time."""
    _, teacher, ref, mask = random_rows(0)
    expected = implicit_value_oracle(teacher, ref, mask, 0.7)
    close(implicit_value(teacher, ref, mask, 0.7), expected, 1e-12)


# --- shaping ------------------------------------------------------------------------------------

ALL = torch.ones(1, 3).bool()


@points("shaping")
@pytest.mark.parametrize("gamma, terminal, psi", [
    (1.0, "zero", [3, -2, -3]),             # 5-2, 3-5, 0-3: sum -2 = -Phi(s_p)
    (1.0, "value", [3, -2, 1]),             # ..., 4-3: sum 2 = Phi(s_end) - Phi(s_p)
    (1.0, "hold", [3, -2, 0]),              # ..., 3-3: sum 1
    (0.9, "zero", [2.5, -2.3, -3]),         # .9*5-2, .9*3-5, -3: plain sum -2.8, not -2
    (0.9, "value", [2.5, -2.3, 0.6]),       # ..., .9*4-3
    (0.9, "hold", [2.5, -2.3, -0.3]),       # ..., .9*3-3
])
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
        "gamma belongs on Phi(s_end), too": [[*psi[:2], end - 3]],
        "Phi(s_end) is read one state too early": [[*psi[:2], gamma * early - 3]],
        "s_end is one state too early": [[psi[0], gamma * early - 5, 4 * gamma - early]],
        "`terminal` has no effect": [[5 * gamma - 2, 3 * gamma - 5, 4 * gamma - 3]]})


@points("shaping")
def test_shaping_default_is_the_undiscounted_value():
    """Without gamma and `terminal`: 5-2, 3-5, 4-3, as with gamma 1 and "value"."""
    close(shaping(t(2, 5, 3, 4).view(1, 4), ALL), [[3, -2, 1]])


@points("shaping")
def test_discounted_sum_telescopes():
    """gamma 0.9: 2.5 - 0.9*2.3 - 0.81*3 = 2.5 - 2.07 - 2.43 = -2.0 = -Phi(s_p), while the plain sum
    is -2.8."""
    psi = shaping(t(2, 5, 3, 4).view(1, 4), ALL, 0.9, "zero")[0]
    close((psi * t(1, 0.9, 0.81)).sum(), -2.0)
    close(psi.sum(), -2.8)


@points("shaping")
def test_gamma_below_one_is_a_length_bias():
    """Constant potential 10, gamma 0.7, terminal 0. Three tokens: -3 -3 -10 = -16. One token: -10
    (7 - 10 = -3 if the last column is taken for s_end). The longer answer is shaped down by 6
    though nothing was learned."""
    values, mask = torch.full((2, 4), 10.0), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    close(shaping(values, mask, 0.7, "zero").sum(-1), [-16, -10], mistakes={
        "s_end is taken from the last column, which may be padding": [-16, -3]})


def shaping_oracle(values, mask, gamma, terminal):
    """psi_t = gamma Phi(s_{t+1}) - Phi(s_t) with Phi(s_end) replaced, literally."""
    psi = torch.zeros(mask.shape, dtype=values.dtype)
    for b in range(mask.shape[0]):
        end = int(mask[b].nonzero()[-1]) + 1
        phi = values[b].clone()
        phi[end] = {"zero": 0.0, "hold": phi[end - 1], "value": phi[end]}[terminal]
        for step in range(mask.shape[1]):
            if mask[b, step]:
                psi[b, step] = gamma * phi[step + 1] - phi[step]
    return psi


@points("shaping")
@pytest.mark.parametrize("terminal", ["zero", "hold", "value"])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_shaping_oracle(gamma, terminal):
    """Six rows against the equation, one action at a time."""
    values, _, _, mask = random_rows(1)
    expected = shaping_oracle(values, mask, gamma, terminal)
    close(shaping(values, mask, gamma, terminal), expected, 1e-12)


@points("shaping", "robustness")
@pytest.mark.parametrize("terminal", ["zero", "hold", "value"])
def test_shaping_never_reads_padding(terminal):
    """The same rows with 0 and with 17 more columns of NaN and inf: the same psi. So too with NaN
    in the prompt before s_p."""
    values, _, _, mask = random_rows(2)
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
    (-0.5, math.log(5 / 4), 1 / 5),         # margin ln 2 + ln 4 / 2 = ln 4: sigmoid 4/5
])
def test_tvkd_by_hand(alpha, loss, weight):
    """beta 1, log-ratios ln 4 and ln 2, summed psi ln 4 and 0. Margins for alpha 0, 1/2, 1: ln 2,
    0, -ln 2. Weight: minus the gradient by log pi(y_w), sigmoid(-margin). alpha -1/2 is the plus
    reading: margin ln 2 + ln 4 / 2 = ln 4, loss -ln(4/5) = ln(5/4), weight 1/5."""
    policy = t(LN4 - 5, LN2 - 6).requires_grad_()
    ref, psi = t(-5, -6), t(LN4, 0)
    got = tvkd_loss(policy[:1], policy[1:], ref[:1], ref[1:], psi[:1], psi[1:], 1.0, alpha)
    close(got, [loss], mistakes={
        "a plus before alpha, where a minus belongs" if alpha > 0 else "the sign of alpha is lost":
            [math.log1p(math.exp(-LN2 - alpha * LN4))],
        "alpha is not applied": [LN3]})
    got.sum().backward()
    close(policy.grad, [-weight, weight])


@points("tvkd_loss", "robustness")
def test_tvkd_gives_reference_and_psi_no_gradient():
    """Both are constants of the data, even where they come with a graph."""
    policy = t(LN4 - 5, LN2 - 6).requires_grad_()
    ref, psi = t(-5, -6).requires_grad_(), t(LN4, 0).requires_grad_()
    loss = tvkd_loss(policy[:1], policy[1:], ref[:1], ref[1:], psi[:1], psi[1:], 1.0, 0.5)
    loss.sum().backward()
    no_gradient(reference=ref, psi=psi)


@points("tvkd_loss")
def test_tvkd_beta_scales_log_ratios_and_not_psi():
    """beta 1/2, alpha 1, log-ratios ln 4 and 0, psi ln 4 and ln 2: margin ln 2 - ln 2 = 0, loss
    ln 2, gradient -beta/2 = -1/4."""
    policy = t(LN4, 0).requires_grad_()
    loss = tvkd_loss(policy[:1], policy[1:], t(0), t(0), t(LN4), t(LN2), 0.5, 1.0)
    close(loss, [LN2], mistakes={
        "beta scales psi too; it belongs to the log-ratios": [math.log1p(math.exp(-LN2 / 2))],
        "beta is applied twice": [math.log1p(math.exp(LN2 / 2))]})
    loss.sum().backward()
    close(policy.grad, [-1 / 4, 1 / 4])


@points("tvkd_loss", "robustness")
def test_tvkd_extreme_margin():
    """Log-ratios 0, alpha 1, psi 900 and 0: margin -900, loss 900, gradient -1."""
    policy, zero = torch.zeros(1, requires_grad=True), torch.zeros(1)
    loss = tvkd_loss(policy, zero, zero, zero, torch.tensor([900.0]), zero, 1.0, 1.0)
    close(loss, [900], mistakes={"log(sigmoid(x)) instead of logsigmoid(x)": [math.inf]})
    loss.sum().backward()
    close(policy.grad, [-1])


@points("all together")
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_lemma_strict_shaping_is_invisible(alpha):
    """The prompt's state s_p is the same for both answers; with gamma 1 and terminal "zero" each
    psi sums to -Phi(s_p), so loss and gradient are DPO's for random values, different lengths and
    any alpha. With "value" they are not."""
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

@points("kd_loss")
def test_kd_by_hand():
    """First call, one scored state: KL((.5, .5) || (.9, .1)) = .5 ln(.5/.9) + .5 ln(.5/.1) =
    -.293893 + .804719 = .510826; the other direction is .368064, the mean over the vocabulary
    .510826/2. Second call, that state and one with student = teacher: (.510826 + 0)/2 = .255413;
    d/d logits = (student - teacher)/2 = (.2, -.2). Its third state is padding; its fourth is never
    acted in."""
    student = torch.stack([t(.9, .1).log(), t(.5, .5).log(), t(3, 0), t(0, 0)]).unsqueeze(0)
    teacher = torch.stack([t(.5, .5).log(), t(.5, .5).log() + 9, t(0, 1), t(0, 0)]).unsqueeze(0)
    student.requires_grad_()
    close(kd_loss(student[:, [0, 3]], teacher[:, [0, 3]], torch.tensor([[True]])), 0.510826,
          mistakes={"the other direction, KL(student || teacher)": 0.368064,
                    "the mean over the vocabulary too; KL sums over it": 0.510826 / 2,
                    "the logits are shifted: logits[:, t] belong to mask[:, t]": 0.0})
    loss = kd_loss(student, teacher, torch.tensor([[1, 1, 0]]).bool())
    close(loss, 0.510826 / 2, mistakes={"the sum over states, not the mean": 0.510826})
    loss.backward()
    close(student.grad[0, :2], [[.2, -.2], [0, 0]])


@points("kd_loss", "robustness")
def test_kd_gives_the_teacher_no_gradient():
    student = torch.zeros(1, 2, 2, requires_grad=True)
    teacher = torch.tensor([[[0.0, 1.0]] * 2], requires_grad=True)
    kd_loss(student, teacher, torch.tensor([[True]])).backward()
    no_gradient(teacher=teacher)


@points("kd_loss", "robustness")
def test_kd_of_garbage_padding():
    """KL((1/2, 1/2) || (.9, .1)) = .510826 in state 0; state 1 is padding and holds NaN. Gradient
    (.9 - .5, .1 - .5) in state 0 and 0 in state 1."""
    student = torch.stack([t(.9, .1).log(), t(NAN, 0), t(0, 0)]).unsqueeze(0).requires_grad_()
    teacher = torch.stack([t(.5, .5).log(), t(0, NAN), t(0, 0)]).unsqueeze(0)
    loss = kd_loss(student, teacher, torch.tensor([[True, False]]))
    close(loss, 0.510826)
    loss.backward()
    close(student.grad[0], [[.4, -.4], [0, 0], [0, 0]])


@points("kd_loss", "robustness")
def test_kd_teacher_probability_zero():
    """Teacher (1, 0), student (1/2, 1/2): KL = ln 2; 0 ln 0 counts as 0."""
    teacher = torch.tensor([0.0, -torch.inf]).expand(1, 2, 2)
    close(kd_loss(torch.zeros(1, 2, 2), teacher, torch.ones(1, 1).bool()), LN2)


@points("nll_loss")
def test_nll_by_hand():
    """Rows (-1, -2, [-9]) and ([-9], -6, [-9]): (1 + 2 + 6) / 3 = 3. The mean of row means would be
    (1.5 + 6) / 2 = 3.75; with prompt and padding (1 + 2 + 6 + 27) / 6 = 6."""
    logps = t(-1, -2, -9, -9, -6, -9).view(2, 3).requires_grad_()
    loss = nll_loss(logps, torch.tensor([[1, 1, 0], [0, 1, 0]]).bool())
    close(loss, 3.0, mistakes={
        "the mean of the rows' means; every token counts the same": 3.75,
        "prompt and padding are scored too": 6.0, "the sum, not the mean": 9.0,
        "divided by rows, not by tokens": 4.5, "divided by all columns": 1.5, "the sign": -3.0,
        "EOS is not scored": 1.0})
    loss.backward()
    close(logps.grad, [[-1 / 3, -1 / 3, 0], [0, -1 / 3, 0]])


@points("nll_loss", "robustness")
def test_nll_of_garbage_padding():
    """Rows (-1, -3, [NaN]): (1 + 3) / 2 = 2, gradient (-1/2, -1/2, 0)."""
    logps = t(-1, -3, NAN).view(1, 3).requires_grad_()
    loss = nll_loss(logps, torch.tensor([[True, True, False]]))
    close(loss, 2.0)
    loss.backward()
    close(logps.grad, [[-1 / 2, -1 / 2, 0]])


# --- masks --------------------------------------------------------------------------------------

def steps(*values):
    return t(*values).view(1, len(values))


MASKS = [
    ("sequence_logps", lambda mask: sequence_logps(steps(-1, -2, -4), mask), [-5]),     # -1 - 4
    ("implicit_value", lambda mask: implicit_value(steps(2, 5, 3), steps(1, 1, 1), mask, 1.0),
     [[0, 1, 1, 3]]),
    ("shaping", lambda mask: shaping(steps(2, 5, 3, 4), mask), [[3, 0, 1]]),            # 5-2, 4-3
    ("shaping", lambda mask: shaping(steps(2, 5, 3, 4), mask, 1.0, "zero"), [[3, 0, -3]]),    # 0-3
    ("kd_loss", lambda mask: kd_loss(torch.zeros(1, 4, 2), t(0, LN3).repeat(1, 4, 1), mask),
     .75 * LN3 - LN2),
    ("nll_loss", lambda mask: nll_loss(steps(-1, -9, -4), mask), 2.5),                  # (1 + 4)/2
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
@pytest.mark.parametrize("call, expected", [
    pytest.param(call, expected, marks=points(name, "robustness"), id=name)
    for name, call, expected in MASKS])
def test_masks_of_zeros_and_ones(call, expected, dtype):
    """The mask (1, 0, 1) as bool, int and float. Implicit value: 0, +(2-1), +0, +(3-1).
    KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2."""
    close(call(torch.tensor([[1, 0, 1]]).to(dtype)), expected)


# --- errors -------------------------------------------------------------------------------------

one, two = torch.zeros(1), torch.zeros(2)
logits5 = torch.zeros(1, 4, 5)
NOT_ALL = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()

ERRORS = [
    ("action_logps", lambda: action_logps(torch.zeros(2, 2), torch.tensor([0, 1, 1])),
     r"actions: expected shape \(2,\), got \(3,\)"),
    ("token_logps", lambda: token_logps(torch.zeros(2, 4, 5), torch.zeros(2, 3).long()),
     r"tokens: expected shape \(2, 4\), got \(2, 3\)"),
    ("sequence_logps", lambda: sequence_logps(torch.zeros(2, 3), torch.ones(2, 4)),
     r"mask: expected shape \(2, 3\), got \(2, 4\)"),
    ("dpo_loss", lambda: dpo_loss(two, one, two, two, 1.0),
     r"policy_rejected: expected shape \(2,\), got \(1,\)"),
    ("dpo_loss", lambda: dpo_loss(two, two, one, two, 1.0),
     r"ref_chosen: expected shape \(2,\), got \(1,\)"),
    ("dpo_loss", lambda: dpo_loss(two, two, two, one, 1.0),
     r"ref_rejected: expected shape \(2,\), got \(1,\)"),
    ("dpo_loss", lambda: dpo_loss(one, two, two, two, 1.0),
     r"policy_rejected: expected shape \(1,\), got \(2,\)"),
    ("tvkd_loss", lambda: tvkd_loss(two, one, two, two, two, two, 1.0, 1.0),
     r"policy_rejected: expected shape \(2,\), got \(1,\)"),
    ("tvkd_loss", lambda: tvkd_loss(two, two, two, two, one, two, 1.0, 1.0),
     r"psi_chosen: expected shape \(2,\), got \(1,\)"),
    ("tvkd_loss", lambda: tvkd_loss(two, two, two, two, two, one, 1.0, 1.0),
     r"psi_rejected: expected shape \(2,\), got \(1,\)"),
    ("implicit_value",
     lambda: implicit_value(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1, 3), 1.0),
     r"mask: expected shape \(2, 3\), got \(1, 3\)"),
    ("implicit_value",
     lambda: implicit_value(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), 1.0),
     r"teacher_ref_logps: expected shape \(2, 3\)"),
    ("implicit_value",
     lambda: implicit_value(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2, 3), 1.0),
     r"teacher_ref_logps: expected shape \(2, 4\), got \(2, 3\)"),
    ("shaping", lambda: shaping(torch.zeros(1, 3), ALL),
     r"values: expected shape \(1, 4\), got \(1, 3\)"),
    ("shaping", lambda: shaping(torch.zeros(1, 4), ALL, terminal="end"),
     'terminal: expected "zero", "hold" or "value", got \'end\''),
    ("shaping", lambda: shaping(torch.zeros(2, 4), NOT_ALL),
     "at least one response token in every row"),
    ("kd_loss", lambda: kd_loss(logits5, torch.zeros(1, 4, 6), ALL),
     r"teacher_logits: expected shape \(1, 4, 5\), got \(1, 4, 6\)"),
    ("kd_loss", lambda: kd_loss(logits5, logits5, ~ALL),
     "at least one response token, got none"),
    ("kd_loss", lambda: kd_loss(logits5, logits5, torch.ones(1, 4)),
     r"mask: expected shape \(1, 3\), got \(1, 4\)"),
    ("nll_loss", lambda: nll_loss(torch.zeros(2, 3), torch.ones(2).bool()),
     r"mask: expected shape \(2, 3\), got \(2,\)"),
    ("nll_loss", lambda: nll_loss(torch.zeros(1, 3), ~ALL),
     "at least one response token, got none"),
]


@pytest.mark.parametrize("call", [
    pytest.param(call, marks=points(name, "robustness"), id=f"{name}-{i}")
    for i, (name, call, text) in enumerate(ERRORS)])
def test_wrong_arguments_are_refused(call):
    """Shapes that do not match, an unknown `terminal` or a missing response: ValueError."""
    try:
        result = call()
    except ValueError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"expected ValueError, got {type(error).__name__}: {error}") from None
    raise AssertionError(f"expected ValueError, got the result {result}")


@pytest.mark.parametrize("call, text", [
    pytest.param(call, text, id=f"{name}-{i}") for i, (name, call, text) in enumerate(ERRORS)])
def test_errors_say_what_was_expected(call, text):
    """The texts of tvkd.py's errors. Not graded: of a solution only the type is asked."""
    with pytest.raises(ValueError, match=text):
        call()
