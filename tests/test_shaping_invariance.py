"""What potential-based shaping preserves and what it moves, on token trees small enough to solve exactly (toy_mdp.py).

The tree of the hand-worked case: actions a and b, two steps, uniform pi_ref, beta 1, reward at the end
    r(aa) = ln 3, r(ab) = 0, r(ba) = ln 5, r(bb) = ln 3
    V*(a) = ln[(3+1)/2] = ln 2,  V*(b) = ln[(5+3)/2] = ln 4,  V*("") = ln[(2+4)/2] = ln 3
    pi*: 1/3 for a at the start, 3/4 for a after a, 5/8 for a after b; responses aa : ab : ba : bb = 3 : 1 : 5 : 3 of 12
"""

import math
import random

import pytest
import torch

from conftest import close
from make_exercise import TOGETHER
from toy_mdp import Tree
from tvkd import implicit_value, shaping, soft_value, token_logps, tvkd_loss

ln = math.log
TREE = Tree("ab", 2)
REF = TREE.uniform()
REWARD = TREE.at_the_end({"aa": ln(3), "ab": 0.0, "ba": ln(5), "bb": ln(3)})
VALUE, Q, PI = TREE.solve(REF, REWARD)


def assert_responses(policy, weights):
    """Responses aa, ab, ba, bb in these proportions."""
    probs = TREE.response_probs(policy)
    for response, weight in zip(("aa", "ab", "ba", "bb"), weights):
        assert probs[response] == pytest.approx(weight / sum(weights), abs=1e-12), response


def random_potential(seed, tree=TREE, terminal=None):
    """A potential of every state; `terminal` overrides it where the response has ended."""
    draw = random.Random(seed)
    phi = {s: draw.gauss(0, 3) for s in tree.states}
    return {s: terminal if terminal is not None and s in tree.responses else value for s, value in phi.items()}


def test_hand_worked_tree():
    assert VALUE == pytest.approx({"": ln(3), "a": ln(2), "b": ln(4), "aa": 0, "ab": 0, "ba": 0, "bb": 0})
    assert PI == pytest.approx({"a": 1 / 3, "b": 2 / 3, "aa": 3 / 4, "ab": 1 / 4, "ba": 5 / 8, "bb": 3 / 8})
    assert_responses(PI, (3, 1, 5, 3))


@pytest.mark.parametrize("seed", range(5))
def test_strict_shaping_preserves_the_optimum(seed):
    """Phi(end) = 0: pi* as before, Q~ = Q* - Phi(s), V~ = V* - Phi(s), for any potential."""
    phi = random_potential(seed, terminal=0.0)
    value, q, policy = TREE.solve(REF, TREE.shaped(REWARD, phi))
    assert policy == pytest.approx(PI, abs=1e-12)
    assert_responses(policy, (3, 1, 5, 3))
    for s in TREE.states:
        assert value[s] == pytest.approx(VALUE[s] - phi[s], abs=1e-10)
    for step in TREE.steps:
        assert q[step] == pytest.approx(Q[step] - phi[step[:-1]], abs=1e-10)


def test_terminal_potential_moves_the_optimum():
    """Phi(aa) = ln 2 at the end, else 0: aa counts twice, 6 : 1 : 5 : 3 of 15."""
    phi = {**dict.fromkeys(TREE.states, 0.0), "aa": ln(2)}
    assert_responses(TREE.solve(REF, TREE.shaped(REWARD, phi))[2], (6, 1, 5, 3))


@pytest.mark.parametrize("seed", range(3))
def test_terminal_potential_by_the_predicted_amount(seed):
    """pi~ is pi* reweighted by exp(alpha Phi(end) / beta), here with three actions, three steps, beta 0.7 and alpha 0.4."""
    tree, alpha, beta = Tree("abc", 3), 0.4, 0.7
    draw = random.Random(100 + seed)
    reward = tree.at_the_end({y: draw.gauss(0, 1) for y in tree.responses})
    phi, ref = random_potential(seed, tree), tree.uniform()
    before = tree.response_probs(tree.solve(ref, reward, beta)[2])
    after = tree.response_probs(tree.solve(ref, tree.shaped(reward, phi, alpha), beta)[2])
    weights = {y: before[y] * math.exp(alpha * phi[y] / beta) for y in tree.responses}
    assert after == pytest.approx({y: w / sum(weights.values()) for y, w in weights.items()}, abs=1e-12)


def test_gamma_moves_the_optimum_unless_returns_are_discounted_too():
    """gamma 1/2, Phi(a) = ln 4, else 0, plain sum: reaching a earns ln(4)/2 and leaving it costs ln 4, so responses through a
    lose ln 2: 3/2 : 1/2 : 5 : 3 = 3 : 1 : 10 : 6 of 20. With returns discounted by the same gamma the optimum stays."""
    phi = {**dict.fromkeys(TREE.states, 0.0), "a": ln(4)}
    shaped = TREE.shaped(REWARD, phi, gamma=0.5)
    assert_responses(TREE.solve(REF, shaped)[2], (3, 1, 10, 6))
    discounted = TREE.solve(REF, REWARD, discount=0.5)[2]
    assert TREE.solve(REF, shaped, discount=0.5)[2] == pytest.approx(discounted, abs=1e-12)


# --- the same tree through tvkd.py: token 0 stands for the prompt, 1 for a, 2 for b ----------------------------------------

