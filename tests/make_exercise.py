"""Writes tvkd.py as an assignment: everything but the bodies of its ten functions.

    python tests/make_exercise.py > my_tvkd.py      the assignment
    pytest --impl=my_tvkd.py                        its tests, and the points

Docstrings, the equations between the functions and the helpers that check inputs stay; comments inside bodies go with them.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple


class Graded(NamedTuple):
    points: int
    equation: str


TOGETHER = "all together"
FUNCTIONS = {
    "action_logps": Graded(1, "log pi(a|s) = logit of a - logsumexp of all logits"),
    "token_logps": Graded(1, "log pi(a_t|s_t), a_t = tokens[t+1], from logits[:, t]"),
    "sequence_logps": Graded(1, "log pi(y|x) = sum_t log pi(a_t|s_t), t over the mask"),
    "dpo_loss": Graded(2, "L = -log sigmoid( beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ] )"),
    "soft_value": Graded(1, "V_phi(s) = beta log sum_a exp(Q_phi(s,a)/beta), logits = Q/beta"),
    "implicit_value": Graded(3, "V_phi(s_{p+k}) - V_phi(s_p) = sum_{i<k} beta log pi_phi(a_i|s_i) / pi_phi,ref(a_i|s_i)"),
    "shaping": Graded(4, "psi_t = gamma Phi(s_{t+1}) - Phi(s_t), Phi(s_end) by `terminal`"),
    "tvkd_loss": Graded(3, "L = -log sigmoid( beta [log-ratio_w - log-ratio_l] - alpha [sum_t psi_w - sum_t psi_l] )"),
    "kd_loss": Graded(2, "mean over response states of KL(teacher || student)"),
    "nll_loss": Graded(1, "mean over response tokens of -log pi(a_t|s_t)"),
    TOGETHER: Graded(1, "several of the functions, one after another"),
}
KEPT_HELPERS = ("_expect_shape", "_at_least_float32", "_non_empty")         # any other private function would help too much

HEADER = """\
# Exercise: write the {n} functions below; each docstring says what goes in and what comes out. `mask` may be bool or 0 and 1.
#
#     pytest --impl=FILE       FILE: this file. Add --function=kd_loss for the tests of one, -x to stop at a failure.
#
# Where shapes do not match, raise ValueError with the text of `_expect_shape`; padding may hold anything, NaN and inf too.
# Points, for a function all of whose tests pass:
{table}
"""


def exercise(source):
    """Source of tvkd.py -> source of the assignment."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):                           # from the end, so that line numbers stay true
        if not isinstance(node, ast.FunctionDef) or node.name in KEPT_HELPERS:
            continue
        start, end = node.lineno - 1, node.end_lineno
        if node.name in FUNCTIONS:
            lines[node.body[0].end_lineno:end] = ["    raise NotImplementedError"]
        else:
            while end < len(lines) and not lines[end]:
                end += 1
            del lines[start:end]
    table = "\n".join(f"#     {name:16}{graded.points:3}" for name, graded in FUNCTIONS.items())
    total = sum(graded.points for graded in FUNCTIONS.values())
    return HEADER.format(n=len(FUNCTIONS) - 1, table=f"{table}\n#     {'total':16}{total:3}") + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(exercise((Path(__file__).resolve().parent.parent / "tvkd.py").read_text(encoding="utf-8")))
