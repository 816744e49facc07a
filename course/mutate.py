"""Do the tests notice a wrong tvkd.py? Changes it in one place at a time and grades each result.

    python -m course.mutate             a few minutes; the last line: caught N of M
    python -m course.mutate shaping     the changes of one function

A change swaps an operator, a constant, two arguments or two names, inverts a condition, or drops a
`.detach()`, an end of a slice or a check of the arguments. Changes that no test can notice are in
EQUIVALENT, each with its reason. Exit status 1: fewer than 95% were caught, or one survived
without a reason.
"""

import ast
import copy
import os
import signal
import sys
import types
from typing import NamedTuple

from course.assignment import ROOT

SECONDS = 60            # a test that takes longer counts as failed: an endless loop is noticed too
ENOUGH = 0.95
TESTS = ("test_tvkd.py", "test_hidden.py", "test_shaping_invariance.py")

OPERATORS = {ast.Add: ("Sub",), ast.Sub: ("Add",), ast.Mult: ("Div", "Add"), ast.Div: ("Mult",),
             ast.Eq: ("NotEq",), ast.NotEq: ("Eq",), ast.In: ("NotIn",), ast.NotIn: ("In",)}
NAMES = {"policy_chosen": "policy_rejected", "ref_chosen": "ref_rejected",
         "psi_chosen": "psi_rejected", "chosen_logratio": "rejected_logratio",
         "student": "teacher", "student_logits": "teacher_logits",
         "teacher_logps": "teacher_ref_logps", "potential": "following"}
NAMES |= {b: a for a, b in NAMES.items()}
CALLS = {"amax": ("amin",), "all": ("any",), "any": ("all",), "sum": ("mean", "amax"),
         "mean": ("sum",), "cumsum": ("cumprod",), "logsumexp": ("amax",),
         "softmax": ("log_softmax",), "log_softmax": ("softmax",),
         "logsigmoid": ("sigmoid", "softsign")}
STRINGS = {"zero": ("hold",), "hold": ("zero",), "value": ("hold", "zero"),
           "sum": ("mean", "batchmean")}
DROPPED = ("detach", "bool", "float")                                   # x.detach() -> x

# (the line, the changed line): why no test can tell them apart
EQUIVALENT = {
    ("_expect_shape(logits.shape[:2], tokens=tokens)", "pass"):
        "action_logps refuses the same arguments; only the text of the error differs",
    ("_expect_shape(logits.shape[:2], tokens=tokens)", "_expect_shape(logits.shape[:2])"):
        "as above",
    ("states = states.masked_fill(states.amax(-1, keepdim=True).isneginf(), 0.0)",
     "states = states.masked_fill(states.amax(-1, keepdim=True).isneginf(), 1.0)"):
        "any constant makes the distribution uniform",
    ("actions = torch.arange(mask.shape[1], device=mask.device)",
     "actions = torch.arange(mask.shape[1])"):
        "only a GPU would tell",
    ("last = torch.where(mask, actions, -1).amax(-1, keepdim=True)",
     "last = torch.where(mask, actions, (0)).amax(-1, keepdim=True)"):
        "no row is without a response, so the maximum is the index of a real action",
    ("last = torch.where(mask, actions, -1).amax(-1, keepdim=True)",
     "last = torch.where(mask, actions, (-2)).amax(-1, keepdim=True)"):
        "as above",
    ("_expect_shape(policy_chosen.shape, psi_chosen=psi_chosen, psi_rejected=psi_rejected)",
     "_expect_shape(policy_rejected.shape, psi_chosen=psi_chosen, psi_rejected=psi_rejected)"):
        "_reward_margin makes sure that both shapes are the same",
    ("_expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)",
     "_expect_shape((teacher_logits.shape[0], student_logits.shape[1] - 1), mask=mask)"):
        "the line above makes sure that both shapes are the same",
    ("_expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)",
     "_expect_shape((student_logits.shape[0], teacher_logits.shape[1] - 1), mask=mask)"):
        "as above",
}


class Mutant(NamedTuple):
    function: str
    line: int
    before: str
    after: str
    source: str                                                         # of the whole file

    @property
    def reason(self):
        return EQUIVALENT.get((self.before, self.after))


def changed(node, **fields):
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return ast.unparse(other)


