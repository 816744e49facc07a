"""docs/theory.md: every statement that names a test, and where each method's optimum lies.

Most tests share one tree of two steps, with uniform pi_ref and beta 1 unless they say otherwise,
and one teacher. The weights are chosen so that sums, means and differences of r and u stay clean:

    responses              aa  ab  ba  bb
    exp(r), the labels'     3   1   5   3      exp(r + u)       9   4   25  36     squares
    exp(u), the teacher's   3   4   5  12      exp(r - u)       1  1/4  1   1/4

u is the teacher's value of the finished answer. Every label is drawn by Bradley-Terry on r, all
pairs are compared, and a tabular student (toy_mdp.fit) minimises the exact expected loss: that is
what "unlimited data" means in the docs.
"""

import ast
import functools
import math
import re
from pathlib import Path

import pytest
import torch

from conftest import close
from toy_mdp import Tree, fit
from tvkd import (dpo_loss, implicit_value, kd_loss, sequence_logps, shaping, soft_value,
                  token_logps, tvkd_loss)

ROOT = Path(__file__).resolve().parent.parent
ln = math.log


def logs(*weights):
    return torch.tensor(weights, dtype=torch.double).log()


TREE, TWO, THREE = Tree("ab", 2), Tree("ab", 1), Tree("abc", 1)
R, U = logs(3, 1, 5, 3), logs(3, 4, 5, 12)


def response_logps(tree, logits):
    mask = torch.ones(len(tree.responses), tree.depth).bool()
    return sequence_logps(token_logps(logits, tree.tokens()), mask)


def pair_indices(tree):
    """Every ordered pair of responses: w, l."""
    n = len(tree.responses)
    return torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j]).T


def differences(scores, tree=TREE):
    w, l = pair_indices(tree)
    return scores[w] - scores[l]


def expected_dpo(tree, preferred, logits, beta=1.0):
    """The DPO loss if w wins against l with probability `preferred`, one number per ordered
    pair."""
    (w, l), logps = pair_indices(tree), response_logps(tree, logits)
    ref = torch.full_like(logps, -ln(len(logps)))
    return (preferred * dpo_loss(logps[w], logps[l], ref[w], ref[l], beta)).sum()


def expected_tvkd(tree, preferred, psi, alpha, beta, logits):
    """The same for TVKD; psi is summed over each response."""
    (w, l), logps = pair_indices(tree), response_logps(tree, logits)
    ref = torch.full_like(logps, -ln(len(logps)))
    losses = tvkd_loss(logps[w], logps[l], ref[w], ref[l], psi[w], psi[l], beta, alpha)
    return (preferred * losses).sum()


def optimum_of(tree, loss, *args, **options):
    """log pi of the responses where the loss is smallest."""
    probs = tree.response_probs(fit(tree, functools.partial(loss, tree, *args, **options)))
    return torch.tensor([probs[y] for y in tree.responses], dtype=torch.double).log()


def assert_proportional(logps, weights):
    close(logps.exp(), [weight / sum(weights) for weight in weights], 1e-7)


def solved(reward, beta=1.0):
    """log pi* of the responses for a reward paid at the end, by the exact solver."""
    at_the_end = TREE.at_the_end(dict(zip(TREE.responses, reward.tolist())))
    probs = TREE.response_probs(TREE.solve(TREE.uniform(), at_the_end, beta)[2])
    return logs(*probs.values())


def summed_psi(end, gamma=1.0, terminal="value", first=(1.5, -2.5)):
    """Summed psi of aa, ab, ba, bb: 0.5 at the prompt, `first` after the first action, then
    `end`."""
    before = torch.tensor([[0.5, first[0]]] * 2 + [[0.5, first[1]]] * 2, dtype=torch.double)
    values = torch.cat([before, end.unsqueeze(-1)], -1)
    return shaping(values, torch.ones(4, 2).bool(), gamma, terminal).sum(-1)


# --- the Bellman equation and the two values ------------------------------------------------------

