"""This year's convention: the same ten functions under other names, signs and orders of arguments.

Variant 0 is tvkd.py's own. A variant has three sources: the stubs for students (my_tvkd.py), the
instructor's key, which is tvkd.py and the convention on top of it, and tvkd.py of the release,
which lets model.py, train.py and the tests call a student's functions as if they were tvkd.py's.
"""

import ast
import re
import textwrap
import types
from typing import NamedTuple

from course.assignment import FUNCTIONS, ROOT, exercise

HAS_SOLUTION = (ROOT / "course" / "release.py").exists()        # a release is without
MY = "my_tvkd"


class Change(NamedTuple):
    function: str
    unlike: str                 # what a student reads
    result: tuple = ("{}", "{}")                # tvkd.py's in the variant, and back
    args: dict = {}             # parameter -> the variant's in tvkd.py's terms, and back
    swapped: tuple = ()         # pairs of parameters that change places


REJECTED_FIRST = "The rejected response stands before the chosen one in every pair of arguments."
OPPOSITE = "Surprisals, -log pi, take the place of log-probs: "
CHANGES = {
    "cost": [
        Change("shaping", "psi is a cost: every result has the opposite sign.", ("-{}", "-{}")),
        Change("tvkd_loss", "psi is a cost: both sums of psi have the opposite sign.",
               args={name: (f"-{name}", f"-{name}") for name in ("psi_chosen", "psi_rejected")})],
    "gamma": [
        Change("shaping", "psi is divided by gamma: gamma stands below Phi(s_t).",
               ("{} / gamma", "{} * gamma"))],
    "alpha": [
        Change("tvkd_loss", "alpha stands inside beta's brackets: beta [ ... - alpha [ ... ] ].",
               args={"alpha": ("beta * alpha", "alpha / beta")})],
    "q_values": [
        Change("soft_value", "`logits` holds Q-values, beta times the logits.",
               args={"logits": ("logits / beta", "logits * beta")})],
    "surprisal": [
        Change("action_logps", OPPOSITE + "the result is positive.", ("-{}", "-{}")),
        Change("token_logps", OPPOSITE + "the result is positive.", ("-{}", "-{}")),
        Change("nll_loss", OPPOSITE + "`logps` is positive.", args={"logps": ("-logps",) * 2})],
    "order": [
        Change("dpo_loss", REJECTED_FIRST, swapped=(("policy_chosen", "policy_rejected"),
                                                    ("ref_chosen", "ref_rejected"))),
        Change("tvkd_loss", REJECTED_FIRST, swapped=(("policy_chosen", "policy_rejected"),
                                                     ("ref_chosen", "ref_rejected"),
                                                     ("psi_chosen", "psi_rejected"))),
        Change("kd_loss", "The teacher's logits stand before the student's.",
               swapped=(("student_logits", "teacher_logits"),)),
        Change("implicit_value", "The reference's log-probs stand before the teacher's.",
               swapped=(("teacher_logps", "teacher_ref_logps"),))],
}
# Neighbours have little in common, so that last year's file is of little use.
VARIANTS = ((), ("cost", "alpha", "order"), ("gamma", "q_values", "surprisal"),
            ("cost", "q_values", "order"), ("gamma", "alpha", "surprisal", "q_values"))


def filled(line, indent):
    return textwrap.fill(line, 100, subsequent_indent=" " * indent, break_long_words=False)