def as_tokens(response):
    return [0] + [1 + "ab".index(a) for a in response]


TOKENS = torch.tensor([as_tokens(y) for y in TREE.responses])                                  # (4, 3): T = 2
MASK = torch.ones(4, 2).bool()


def logits_of(policy, shift=None):
    """Logits (4, 3, V=2+1) of a tabular policy along each response; the prompt token has probability 0."""
    logits = torch.full((4, 3, 3), -torch.inf, dtype=torch.double)
    for row, y in enumerate(TREE.responses):
        for step in range(2):
            for a in "ab":
                logits[row, step, 1 + "ab".index(a)] = ln(policy[y[:step] + a]) + (shift[y[:step]] if shift else 0.0)
        logits[row, 2] = 0.0                                                                   # after the end: never read
    return logits


@pytest.mark.points(TOGETHER)
@pytest.mark.parametrize("shift", [None, {"": 3.0, "a": -2.0, "b": 5.0}])
def test_implicit_value_is_the_soft_value(shift):
    """implicit_value of pi* = V*(s) - V*(""), with r paid at the end: at a ln(2/3), at b ln(4/3), and r(y) - ln 3 at the end.
    A constant c(s) added to the teacher's logits changes nothing."""
    teacher, ref = (token_logps(logits, TOKENS) for logits in (logits_of(PI, shift), logits_of(REF)))
    values = implicit_value(teacher, ref, MASK, 1.0)
    close(values, [[0.0, VALUE[y[0]] - VALUE[""], REWARD[y] - VALUE[""]] for y in TREE.responses])
    close(values[0], [0.0, ln(2 / 3), 0.0])                                                    # aa: r - V* = ln 3 - ln 3


@pytest.mark.points("soft_value")
def test_soft_value_of_q_is_the_soft_value_and_moves_with_c():
    """Logits Q/beta with beta log pi_ref folded in: logsumexp = V*(s), ln 3 at the start and ln 2 at a. Adding c(s) moves it by
    c(s) and leaves the policy alone."""
    folded = {step: REF[step] * math.exp(Q[step]) for step in TREE.steps}                      # exp(log pi_ref + Q)
    values = soft_value(logits_of(folded), 1.0)
    close(values[0, :2], [ln(3), ln(2)])
    shift = {"": 3.0, "a": -2.0, "b": 5.0}
    moved = soft_value(logits_of(folded, shift), 1.0)
    close((moved - values)[0, :2], [3.0, -2.0])
    close(logits_of(folded, shift).softmax(-1), logits_of(folded).softmax(-1))


# --- a student trained by gradient descent on the exact expected loss ------------------------------------------------------

def train_student(phi, terminal, alpha, beta):
    """Minimise the expected TVKD loss over every ordered pair of responses, each labelled by Bradley-Terry on the true reward.
    The student is tabular: two logits at each of the three states."""
    values = torch.tensor([[phi[y[:k]] for k in range(3)] for y in TREE.responses], dtype=torch.double)
    psi = shaping(values, MASK, 1.0, terminal).sum(-1)                                          # (4,)
    rewards = torch.tensor([REWARD[y] for y in TREE.responses], dtype=torch.double)
    w, l = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    preferred = (rewards[w] - rewards[l]).sigmoid()                                             # P(w is chosen over l)
    ref = torch.full((4,), ln(1 / 4), dtype=torch.double)
    table = torch.zeros(3, 2, dtype=torch.double, requires_grad=True)                           # states "", "a", "b"
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def response_logps():
        logps = table.log_softmax(-1)
        return torch.stack([logps[0, "ab".index(y[0])] + logps[1 + "ab".index(y[0]), "ab".index(y[1])] for y in TREE.responses])

    def closure():
        optimizer.zero_grad()
        logps = response_logps()
        loss = (preferred * tvkd_loss(logps[w], logps[l], ref[w], ref[l], psi[w], psi[l], beta, alpha)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return response_logps().exp().tolist()


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_zero():
    """terminal "zero": pi* of the unshaped problem, 3 : 1 : 5 : 3, for a potential that is anything but zero."""
    close(train_student(random_potential(7), "zero", alpha=0.8, beta=1.0), [3 / 12, 1 / 12, 5 / 12, 3 / 12])


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_value():
    """terminal "value", Phi(aa) = ln 2 at the end, alpha 1, beta 1: pi_ref exp(r + Phi) = 6 : 1 : 5 : 3 of 15, as above."""
    phi = {**random_potential(8), "aa": ln(2), "ab": 0.0, "ba": 0.0, "bb": 0.0}
    close(train_student(phi, "value", alpha=1.0, beta=1.0), [6 / 15, 1 / 15, 5 / 15, 3 / 15])


@pytest.mark.points(TOGETHER)
def test_student_reaches_the_predicted_optimum_value_with_alpha_and_beta():
    """terminal "value", alpha 2, beta 1/2, Phi(aa) = ln 2, so pi_ref exp((r + 2 Phi) / (1/2)) = (3*4)^2 : 1 : 25 : 9 of 179."""
    phi = {**random_potential(9), "aa": ln(2), "ab": 0.0, "ba": 0.0, "bb": 0.0}
    close(train_student(phi, "value", alpha=2.0, beta=0.5), [144 / 179, 1 / 179, 25 / 179, 9 / 179])
