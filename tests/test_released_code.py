"""README "Beside the released code": its claims about other forms of the value and of the margin, on tensors, worked by hand.

The forms below are written from their description, to compute with; none is used by this project.
"""

import math

import torch

from conftest import close
from tvkd import shaping, soft_value

ALPHA = 0.7


def tempered(probs):
    """logsumexp(alpha log p)"""
    return torch.logsumexp(ALPHA * probs.log(), -1)


def renyi(probs):
    """Renyi entropy of order alpha: ln(sum_a p(a)^alpha) / (1 - alpha)."""
    return (probs ** ALPHA).sum(-1).log() / (1 - ALPHA)


def test_tempered_log_probs_are_a_renyi_entropy():
    """Uniform over 5: ln(5 * 5^-0.7) = 0.3 ln 5 = 0.482831. All on one token: ln 1 = 0. In general (1 - alpha) times the entropy
    of order alpha: at (1/2, 1/4, 1/4), .5^.7 = .615572 and .25^.7 = .378929, ln 1.373430 = .317312. With alpha 1 always 0."""
    uniform, skewed = torch.full((5,), 0.2).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    close(tempered(uniform), 0.3 * math.log(5))
    close(tempered(torch.tensor([1.0, 0.0, 0.0]).double()), 0.0)
    close(tempered(skewed), 0.317311, 2e-6)
    for probs in (uniform, skewed):
        close(tempered(probs), (1 - ALPHA) * renyi(probs))
        close(torch.logsumexp(probs.log(), -1), 0.0)


def test_an_entropy_is_not_the_soft_value():
    """Logits (ln 3, 0) and the same + 10: the tempered value is the same number, the soft value ln 4 moves by 10. An entropy
    reads how sure the policy is, not how good the state is."""
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3) + 10, 10.0]]).double()
    close(soft_value(logits, 1.0), [math.log(4), math.log(4) + 10])
    before, after = tempered(logits.softmax(-1)).tolist()
    close(before, after)


def test_adding_the_current_value_telescopes_to_a_prompt_constant():
    """Token terms log pi - V(s_{t+1}) + V(s_t) with V(s_end) = 0. One answer has V = (2, 5, 3, 0) and log pi = (-1, -1, -1): sum
    -3 + 2 = -1. Another to the same prompt has V = (2, 7, 0): -2 + 2 = 0. The V on the way are gone, the prompt's 2 is in both
    and cancels: the difference is that of the log-probs, -3 - -2 = -1. It is strict shaping ("zero")."""
    def summed(values):
        return sum(-1 - after + before for before, after in zip(values, values[1:]))
    close(summed([2.0, 5.0, 3.0, 0.0]), -1.0)
    close(summed([2.0, 7.0, 0.0]), 0.0)
    values, mask = torch.tensor([[2.0, 5.0, 3.0, 0.0], [2.0, 7.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    close(-3 - shaping(values, mask, 1.0, "zero")[0].sum().item(), summed([2.0, 5.0, 3.0, 0.0]))


def test_the_next_value_alone_is_not_a_potential_difference():
    """Token terms log pi - V(s_{t+1}) without V(s_t): V = (2, 5, 3, 0) leaves -(5 + 3) = -8 of the values, V = (2, 7, 0) -7; the
    values on the way stay, more of them the longer the answer: with V = 1 throughout, n tokens leave -(n - 1). Strict
    shaping sums to -V(s_p) = -2; with the V(s_t) it subtracts put back, -2 + (2 + 5 + 3) = 8, entering with a minus."""
    def left_over(values):
        psi = shaping(torch.tensor([values]), torch.ones(1, len(values) - 1).bool(), 1.0, "zero").sum().item()
        return -(psi + sum(values[:-1]))                                    # psi + V(s_t) is V(s_{t+1})
    close(left_over([2.0, 5.0, 3.0, 0.0]), -8.0)
    close(left_over([2.0, 7.0, 0.0]), -7.0)
    for n in (1, 4, 9):
        close(left_over([1.0] * n + [0.0]), -(n - 1.0))


def test_an_entropy_of_the_student_does_not_read_the_teachers_probabilities():
    """The entropy of the student's distribution over the teacher's stored ids and one bin for the rest: the teacher decides which
    ids, its probabilities nowhere enter, and the gradient goes to the student; the soft value is the other way round. Student
    (1/2, 1/4, 1/8, 1/8), stored ids 0 and 1: bins (1/2, 1/4, 1/4), entropy 1/2 ln 2 + 2/4 ln 4 = 1.5 ln 2. Stored ids 2 and
    3: bins (1/8, 1/8, 3/4), another number."""
    def entropy(logits, ids):
        kept = logits.softmax(-1)[ids]
        bins = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)])
        return -(bins * bins.log()).sum()
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).double().log().requires_grad_(True)
    value = entropy(logits, [0, 1])
    close(value.detach(), 1.5 * math.log(2))
    close(entropy(logits, [2, 3]).detach(), 0.25 * math.log(8) + 0.75 * math.log(4 / 3))
    assert torch.autograd.grad(value, logits)[0].abs().max() > 0.01
    # Another teacher with the same two likeliest tokens: another psi, and none of it asks for a gradient.
    teachers = torch.tensor([[[4.0, 3, 0, 0], [4, 3, 0, 0]], [[4, 3, 0, 0], [9, 3, 0, 0]]]).double().requires_grad_(True)
    psi = shaping(soft_value(teachers, 1.0), torch.ones(2, 1).bool(), 1.0, "value")
    assert not psi.requires_grad and psi[0].item() == 0 and psi[1].item() > 4