def test_log_ratio_is_reward_minus_the_value_of_the_prompt():
    """beta log pi*/pi_ref = r + V*(s') - V*(s) at every step, so that a response sums to
    sum r - V*(s_p): rewards on the way too, beta 1/2, pi_ref(a) = 1/4 everywhere."""
    ref = {step: 1 / 4 if step[-1] == "a" else 3 / 4 for step in TREE.steps}
    reward = {"a": 1.0, "b": -2.0, "aa": 0.5, "ab": 3.0, "ba": -1.0, "bb": 0.0}
    value, _, policy = TREE.solve(ref, reward, beta=0.5)
    for step in TREE.steps:
        ratio = 0.5 * ln(policy[step] / ref[step])
        assert ratio == pytest.approx(reward[step] + value[step] - value[step[:-1]])
    for y in TREE.responses:
        ratio = 0.5 * ln(TREE.response_probs(policy)[y] / TREE.response_probs(ref)[y])
        assert ratio == pytest.approx(reward[y[0]] + reward[y] - value[""])


def test_implicit_value_of_any_teacher_is_the_value_of_its_own_implicit_reward():
    """A teacher and a reference with nothing in common and no training. Its implicit reward
    beta log pi/pi_ref of a whole response, paid at the end, has V*("") = 0, V* = implicit_value at
    every state, and pi* = the teacher. At a: ln[(2/3) / (1/4)] = ln(8/3) with beta 1."""
    teacher = {"a": 2/3, "b": 1/3, "aa": 1/5, "ab": 4/5, "ba": 1/2, "bb": 1/2}
    ref = {"a": 1/4, "b": 3/4, "aa": 1/3, "ab": 2/3, "ba": 1/8, "bb": 7/8}
    teacher_logps, ref_logps = (token_logps(TREE.logits(x), TREE.tokens()) for x in (teacher, ref))
    values = implicit_value(teacher_logps, ref_logps, torch.ones(4, 2).bool(), 1.0)
    close(values[0, 1], ln(8 / 3))
    own_reward = TREE.at_the_end(dict(zip(TREE.responses, values[:, 2].tolist())))
    solution, _, policy = TREE.solve(ref, own_reward)
    assert solution[""] == pytest.approx(0)
    assert policy == pytest.approx(teacher)
    close(values[:, 1], [solution[y[0]] for y in TREE.responses])


@pytest.mark.parametrize("beta, weights", [(1, (3, 1, 5, 3)), (0.5, (9, 1, 25, 9))])
def test_dpo_ends_at_the_exact_optimum(beta, weights):
    """pi_ref exp(r / beta): the weights of r, squared for beta 1/2."""
    assert_proportional(solved(R, beta), weights)
    best = optimum_of(TREE, expected_dpo, differences(R).sigmoid(), beta=beta)
    assert_proportional(best, weights)


# --- gamma below 1 --------------------------------------------------------------------------------

def test_plain_sum_below_one_keeps_the_potentials_on_the_way():
    """Potentials (2, 5, 3), value 4 at the end, gamma 0.9: gamma Phi(end) - Phi(s_p) - 0.1 (5 + 3)
    is 3.6 - 2 - 0.8 = 0.8 with "value" and 0 - 2 - 0.8 = -2.8 with "zero"."""
    values, mask = torch.tensor([[2.0, 5, 3, 4]]).double(), torch.ones(1, 3).bool()
    close(shaping(values, mask, 0.9, "value").sum(), 0.8)
    close(shaping(values, mask, 0.9, "zero").sum(), -2.8)


