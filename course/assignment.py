"""Writes tvkd.py as an assignment: everything but the bodies of its ten functions.

    python -m course.assignment > my_tvkd.py        the assignment
    python -m pytest -q --impl=my_tvkd.py           its points (course/grader.py)

The docstrings, the equations between the functions and the helpers that check arguments stay.
Comments inside a body go with the body. course/release.py makes a folder for students of it.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from harness.errors import one_line

ROOT = Path(__file__).resolve().parent.parent
VARIANT = 0                     # of this folder; course/release.py writes another number


class Graded(NamedTuple):
    equation: str
    points: int                 # for the equation
    robustness: int = 1         # points for surviving what real batches contain


FUNCTIONS = {
    "action_logps": Graded("log pi(a|s) = logit of a - logsumexp of all logits", 1),
    "token_logps": Graded("log pi(a_t|s_t), a_t = tokens[t+1], from logits[:, t]", 2),
    "sequence_logps": Graded("log pi(y|x) = sum_t log pi(a_t|s_t), t over the mask", 1),
    "dpo_loss": Graded("L = -log sigmoid( beta [log-ratio_w - log-ratio_l] ), "
                       "log-ratio = log pi(y|x) - log pi_ref(y|x)", 2),
    "soft_value": Graded("V(s) = beta log sum_a exp(Q(s,a)/beta), logits = Q/beta", 1),
    "implicit_value": Graded("V(s_{p+k}) - V(s_p) = "
                             "sum_{i<k} beta log pi_phi(a_i|s_i) / pi_phi,ref(a_i|s_i)", 3),
    "shaping": Graded("psi_t = gamma Phi(s_{t+1}) - Phi(s_t), Phi(s_end) by `terminal`", 4),
    "tvkd_loss": Graded("L = -log sigmoid( beta [log-ratio_w - log-ratio_l]"
                        " - alpha [sum_t psi_w - sum_t psi_l] )", 3),
    "kd_loss": Graded("mean over response states of KL(teacher || student)", 2),
    "nll_loss": Graded("mean over response tokens of -log pi(a_t|s_t)", 1),
}
TOGETHER = "all together"       # tests of several functions, one after another
GRADED = {**FUNCTIONS, TOGETHER: Graded("", 2, 0)}
KEPT_HELPERS = ("_expect_shape", "_at_least_float32", "_non_empty")     # others give too much away

HEADER = """\
# Exercise: write the {count} functions below. Each docstring says what goes in and what comes out.
#
#     python -m pytest -q --impl=FILE                        FILE: this file
#     python -m pytest -q --impl=FILE --function=NAME        the tests of one function
#     python -m pytest -v --impl=FILE                        every failure, not one per function
#
# A function earns its points for the equation if all tests of the equation pass, and those for
# robustness if all tests of robustness pass. `shaping` earns one each for psi along the way, gamma,
# `terminal`, and rows of different lengths. A function that calls another needs that one right.
# Robust means, where it applies:
#   - Half-precision logits are raised to float32, and float64 stays float64.
#   - Shapes that do not match, an unknown `terminal` and a missing response raise ValueError.
#     Only the type counts, not the text.
#   - Gradients reach the policy or student and nothing else: not the reference, the teacher, the
#     values or psi, even where these come with a graph.
#   - No argument is written into.
#   - Padding may hold anything, NaN and inf too. It changes neither the result nor a gradient.
#     Inside the response, -inf and NaN stay what they are.
#   - `mask` may be bool, or 0 and 1 of any type.
#   - Nothing overflows: a margin of -900 gives a loss of 900, logits of 1000 and -1000 a finite
#     value, and a probability of 0 is allowed.
#
#     function                equation   robustness
{table}
"""


def exercise(source):
    """Source of tvkd.py -> source of the assignment."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):       # from the end: line numbers stay valid
        if not isinstance(node, ast.FunctionDef) or node.name in KEPT_HELPERS:
            continue
        start, end = node.lineno - 1, node.end_lineno
        if node.name in FUNCTIONS:
            lines[node.body[0].end_lineno:end] = ["    raise NotImplementedError"]
        else:
            while end < len(lines) and not lines[end]:
                end += 1
            del lines[start:end]
    return HEADER.format(count=len(FUNCTIONS), table=table()) + "\n".join(lines) + "\n"


def table():
    rows = [(name, graded.points, graded.robustness) for name, graded in GRADED.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "\n".join(f"#     {name:23}{points:9}{robust:13}" for name, points, robust in rows)


def command(name, doc, run, arguments):
    """Exit status of `python -m course.NAME`. A ValueError says what was expected instead."""
    if arguments == ["--help"]:
        print(doc)
        return 0
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(one_line(f"course.{name}: {error}, got {' '.join(arguments)!a}"), file=sys.stderr)
        return 2
    return 0


def write_assignment(arguments):
    if arguments:
        raise ValueError("expected no arguments, but `python -m course.assignment > my_tvkd.py`")
    sys.stdout.write(exercise((ROOT / "tvkd.py").read_text(encoding="utf-8")))


def main(arguments):
    return command("assignment", __doc__, write_assignment, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
