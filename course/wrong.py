"""Solutions to try the grader on: typical mistakes, one each, and a correct but naive file.

    python -m course.wrong                      their names
    python -m course.wrong plus > plus.py       tvkd.py with that mistake
    python -m pytest -q --impl=plus.py          what a student would read

A mistake is the body of one function; all else is tvkd.py's. tests/system/test_courses.py grades
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
    body: str


MISTAKES = {
    "no_logsumexp": Mistake("action_logps", "equation", "without - logsumexp", """
        return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    """),
    "half_precision": Mistake("action_logps", "robustness", "expected torch.float32", """
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    """),
    "no_shift": Mistake("token_logps", "equation", "no shift", """
        return action_logps(logits[:, 1:], tokens[:, 1:])
    """),
    "nan_through_padding": Mistake("token_logps", "robustness", "[[nan, nan, nan", """
        _expect_shape(logits.shape[:2], tokens=tokens)
        return action_logps(logits[:, :-1], tokens[:, 1:])
    """),
    "mean_for_sum": Mistake("sequence_logps", "equation", "the mean over response tokens", """
        return (logps * mask).sum(-1) / mask.sum(-1)
    """),
    "mask_off_by_one": Mistake("sequence_logps", "equation", "one column too far right", """
        return (logps[:, 1:] * mask[:, :-1]).sum(-1)
    """),
    "eos_unscored": Mistake("sequence_logps", "equation", "EOS is not scored", """
        return (logps[:, :-1] * mask[:, 1:] * mask[:, :-1]).sum(-1)
    """),
    "one_sum_for_all": Mistake("sequence_logps", "equation", "one sum for all rows", """
        return torch.where(mask.bool(), logps, 0.0).sum().expand(len(logps))
    """),
    "nan_to_num": Mistake("sequence_logps", "robustness", "expected [-inf, nan]", """
        return torch.where(mask.bool(), logps.nan_to_num(neginf=0), 0.0).sum(-1)
    """),
    "mask_times": Mistake("sequence_logps", "robustness", "got [nan]", """
        return (logps * mask).sum(-1)
    """),
    "swapped": Mistake("dpo_loss", "equation", "chosen and rejected are swapped", """
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        return -F.logsigmoid(beta * (rejected - chosen))
    """),
    "beta_twice": Mistake("dpo_loss", "equation", "beta is applied twice", """
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        return -F.logsigmoid(beta * (beta * chosen - beta * rejected))
    """),
    "no_reference": Mistake("dpo_loss", "equation", "the reference is not subtracted", """
        return -F.logsigmoid(beta * (policy_chosen - policy_rejected))
    """),
    "reference_added": Mistake("dpo_loss", "equation", "the reference is added", """
        chosen, rejected = policy_chosen + ref_chosen, policy_rejected + ref_rejected
        return -F.logsigmoid(beta * (chosen - rejected))
    """),
    "missing_brackets": Mistake("dpo_loss", "equation", "ref_rejected has the wrong sign", """
        ratio = policy_chosen - ref_chosen - policy_rejected - ref_rejected
        return -F.logsigmoid(beta * ratio)
    """),
    "mean_of_pairs": Mistake("dpo_loss", "equation", "the rows are averaged", """
        margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
        return -F.logsigmoid(margin).mean().expand(margin.shape)
    """),
    "reference_not_detached": Mistake("dpo_loss", "robustness", "no gradient of reference", """
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        return -F.logsigmoid(beta * (chosen - rejected))
    """),
    "log_of_sigmoid": Mistake("dpo_loss", "robustness", "mistake: log(sigmoid(x))", """
        chosen = policy_chosen - ref_chosen.detach()
        rejected = policy_rejected - ref_rejected.detach()
        return -torch.log(torch.sigmoid(beta * (chosen - rejected)))
    """),
    "log_softmax_first": Mistake("soft_value", "equation", "log_softmax before logsumexp", """
        return beta * logits.log_softmax(-1).logsumexp(-1)
    """),
    "divided_by_beta": Mistake("soft_value", "equation", "logits are already Q/beta", """
        return beta * (logits / beta).logsumexp(-1)
    """),
    "overflow": Mistake("soft_value", "robustness", "exp overflows", """
        return beta * torch.log(torch.exp(_at_least_float32(logits)).sum(-1))
    """),
    "prompt_scored": Mistake("implicit_value", "equation", "prompt and padding are counted", """
        return beta * F.pad((teacher_logps - teacher_ref_logps).cumsum(-1), (1, 0))
    """),
    "masked_too_late": Mistake("implicit_value", "equation", "mask the log-ratios before", """
        ratios = (teacher_logps - teacher_ref_logps).cumsum(-1) * mask
        return beta * F.pad(ratios, (1, 0))
    """),
    "teacher_alone": Mistake("implicit_value", "equation", "the teacher's reference is not", """
        return beta * F.pad(torch.where(mask.bool(), teacher_logps, 0.0).cumsum(-1), (1, 0))
    """),
    "zero_after_the_end": Mistake("implicit_value", "equation", "after s_end the value is 0", """
        values = F.pad(((teacher_logps - teacher_ref_logps) * mask).cumsum(-1), (1, 0))
        return beta * values * F.pad(mask, (1, 0))
    """),
    "one_state_early": Mistake("implicit_value", "equation", "one state early", """
        return beta * F.pad(((teacher_logps - teacher_ref_logps) * mask).cumsum(-1), (0, 1))
    """),
    "gamma_on_wrong_state": Mistake("shaping", "equation", "gamma is on Phi(s_t)", """
        last = mask & ~F.pad(mask, (0, 1))[:, 1:]
        potential, following = values[:, :-1], values[:, 1:]
        end = {"zero": potential * 0, "hold": potential, "value": following}[terminal]
        return (torch.where(last, end, following) - gamma * potential) * mask
    """),
    "gamma_on_both": Mistake("shaping", "equation", "gamma multiplies both potentials", """
        last = mask & ~F.pad(mask, (0, 1))[:, 1:]
        end = {"zero": 0.0, "hold": values[:, :-1], "value": values[:, 1:]}[terminal]
        return gamma * (torch.where(last, end, values[:, 1:]) - values[:, :-1]) * mask
    """),
    "psi_zero_at_the_end": Mistake("shaping", "equation", "psi is 0 at the end", """
        last = mask & ~F.pad(mask, (0, 1))[:, 1:]
        psi = (gamma * values[:, 1:] - values[:, :-1]) * mask
        held = (gamma - 1) * values[:, :-1]
        return torch.where(last, {"zero": psi * 0, "hold": held, "value": psi}[terminal], psi)
    """),
    "end_from_the_length": Mistake("shaping", "equation", "the length of the response", """
        phi, rows, end = values.clone(), range(len(mask)), mask.sum(-1)
        phi[rows, end] = {"zero": phi[rows, end] * 0, "hold": phi[rows, end - 1],
                          "value": phi[rows, end]}[terminal]
        return (gamma * phi[:, 1:] - phi[:, :-1]) * mask
    """),
    "end_of_row_0": Mistake("shaping", "equation", "s_end of row 0", """
        end = int(mask[0].nonzero()[-1])
        following = values[:, 1:].clone()
        following[:, end] = {"zero": 0 * following[:, end], "hold": values[:, end],
                             "value": following[:, end]}[terminal]
        return (gamma * following - values[:, :-1]) * mask
    """),
    "values_written_into": Mistake("shaping", "robustness", "arguments unchanged", """
        if terminal not in ("zero", "hold", "value"):
            raise ValueError(terminal)
        _expect_shape((mask.shape[0], mask.shape[1] + 1), values=values)
        mask, values = mask.bool(), values.detach()
        if not mask.any(-1).all():
            raise ValueError("no response")
        for row, response in enumerate(mask):
            end = int(response.nonzero()[-1]) + 1
            if terminal != "value":
                values[row, end] = values[row, end - 1] if terminal == "hold" else 0.0
        return torch.where(mask, gamma * values[:, 1:] - values[:, :-1], 0.0)
    """),
    "hold_without_gamma": Mistake("shaping", "equation", "gamma belongs on Phi(s_end), too", """
        last = mask & ~F.pad(mask, (0, 1))[:, 1:]
        psi = gamma * values[:, 1:] - values[:, :-1]
        end = {"zero": -values[:, :-1], "hold": psi * 0, "value": psi}[terminal]
        return torch.where(last, end, psi) * mask
    """),
    "held_too_early": Mistake("shaping", "equation", "read one state too early", """
        last = mask & ~F.pad(mask, (0, 1))[:, 1:]
        potential, following = values[:, :-1], values[:, 1:]
        held = F.pad(potential, (1, 0))[:, :-1]
        end = {"zero": potential * 0, "hold": held, "value": following}[terminal]
        return (gamma * torch.where(last, end, following) - potential) * mask
    """),
    "terminal_from_padding": Mistake("shaping", "equation", "taken from the last column", """
        phi = values.clone()
        phi[:, -1] = {"zero": phi[:, -1] * 0, "hold": phi[:, -2], "value": phi[:, -1]}[terminal]
        return (gamma * phi[:, 1:] - phi[:, :-1]) * mask
    """),
    "terminal_ignored": Mistake("shaping", "equation", "`terminal` has no effect", """
        return (gamma * values[:, 1:] - values[:, :-1]) * mask
    """),
    "plus": Mistake("tvkd_loss", "equation", "a plus before alpha", """
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        return -F.logsigmoid(beta * (chosen - rejected) + alpha * (psi_chosen - psi_rejected))
    """),
    "beta_on_psi": Mistake("tvkd_loss", "equation", "beta scales psi too", """
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        return -F.logsigmoid(beta * (chosen - rejected - alpha * (psi_chosen - psi_rejected)))
    """),
    "absolute_alpha": Mistake("tvkd_loss", "equation", "the sign of alpha is lost", """
        _expect_shape(policy_chosen.shape, psi_chosen=psi_chosen, psi_rejected=psi_rejected)
        margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
        return -F.logsigmoid(margin - abs(alpha) * (psi_chosen - psi_rejected).detach())
    """),
    "psi_of_row_0": Mistake("tvkd_loss", "equation", "psi of row 0", """
        margin = _reward_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
        return -F.logsigmoid(margin - alpha * (psi_chosen[0] - psi_rejected[0]).detach())
    """),
    "psi_not_detached": Mistake("tvkd_loss", "robustness", "no gradient of psi", """
        chosen = policy_chosen - ref_chosen.detach()
        rejected = policy_rejected - ref_rejected.detach()
        return -F.logsigmoid(beta * (chosen - rejected) - alpha * (psi_chosen - psi_rejected))
    """),
    "other_direction": Mistake("kd_loss", "equation", "the other direction", """
        student = student_logits[:, :-1][mask].log_softmax(-1)
        teacher = teacher_logits[:, :-1][mask].log_softmax(-1)
        return (student.exp() * (student - teacher)).sum(-1).mean()
    """),
    "kd_of_row_0": Mistake("kd_loss", "equation", "row 0 alone", """
        student = student_logits[:1, :-1][mask[:1]].log_softmax(-1)
        teacher = teacher_logits[:1, :-1][mask[:1]].log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    """),
    "kd_of_rows_means": Mistake("kd_loss", "equation", "the mean of the rows' means", """
        student, teacher = (x[:, :-1].log_softmax(-1) for x in (student_logits, teacher_logits))
        divergence = (teacher.exp() * (teacher - student)).sum(-1) * mask
        return (divergence.sum(-1) / mask.sum(-1)).mean()
    """),
    "kd_over_padding": Mistake("kd_loss", "equation", "prompt and padding are counted", """
        student, teacher = (x[:, :-1].log_softmax(-1) for x in (student_logits, teacher_logits))
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    """),
    "kd_over_every_state": Mistake("kd_loss", "equation", "every state is counted", """
        student, teacher = (x.log_softmax(-1) for x in (student_logits, teacher_logits))
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    """),
    "cross_entropy": Mistake("kd_loss", "equation", "the teacher's entropy is not", """
        student = student_logits[:, :-1][mask].log_softmax(-1)
        return -(teacher_logits[:, :-1][mask].softmax(-1) * student).sum(-1).mean()
    """),
    "mean_over_vocabulary": Mistake("kd_loss", "equation", "mean over the vocabulary too", """
        student = student_logits[:, :-1][mask].log_softmax(-1)
        teacher = teacher_logits[:, :-1][mask].softmax(-1)
        return F.kl_div(student, teacher, reduction="mean")
    """),
    "shifted_logits": Mistake("kd_loss", "equation", "the logits are shifted", """
        student = student_logits[:, 1:][mask].log_softmax(-1)
        teacher = teacher_logits[:, 1:][mask].log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    """),
    "mean_of_rows": Mistake("nll_loss", "equation", "the mean of the rows' means", """
        return -((logps * mask).sum(-1) / mask.sum(-1)).mean()
    """),
    "prompt_scored_too": Mistake("nll_loss", "equation", "the prompt is scored too", """
        seen = mask.flip(-1).cumsum(-1).flip(-1) > 0
        return -(logps * seen).sum() / seen.sum()
    """),
    "mean_over_rows": Mistake("nll_loss", "equation", "divided by rows", """
        return -(logps * mask).sum() / len(mask)
    """),
    "padding_scored": Mistake("nll_loss", "equation", "prompt and padding are scored", """
        return -logps.mean()
    """),
}

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


def solution(source, bodies):
    """The source of tvkd.py with other bodies: {function: its body}. Docstrings stay."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):           # from the end: line numbers stay valid
        if isinstance(node, ast.FunctionDef) and node.name in bodies:
            body = textwrap.dedent(bodies[node.name]).strip()
            lines[node.body[0].end_lineno:node.end_lineno] = textwrap.indent(
                body, "    ").splitlines()
    return "\n".join(lines) + "\n"


def functions(bodies):
    """The functions of tvkd.py, some with other bodies, as a module."""
    source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
    module = types.ModuleType("solution")
    exec(compile(solution(source, bodies), "solution.py", "exec"), vars(module))
    return module


def bodies_of(name):
    return NAIVE if name == "naive" else {MISTAKES[name].function: MISTAKES[name].body}


def main(arguments):
    if not arguments:
        for name, mistake in MISTAKES.items():
            print(f"{name:24}{mistake.function:16}{mistake.kind}")
        print(f"{'naive':24}{'all':16}robustness")
        return 0
    if len(arguments) > 1 or arguments[0] not in (*MISTAKES, "naive"):
        print("course.wrong: expected one of the names that `python -m course.wrong` prints, got "
              + " ".join(arguments), file=sys.stderr)
        return 2
    source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
    sys.stdout.write(solution(source, bodies_of(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