def test_gamma_is_a_length_bias_for_potentials_of_one_sign_only():
    """gamma 1/2, "zero". Phi = 1 throughout: three tokens -1 - (1+1)/2 = -2, one token -1, so
    length costs. Phi = (1, 1, -1): -1 - (1-1)/2 = -1, as much as one token. Phi = -1 throughout:
    length pays, 1 + (1+1)/2 = 2 against 1."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    for three, sums in (((1, 1, 1), (-2, -1)), ((1, 1, -1), (-1, -1)), ((-1, -1, -1), (2, 1))):
        values = torch.tensor([[*three, 0], [three[0], 0, 0, 0]]).double()
        close(shaping(values, mask, 0.5, "zero").sum(-1), list(sums))


@pytest.mark.parametrize("alpha, weights", [(1, (3, 1, 10, 6)), (-1, (6, 2, 5, 3))])
def test_gamma_below_one_moves_the_optimum_even_with_zero(alpha, weights):
    """gamma 1/2, terminal "zero", Phi(a) = ln 4, Phi(b) = 0: sum psi is -ln(4)/2 = -ln 2 through a,
    up to the prompt's. Minus halves aa and ab, 3/2 : 1/2 : 5 : 3; plus doubles them."""
    psi = summed_psi(U, 0.5, "zero", first=(ln(4), 0.0))
    preferred = differences(R).sigmoid()
    assert_proportional(optimum_of(TREE, expected_tvkd, preferred, psi, alpha, 1.0), weights)


# --- the two readings of the sign -----------------------------------------------------------------

@pytest.mark.parametrize("alpha, beta, weights", [
    (0, 1, (3, 1, 5, 3)),               # dpo: exp(r)
    (1, 1, (9, 4, 25, 36)),             # minus: exp(r + u)
    (1, 2, (3, 2, 5, 6)),               # minus at beta (1 + alpha): exp((r + u) / 2), the mean
    (2, 1, (27, 16, 125, 432)),         # minus: exp(r + 2 u)
    (-1, 1, (4, 1, 4, 1)),              # plus: exp(r - u)
])
def test_where_the_optimum_of_tvkd_lies(alpha, beta, weights):
    """pi_ref exp((r + alpha u) / beta), by the exact solver and by a student trained on
    tvkd_loss."""
    assert_proportional(solved(R + alpha * U, beta), weights)
    preferred, psi = differences(R).sigmoid(), summed_psi(U)
    assert_proportional(optimum_of(TREE, expected_tvkd, preferred, psi, alpha, beta), weights)


def test_a_teacher_that_knows_r_gives_dpos_optimum_at_beta_times_one_plus_alpha():
    """u = r, alpha 2, beta 3: exp((r + 2 r) / 3) = exp(r), 3 : 1 : 5 : 3."""
    preferred, psi = differences(R).sigmoid(), summed_psi(R)
    assert_proportional(optimum_of(TREE, expected_tvkd, preferred, psi, 2, 3), (3, 1, 5, 3))


def test_plus_is_right_for_student_and_teacher_together():
    """The plus student has 4 : 1 : 4 : 1. Reweighted by the teacher's exp(u) = 3 : 4 : 5 : 12 it is
    12 : 4 : 20 : 12, and that is 3 : 1 : 5 : 3, what the labels ask for."""
    student = optimum_of(TREE, expected_tvkd, differences(R).sigmoid(), summed_psi(U), -1, 1.0)
    assert_proportional((student + U).log_softmax(-1), (3, 1, 5, 3))


