"""What potential-based shaping preserves and what it moves, on trees small enough to solve exactly.

The tree (toy_mdp.py) has actions a and b, two steps, uniform pi_ref, beta 1, a reward at the end:
    r(aa) = ln 3, r(ab) = 0, r(ba) = ln 5, r(bb) = ln 3
    V*(a) = ln[(3+1)/2] = ln 2,  V*(b) = ln[(5+3)/2] = ln 4,  V*("") = ln[(2+4)/2] = ln 3
    pi*: 1/3 for a at the start, 3/4 for a after a, 5/8 for a after b;
    so the responses aa : ab : ba : bb stand 3 : 1 : 5 : 3 of 12
"""

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


def random_potential(seed, tree=TREE, terminal=None):
    """A potential of every state; `terminal` overrides it where the response has ended."""
    draw = random.Random(seed)
    phi = {s: draw.gauss(0, 3) for s in tree.states}
    return {s: terminal if terminal is not None and s in tree.responses else value
            for s, value in phi.items()}


def test_hand_worked_tree():
    values = {"": ln(3), "a": ln(2), "b": ln(4), "aa": 0, "ab": 0, "ba": 0, "bb": 0}
    assert VALUE == pytest.approx(values)
    assert PI == pytest.approx({"a": 1/3, "b": 2/3, "aa": 3/4, "ab": 1/4, "ba": 5/8, "bb": 3/8})
    assert_responses(PI, (3, 1, 5, 3))


@pytest.mark.parametrize("seed", range(5))
def test_strict_shaping_preserves_the_optimum(seed):
    """Phi(end) = 0: pi* as before, Q~ = Q* - Phi(s), V~ = V* - Phi(s), for any potential."""
    phi = random_potential(seed, terminal=0.0)
    value, q, policy = TREE.solve(REF, TREE.shaped(REWARD, phi))
    assert policy == pytest.approx(PI, abs=1e-12)
    for s in TREE.states:
        assert value[s] == pytest.approx(VALUE[s] - phi[s], abs=1e-10)
    for step in TREE.steps:
        assert q[step] == pytest.approx(Q[step] - phi[step[:-1]], abs=1e-10)


def test_a_terminal_potential_of_the_prompt_alone_preserves_the_optimum():
    """Phi(end) = 5 for every answer: each return gains 5 - Phi(s_p), and a number that all answers
    gain moves no policy. Zero is not special."""
    policy = TREE.solve(REF, TREE.shaped(REWARD, random_potential(0, terminal=5.0)))[2]
    assert policy == pytest.approx(PI, abs=1e-12)


def test_terminal_potential_moves_the_optimum():
    """Phi(aa) = ln 2 at the end, else 0: aa counts twice, 6 : 1 : 5 : 3 of 15."""
    phi = {**dict.fromkeys(TREE.states, 0.0), "aa": ln(2)}
    assert_responses(TREE.solve(REF, TREE.shaped(REWARD, phi))[2], (6, 1, 5, 3))


@pytest.mark.parametrize("seed", range(3))
def test_terminal_potential_by_the_predicted_amount(seed):
    """pi~ is pi* reweighted by exp(alpha Phi(end) / beta): three actions, three steps, beta 0.7,
    alpha 0.4."""
    tree, alpha, beta = Tree("abc", 3), 0.4, 0.7
    draw = random.Random(100 + seed)
    reward = tree.at_the_end({y: draw.gauss(0, 1) for y in tree.responses})
    phi, ref = random_potential(seed, tree), tree.uniform()
    before = tree.response_probs(tree.solve(ref, reward, beta)[2])
    shaped = tree.shaped(reward, phi, alpha)
    after = tree.response_probs(tree.solve(ref, shaped, beta)[2])
    weights = {y: before[y] * math.exp(alpha * phi[y] / beta) for y in tree.responses}
    expected = {y: weight / sum(weights.values()) for y, weight in weights.items()}
    assert after == pytest.approx(expected, abs=1e-12)


def test_gamma_moves_the_optimum_unless_returns_are_discounted_too():
    """gamma 1/2, Phi(a) = ln 4, else 0, plain sum: reaching a earns ln(4)/2 and leaving it costs
    ln 4, so responses through a lose ln 2: 3/2 : 1/2 : 5 : 3 = 3 : 1 : 10 : 6 of 20. If returns
    are discounted by the same gamma, the optimum stays."""
    phi = {**dict.fromkeys(TREE.states, 0.0), "a": ln(4)}
    shaped = TREE.shaped(REWARD, phi, gamma=0.5)
    assert_responses(TREE.solve(REF, shaped)[2], (3, 1, 10, 6))
    discounted = TREE.solve(REF, REWARD, discount=0.5)[2]
    assert TREE.solve(REF, shaped, discount=0.5)[2] == pytest.approx(discounted, abs=1e-12)


