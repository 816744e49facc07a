"""docs/theory.md: what its statements name as tests, and the page itself.

Most tests share a tree of two steps with answers aa, ab, ba, bb, a uniform pi_ref and beta 1. There
exp(r) = 3, 1, 5, 3 is what the labels know, exp(u) = 3, 4, 5, 12 the teacher's reward. "Unlimited
data": all pairs are compared, labels come from Bradley-Terry on r, and a tabular student
(toy_mdp.fit) minimises the exact expected loss. For TVKD see test_shaping_invariance.py.
"""

import ast
import functools
import itertools
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


def rewarded(tree, rewards):
    """A reward paid by the last action, from one number per response."""
    return tree.at_the_end(dict(zip(tree.responses, rewards.tolist())))


TREE, TWO, THREE = Tree("ab", 2), Tree("ab", 1), Tree("abc", 1)
R, U = logs(3, 1, 5, 3), logs(3, 4, 5, 12)
MASK = torch.ones(4, 2).bool()
TEACHER_REF = {"a": 1/2, "b": 1/2, "aa": 2/3, "ab": 1/3, "ba": 3/5, "bb": 2/5}
TEACHER_VALUE, _, TEACHER = TREE.solve(TEACHER_REF, rewarded(TREE, U))      # optimal for u


def pair_indices(n):
    """w, l of every ordered pair of n responses."""
    return torch.tensor(list(itertools.permutations(range(n), 2))).T


def differences(scores):
    w, l = pair_indices(len(scores))
    return scores[w] - scores[l]


def expected_loss(tree, preferred, logits, psi=None, beta=1.0):
    """The DPO loss, or with summed psi the TVKD loss, if w wins with probability `preferred`."""
    mask = torch.ones(len(tree.responses), tree.depth).bool()
    logps = sequence_logps(token_logps(logits, tree.tokens()), mask)
    (w, l), ref = pair_indices(len(logps)), torch.full_like(logps, -ln(len(logps)))
    sums = logps[w], logps[l], ref[w], ref[l]
    if psi is None:
        return (preferred * dpo_loss(*sums, beta)).sum()
    return (preferred * tvkd_loss(*sums, psi[w], psi[l], beta, 1.0)).sum()


def optimum_of(tree, preferred, **options):
    """log pi of the responses where the loss is smallest."""
    policy = fit(tree, functools.partial(expected_loss, tree, preferred, **options))
    return logs(*tree.response_probs(policy).values())


def assert_proportional(logps, weights):
    close(logps.exp(), [weight / sum(weights) for weight in weights], 1e-7)


def loss_and_gradient(loss, policy, ref, *options):
    """policy, ref (2, B): chosen, rejected. The loss of each pair, its gradient by `policy`."""
    policy = policy.clone().requires_grad_()
    losses = loss(*policy, *ref, *options)
    return losses.detach(), torch.autograd.grad(losses.sum(), policy)[0]


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
    """Teacher and reference drawn at random, beta 0.7, three actions, three steps. For the
    teacher's log-ratio of the whole answer as reward: the teacher is optimal, V*(s_p) = 0, and
    implicit_value is V* at every state before the end. At the end V* is 0 and implicit_value is
    the reward: a sum of what was paid, not a value."""
    tree, generator = Tree("abc", 3), torch.Generator().manual_seed(0)
    states = [s for s in tree.states if len(s) < 3]
    teacher, ref = ({s + a: p for s in states for a, p in zip("abc", torch.randn(
        3, generator=generator, dtype=torch.double).softmax(-1).tolist())} for _ in range(2))
    logps = [token_logps(tree.logits(policy), tree.tokens()) for policy in (teacher, ref)]
    values = implicit_value(*logps, torch.ones(27, 3).bool(), 0.7)
    solution, _, policy = tree.solve(ref, rewarded(tree, values[:, -1]), 0.7)
    assert policy == pytest.approx(teacher)
    gap = values - tree.along(solution)
    close(gap[:, :-1], torch.zeros(27, 3), 1e-12)
    close(gap[:, -1], 0.7 * (logps[0] - logps[1]).sum(-1), 1e-12)
    assert gap[:, -1].abs().max() > 1


@pytest.mark.parametrize("scores, beta, weights", [
    (R, 1, (3, 1, 5, 3)), (R, 0.5, (9, 1, 25, 9)), (U, 1, (3, 4, 5, 12))])