def test_tpkd_ref_is_the_plus_reading():
    """The reward written down in the released branch `tpkd_ref`: beta log-ratio - (1 - gamma) times
    the sum of V(s_{t+1}), V = T logsumexp(log p / T), 0 after the end, gamma 0.7. Here T = 2, so
    V = 2 ln sum sqrt(p). Chosen, three tokens: p = (1/4, 1/4, 1/4, 1/4), V = 2 ln 2, then
    (4/9, 4/9, 1/9, 0), V = 2 ln(5/3). Rejected, two tokens: V = 2 ln 2. The values' part of the
    margin is -0.6 ln 2 - 0.6 ln(5/3) + 0.6 ln 2 = -0.6 ln(5/3). With log-ratios 0.6 ln(5/3) + ln 2
    and 0 the margin is ln 2, the loss ln(3/2): alpha -1. With alpha +1 the margin is
    ln 2 + 1.2 ln(5/3)."""
    prompt, even, skewed = (1, 0, 0, 0), (1/4, 1/4, 1/4, 1/4), (4/9, 4/9, 1/9, 0)
    probs = torch.tensor([[prompt, even, skewed, prompt], [prompt, even, prompt, prompt]])
    values = soft_value(probs.double().log() / 2, 2.0)
    close(values, [[0, 2 * ln(2), 2 * ln(5 / 3), 0], [0, 2 * ln(2), 0, 0]])
    psi = shaping(values, torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), 0.7, "zero").sum(-1)
    policy, ref = torch.tensor([0.6 * ln(5 / 3) + ln(2), 0.0]).double(), torch.zeros(1).double()
    for alpha, loss in ((-1, ln(3 / 2)), (1, ln(1 + 1 / (2 * (5 / 3) ** 1.2)))):
        close(tvkd_loss(policy[:1], policy[1:], ref, ref, psi[:1], psi[1:], 1.0, alpha), [loss])


# --- a margin, and a weight on pairs --------------------------------------------------------------

@pytest.mark.parametrize("alpha", [1, -1])
def test_the_weight_exceeds_dpos_exactly_where_the_teacher_agrees(alpha):
    """At policy = reference DPO weighs each pair 1/2. dpsi = ln 3, 0, -ln 3 give sigmoid(alpha
    dpsi) = 3/4, 1/2, 1/4 for alpha 1 and the reverse for alpha -1."""
    policy = torch.zeros(3, dtype=torch.double, requires_grad=True)
    zero, dpsi = torch.zeros(3).double(), torch.tensor([ln(3), 0, -ln(3)]).double()
    tvkd_loss(policy, zero, zero, zero, dpsi, zero, 1.0, alpha).sum().backward()
    close(-policy.grad, [3 / 4, 1 / 2, 1 / 4][::alpha])


def test_the_expected_push_is_the_label_minus_the_students_belief():
    """Averaged over a label that holds with probability p, the push on log pi(y_w) is
    beta (p - sigmoid(beta dlogratio - alpha dpsi)). p = 1/2, equal log-ratios, dpsi = ln 3, alpha
    1, beta 2: sigmoid(-ln 3) = 1/4 and 2 (1/2 - 1/4) = 1/2, towards the answer that the teacher
    values although the labels see no difference. It is 0 where 2 dlogratio = ln 3."""
    zero, psi = torch.zeros(1).double(), torch.tensor([ln(3)]).double()
    for start, push in ((0.0, 1 / 2), (ln(3) / 2, 0.0)):
        w = torch.tensor([start], dtype=torch.double, requires_grad=True)
        loss = (tvkd_loss(w, zero, zero, zero, psi, zero, 2.0, 1.0)
                + tvkd_loss(zero, w, zero, zero, zero, psi, 2.0, 1.0)) / 2
        loss.sum().backward()
        close(-w.grad, [push])


# --- the teacher's opinion as a label -------------------------------------------------------------

def margin_between_two(preferred, u=0.0):
    """beta 1. The log-ratio margin of a over b that a student learns if these are all answers to
    the prompt, a wins with probability `preferred`, and the teacher gives a u more (alpha 1)."""
    both, psi = torch.tensor([preferred, 1 - preferred]), torch.tensor([u, 0.0]).double()
    best = optimum_of(TWO, expected_tvkd, both, psi, 1.0, 1.0)
    return best[0] - best[1]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_soft_labels_end_at_the_teacher_whatever_the_labels_say():
    """Labels sigmoid(du): exp(u) = 3 : 4 : 5 : 12 of 24. r is nowhere in it."""
    best = optimum_of(TREE, expected_dpo, differences(U).sigmoid())
    assert_proportional(best, (3, 4, 5, 12))
    close(best, solved(U))


