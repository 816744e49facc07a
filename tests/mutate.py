"""Do the tests of the equations notice a wrong tvkd.py? Changes it in one place at a time, and runs them on each result.

    python tests/mutate.py              a few minutes; the last line: caught N of M
    python tests/mutate.py shaping      the changes of one function alone

A change swaps an operator, a constant, an argument or two names for each other, inverts a condition, drops a `.detach()`, the
end of a slice or an input check. Changes that cannot show are in EQUIVALENT, each with its reason. Exit status 1: fewer than 95%
of all were caught, or one survived without a reason.
"""

import ast
import copy
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60                                                                # more: caught, since an endless loop is noticed too
ENOUGH = 0.95

OPERATORS = {ast.Add: ("Sub",), ast.Sub: ("Add",), ast.Mult: ("Div", "Add"), ast.Div: ("Mult",), ast.Eq: ("NotEq",),
             ast.NotEq: ("Eq",), ast.In: ("NotIn",), ast.NotIn: ("In",)}
NAMES = {"policy_chosen": "policy_rejected", "ref_chosen": "ref_rejected", "psi_chosen": "psi_rejected", "student": "teacher",
         "chosen_logratio": "rejected_logratio", "teacher_logps": "teacher_ref_logps", "student_logits": "teacher_logits",
         "potential": "following"}
NAMES |= {b: a for a, b in NAMES.items()}
CALLS = {"amax": ("amin",), "all": ("any",), "any": ("all",), "sum": ("mean", "amax"), "mean": ("sum",), "cumsum": ("cumprod",),
         "logsumexp": ("amax",), "softmax": ("log_softmax",), "log_softmax": ("softmax",), "logsigmoid": ("sigmoid", "softsign")}
STRINGS = {"zero": ("hold",), "hold": ("zero",), "value": ("hold", "zero"), "sum": ("mean", "batchmean")}
DROPPED = ("detach", "bool", "float")                                       # x.detach() -> x

# (the line, the line changed): why no test can tell the two apart
EQUIVALENT = {
    ("logits = logits.masked_fill(logits.amax(-1, keepdim=True).isneginf(), 0.0)",
     "logits = logits.masked_fill(logits.amax(-1, keepdim=True).isneginf(), 1.0)"):
        "any constant makes the distribution uniform",
    ("actions = torch.arange(mask.shape[1], device=mask.device)", "actions = torch.arange(mask.shape[1])"):
        "only a GPU would tell",
    ("is_last = actions == torch.where(mask, actions, -1).amax(-1, keepdim=True)",
     "is_last = actions == torch.where(mask, actions, (0)).amax(-1, keepdim=True)"):
        "no row is without a response, so the maximum is a real action's",
    ("is_last = actions == torch.where(mask, actions, -1).amax(-1, keepdim=True)",
     "is_last = actions == torch.where(mask, actions, (-2)).amax(-1, keepdim=True)"):
        "as above",
    ("_expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)",
     "_expect_shape((teacher_logits.shape[0], student_logits.shape[1] - 1), mask=mask)"):
        "the line above made sure that both shapes are the same",
    ("_expect_shape((student_logits.shape[0], student_logits.shape[1] - 1), mask=mask)",
     "_expect_shape((student_logits.shape[0], teacher_logits.shape[1] - 1), mask=mask)"):
        "as above",
}


class Mutant(NamedTuple):
    function: str
    line: int
    before: str
    after: str
    source: str                                                             # of the whole file

    @property
    def reason(self):
        return EQUIVALENT.get((self.before, self.after))


def replacements(node):
    """Expressions or statements to stand in the node's place, as source."""
    def changed(**fields):
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return ast.unparse(other)

    match node:
        case ast.BinOp():
            yield from (changed(op=getattr(ast, op)()) for op in OPERATORS.get(type(node.op), ()))
            if isinstance(node.op, (ast.Mult, ast.Div)):
                yield ast.unparse(node.left)
                yield ast.unparse(node.right)
        case ast.Compare():
            yield from (changed(ops=[getattr(ast, op)()]) for op in OPERATORS.get(type(node.ops[0]), ()))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=number)):
            yield from ("0", f"-{number + 1}")
        case ast.UnaryOp():
            yield ast.unparse(node.operand)
        case ast.IfExp():
            yield from (ast.unparse(node.body), ast.unparse(node.orelse))
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int() | float()):
            yield repr(type(node.value)(node.value == 0))                   # 0 -> 1, anything else -> 0
        case ast.Constant(value=str()):
            yield from map(repr, STRINGS.get(node.value, ()))
        case ast.Name(ctx=ast.Load()) if node.id in NAMES:
            yield NAMES[node.id]
        case ast.Slice():
            yield from (changed(**{end: None}) for end in ("lower", "upper") if getattr(node, end))
        case ast.Call():
            if isinstance(node.func, ast.Attribute):
                for name in CALLS.get(node.func.attr, ()):
                    yield changed(func=ast.Attribute(node.func.value, name, ast.Load()))
                if node.func.attr in DROPPED:
                    yield f"({ast.unparse(node.func.value)})"
            for i in range(len(node.args) - 1):
                yield changed(args=[*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2:]])
            for i in range(len(node.keywords)):
                yield changed(keywords=node.keywords[:i] + node.keywords[i + 1:])
        case ast.Return():
            yield f"return -({ast.unparse(node.value)})"
        case ast.If():
            yield from ("False", f"not ({ast.unparse(node.test)})")         # in place of its condition
        case ast.Raise() | ast.Expr():
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in [x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)]:
            yield "pass"                                                    # x = f(x): leave x as it was