def test_dpo_ends_at_the_exact_optimum_of_what_the_labels_say(scores, beta, weights):
    """pi_ref exp(r / beta): the weights of r, squared for beta 1/2. With the teacher's soft labels
    sigmoid(du) it is exp(u), and r is nowhere in it."""
    assert_proportional(optimum_of(TREE, differences(scores).sigmoid(), beta=beta), weights)


# --- what a true value adds, and how a student gets to an optimum ---------------------------------

def test_with_a_true_value_tvkd_is_dpo():
    """Chosen bb, rejected aa, both at the reference, beta 1, alpha 1, terminal "value". With V* of
    a teacher that is optimal for u, V*(end) = 0 and the loss is DPO's: ln 2, weight 1/2. With its
    implicit value dpsi = du = ln 12 - ln 3 = ln 4: loss -ln sigmoid(-ln 4) = ln 5, weight 4/5."""
    logps = [token_logps(TREE.logits(policy), TREE.tokens()) for policy in (TEACHER, TEACHER_REF)]
    true, implicit = TREE.along(TEACHER_VALUE), implicit_value(*logps, MASK, 1.0)
    close(implicit[:, :2], (true - true[:, :1])[:, :2])                 # the same before the end
    for values, loss, weight in ((true, ln(2), 1 / 2), (implicit, ln(5), 4 / 5)):
        psi = shaping(values, MASK, 1.0, "value").sum(-1)
        zero = torch.zeros(2, 1).double()
        got = loss_and_gradient(tvkd_loss, zero, zero, psi[3:], psi[:1], 1.0, 1.0)
        close(got[0], [loss])
        close(got[1], [[-weight], [weight]])


@pytest.mark.parametrize("compared, flat", [((0, 1, 2, 3), 1), ((0, 1, 3), 2)])
def test_the_loss_is_convex_with_its_minimum_at_the_optimum(compared, flat):
    """Five answers, random r and u; answer i meets i + 1. At log-ratios (r + alpha u) / beta the
    gradient is 0. Elsewhere the Hessian has one eigenvalue 0, a constant of the prompt, and none
    below. Without the pair 2, 3 two groups of answers may shift: a second direction is flat."""
    r, u, elsewhere = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    first = torch.tensor(compared)
    w, l = torch.cat([first, first + 1]), torch.cat([first + 1, first])
    loss = functools.partial(loss_of_log_ratios, (r[w] - r[l]).sigmoid(), w, l, u)
    close(torch.autograd.functional.jacobian(loss, (r + 0.6 * u) / 0.3), torch.zeros(5), 1e-12)
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, elsewhere))
    close(eigenvalues[:flat], torch.zeros(flat), 1e-12)
    assert eigenvalues[flat] > 1e-4


def loss_of_log_ratios(labels, w, l, u, ratios):
    zero = torch.zeros(len(w))
    return (labels * tvkd_loss(ratios[w], ratios[l], zero, zero, u[w], u[l], 0.3, 0.6)).sum()


# --- gamma below 1 --------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, rows, sums", [
    (0.5, [[1, 1, 1], [1]], [-2, -1]),                      # -1 - (1+1)/2: length costs
    (0.9, [[2, 50], [2, .1, .1, .1, .1]], [-7, -2.04]),     # -2 - 5; -2 - .04: it does not
])
def test_gamma_is_a_length_bias_by_tendency_only(gamma, rows, sums):
    """Terminal "zero": the plain sum is -Phi(s_p) - (1 - gamma) times the Phi on the way."""
    values = torch.tensor([row + [0] * (6 - len(row)) for row in rows]).double()
    mask = torch.arange(5) < torch.tensor([[len(row)] for row in rows])
    close(shaping(values, mask, gamma, "zero").sum(-1), sums)


# --- the sign of psi -----------------------------------------------------------------------------

def test_tpkd_ref_is_the_plus_reading():
    """The reward of the released branch `tpkd_ref`: beta log-ratio - (1 - gamma) times the sum of
    V(s_{t+1}), V = T logsumexp(log p / T), 0 after the end; here gamma 0.7, T 2, so that V =
    2 ln sum sqrt(p). At the prompt p = (4/9, 4/9, 1/9, 0), V = 2 ln(5/3). Chosen, two tokens: p =
    1/4 in between, V = 2 ln 2; rejected, one token. With log-ratios 1.6 ln 2 and 0 the margin is
    1.6 ln 2 - 0.3 * 2 ln 2 = ln 2, as with alpha -1. With alpha +1 it is 2.2 ln 2."""
    prompt, even = [4/9, 4/9, 1/9, 0], [1/4] * 4
    values = soft_value(logs([prompt, even, prompt], [prompt, prompt, prompt]) / 2, 2.0)
    close(values[0, :2], [2 * ln(5 / 3), 2 * ln(2)])
    psi = shaping(values, torch.tensor([[1, 1], [1, 0]]).bool(), 0.7, "zero").sum(-1)
    policy, zero = torch.tensor([1.6 * ln(2)]).double(), torch.zeros(1).double()
    for alpha, loss in ((-1, ln(3 / 2)), (1, ln(1 + 2 ** -2.2))):
        close(tvkd_loss(policy, zero, zero, zero, psi[:1], psi[1:], 1.0, alpha), [loss])