class Variant:
    def __init__(self, number=0):
        self.number = number
        chosen = VARIANTS[(number - 1) % (len(VARIANTS) - 1) + 1] if number else ()
        self.changes = [change for name in chosen for change in CHANGES[name]]
        self.names = {name: f"{name}{number or ''}" for name in FUNCTIONS}
        source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
        self.signatures = {node.name: node.args for node in ast.parse(source).body
                           if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS}

    def of(self, function):
        return [change for change in self.changes if change.function == function]

    def unlike(self, function):
        return " ".join(change.unlike for change in self.of(function))

    def parameters(self, function):
        """Their names, in the variant's order."""
        names = [arg.arg for arg in self.signatures[function].args]
        for change in self.of(function):
            for a, b in change.swapped:
                i, j = names.index(a), names.index(b)
                names[i], names[j] = b, a
        return names

    def signature(self, function, variant):
        """`values, mask, gamma=1.0, terminal='value'`. Those with defaults keep their places."""
        if not variant:
            return ast.unparse(self.signatures[function])
        args = ast.parse(f"lambda {ast.unparse(self.signatures[function])}: 0", mode="eval").body
        args.args.args = [ast.arg(name) for name in self.parameters(function)]
        return ast.unparse(args.args)

    def head(self, function, variant):
        name = self.names[function] if variant else function
        return filled(f"def {name}({self.signature(function, variant)}):", len(f"def {name}("))

    def wrapper(self, function, place, to_variant):
        """Source of a function that calls the one in `place`, in the other convention."""
        side, inner = (0, function) if to_variant else (1, self.names[function])
        given = {name: name for name in self.parameters(function)}
        result = "{}"
        for change in self.of(function):
            given |= {name: both[side] for name, both in change.args.items()}
            result = change.result[side].format(result)
        order = [arg.arg for arg in self.signatures[function].args] if to_variant else given
        call = f"{place}.{inner}({', '.join(given[name] for name in order)})"
        body = filled(f"    return {result.format(call)}", 8)
        return f"{self.head(function, to_variant)}\n{body}"

    # --- the three sources ---------------------------------------------------------------------

    def adapter_source(self):
        functions = "\n\n\n".join(self.wrapper(name, MY, to_variant=False) for name in FUNCTIONS)
        return (f'"""The functions of {MY}.py as model.py, train.py and the tests call them."""\n\n'
                f"import {MY}\n\n\n{functions}\n")

    def adapter(self, functions):
        """A module `tvkd` that calls these functions, an object with the variant's names."""
        module = types.ModuleType("tvkd")
        vars(module)[MY] = functions
        exec(self.adapter_source().replace(f"import {MY}\n", ""), vars(module))
        return module

    def key_source(self):
        source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
        if not self.number:
            return source
        functions = "\n\n\n".join(self.wrapper(name, "standard", to_variant=True)
                                  for name in FUNCTIONS)
        return (f"{source}\n\n# The convention of variant {self.number}.\nimport types\n\n"
                f"standard = types.SimpleNamespace(**globals())\n\n\n{functions}\n")

    def key(self):
        """The key as a module; None where there is no solution to make it from."""
        if not HAS_SOLUTION:
            return None
        module = types.ModuleType("key")
        exec(compile(self.key_source(), "key.py", "exec"), vars(module))
        return module

    def stubs(self):
        """tvkd.py without the bodies, in the variant's names, with what is unlike its equations."""
        source = exercise((ROOT / "tvkd.py").read_text(encoding="utf-8"))
        if not self.number:
            return source
        lines = source.splitlines()
        for node in reversed(ast.parse(source).body):
            if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
                start, end = node.lineno - 1, node.body[0].lineno - 1
                if self.of(node.name):
                    at = node.body[0].end_lineno - 1
                    text = [f"    {change.unlike}" for change in self.of(node.name)]
                    last = lines[at].removesuffix('"""').rstrip()
                    lines[at:at + 1] = [*[last] * bool(last), "", "    UNLIKE THE EQUATIONS ABOVE:",
                                        *text, '    """']
                lines[start:end] = [self.head(node.name, True)]
        text = "\n".join(lines) + "\n"
        for ours, theirs in self.names.items():         # not the word "shaping" of a sentence
            text = re.sub(rf"(?<=[`=]){ours}\b", theirs, text)
            text = re.sub(rf"(?m)^#     {ours}  ?", f"#     {theirs} ", text)
        return text