# --- the same tree through tvkd.py ----------------------------------------------------------------

TOKENS = TREE.tokens()                                  # (4, 3): T = 2
MASK = torch.ones(4, 2).bool()
SHIFT = {**dict.fromkeys(TREE.states, 0.0), "": 3.0, "a": -2.0, "b": 5.0}       # c(s)


@pytest.mark.points(TOGETHER)
@pytest.mark.parametrize("shift", [None, SHIFT])
def test_implicit_value_is_the_soft_value(shift):
    """With r paid at the end, implicit_value of pi* is V*(s) - V*(""): ln(2/3) at a, ln(4/3) at b,
    r(y) - ln 3 at the end. A constant c(s) added to the teacher's logits changes nothing."""
    logits = TREE.logits(PI)
    if shift:
        logits = logits + TREE.along(shift).unsqueeze(-1)
    teacher, ref = token_logps(logits, TOKENS), token_logps(TREE.logits(REF), TOKENS)
    values = implicit_value(teacher, ref, MASK, 1.0)
    close(values, [[0.0, VALUE[y[0]] - VALUE[""], REWARD[y] - VALUE[""]] for y in TREE.responses])
    close(values[0], [0.0, ln(2 / 3), 0.0])             # aa: r - V* = ln 3 - ln 3


@pytest.mark.points("soft_value")
def test_soft_value_of_q_is_the_soft_value_and_moves_with_c():
    """Logits Q/beta with beta log pi_ref counted into Q: logsumexp is V*, ln 3 at the start and
    ln 2 at a. Adding c(s) moves it by c(s) and leaves the policy alone."""
    logits = TREE.logits({step: REF[step] * math.exp(Q[step]) for step in TREE.steps})
    values = soft_value(logits, 1.0)
    close(values[0, :2], [ln(3), ln(2)])
    shifted = logits + TREE.along(SHIFT).unsqueeze(-1)
    close((soft_value(shifted, 1.0) - values)[0, :2], [3.0, -2.0])
    close(shifted.softmax(-1), logits.softmax(-1))


# --- a student trained by gradient descent on the exact expected loss -----------------------------

def train_student(phi, terminal, alpha, beta):
    """Minimise the expected TVKD loss over every ordered pair of responses, each labelled by
    Bradley-Terry on the true reward."""
    psi = shaping(TREE.along(phi), MASK, 1.0, terminal).sum(-1)                         # (4,)
    rewards = torch.tensor([REWARD[y] for y in TREE.responses], dtype=torch.double)
    ref = torch.full((4,), ln(1 / 4), dtype=torch.double)
    w, l = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    preferred = (rewards[w] - rewards[l]).sigmoid()                                     # P(w wins)

    def expected_loss(logits):
        logps = sequence_logps(token_logps(logits, TOKENS), MASK)
        losses = tvkd_loss(logps[w], logps[l], ref[w], ref[l], psi[w], psi[l], beta, alpha)
        return (preferred * losses).sum()

    return fit(TREE, expected_loss)


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_zero():
    """terminal "zero": pi* of the unshaped problem, 3 : 1 : 5 : 3, for a potential that is anything
    but zero."""
    student = train_student(random_potential(7), "zero", alpha=0.8, beta=1.0)
    assert_responses(student, (3, 1, 5, 3))


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_hold():
    """terminal "hold", Phi(a) = ln 2 and Phi(b) = 0 before the last action: aa and ab count twice,
    6 : 2 : 5 : 3 of 16, whatever the potential says at the end."""
    phi = {**random_potential(6), "a": ln(2), "b": 0.0}
    assert_responses(train_student(phi, "hold", alpha=1.0, beta=1.0), (6, 2, 5, 3))


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_value():
    """terminal "value", Phi(aa) = ln 2 at the end, else 0, alpha 1, beta 1: pi_ref exp(r + Phi) =
    6 : 1 : 5 : 3 of 15, as above."""
    phi = {**random_potential(8), "aa": ln(2), "ab": 0.0, "ba": 0.0, "bb": 0.0}
    assert_responses(train_student(phi, "value", alpha=1.0, beta=1.0), (6, 1, 5, 3))


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_value_with_alpha_and_beta():
    """terminal "value", Phi(aa) = ln 2 at the end, alpha 2, beta 1/2: pi_ref exp((r + 2 Phi)/(1/2))
    = (3*4)^2 : 1 : 25 : 9 of 179."""
    phi = {**random_potential(9), "aa": ln(2), "ab": 0.0, "ba": 0.0, "bb": 0.0}
    assert_responses(train_student(phi, "value", alpha=2.0, beta=0.5), (144, 1, 25, 9))
