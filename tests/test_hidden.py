"""tvkd.py, or a graded file, against naive loops on random rows of different lengths.

The loops and the typical mistakes are in course/wrong.py; a mistake is named where the result is
what it gives on the same numbers. Students do not get this file, and --variant=N draws others.
"""

import pytest
import torch

import tvkd
from conftest import close, is_close
from course import wrong

NAIVE = wrong.as_module(wrong.solution(bodies=wrong.NAIVE))
ROWS, WIDTH, VOCABULARY = 5, 8, 6
WITH_GRADIENT = {"action_logps": 1, "token_logps": 1, "sequence_logps": 1, "dpo_loss": 2,
                 "tvkd_loss": 2, "kd_loss": 1, "nll_loss": 1}            # the first arguments
CASES = [("shaping", "gamma", 0.8, "value"), ("shaping", "rows", 1.0, "value"),
         ("shaping", "rows", 1.0, "zero"), ("shaping", "rows", 1.0, "hold")]
CASES += [(name, "") for name in wrong.NAIVE if name != "shaping"]


def arguments(name, seed, *options):
    """Random numbers in float64; responses of 1, 3, 2, 5, 4 tokens behind prompts of any length."""
    draw = torch.Generator().manual_seed(1000 + seed)
    logits, others = 2 * torch.randn(2, ROWS, WIDTH + 1, VOCABULARY, generator=draw).double()
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH + 1), generator=draw)
    logps, ref_logps = -3 * torch.rand(2, ROWS, WIDTH, generator=draw).double()
    values = 2 * torch.randn(ROWS, WIDTH + 1, generator=draw).double()
    pairs = torch.randn(6, ROWS, generator=draw).double()
    beta, alpha = (0.3 + torch.rand(2, generator=draw).double()).tolist()
    mask = torch.zeros(ROWS, WIDTH).bool()
    for row, length in zip(mask, (1, 3, 2, 5, 4)):
        start = int(torch.randint(1, WIDTH - length, (1,), generator=draw))
        row[start:start + length] = True
    return {"action_logps": [logits[:, 0], tokens[:, 0]], "token_logps": [logits, tokens],
            "sequence_logps": [logps, mask], "dpo_loss": [*pairs[:4], beta],
            "soft_value": [logits, beta], "implicit_value": [logps, ref_logps, mask, beta],
            "shaping": [values, mask, *options], "tvkd_loss": [*pairs, beta, alpha],
            "kd_loss": [logits, others, mask], "nll_loss": [logps, mask]}[name]


def called(function, name, given):
    """The result, and the gradient of its elements, each with a weight of its own."""
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
    n = WITH_GRADIENT.get(name, 0)
    for x in inputs[:n]:
        x.requires_grad_()
    result = function(*inputs)
    weights = torch.linspace(1, 2, result.numel()).double().view(result.shape)
    gradient = torch.autograd.grad((result * weights).sum(), inputs[:n]) if n else ()
    return result.detach(), gradient


def mistakes(name, given):
    """What the typical mistakes give on these arguments."""
    found = {}
    for key, mistake in wrong.MISTAKES.items():
        if mistake.function == name and mistake.kind == "equation":
            function = getattr(wrong.as_module(wrong.solution([key])), name)
            found[mistake.message] = called(function, name, given)
    return found


@pytest.mark.parametrize("name, options", [
    pytest.param(name, options, id="-".join(map(str, (name, *options))),
                 marks=pytest.mark.points(name, "equation", part))
    for name, part, *options in CASES])
def test_random_rows(name, options, pytestconfig):
    """Rows of different lengths, value and gradient."""
    given = arguments(name, int(pytestconfig.getoption("variant") or 0), *options)
    result, gradient = called(getattr(tvkd, name), name, given)
    expected, expected_gradient = called(getattr(NAIVE, name), name, given)
    if not is_close(result, expected, 1e-9):
        close(result, expected, 1e-9, {hint: value for hint, (value, _) in
                                       mistakes(name, given).items()})
    for got, right in zip(gradient, expected_gradient):
        close(got, right, 1e-9)
