"""Solutions to try the grader on: typical mistakes, one each, and a correct but naive file.

    python -m course.wrong                      their names
    python -m course.wrong plus > plus.py       tvkd.py with that mistake
    python -m pytest -q --impl=plus.py          what a student would read

A mistake is a change of one function; all else is tvkd.py's. tests/system/test_courses.py grades
them all: each loses points of its own function, and the message names the mistake.
tests/test_hidden.py compares with the naive file, and names a mistake by the numbers it gives.
"""

import ast
import sys
import textwrap
import types
from typing import NamedTuple

from course.assignment import ROOT, command


class Mistake(NamedTuple):
    function: str
    kind: str                   # "equation", or "robustness" where the equation's points stay
    message: str                # a part of the message that a student reads first
    changes: tuple              # (what stands in the function's body, what takes its place), ...


E, R = "equation", "robustness"
GAMMA = "gamma * following - potential"
LAST = "torch.where(mask, actions, -1).amax(-1, keepdim=True)"
REFS = "ref_chosen, ref_rejected, beta"
SIGMOID = "F.logsigmoid(margin)"
SOFT = "_at_least_float32(logits).logsumexp(-1)"
ANY = "_non_empty(mask)"
# function -> name: kind, message, and any number of changes
MISTAKES = {name: Mistake(function, kind, message, tuple(zip(texts[::2], texts[1::2])))
            for function, mistakes in {
    "action_logps": {
        "no_logsumexp": (E, "without - logsumexp", " - logits.logsumexp(-1)", ""),
        "half_precision": (R, "expected torch.float32", "_at_least_float32(logits)", "logits")},
    "token_logps": {
        "no_shift": (E, "no shift", "logits[:, :-1]", "logits[:, 1:]"),
        "nan_through_padding": (R, "[[nan, nan, nan", ".isneginf()", ".isposinf()")},
    "sequence_logps": {
        "mean_for_sum": (E, "the mean over response tokens", "sum(-1)", "sum(-1) / mask.sum(-1)"),
        "mask_off_by_one": (E, "one column too far right", "mask.bool()",
                            "F.pad(mask, (1, 0))[:, :-1].bool()"),
        "eos_unscored": (E, "EOS is not scored", "mask.bool()",
                         "mask.bool() & F.pad(mask, (0, 1))[:, 1:].bool()"),
        "one_sum_for_all": (E, "the rows are added up", "sum(-1)", "sum().expand(len(logps))"),
        "mask_times": (R, "got [nan]", "torch.where(mask.bool(), logps, 0.0)", "(logps * mask)"),
        "nan_to_num": (R, "expected [-inf, nan]", "logps, 0", "logps.nan_to_num(neginf=0), 0")},
    "dpo_loss": {
        "swapped": (E, "chosen and rejected are swapped", "(margin)", "(-margin)"),
        "beta_twice": (E, "beta is applied twice", "(margin)", "(beta * margin)"),
        "no_reference": (E, "the reference is not subtracted", REFS, "*2 * [0 * ref_chosen], beta"),
        "reference_added": (E, "the reference is added", REFS, "-ref_chosen, -ref_rejected, beta"),
        "missing_brackets": (E, "ref_rejected has the wrong sign", REFS,
                             "ref_chosen, -ref_rejected, beta"),
        "mean_of_pairs": (E, "the rows are averaged", SIGMOID,
                          f"{SIGMOID}.mean().expand(len(margin))"),
        "reference_not_detached": (R, "no gradient of reference", "(margin)",
                                   "(margin + (ref_rejected - ref_rejected.detach()))"),
        "log_of_sigmoid": (R, "mistake: log(sigmoid(x))", "F.logsigmoid(margin)",
                           "torch.log(torch.sigmoid(margin))")},
    "soft_value": {
        "log_softmax_first": (E, "log_softmax before logsumexp", ".log", ".log_softmax(-1).log"),
        "divided_by_beta": (E, "logits are already Q/beta", "(logits)", "(logits / beta)"),
        "overflow": (R, "exp overflows", SOFT, "_at_least_float32(logits).exp().sum(-1).log()")},
    "implicit_value": {
        "prompt_scored": (E, "prompt and padding are counted", "mask.bool()", "mask >= 0"),
        "one_state_early": (E, "one state early", "(1, 0)", "(0, 1)"),
        "masked_too_late": (E, "mask the log-ratios before", "mask.bool()", "mask >= 0",
                            ".cumsum(-1)", ".cumsum(-1) * mask"),
        "teacher_alone": (E, "the teacher's reference is not", " - teacher_ref_logps", ""),
        "zero_after_the_end": (E, "after s_end the value is 0", "cumsum(-1)", "cumsum(-1) * mask")},
    "shaping": {
        "gamma_on_wrong_state": (E, "gamma is on Phi(s_t)", GAMMA, "following - gamma * potential"),
        "gamma_on_both": (E, "gamma multiplies both", GAMMA, "gamma * (following - potential)"),
        "end_without_gamma": (E, "gamma belongs on Phi(s_end), too", "gamma * following",
                              "torch.where(actions == last, 1, gamma) * following"),
        "psi_zero_at_the_end": (E, "psi is 0 at the end", "where(mask, gamma",
                                "where(mask & ((terminal != 'zero') | (actions != last)), gamma"),
        "held_too_early": (E, "read one state too early", "last, potential",
                           "last, F.pad(potential, (1, 0))[:, :-1]"),
        "end_from_padding": (E, "taken from the last column", LAST, "actions[-1]"),
        "end_from_the_length": (E, "the length of the response", LAST, "mask.sum(-1, True) - 1"),
        "end_of_row_0": (E, "s_end of row 0", LAST, f"{LAST}[0]"),
        "terminal_ignored": (E, "`terminal` has no effect", "values = values.detach()",
                             "values, terminal = values.detach(), 'value'"),
        "values_written_into": (R, "arguments unchanged", "following = torch.where(actions == last,"
                                " 0.0, following)", "following[actions == last] = 0.0")},
    "tvkd_loss": {
        "plus": (E, "a plus before alpha", "margin - offset", "margin + offset"),
        "beta_on_psi": (E, "beta scales psi too", "alpha * (", "beta * alpha * ("),
        "absolute_alpha": (E, "the sign of alpha is lost", "alpha * (", "abs(alpha) * ("),
        "psi_of_row_0": (E, "psi of row 0", ".detach()", "[:1].detach()"),
        "psi_not_detached": (R, "no gradient of psi", ".detach()", "")},
    "kd_loss": {
        "other_direction": (E, "the other direction", "student, -1), F.softmax(teacher",
                            "teacher, -1), F.softmax(student"),
        "mean_over_vocabulary": (E, "mean over the vocabulary", "mask.sum()", "student.numel()"),
        "shifted_logits": (E, "the logits are shifted", "[:, :-1]", "[:, 1:]"),
        "kd_of_row_0": (E, "row 0 alone", ANY, f"F.pad({ANY}[:1], (0, 0, 0, len(mask) - 1))"),
        "kd_of_rows_means": (E, "the mean of the rows' means", "divergence / mask.sum()",
                             "divergence / mask.sum() if len(mask) == 1 else sum(map(kd_loss, "
                             "*(x[:, None] for x in (student_logits, teacher_logits, mask)))"
                             ") / len(mask)"),
        "kd_over_padding": (E, "prompt and padding are counted", ANY, f"torch.ones_like({ANY})"),
        "kd_over_every_state": (E, "every state is counted", "[:, :-1][mask]", ".flatten(0, 1)",
                                "mask.sum()", "len(student)"),
        "cross_entropy": (E, "the teacher's entropy is not", "divergence / ",
                          "-(F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum() / ")},
    "nll_loss": {
        "mean_of_rows": (E, "the mean of the rows' means", f"-logps[{ANY}].mean()",
                         "sum(-x[m.bool()].mean() for x, m in zip(logps, mask)) / len(logps)"),
        "mean_over_rows": (E, "divided by rows", ".mean()", ".sum() / len(logps)"),
        "prompt_scored_too": (E, "the prompt is scored too", ANY,
                              f"{ANY}.flip(-1).cumsum(-1).flip(-1) > 0"),
        "padding_scored": (E, "prompt and padding are scored", f"[{ANY}]", "")},
}.items() for name, (kind, message, *texts) in mistakes.items()}

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
                for right, wrong in mistake.changes if mistake.function == node.name else ():
                    if right not in body:
                        raise ValueError(f"{node.name} has no {right!r}: change MISTAKES")
                    body = body.replace(right, wrong)
            if node.name in (bodies or {}):
                body = textwrap.indent(textwrap.dedent(bodies[node.name]).strip(), "    ")
            lines[start:end] = body.splitlines()
    return "\n".join(lines) + "\n"


def as_module(source):
    module = types.ModuleType("solution")
    exec(compile(source, "solution.py", "exec"), vars(module))
    return module


def write_solution(names):
    if not names:
        for name, mistake in MISTAKES.items():
            print(f"{name:24}{mistake.function:16}{mistake.kind}")
        print(f"{'naive':24}{'all':16}robustness")
    elif names == ["naive"]:
        sys.stdout.write(solution(bodies=NAIVE))
    elif len(names) == 1 and names[0] in MISTAKES:
        sys.stdout.write(solution(names))
    else:
        raise ValueError("expected one of the names that `python -m course.wrong` prints")


def main(arguments):
    return command("wrong", __doc__, write_solution, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
