"""What potential-based shaping preserves and what it moves, on trees small enough to solve exactly.

The tree (toy_mdp.py) has actions a and b, two steps, uniform pi_ref, beta 1, a reward at the end:
    r(aa) = ln 3, r(ab) = 0, r(ba) = ln 5, r(bb) = ln 3
    V*(a) = ln[(3+1)/2] = ln 2,  V*(b) = ln[(5+3)/2] = ln 4,  V*("") = ln[(2+4)/2] = ln 3
    pi*: 1/3 for a at the start, 3/4 for a after a, 5/8 for a after b;
    so the responses aa : ab : ba : bb stand 3 : 1 : 5 : 3 of 12
"""

import functools
import math
import random

import pytest
import torch

from conftest import close
from course.assignment import TOGETHER
from toy_mdp import Tree, fit
from tvkd import implicit_value, sequence_logps, shaping, soft_value, token_logps, tvkd_loss

ln = math.log
TREE = Tree("ab", 2)
REF = TREE.uniform()
REWARD = TREE.at_the_end({"aa": ln(3), "ab": 0.0, "ba": ln(5), "bb": ln(3)})
VALUE, Q, PI = TREE.solve(REF, REWARD)


def assert_responses(policy, weights):
    """Responses aa, ab, ba, bb stand in these proportions."""
    probs = TREE.response_probs(policy)
    for response, weight in zip(("aa", "ab", "ba", "bb"), weights):
        assert probs[response] == pytest.approx(weight / sum(weights), abs=1e-7), response


def random_potential(seed, end=None):
    """A potential of every state; `end` overrides it where the response has ended."""
    draw = random.Random(seed)
    phi = {s: draw.gauss(0, 3) for s in TREE.states}
    return phi if end is None else {**phi, **dict.fromkeys(TREE.responses, end)}


def test_hand_worked_tree():
    values = {"": ln(3), "a": ln(2), "b": ln(4), "aa": 0, "ab": 0, "ba": 0, "bb": 0}
    assert VALUE == pytest.approx(values)
    assert PI == pytest.approx({"a": 1/3, "b": 2/3, "aa": 3/4, "ab": 1/4, "ba": 5/8, "bb": 3/8})
    assert_responses(PI, (3, 1, 5, 3))


@pytest.mark.parametrize("seed, end", [(0, 0.0), (1, 0.0), (2, 0.0), (3, 5.0)])
def test_strict_shaping_preserves_the_optimum(seed, end):
    """Phi(end) = 0: pi* as before, Q~ = Q* - Phi(s), V~ = V* - Phi(s), for any potential. With
    Phi(end) = 5 for every answer both gain 5, and a number that all answers gain moves no policy:
    zero is not special."""
    phi = random_potential(seed, end)
    value, q, policy = TREE.solve(REF, TREE.shaped(REWARD, phi))
    assert policy == pytest.approx(PI, abs=1e-12)
    for s in TREE.states:
        assert value[s] == pytest.approx(VALUE[s] - phi[s] + end, abs=1e-10)
    for step in TREE.steps:
        assert q[step] == pytest.approx(Q[step] - phi[step[:-1]] + end, abs=1e-10)


def test_gamma_moves_the_optimum_unless_returns_are_discounted_too():
    """gamma 1/2, Phi(a) = ln 4, else 0, plain sum: reaching a earns ln(4)/2 and leaving it costs
    ln 4, so responses through a lose ln 2: 3/2 : 1/2 : 5 : 3 = 3 : 1 : 10 : 6 of 20. If returns
    are discounted by the same gamma, the KL with them, the optimum stays; and then the log-ratios
    of an answer give its reward, r/2 - V*(""), only if the second of them is halved as well."""
    phi = {**dict.fromkeys(TREE.states, 0.0), "a": ln(4)}
    shaped = TREE.shaped(REWARD, phi, gamma=0.5)
    assert_responses(TREE.solve(REF, shaped)[2], (3, 1, 10, 6))
    value, _, discounted = TREE.solve(REF, REWARD, discount=0.5)
    assert TREE.solve(REF, shaped, discount=0.5)[2] == pytest.approx(discounted, abs=1e-12)
    for y in TREE.responses:
        first, second = ln(discounted[y[0]] / REF[y[0]]), ln(discounted[y] / REF[y])
        assert first + second / 2 == pytest.approx(REWARD[y] / 2 - value[""])


# --- the same tree through tvkd.py ----------------------------------------------------------------

TOKENS = TREE.tokens()                                  # (4, 3): T = 2
MASK = torch.ones(4, 2).bool()
SHIFT = {**dict.fromkeys(TREE.states, 0.0), "": 3.0, "a": -2.0, "b": 5.0}       # c(s)