def parts(node):
    """The node and all below it, but docstrings, types and what an error says."""
    yield node
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from parts(child)


def mutants(source):
    """Every change of one place of one function, each once. They compile."""
    lines = source.splitlines(keepends=True)
    starts = [sum(len(line.encode()) for line in lines[:i]) for i in range(len(lines))]
    found, known = [], {ast.dump(ast.parse(source))}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in parts(function):
            for new in replacements(node):
                place = node.test if isinstance(node, ast.If) else node
                if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.IfExp)):
                    new = f"({new})"
                start, end = starts[place.lineno - 1] + place.col_offset, starts[place.end_lineno - 1] + place.end_col_offset
                text = (source.encode()[:start] + new.encode() + source.encode()[end:]).decode()
                tree = ast.dump(ast.parse(text))
                if tree not in known:
                    known.add(tree)
                    before = source.splitlines()[place.lineno - 1].split("  #")[0].strip()
                    after = text.splitlines()[place.lineno - 1].split("  #")[0].strip()
                    found.append(Mutant(function.name, place.lineno, before, after, text))
    return found


def grade(path, output, *options):
    """Exit status of pytest --impl=path in a process of its own, what it prints in the file `output`; None where it was ended."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", f"--impl={path}", *options,
               *(str(ROOT / "tests" / name) for name in ("test_tvkd.py", "test_shaping_invariance.py"))]        # quick ones first
    if not hasattr(os, "fork"):
        with open(output, "w", encoding="utf-8") as file:
            try:
                command = [sys.executable, "-m", "pytest", *options]
                return subprocess.run(command, stdout=file, stderr=file, timeout=SECONDS).returncode
            except subprocess.TimeoutExpired:
                return None
    child = os.fork()                                                       # has loaded already what the parent has: torch
    if child == 0:
        status = 3
        try:
            signal.alarm(SECONDS)                                           # ends the child
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            import pytest
            status = int(pytest.main(options))
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else None


def prepare():
    """Load once what every child needs and is slow to load. One thread, which a fork wants."""
    os.environ["OMP_NUM_THREADS"] = "1"                                     # read by torch when it is loaded
    sys.dont_write_bytecode = True                                          # mutants share a name, and may share a time
    import pytest  # noqa: F401
    import torch
    torch.optim.SGD([torch.zeros(1)])


def main(only=()):
    source = (ROOT / "tvkd.py").read_text(encoding="utf-8")
    todo = [mutant for mutant in mutants(source) if not only or mutant.function in only]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.py"
        path.write_text(source, encoding="utf-8")
        if grade(path, os.devnull, "-x") != 0:
            sys.exit("mutate.py: the tests fail on tvkd.py as it is; run pytest first")
        for i, mutant in enumerate(todo):
            path.write_text(mutant.source, encoding="utf-8")
            if grade(path, os.devnull, "-x") == 0:
                survivors.append(mutant)
                print(f"survived  tvkd.py:{mutant.line}  {mutant.function}\n- {mutant.before}\n+ {mutant.after}\n"
                      f"  {'equivalent: ' + mutant.reason if mutant.reason else 'NO REASON GIVEN: sharpen a test'}\n", flush=True)
            if sys.stderr.isatty():
                print(f"{i + 1}/{len(todo)}", end="\r", file=sys.stderr, flush=True)
    caught, equivalent = len(todo) - len(survivors), sum(mutant.reason is not None for mutant in survivors)
    share = caught / max(1, len(todo))
    print(f"caught {caught} of {len(todo)} ({share:.0%}); {len(survivors)} survivors, {equivalent} of them equivalent")
    return int(share < ENOUGH or equivalent < len(survivors))


if __name__ == "__main__":
    prepare()
    sys.exit(main(sys.argv[1:]))