def test_hard_labels_have_no_optimum_and_drift_to_the_teachers_favourite():
    """u ranks aa, ab, ba, bb; the label is the answer with more u. Policies 1 : z : z^2 : z^3 rank
    alike; three pairs have margin ln z, two 2 ln z, one 3 ln z. With z = 2 the loss is
    3 ln(3/2) + 2 ln(5/4) + ln(9/8) = 1.780465 and it falls to 0 as z grows: no policy is best. The
    share of bb, z^3 of the sum, goes to 1: 8/15, 512/585, 0.99 for z = 2, 8, 100."""
    preferred = (differences(U) > 0).double()
    losses = []
    for z, share in ((2, 8 / 15), (8, 512 / 585), (100, 1e6 / 1010101)):
        logps = logs(1, z, z**2, z**3).log_softmax(-1)
        close(logps[3].exp(), share)
        w, l = pair_indices(TREE)
        zero = torch.zeros(len(w)).double()
        losses.append((preferred * dpo_loss(logps[w], logps[l], zero, zero, 1.0)).sum().item())
    close(losses[0], 1.780465)
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.04
    assert optimum_of(TREE, expected_dpo, preferred)[3].exp() > 0.999


def test_mean_of_label_and_soft_label_is_bounded_where_the_teacher_is_silent():
    """Two answers: the margin is logit of (sigmoid(dr) + sigmoid(du)) / 2. dr = ln 3, du = -ln 3:
    (3/4 + 1/4)/2 = 1/2, margin 0. Silent teacher, du = 0: dr = ln 3 gives (3/4 + 1/2)/2 = 5/8,
    ln(5/3); dr = ln 9 gives 7/10, ln(7/3); dr = 50 nearly 3/4, nearly ln 3."""
    for dr, du, margin in ((ln(3), -ln(3), 0.0), (ln(3), 0, ln(5 / 3)), (ln(9), 0, ln(7 / 3))):
        close(margin_between_two((sigmoid(dr) + sigmoid(du)) / 2), margin)
    assert ln(3) - 1e-6 < margin_between_two((sigmoid(50) + 1 / 2) / 2) < ln(3) + 1e-9


def test_label_and_teacher_as_evidence_is_bounded_where_the_teacher_is_silent():
    """Two answers, the label counts as c = ln 3 nats of evidence: E sigmoid(du +- c) over the
    label. dr = ln 3, du = 0: 3/4 3/4 + 1/4 1/4 = 5/8, ln(5/3). dr = 50: nearly 3/4, nearly c. du =
    ln 9: 3/4 sigmoid(ln 27) + 1/4 sigmoid(ln 3) = 3/4 27/28 + 1/4 3/4 = 102/112, ln(102/10) > c."""
    c = ln(3)
    for dr, du, margin in ((ln(3), 0, ln(5 / 3)), (50, 0, c), (ln(3), ln(9), ln(102 / 10))):
        preferred = sigmoid(dr) * sigmoid(du + c) + sigmoid(-dr) * sigmoid(du - c)
        close(margin_between_two(preferred), margin)


def test_the_bounds_hold_for_a_pair_and_not_for_three_answers_to_one_prompt():
    """A silent teacher and three answers with r = 2 ln 9, ln 9, 0. The mean's targets are 7/10,
    7/10 and (81/82 + 1/2)/2 = 61/82 < 3/4. No margins m, m and 2m meet all three. The best answer's
    condition is sigmoid(m) + sigmoid(2m) = 7/10 + 61/82 = 1.4439; with 2m <= ln 3 it could be at
    most 0.6340 + 0.75. So 2m is above ln 3: 1.3038, with m = 0.6519."""
    r = logs(81, 9, 1)
    preferred = (differences(r, THREE).sigmoid() + 1 / 2) / 2
    best = optimum_of(THREE, expected_dpo, preferred)
    m = (best[0] - best[1]).item()
    close(best[1] - best[2], m)
    close(sigmoid(m) + sigmoid(2 * m), 7 / 10 + 61 / 82)
    close(2 * m, 1.303849, 1e-4)
    assert 2 * m > ln(3) > 1.0986