@pytest.mark.points(TOGETHER)
@pytest.mark.parametrize("shift", [None, SHIFT])
def test_implicit_value_is_the_soft_value(shift):
    """With r paid by the last action, implicit_value of pi* is V*(s) - V*("") before the end:
    ln(2/3) at a, ln(4/3) at b. At the end V* is 0 and implicit_value r(y) - ln 3, the reward. A
    constant c(s) added to the teacher's logits changes nothing."""
    logits = TREE.logits(PI)
    if shift:
        logits = logits + TREE.along(shift).unsqueeze(-1)
    teacher, ref = token_logps(logits, TOKENS), token_logps(TREE.logits(REF), TOKENS)
    values = implicit_value(teacher, ref, MASK, 1.0)
    close(values, [[0.0, VALUE[y[0]] - VALUE[""], REWARD[y] - VALUE[""]] for y in TREE.responses])
    close(values[0], [0.0, ln(2 / 3), 0.0])             # aa: r - V* = ln 3 - ln 3


@pytest.mark.points("soft_value")
def test_soft_value_of_q_is_the_soft_value_and_moves_with_c():
    """Logits Q/beta with beta log pi_ref counted into Q: logsumexp is V* at every state before the
    end, ln 3 at the start, ln 2 at a, ln 4 at b. Adding c(s) moves it by c(s) and leaves the policy
    alone."""
    logits = TREE.logits({step: REF[step] * math.exp(Q[step]) for step in TREE.steps})
    values = soft_value(logits, 1.0)
    close(values[:, :2], [[ln(3), ln(2)]] * 2 + [[ln(3), ln(4)]] * 2)
    shifted = logits + TREE.along(SHIFT).unsqueeze(-1)
    close(soft_value(shifted, 1.0) - values, [[3, -2, 0]] * 2 + [[3, 5, 0]] * 2)
    close(shifted.softmax(-1), logits.softmax(-1))


# --- a student trained by gradient descent on the exact expected loss -----------------------------

ONE = {"aa": ln(2), "ab": 0.0, "ba": 0.0, "bb": 0.0}
U = {"aa": ln(3), "ab": ln(4), "ba": ln(5), "bb": ln(12)}           # exp(r + u): 9, 4, 25, 36
WAY = {"a": ln(4), "b": 0.0}


@pytest.mark.points(TOGETHER)
@pytest.mark.parametrize("terminal, known, gamma, alpha, beta, weights", [
    ("zero", {}, 1, 0.8, 1.0, (3, 1, 5, 3)),            # pi*, whatever the potential
    ("zero", WAY, 0.5, 1, 1.0, (3, 1, 10, 6)),          # psi through a sums to ln(4)/2 - ln 4
    ("zero", WAY, 0.5, -1, 1.0, (6, 2, 5, 3)),          # plus: -ln 2 is taken off again
    ("hold", WAY, 1, 0.5, 1.0, (6, 2, 5, 3)),           # aa and ab gain ln(4)/2
    ("value", ONE, 1, 1, 1.0, (6, 1, 5, 3)),            # aa counts twice
    ("value", ONE, 1, 2, 0.5, (144, 1, 25, 9)),         # exp((r + 2 u) / (1/2)): (3 4)^2, ...
    ("value", U, 1, 1, 1.0, (9, 4, 25, 36)),            # minus: exp(r + u)
    ("value", U, 1, 1, 2.0, (3, 2, 5, 6)),              # at beta (1 + alpha): exp((r + u) / 2)
    ("value", REWARD, 1, 2, 3.0, (3, 1, 5, 3)),         # a teacher that knows r: exp((r + 2 r) / 3)
    ("value", U, 1, -1, 1.0, (4, 1, 4, 1)),             # plus: exp(r - u)
])
def test_student_reaches_the_predicted_optimum(terminal, known, gamma, alpha, beta, weights):
    """The expected TVKD loss over every ordered pair, labelled by Bradley-Terry on r, has its
    minimum at the optimum of the shaped problem: worked by hand, and by the exact solver. The
    potential is random but for the states in `known`."""
    phi = {**random_potential(7), **known}
    psi = shaping(TREE.along(phi), MASK, gamma, terminal).sum(-1)                       # (4,)
    loss = functools.partial(expected_loss, psi, alpha, beta)
    assert_responses(fit(TREE, loss), weights)
    end = {y: {"zero": 0.0, "hold": phi[y[:-1]], "value": phi[y]}[terminal] for y in TREE.responses}
    shaped = TREE.shaped(REWARD, {**phi, **end}, alpha, gamma)
    assert_responses(TREE.solve(REF, shaped, beta)[2], weights)


def expected_loss(psi, alpha, beta, logits):
    rewards = torch.tensor([REWARD[y] for y in TREE.responses], dtype=torch.double)
    ref = torch.full((4,), ln(1 / 4), dtype=torch.double)
    w, l = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    logps = sequence_logps(token_logps(logits, TOKENS), MASK)
    losses = tvkd_loss(logps[w], logps[l], ref[w], ref[l], psi[w], psi[l], beta, alpha)
    return ((rewards[w] - rewards[l]).sigmoid() * losses).sum()                         # P(w wins)
