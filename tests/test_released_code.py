"""docs/released-code.md: what it says about other forms of the value and the margin, by hand.

The formulas are written from their description and compared with tvkd.py, which uses none of them.
"""

import math

import pytest
import torch

from conftest import close
from tvkd import dpo_loss, shaping, soft_value, tvkd_loss

ALPHA = 0.7
ln = math.log


def doubles(*values):
    return torch.tensor(values, dtype=torch.double)


@pytest.mark.parametrize("probs, value", [
    ((0.2,) * 5, 0.3 * ln(5)),              # ln(5 * 5^-0.7)
    ((1.0, 0.0, 0.0), 0.0),                 # ln 1
    ((0.5, 0.25, 0.25), 0.317312),          # .5^.7 = .615572, .25^.7 = .378929: ln 1.373430
])
def test_tempered_log_probs_are_a_renyi_entropy(probs, value):
    """logsumexp(0.7 log p) = ln sum p^0.7, which is 0.3 times the Renyi entropy of order 0.7."""
    close(soft_value(ALPHA * doubles(*probs).log(), 1.0), value, 2e-6)
    close(soft_value(ALPHA * doubles(*probs).log(), 1.0), (doubles(*probs) ** ALPHA).sum().log())


def test_values_of_normalised_log_probs_are_zero_at_temperature_one():
    """T logsumexp(log p / T) of (1/2, 1/4, 1/4) and (1, 0, 0): 0 and 0 for T = 1, so psi is 0 and
    the loss DPO's, for any gamma. For T = 2 it is 2 ln(sum sqrt p): 2 ln(sqrt(1/2) + 1) and 0."""
    log_p = doubles([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]).log()
    values = soft_value(log_p, 1.0).unsqueeze(0)
    close(values, [[0, 0, 0]])
    psi = shaping(values, torch.ones(1, 2).bool(), 0.7, "zero").sum(-1)
    one, zero = doubles(1.0), doubles(0.0)
    loss = tvkd_loss(one, zero, zero, zero, psi, zero, 1.0, -1.0)
    close(loss, dpo_loss(one, zero, zero, zero, 1.0))
    close(soft_value(log_p / 2, 2.0)[:2], [2 * ln(math.sqrt(0.5) + 1), 0])


def test_an_entropy_is_not_the_soft_value():
    """Logits (ln 3, 0) and the same + 10: the tempered value of their probabilities is the same
    number, the soft value ln 4 moves by 10."""
    logits = doubles([ln(3), 0.0], [ln(3) + 10, 10.0])
    close(soft_value(logits, 1.0), [ln(4), ln(4) + 10])
    close(soft_value(ALPHA * logits.log_softmax(-1), 1.0).diff(), [0])


def test_pi_is_the_minus_reading_and_telescopes():
    """Branch `PI` with gamma 1, sum of log pi - V(s_{t+1}) + V(s_t), every log pi -1. V =
    (2, 5, 3, 0): -3 + 2 = -1. V = (2, 7, 0): -2 + 2 = 0. The values on the way are gone, and the 2
    of the prompt is in both: R_w - R_l = -1, the difference of the log-probs -3 and -2. It is
    tvkd_loss with alpha 1 and "zero", and so DPO without a reference."""
    values, mask = doubles([2, 5, 3, 0], [2, 7, 0, 0]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    reward = ((-1 - values[:, 1:] + values[:, :-1]) * mask).sum(-1)
    close(reward, [-1, 0])
    psi, zero = shaping(values, mask, 1.0, "zero").sum(-1), doubles(0.0)
    loss = tvkd_loss(doubles(-3.0), doubles(-2.0), zero, zero, psi[:1], psi[1:], 1.0, 1.0)
    close(loss, [ln(1 + math.e)])                       # -log sigmoid(-1)


@pytest.mark.parametrize("values, left", [([2, 5, 3, 0], -8), ([1, 0], 0), ([1, 1, 1, 1, 0], -3)])
def test_the_next_value_alone_is_not_a_potential_difference(values, left):
    """Without V(s_t), V = (2, 5, 3, 0) leaves -(5 + 3) = -8 of the values. With V = 1 throughout, n
    tokens leave -(n - 1): longer answers keep more. Of psi: strict shaping sums to -2, and the
    V(s_t) that it subtracts, put back, make -2 + (2+5+3) = 8."""
    psi = shaping(doubles(values), torch.ones(1, len(values) - 1).bool(), 1.0, "zero").sum().item()
    close(-(psi + sum(values[:-1])), float(left))       # psi_t + V(s_t) = V(s_{t+1})


def entropy_of_bins(logits, ids):
    """Entropy of the student over the teacher's stored ids and one bin for the rest."""
    stored = logits.softmax(-1)[ids]
    bins = torch.cat([stored, 1 - stored.sum(-1, keepdim=True)])
    return -(bins * bins.log()).sum()


def test_an_entropy_of_the_student_does_not_read_the_teachers_probabilities():
    """Student (1/2, 1/4, 1/8, 1/8). Stored ids 0 and 1: bins (1/2, 1/4, 1/4), entropy 1.5 ln 2.
    Ids 2 and 3: bins (1/8, 1/8, 3/4). The teacher only chooses the ids, and the gradient goes to
    the student. The soft value is the other way round: two teachers with the same two likeliest
    tokens give another psi, 0 and ln[(e^9 + e^3 + 2)/(e^4 + e^3 + 2)] = 4.665, and no gradient."""
    logits = doubles(0.5, 0.25, 0.125, 0.125).log().requires_grad_()
    entropy = entropy_of_bins(logits, [0, 1])
    close(entropy, 1.5 * ln(2))
    close(entropy_of_bins(logits, [2, 3]), 0.25 * ln(8) + 0.75 * ln(4 / 3))
    assert torch.autograd.grad(entropy, logits)[0].abs().max() > 0.01
    teachers = doubles([[4, 3, 0, 0], [4, 3, 0, 0]], [[4, 3, 0, 0], [9, 3, 0, 0]]).requires_grad_()
    psi = shaping(soft_value(teachers, 1.0), torch.ones(2, 1).bool(), 1.0, "value")
    e = math.exp
    close(psi, [[0], [ln((e(9) + e(3) + 2) / (e(4) + e(3) + 2))]])
    assert not psi.requires_grad


def test_values_of_a_clamped_padding_column():
    """51 bins of 1e-8. Weight 0.7: ln 51 + 0.7 ln 1e-8 = 3.931826 - 12.894476 = -8.962650. Weight
    1: 3.931826 - 18.420681 = -14.488855, times -0.3 = 4.346657. Left as the value of s_end it is in
    psi; "zero" finds the end by the mask and never reads the column."""
    column = torch.full((51,), 1e-8).double().log()
    close(soft_value(0.7 * column, 1.0), -8.962650)
    padded = soft_value(column, 1.0)
    close(padded, -14.488855)
    close(-(1 - ALPHA) * padded, 4.346657)
    values = doubles([0.0, 0.0, padded])
    close(shaping(values, torch.tensor([[1, 0]]).bool(), 1.0, "zero"), [[0, 0]])