@pytest.mark.parametrize("kind", ["mean", "evidence"])
def test_mean_and_evidence_fit_targets_that_need_not_be_differences(kind):
    """With more answers the student is the fit: for every answer, the sums of sigmoid(margin) and
    of its targets agree. r still counts: the optimum is not the soft labels' 3 : 4 : 5 : 12."""
    dr, du, c = differences(R), differences(U), ln(3)
    preferred = {"mean": (dr.sigmoid() + du.sigmoid()) / 2,
                 "evidence": dr.sigmoid() * (du + c).sigmoid()
                             + (-dr).sigmoid() * (du - c).sigmoid()}[kind]
    best = optimum_of(TREE, expected_dpo, preferred)
    gap = (differences(best).sigmoid() - preferred).view(4, 3)
    close(gap.sum(-1), torch.zeros(4), 1e-7)
    assert gap.abs().max() > 1e-3
    assert (best - solved(U)).abs().max() > 0.1


# --- KL distillation ------------------------------------------------------------------------------

TEACHER_REF = {"a": 1/2, "b": 1/2, "aa": 2/3, "ab": 1/3, "ba": 3/5, "bb": 2/5}
TEACHER = TREE.solve(TEACHER_REF, TREE.at_the_end(dict(zip(TREE.responses, U.tolist()))))[2]


def test_kd_ends_at_the_teachers_policy_on_the_states_visited():
    """The teacher's reference has 1/3 : 1/6 : 3/10 : 1/5; times exp(u) = 3 : 4 : 5 : 12 that is
    30 : 20 : 45 : 72 of 167, and KD copies it, reference and all. Trained on aa and ab alone, it
    never visits the state b and leaves 1/2 there."""
    teacher, mask = TREE.logits(TEACHER), torch.ones(4, 2).bool()
    policy = fit(TREE, lambda logits: kd_loss(logits, teacher, mask))
    assert_proportional(logs(*TREE.response_probs(policy).values()), (30, 20, 45, 72))
    policy = fit(TREE, lambda logits: kd_loss(logits[:2], teacher[:2], mask[:2]))
    expected = {**TEACHER, "ba": 1 / 2, "bb": 1 / 2}
    assert policy == pytest.approx(expected, abs=1e-6)


def test_kd_plus_dpo_lies_between():
    """The best policy for the sum of the two losses is worse than KD's at KD's loss, worse than
    DPO's at DPO's, and better than the other one at both."""
    teacher, mask = TREE.logits(TEACHER), torch.ones(4, 2).bool()
    losses = {"kd": lambda logits: kd_loss(logits, teacher, mask),
              "dpo": functools.partial(expected_dpo, TREE, differences(R).sigmoid())}
    policies = {name: fit(TREE, loss) for name, loss in losses.items()}
    policies["both"] = fit(TREE, lambda logits: losses["kd"](logits) + losses["dpo"](logits))
    for name, other in (("kd", "dpo"), ("dpo", "kd")):
        at = {p: losses[name](TREE.logits(policies[p]).clamp_min(-1e4)).item() for p in policies}
        assert at[name] + 1e-3 < at["both"] < at[other] - 1e-3


# --- labels turned round --------------------------------------------------------------------------

def test_label_noise_shrinks_the_labels_part_of_the_margin_only():
    """dr = ln 3, one label in four turned round: (1 - 1/2) 3/4 + 1/4 = 5/8, so DPO's margin falls
    from ln 3 to ln(5/3). TVKD with du = ln 4 has ln(5/3) + ln 4 = ln(20/3): the teacher's part is
    whole."""
    noisy = (1 - 2 / 4) * sigmoid(ln(3)) + 1 / 4
    close(margin_between_two(sigmoid(ln(3))), ln(3))
    close(margin_between_two(noisy), ln(5 / 3))
    close(margin_between_two(noisy, u=ln(4)), ln(20 / 3))