def replacements(node):
    """What may replace the node, as source."""
    match node:
        case ast.BinOp():
            for op in OPERATORS.get(type(node.op), ()):
                yield changed(node, op=getattr(ast, op)())
            if isinstance(node.op, (ast.Mult, ast.Div)):
                yield ast.unparse(node.left)
                yield ast.unparse(node.right)
        case ast.Compare():
            for op in OPERATORS.get(type(node.ops[0]), ()):
                yield changed(node, ops=[getattr(ast, op)()])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=number)):
            yield from ("0", f"-{number + 1}")
        case ast.UnaryOp():
            yield ast.unparse(node.operand)
        case ast.IfExp():
            yield from (ast.unparse(node.body), ast.unparse(node.orelse))
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int() | float()):
            yield repr(type(node.value)(node.value == 0))           # 0 -> 1, others -> 0
        case ast.Constant(value=str()):
            yield from map(repr, STRINGS.get(node.value, ()))
        case ast.Name(ctx=ast.Load()) if node.id in NAMES:
            yield NAMES[node.id]
        case ast.Slice():
            for end in ("lower", "upper"):
                if getattr(node, end):
                    yield changed(node, **{end: None})
        case ast.Call():
            if isinstance(node.func, ast.Attribute):
                for name in CALLS.get(node.func.attr, ()):
                    yield changed(node, func=ast.Attribute(node.func.value, name, ast.Load()))
                if node.func.attr in DROPPED:
                    yield f"({ast.unparse(node.func.value)})"
            for i in range(len(node.args) - 1):
                first, second = node.args[i:i + 2]
                yield changed(node, args=[*node.args[:i], second, first, *node.args[i + 2:]])
            for i in range(len(node.keywords)):
                yield changed(node, keywords=node.keywords[:i] + node.keywords[i + 1:])
        case ast.Return():
            yield f"return -({ast.unparse(node.value)})"
        case ast.If():
            yield from ("False", f"not ({ast.unparse(node.test)})")     # replaces the condition
        case ast.Raise() | ast.Expr():
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in names_in(node.value):
            yield "pass"                                                # x = f(x): x stays


def names_in(node):
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def parts(node):
    """The node and all below it except docstrings, negative numbers and the texts of errors."""
    yield node
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from parts(child)


def mutants(source):
    """Every change of one place of one function, without repetition. All compile."""
    result, known = [], {ast.dump(ast.parse(source))}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            for node in parts(function):
                for new in replacements(node):
                    mutant = mutate(source, function.name, node, new)
                    tree = ast.dump(ast.parse(mutant.source))
                    if tree not in known:
                        known.add(tree)
                        result.append(mutant)
    return result


def mutate(source, function, node, new):
    """The source with `new` in place of the node, or of the condition of an `if`."""
    place = node.test if isinstance(node, ast.If) else node
    if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.IfExp)):
        new = f"({new})"
    lines = source.encode().splitlines(keepends=True)           # ast counts columns in bytes
    before = b"".join(lines[:place.lineno - 1]) + lines[place.lineno - 1][:place.col_offset]
    after = lines[place.end_lineno - 1][place.end_col_offset:] + b"".join(lines[place.end_lineno:])
    text = (before + new.encode() + after).decode()
    old_line, new_line = (x.splitlines()[place.lineno - 1].split("  #")[0].strip()
                          for x in (source, text))
    return Mutant(function, place.lineno, old_line, new_line, text)


def grade(output, *options, tvkd=None):
    """Exit status of pytest in a fork of this process, None if it took too long.

    tvkd: takes the place of tvkd.py, in the same process, since a change of it is no stranger's
    file. What pytest prints goes to the file `output`.
    """
    faster = [f"-pno:{plugin}" for plugin in ("cacheprovider", "logging", "unraisableexception")]
    child = os.fork()                                   # the parent has already imported torch
    if child == 0:
        status = 3
        try:
            signal.alarm(SECONDS)                       # kills the child
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            if tvkd:
                sys.modules["tvkd"] = module = types.ModuleType("tvkd")
                exec(compile(tvkd, "mutant.py", "exec"), vars(module))
            import pytest
            status = int(pytest.main(["-q", *faster, *options]))
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else None


def prepare():
    """Import once what every child needs. One thread, because threads do not survive a fork."""
    os.environ["OMP_NUM_THREADS"] = "1"                 # torch reads it when it is imported
    sys.dont_write_bytecode = True                      # mutants share a name, and may share a time
    import pytest  # noqa: F401
    import torch
    torch.optim.SGD([torch.zeros(1)])


def main(only=()):
    if list(only) == ["--help"]:
        print(__doc__)
        return 0
    source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
    todo = mutants(source)
    functions = list(dict.fromkeys(mutant.function for mutant in todo))
    if not set(only) <= set(functions) or not hasattr(os, "fork"):
        print(f"course.mutate: expected Linux or macOS, and one or more of {', '.join(functions)}, "
              f"got {ascii(' '.join(only))[:200]}", file=sys.stderr)
        return 2
    prepare()
    tests = ["-x", "-mpoints", *(str(ROOT / "tests" / name) for name in TESTS)]
    if grade(os.devnull, *tests) != 0:
        sys.exit("course.mutate: the tests fail on tvkd.py itself; run pytest first")
    survivors = []
    todo = [mutant for mutant in todo if not only or mutant.function in only]
    for i, mutant in enumerate(todo):
        if grade(os.devnull, *tests, tvkd=mutant.source) == 0:
            survivors.append(mutant)
            reason = mutant.reason or "NO REASON GIVEN: sharpen a test"
            print(f"survived  tvkd.py:{mutant.line}  {mutant.function}\n- {mutant.before}\n"
                  f"+ {mutant.after}\n  {reason}\n", flush=True)
        if sys.stderr.isatty():
            print(f"{i + 1}/{len(todo)}", end="\r", file=sys.stderr, flush=True)
    caught, equivalent = len(todo) - len(survivors), sum(bool(m.reason) for m in survivors)
    share = caught / max(1, len(todo))
    print(f"caught {caught} of {len(todo)} ({share:.0%}); "
          f"{len(survivors)} survivors, {equivalent} of them equivalent")
    return int(share < ENOUGH or equivalent < len(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