# --- a tilted reference, a margin, a weight -------------------------------------------------------

def test_tvkd_is_dpo_with_a_tilted_reference_by_hand():
    """beta 1/2, alpha 1/4, so the tilt is u / 2. Phi(s_p) = 1. Pair 0: u_w = ln 16 after three
    tokens, u_l = 0 after two; log-ratios ln 64, ln 4. TVKD: ln(16)/2 - ln(16)/4 = ln 2. DPO: the
    tilt leaves ln 16, ln 4, and ln(4)/2 = ln 2. Pair 1: u_w = 0 after one token, u_l = ln 81 after
    three; log-ratios 0, 0. TVKD: ln(81)/4 = ln 3. DPO: 0, -ln 9, and ln(9)/2 = ln 3. Losses
    ln(3/2), ln(4/3); gradients beta times 1/3, 1/4."""
    values = torch.tensor([[1, 7, -2, ln(16)], [1, 0, 50, 50],          # the chosen of 0 and 1
                           [1, 3, 0, 50], [1, 5, 4, ln(81)]]).double()  # the rejected
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    psi = shaping(values, mask, 1.0, "value").sum(-1).view(2, 2)
    policy, ref = logs([64, 1], [4, 1]), logs([1, 1], [1, 1])
    tilted = ref + logs([16, 1], [1, 81]) / 2
    for got in (loss_and_gradient(tvkd_loss, policy, ref, *psi, 0.5, 0.25),
                loss_and_gradient(dpo_loss, policy, tilted, 0.5)):
        close(got[0], [ln(3 / 2), ln(4 / 3)])
        close(got[1], [[-1 / 6, -1 / 8], [1 / 6, 1 / 8]])


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.3, 0.05), (-2.0, 0.7)])
def test_tvkd_is_dpo_with_a_tilted_reference_for_any_rows(alpha, beta):
    """64 random pairs, answers of 1 to 7 tokens, 2 of the prompt: the same losses and gradients as
    DPO whose reference log-probs gain alpha / beta times the value at each row's end."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2),
                             dtype=torch.double)
    values, policy, ref = draw(128, 10), 9 * draw(2, 64), 9 * draw(2, 64)
    values[64:, 2] = values[:64, 2]                             # one prompt, so one Phi(s_p)
    ends = 3 + torch.arange(128).unsqueeze(-1) * 5 % 7          # (128, 1) the state after EOS
    mask = (torch.arange(9) >= 2) & (torch.arange(9) < ends)
    psi, u = shaping(values, mask, 1.0, "value").sum(-1).view(2, 64), values.gather(-1, ends)
    tvkd = loss_and_gradient(tvkd_loss, policy, ref, *psi, beta, alpha)
    tilted = loss_and_gradient(dpo_loss, policy, ref + alpha / beta * u.view(2, 64), beta)
    close(tvkd[0], tilted[0], 1e-12)
    close(tvkd[1], tilted[1], 1e-12)


@pytest.mark.parametrize("alpha", [1, -1])
def test_the_weight_exceeds_dpos_exactly_where_the_teacher_agrees(alpha):
    """At policy = reference DPO weighs each pair 1/2. dpsi = ln 3, 0, -ln 3 give sigmoid(alpha
    dpsi) = 3/4, 1/2, 1/4 for alpha 1 and the reverse for alpha -1."""
    policy, zero = torch.zeros(2, 3).double(), torch.zeros(3).double()
    dpsi = torch.tensor([ln(3), 0, -ln(3)]).double()
    gradient = loss_and_gradient(tvkd_loss, policy, policy, dpsi, zero, 1.0, alpha)[1]
    close(-gradient[0], [3 / 4, 1 / 2, 1 / 4][::alpha])


def test_the_expected_push_is_the_label_minus_the_students_belief():
    """Averaged over a label that holds with probability p, the push on log pi(y_w) is
    beta (p - sigmoid(beta dlogratio - alpha dpsi)). p = 1/2, equal log-ratios, dpsi = ln 3, alpha
    1, beta 2: sigmoid(-ln 3) = 1/4 and 2 (1/2 - 1/4) = 1/2, towards the answer that the teacher
    values although the labels see no difference. It is 0 where 2 dlogratio = ln 3."""
    psi = torch.tensor([[ln(3), 0], [0, ln(3)]]).double()       # pair 1: pair 0, flipped
    for start, push in ((0.0, 1 / 2), (ln(3) / 2, 0.0)):
        policy = torch.tensor([[start, 0], [0, start]]).double()
        gradient = loss_and_gradient(tvkd_loss, policy, 0 * policy, *psi, 2.0, 1.0)[1]
        close(-gradient.diagonal().mean(), push)


# --- the teacher's opinion as a label, and noise --------------------------------------------------

def margin_between_two(preferred, u=0.0):
    """The log-ratio margin of a over b that a student learns if these are all answers to the
    prompt, a wins with probability `preferred`, and the teacher gives a u more."""
    both, psi = torch.tensor([[preferred, 1 - preferred], [u, 0]], dtype=torch.double)
    first, second = optimum_of(TWO, both, psi=psi)
    return first - second


def test_hard_labels_have_no_optimum_and_drift_to_the_teachers_favourite():
    """u ranks aa, ab, ba, bb; the label is the answer with more u. Policies 1 : z : z^2 : z^3 rank
    alike. With z = 2 the loss is 3 ln(3/2) + 2 ln(5/4) + ln(9/8) = 1.780465, and it falls to 0 as z
    grows: no policy is best. A student ends at bb."""
    preferred = (differences(U) > 0).double()
    losses = [(preferred * dpo_loss(differences(logs(1, z, z**2, z**3)), *torch.zeros(3, 12), 1.0))
              .sum().item() for z in (2, 8, 100)]
    close(losses[0], 1.780465)
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.04
    assert optimum_of(TREE, preferred)[3].exp() > 0.999


@pytest.mark.parametrize("p, odds, mean, evidence", [
    (3/4, 1/3, 0, ln(4 / 3)),               # (3/4 + 1/4)/2 = 1/2; 3/4 3/4 + 1/4 1/28 = 4/7
    (3/4, 1, ln(5 / 3), ln(7 / 3)),         # (3/4 + 1/2)/2 = 5/8; 3/4 9/10 + 1/4 1/10 = 7/10
    (9/10, 1, ln(7 / 3), ln(41 / 9)),       # (9/10 + 1/2)/2 = 7/10; 9/10 9/10 + 1/10 1/10 = .82
    (1, 1, ln(3), ln(9)),                   # labels beyond doubt, the bounds: 3/4; 9/10
])
def test_mixed_labels_are_bounded_where_the_teacher_is_silent(p, odds, mean, evidence):
    """Two answers; a wins with probability p, the teacher's odds are exp(du), 1 if it is silent.
    Mean of label and soft label: logit of (p + sigmoid(du)) / 2. Label and teacher as evidence:
    logit of E sigmoid(du +- c), here with c = ln 9."""
    close(margin_between_two((p + odds / (1 + odds)) / 2), mean)
    close(margin_between_two(p * 9 * odds / (1 + 9 * odds) + (1 - p) * odds / (9 + odds)), evidence)


def test_the_bounds_hold_for_a_pair_and_not_for_three_answers_to_one_prompt():
    """A silent teacher and three answers with r = 2 ln 9, ln 9, 0. The mean's targets are 7/10,
    7/10 and (81/82 + 1/2)/2 = 61/82 < 3/4. No margins m, m and 2m meet all three. The best answer's
    condition is sigmoid(m) + sigmoid(2m) = 7/10 + 61/82 = 1.4439; with 2m <= ln 3 it could be at
    most 0.6340 + 0.75. So 2m is above ln 3: 1.3037..., with m = 0.6518...."""
    best = optimum_of(THREE, (differences(logs(81, 9, 1)).sigmoid() + 1 / 2) / 2)
    m = best[0] - best[1]
    close(best[1] - best[2], m)
    close(m.sigmoid() + (2 * m).sigmoid(), 7 / 10 + 61 / 82)
    assert 2 * m > 1.3037 > ln(3)


@pytest.mark.parametrize("flipped, margin", [(1/4, ln(5 / 3)), (1/2, 0), (3/4, -ln(5 / 3))])
def test_flipped_labels_change_the_labels_part_of_the_margin_only(flipped, margin):
    """A label is right with 3/4; a share e is flipped: (1 - 2e) 3/4 + e = 5/8, 1/2, 3/8. DPO's
    margin falls from ln 3 to ln(5/3), 0, -ln(5/3). TVKD with du = ln 4 has ln 4 more."""
    noisy = (1 - 2 * flipped) * 3 / 4 + flipped
    close(margin_between_two(noisy), margin)
    close(margin_between_two(noisy, u=ln(4)), margin + ln(4))


# --- KL distillation ------------------------------------------------------------------------------

def test_kd_ends_at_the_teachers_policy_on_the_states_visited():
    """The teacher's reference has 1/3 : 1/6 : 3/10 : 1/5; times exp(u) = 3 : 4 : 5 : 12 that is
    30 : 20 : 45 : 72 of 167, and KD copies it, reference and all. Trained on aa and ab alone, it
    never visits the state b and leaves 1/2 there."""
    teacher = TREE.logits(TEACHER)
    policy = fit(TREE, lambda logits: kd_loss(logits, teacher, MASK))
    assert_proportional(logs(*TREE.response_probs(policy).values()), (30, 20, 45, 72))
    policy = fit(TREE, lambda logits: kd_loss(logits[:2], teacher[:2], MASK[:2]))
    assert policy == pytest.approx({**TEACHER, "ba": 1 / 2, "bb": 1 / 2}, abs=1e-6)


# --- the page -------------------------------------------------------------------------------------

THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def definitions(path):
    """{name at the top level of a file: all names used in its definition}"""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = {getattr(x, "id", getattr(x, "attr", None)) for x in ast.walk(node)} - {None}
        left = [x for target in getattr(node, "targets", ()) for x in ast.walk(target)]
        found |= {getattr(x, "name", getattr(x, "id", None)): names for x in [node, *left]}
    return found


TESTS = [definitions(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def reaches(used, name, function):
    """Does the test use the function, itself or through names of its own file?"""
    seen = {name}
    while more := set().union(*(used.get(other, ()) for other in seen)) - seen:
        seen |= more
    return function in seen


def test_every_statement_names_a_function_and_a_test_that_calls_it():
    """The line below each numbered statement says whose it is and names functions of tvkd.py or
    toy_mdp.py and tests; every test uses one of the functions. Tests named elsewhere exist."""
    code = "".join((ROOT / name).read_text(encoding="utf-8")
                   for name in ("tvkd.py", "tests/toy_mdp.py"))
    numbers = re.findall(r"^\*\*(\d+)\. ", THEORY, re.MULTILINE)
    lines = re.findall(r"^\((?:paper|standard|ours)[;:,](.*)\)$", THEORY, re.MULTILINE)
    assert numbers == [str(n + 1) for n in range(len(lines))] and len(lines) > 20
    for number, line in zip(numbers, lines):
        names = re.findall(r"`(?:Tree\.)?(\w+)`", line)
        functions = [name for name in names if not name.startswith("test_")]
        assert all(f"def {name}(" in code for name in functions), f"{number}: {functions}"
        assert len(functions) < len(names), f"statement {number}: expected a test"
        for test in set(names) - set(functions):
            assert any(reaches(used, test, function) for used in TESTS if test in used
                       for function in functions), f"{number}: {test} calls none of {functions}"
    text = THEORY + (ROOT / "docs" / "released-code.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", text)) <= set().union(*TESTS)


@pytest.mark.parametrize("page", ["docs/theory.md", "README.md"])
def test_math_is_not_eaten_by_markdown(page):
    """GitHub runs Markdown over the text before MathJax sees it: a backslash before punctuation is
    taken away, `_` after punctuation and `*` open emphasis, and display math needs blank lines."""
    text = re.sub(r"`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    display = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))
    assert len(display) >= 5 and len(inline) > 15
    for math_text in display + inline:
        bad = re.search(r"\\[^a-zA-Z]|\*|(?<![A-Za-z0-9])_(?=[A-Za-z0-9])|operatorname|<|>",
                        math_text)
        assert not bad and math_text.count("{") == math_text.count("}"), math_text
    for math_text in display:
        assert re.fullmatch(r"\n[^\n]+\n", math_text) and f"\n\n$${math_text}$$\n\n" in text