def test_a_wrong_label_starts_below_weight_one_half():
    """The teacher gives the better answer ln 4 more. Right label: weight sigmoid(ln 4) = 4/5. Wrong
    label: dpsi = -ln 4, weight 1/5. DPO starts both at 1/2."""
    policy = torch.zeros(2, dtype=torch.double, requires_grad=True)
    zero, dpsi = torch.zeros(2).double(), torch.tensor([ln(4), -ln(4)]).double()
    tvkd_loss(policy, zero, zero, zero, dpsi, zero, 1.0, 1.0).sum().backward()
    close(-policy.grad, [4 / 5, 1 / 5])


# --- the document ---------------------------------------------------------------------------------

THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def definitions(path):
    """{top-level name: names used inside it}, methods as Class.name."""
    used = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    used[f"{node.name}.{method.name}"] = names_in(method)
        elif isinstance(node, ast.FunctionDef):
            used[node.name] = names_in(node)
        elif isinstance(node, ast.Assign):
            for name in names_in(node.targets[0]):
                used[name] = names_in(node.value)
    return used


def names_in(tree):
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def reaches(used, name, function):
    """Does the test use the function, itself or through names of its own file?"""
    seen, waiting = set(), [name]
    while waiting:
        for other in used[waiting.pop()] - seen:
            seen.add(other)
            if other in used:
                waiting.append(other)
    return function.split(".")[-1] in seen


def test_every_statement_names_a_function_and_a_test_that_calls_it():
    """Statements are numbered from 1 on. The line below each says whose it is and names functions
    of tvkd.py or toy_mdp.py and tests; every test named uses one of the functions named."""
    functions = {**definitions(ROOT / "tvkd.py"), **definitions(ROOT / "tests" / "toy_mdp.py")}
    tests = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        used = definitions(path)
        tests.update({name: used for name in used if name.startswith("test_")})
    numbers = re.findall(r"^\*\*(\d+)\. ", THEORY, re.MULTILINE)
    lines = re.findall(r"^\((paper|standard|ours)[;:,](.*)\)$", THEORY, re.MULTILINE)
    assert numbers == [str(n + 1) for n in range(len(lines))] and len(lines) > 20
    for number, (_, line) in zip(numbers, lines):
        names = re.findall(r"`([\w.]+)`", line)
        called = [name for name in names if not name.startswith("test_")]
        named = [name for name in names if name.startswith("test_")]
        assert called and named, f"statement {number}: expected a function and a test, got {names}"
        for name in called:
            assert name in functions, f"statement {number}: no function {name}"
        for name in named:
            assert name in tests, f"statement {number}: no test {name}"
            assert any(reaches(tests[name], name, function) for function in called), \
                f"statement {number}: {name} calls none of {called}"


def test_every_test_the_page_names_exists():
    """In the text and the tables too."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    for page in ("theory.md", "released-code.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", text):
            assert any(f"def {name}(" in source for source in sources), f"{page}: {name}"


def test_math_is_not_eaten_by_markdown():
    """GitHub runs Markdown over the text before MathJax sees it: a backslash before punctuation is
    taken away, `_` after punctuation and `*` open emphasis, and display math needs blank lines."""
    outside = re.sub(r"`[^`\n]*`", "", THEORY)
    display = re.findall(r"\$\$(.*?)\$\$", outside, re.DOTALL)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.*?\$\$", "", outside, flags=re.DOTALL))
    assert len(display) > 15 and len(inline) > 30
    for math_text in display + inline:
        bad = re.search(r"\\[^a-zA-Z]|\*|(?<![A-Za-z0-9])_(?=[A-Za-z0-9])|operatorname|<|>",
                        math_text)
        assert not bad, f"{bad.group()} in {math_text.strip()}"
        assert math_text.count("{") == math_text.count("}")
    for math_text in display:
        assert f"\n\n$${math_text}$$\n\n" in THEORY, math_text
        assert math_text.startswith("\n") and math_text.endswith("\n") and "\n\n" not in math_text
