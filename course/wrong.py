"""Solutions to try the grader on: typical mistakes, one each, and a correct but naive file.

    python -m course.wrong                      their names
    python -m course.wrong plus > plus.py       tvkd.py with that mistake
    python -m pytest -q --impl=plus.py          what a student would read

A mistake is a change of one function; all else is tvkd.py's. tests/system/test_courses.py grades
them all: each loses points of its own function only, and the message names the mistake.
tests/test_hidden.py compares with the naive file, and names a mistake by the numbers it gives.
"""

import ast
import sys
import textwrap
import types
from typing import NamedTuple

from course.assignment import ROOT


class Mistake(NamedTuple):
    function: str
    kind: str                   # "equation", or "robustness" where the equation's points stay
    message: str                # a part of the message that a student reads first
    right: str                  # in the function's body, and what takes its place
    wrong: str


E, R = "equation", "robustness"
BOTH_KD = "mask = _non_empty(mask)"
PSI = "gamma * following - potential"
LAST = "torch.where(mask, actions, -1).amax(-1, keepdim=True)"
RATIOS = "torch.where(mask.bool(), teacher_logps - teacher_ref_logps, 0.0)"
REFS = "ref_chosen, ref_rejected, beta"
NLL = "-logps[_non_empty(mask)].mean()"
SOFT = "_at_least_float32(logits).logsumexp(-1)"
MISTAKES = {name: Mistake(*mistake) for name, mistake in {
    "no_logsumexp": ("action_logps", E, "without - logsumexp", " - logits.logsumexp(-1)", ""),
    "half_precision": ("action_logps", R, "expected torch.float32", "_at_least_float32(logits)",
                       "logits"),
    "no_shift": ("token_logps", E, "no shift", "logits[:, :-1]", "logits[:, 1:]"),
    "nan_through_padding": ("token_logps", R, "[[nan, nan, nan", ".isneginf()", ".isnan()"),
    "mean_for_sum": ("sequence_logps", E, "the mean over response tokens", ".sum(-1)",
                     ".sum(-1) / mask.sum(-1)"),
    "mask_off_by_one": ("sequence_logps", E, "one column too far right", "mask.bool()",
                        "F.pad(mask, (1, 0))[:, :-1].bool()"),
    "eos_unscored": ("sequence_logps", E, "EOS is not scored", "mask.bool()",
                     "mask.bool() & F.pad(mask, (0, 1))[:, 1:].bool()"),
    "one_sum_for_all": ("sequence_logps", E, "the rows are added up", ".sum(-1)",
                        ".sum().expand(len(logps))"),
    "mask_times": ("sequence_logps", R, "got [nan]", "torch.where(mask.bool(), logps, 0.0)",
                   "(logps * mask)"),
    "nan_to_num": ("sequence_logps", R, "expected [-inf, nan]", "logps, 0.0",
                   "logps.nan_to_num(neginf=0), 0.0"),
    "swapped": ("dpo_loss", E, "chosen and rejected are swapped", "(margin)", "(-margin)"),
    "beta_twice": ("dpo_loss", E, "beta is applied twice", "(margin)", "(beta * margin)"),
    "no_reference": ("dpo_loss", E, "the reference is not subtracted", REFS,
                     "0 * ref_chosen, 0 * ref_rejected, beta"),
    "reference_added": ("dpo_loss", E, "the reference is added", REFS,
                        "-ref_chosen, -ref_rejected, beta"),
    "missing_brackets": ("dpo_loss", E, "ref_rejected has the wrong sign", REFS,
                         "ref_chosen, -ref_rejected, beta"),
    "mean_of_pairs": ("dpo_loss", E, "the rows are averaged", "F.logsigmoid(margin)",
                      "F.logsigmoid(margin).mean().expand(margin.shape)"),
    "reference_not_detached": ("dpo_loss", R, "no gradient of reference", "(margin)",
                               "(margin + beta * (ref_rejected - ref_chosen) "
                               "- beta * (ref_rejected - ref_chosen).detach())"),
    "log_of_sigmoid": ("dpo_loss", R, "mistake: log(sigmoid(x))", "F.logsigmoid(margin)",
                       "torch.log(torch.sigmoid(margin))"),
    "log_softmax_first": ("soft_value", E, "log_softmax before logsumexp", ".logsumexp",
                          ".log_softmax(-1).logsumexp"),
    "divided_by_beta": ("soft_value", E, "logits are already Q/beta", SOFT,
                        "(_at_least_float32(logits) / beta).logsumexp(-1)"),
    "overflow": ("soft_value", R, "exp overflows", SOFT,
                 "torch.log(torch.exp(_at_least_float32(logits)).sum(-1))"),
    "prompt_scored": ("implicit_value", E, "prompt and padding are counted", "mask.bool()",
                      "mask >= 0"),
    "one_state_early": ("implicit_value", E, "one state early", "(1, 0)", "(0, 1)"),
    "masked_too_late": ("implicit_value", E, "mask the log-ratios before", RATIOS,
                        "(teacher_logps - teacher_ref_logps).cumsum(-1) * mask\n"
                        "    return beta * F.pad(logratios, (1, 0))"),
    "teacher_alone": ("implicit_value", E, "the teacher's reference is not",
                      "teacher_logps - teacher_ref_logps", "teacher_logps"),
    "zero_after_the_end": ("implicit_value", E, "after s_end the value is 0", ".cumsum(-1)",
                           ".cumsum(-1) * mask"),
    "gamma_on_wrong_state": ("shaping", E, "gamma is on Phi(s_t)", PSI,
                             "following - gamma * potential"),
    "gamma_on_both": ("shaping", E, "gamma multiplies both potentials", PSI,
                      "gamma * (following - potential)"),
    "end_without_gamma": ("shaping", E, "gamma belongs on Phi(s_end), too", PSI,
                          "torch.where(actions == last, 1, gamma) * following - potential"),
    "psi_zero_at_the_end": ("shaping", E, "psi is 0 at the end", "torch.where(mask, gamma",
                            "torch.where(mask & ((terminal != 'zero') | (actions != last)), gamma"),
    "held_too_early": ("shaping", E, "read one state too early", "last, potential",
                       "last, F.pad(potential, (1, 0))[:, :-1]"),
    "end_from_padding": ("shaping", E, "taken from the last column", LAST, "actions[-1]"),
    "end_from_the_length": ("shaping", E, "the length of the response", LAST,
                            "mask.sum(-1, keepdim=True) - 1"),
    "end_of_row_0": ("shaping", E, "s_end of row 0", LAST, f"{LAST}[0]"),
    "terminal_ignored": ("shaping", E, "`terminal` has no effect", "values = values.detach()",
                         "values, terminal = values.detach(), 'value'"),
    "values_written_into": ("shaping", R, "arguments unchanged",
                            "following = torch.where(actions == last, 0.0, following)",
                            "following[actions == last] = 0.0"),
    "plus": ("tvkd_loss", E, "a plus before alpha", "margin - offset", "margin + offset"),
    "beta_on_psi": ("tvkd_loss", E, "beta scales psi too", "alpha * (", "beta * alpha * ("),
    "absolute_alpha": ("tvkd_loss", E, "the sign of alpha is lost", "alpha * (", "abs(alpha) * ("),
    "psi_of_row_0": ("tvkd_loss", E, "psi of row 0", ".detach()", "[:1].detach()"),
    "psi_not_detached": ("tvkd_loss", R, "no gradient of psi", ".detach()", ""),
    "other_direction": ("kd_loss", E, "the other direction",
                        "F.log_softmax(student, -1), F.softmax(teacher, -1)",
                        "F.log_softmax(teacher, -1), F.softmax(student, -1)"),
    "mean_over_vocabulary": ("kd_loss", E, "mean over the vocabulary too", "mask.sum()",
                             "student.numel()"),
    "shifted_logits": ("kd_loss", E, "the logits are shifted", "[:, :-1]", "[:, 1:]"),
    "kd_of_row_0": ("kd_loss", E, "row 0 alone", BOTH_KD,
                    "student_logits, teacher_logits = student_logits[:1], teacher_logits[:1]\n"
                    "    mask = _non_empty(mask[:1])"),
    "kd_of_rows_means": ("kd_loss", E, "the mean of the rows' means", BOTH_KD,
                         "if len(mask) > 1:\n        rows = zip(student_logits[:, None], "
                         "teacher_logits[:, None], mask[:, None])\n"
                         "        return sum(kd_loss(*row) for row in rows) / len(mask)\n    "
                         + BOTH_KD),
    "kd_over_padding": ("kd_loss", E, "prompt and padding are counted", BOTH_KD,
                        "mask = torch.ones_like(_non_empty(mask))"),
    "kd_over_every_state": ("kd_loss", E, "every state is counted", BOTH_KD,
                            "mask = torch.ones(student_logits.shape[:2]).bool()\n    "
                            "student_logits, teacher_logits = (F.pad(x, (0, 0, 0, 1)) for x in "
                            "(student_logits, teacher_logits))"),
    "cross_entropy": ("kd_loss", E, "the teacher's entropy is not", "divergence / ",
                      "-(F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum() / "),
    "mean_of_rows": ("nll_loss", E, "the mean of the rows' means", NLL,
                     "sum(-x[m.bool()].mean() for x, m in zip(logps, mask)) / len(logps)"),
    "mean_over_rows": ("nll_loss", E, "divided by rows", ".mean()", ".sum() / len(logps)"),
    "prompt_scored_too": ("nll_loss", E, "the prompt is scored too", "_non_empty(mask)",
                          "_non_empty(mask).flip(-1).cumsum(-1).flip(-1) > 0"),
    "padding_scored": ("nll_loss", E, "prompt and padding are scored", NLL, "-logps.mean()"),
}.items()}

