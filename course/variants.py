"""This year's convention: the same ten functions under other names, signs and units.

Variant 0 is tvkd.py's own. A variant has three sources: the stubs for students (my_tvkd.py), the
instructor's key, which is tvkd.py and the convention on top of it, and tvkd.py of the release,
which lets model.py, train.py and the tests call a student's functions as if they were tvkd.py's.
"""

import ast
import re
import textwrap
import types

from course.assignment import FUNCTIONS, ROOT, exercise

MY = "my_tvkd"
OPPOSITE, LN2 = ("-{}", "-{}"), "0.6931471805599453"
SURPRISAL = "Surprisals, -log pi, take the place of log-probs: "
BITS = "The result is in bits: nats divided by ln 2.", {"result": ("{} / " + LN2, "{} * " + LN2)}
POLICIES = dict.fromkeys(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"),
                         OPPOSITE)
# (function, what a student reads, {the result or a parameter: (how the key translates it between
# the variant and tvkd.py, how the tests do)}).
CHANGES = {
    "cost": [
        ("shaping", "psi is a cost: every result has the opposite sign.", {"result": OPPOSITE}),
        ("tvkd_loss", "psi is a cost: both sums of psi have the opposite sign.",
         {"psi_chosen": OPPOSITE, "psi_rejected": OPPOSITE})],
    "gamma": [
        ("shaping", "psi is divided by gamma: gamma stands below Phi(s_t).",
         {"result": ("{} / gamma", "{} * gamma")})],
    "alpha": [
        ("tvkd_loss", "alpha stands inside beta's brackets: beta [ ... - alpha [ ... ] ].",
         {"alpha": ("beta * {}", "{} / beta")})],
    "q_values": [
        ("soft_value", "`logits` holds Q-values, beta times the logits.",
         {"logits": ("{} / beta", "{} * beta")})],
    "surprisal": [
        ("action_logps", SURPRISAL + "the result is positive.", {"result": OPPOSITE}),
        ("token_logps", SURPRISAL + "the result is positive.", {"result": OPPOSITE}),
        ("dpo_loss", SURPRISAL + "the four sums are positive.", POLICIES),
        ("tvkd_loss", SURPRISAL + "the four sums are positive, psi stays.", POLICIES),
        ("implicit_value", SURPRISAL + "both are positive.",
         {"teacher_logps": OPPOSITE, "teacher_ref_logps": OPPOSITE}),
        ("nll_loss", SURPRISAL + "`logps` is positive.", {"logps": OPPOSITE})],
    "bits": [("kd_loss", *BITS), ("nll_loss", *BITS)],
}
# Neighbours have little in common, so that last year's file is of little use.
VARIANTS = ((), ("cost", "alpha", "bits"), ("gamma", "q_values", "surprisal"), ("cost", "bits"),
            ("gamma", "alpha", "surprisal", "q_values"))


class Variant:
    def __init__(self, number=0):
        self.number = number
        chosen = VARIANTS[(number - 1) % (len(VARIANTS) - 1) + 1] if number else ()
        changes = [change for name in chosen for change in CHANGES[name]]
        self.unlike = {name: " ".join(text for function, text, _ in changes if function == name)
                       for name in FUNCTIONS}
        self.places = {name: {} for name in FUNCTIONS}
        for function, _, places in changes:
            self.places[function] |= places
        self.names = {name: f"{name}{number or ''}" for name in FUNCTIONS}
        self.source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
        self.signatures = {node.name: node.args for node in ast.parse(self.source).body
                           if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS}

    def parameters(self, function):
        return [arg.arg for arg in self.signatures[function].args]

    def wrappers(self, module, side):
        """Source of ten functions that call those of `module` in the other convention. side 0: they
        are the variant's and call tvkd.py's; side 1: the other way round."""
        sources = []
        for name in FUNCTIONS:
            here, there = (self.names[name], name) if side == 0 else (name, self.names[name])
            places = {place: both[side] for place, both in self.places[name].items()}
            given = ", ".join(places.get(x, "{}").format(x) for x in self.parameters(name))
            result = places.get("result", "{}").format(f"{module}.{there}({given})")
            head = f"def {here}({ast.unparse(self.signatures[name])}):"
            sources += ["", "", *textwrap.wrap(head, 100, subsequent_indent=8 * " "),
                        *textwrap.wrap(f"    return {result}", 100, subsequent_indent=8 * " ")]
        return "\n".join(sources) + "\n"

    # --- the three sources ---------------------------------------------------------------------

    def stubs(self):
        """The assignment in the variant's names, with what is unlike its equations."""
        text = exercise(self.source)
        for ours, theirs in self.names.items():         # not the word "shaping" of a sentence
            unlike = f"UNLIKE THE EQUATION: {self.unlike[ours]}\n" if self.unlike[ours] else ""
            comment = textwrap.indent(textwrap.fill(unlike, 98), "# ") + "\n" * bool(unlike)
            text = text.replace(f"\ndef {ours}(", f"\n{comment}def {theirs}(")
            text = re.sub(rf"(?<=[`=]){ours}\b", theirs, text)
            text = re.sub(rf"(?m)^#     {ours} {{{len(theirs) - len(ours)}}}", f"#     {theirs}",
                          text)
        return text

    def key(self):
        if not self.number:
            return self.source
        return (f"{self.source}\n\n# The convention of variant {self.number}.\nimport types\n\n"
                f"standard = types.SimpleNamespace(**globals())\n{self.wrappers('standard', 0)}")

    def adapter(self):
        return (f'"""The functions of {MY}.py as model.py, train.py and the tests call them."""\n\n'
                f"import {MY}\n{self.wrappers(MY, 1)}")

    def adapted(self, functions):
        """A module `tvkd` that calls these functions, an object with the variant's names."""
        module = types.ModuleType("tvkd")
        vars(module)[MY] = functions
        exec(self.wrappers(MY, 1), vars(module))
        return module