# The equations and nothing else: all points for the equation, few for robustness.
NAIVE = {
    "action_logps": "return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]",
    "token_logps": "return action_logps(logits[:, :-1], tokens[:, 1:])",
    "sequence_logps": "return (logps * mask).sum(-1)",
    "dpo_loss": """
        ratio = policy_chosen - ref_chosen - (policy_rejected - ref_rejected)
        return -torch.log(torch.sigmoid(beta * ratio))
    """,
    "soft_value": "return beta * logits.logsumexp(-1)",
    "implicit_value": """
        ratios = (teacher_logps - teacher_ref_logps) * mask
        return beta * torch.cat([torch.zeros_like(ratios[:, :1]), ratios.cumsum(-1)], -1)
    """,
    "shaping": """
        psi = torch.zeros_like(values[:, 1:])
        for row in range(len(mask)):
            actions = mask[row].nonzero().flatten().tolist()
            for t in actions:
                following = values[row, t + 1]
                if t == actions[-1] and terminal != "value":
                    following = values[row, t] if terminal == "hold" else 0.0
                psi[row, t] = gamma * following - values[row, t]
        return psi
    """,
    "tvkd_loss": """
        ratio = policy_chosen - ref_chosen - (policy_rejected - ref_rejected)
        return -torch.log(torch.sigmoid(beta * ratio - alpha * (psi_chosen - psi_rejected)))
    """,
    "kd_loss": """
        student = student_logits[:, :-1].log_softmax(-1)
        teacher = teacher_logits[:, :-1].log_softmax(-1)
        return ((teacher.exp() * (teacher - student)).sum(-1) * mask).sum() / mask.sum()
    """,
    "nll_loss": "return -(logps * mask).sum() / mask.sum()",
}


SOURCE = (ROOT / "tvkd.py").read_text(encoding="utf-8")


def solution(names=(), bodies=None):
    """tvkd.py with mistakes, at most one a function, and with other bodies: {function: body}."""
    lines = SOURCE.splitlines()
    for node in reversed(ast.parse(SOURCE).body):           # from the end: line numbers stay valid
        if isinstance(node, ast.FunctionDef):
            start, end = node.body[0].end_lineno, node.end_lineno
            body = "\n".join(lines[start:end])
            for mistake in (MISTAKES[name] for name in names):
                if mistake.function == node.name:
                    if mistake.right not in body:
                        raise ValueError(f"{node.name} has no {mistake.right!r}: change MISTAKES")
                    body = body.replace(mistake.right, mistake.wrong)
            if node.name in (bodies or {}):
                body = textwrap.indent(textwrap.dedent(bodies[node.name]).strip(), "    ")
            lines[start:end] = body.splitlines()
    return "\n".join(lines) + "\n"


def as_module(source):
    module = types.ModuleType("solution")
    exec(compile(source, "solution.py", "exec"), vars(module))
    return module


def main(arguments):
    if not arguments:
        for name, mistake in MISTAKES.items():
            print(f"{name:24}{mistake.function:16}{mistake.kind}")
        print(f"{'naive':24}{'all':16}robustness")
    elif arguments == ["--help"]:
        print(__doc__)
    elif arguments == ["naive"]:
        sys.stdout.write(solution(bodies=NAIVE))
    elif len(arguments) == 1 and arguments[0] in MISTAKES:
        sys.stdout.write(solution(arguments))
    else:
        print("course.wrong: expected one of the names that `python -m course.wrong` prints, got "
              + ascii(" ".join(arguments))[:200], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
