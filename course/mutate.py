"""Do the tests notice a wrong file? Changes it in one place at a time and tests each result.

    python -m course.mutate                         tvkd.py, a few minutes
    python -m course.mutate shaping                 one function of it
    python -m course.mutate model.py steps.cut      another file; a function of a third
    python -m course.mutate --sample=40 train.py    40 of its changes, evenly spread

A change swaps an operator, a constant, two arguments or two names, inverts a condition, or drops a
`.detach()`, an end of a slice or a check of the arguments. What is printed is not changed. A line a
file: caught N of M. Changes that no test can notice are in EQUIVALENT, each with its reason. Exit
status 1: one survived without a reason.
"""

import ast
import copy
import os
import re
import signal
import sys
import tempfile
from importlib.machinery import SourceFileLoader
from typing import NamedTuple

from course.assignment import ROOT

SECONDS = 120           # a change whose tests take longer counts as caught: an endless loop
# Which tests grade a module, quick ones first.
TESTS = {
    "tvkd": ("test_tvkd", "test_hidden", "test_shaping_invariance"),
    "data": ("test_data", "test_model"),
    "model": ("test_model", "test_losses", "test_wiring"),
    "train": ("test_losses", "test_wiring"),
    "harness.steps": ("test_losses", "test_wiring", "system/test_scale"),
    "harness.sampling": ("test_model", "test_wiring"),
    "harness.evaluate": ("test_losses", "test_wiring", "system/test_report"),
    "harness.numbers": ("test_wiring", "system/test_report"),
    "harness.preferences": ("system/test_preferences", "system/test_hostile_data"),
}

# Operators, names, attributes and strings that are easily mixed up.
PAIRS = [pair.split("/") for pair in """
    chosen/rejected policy_chosen/policy_rejected ref_chosen/ref_rejected psi_chosen/psi_rejected
    chosen_logratio/rejected_logratio student/teacher student_logits/teacher_logits model/ref
    teacher_logps/teacher_ref_logps teacher/teacher_ref student_ref/teacher_ref policy/reference
    potential/following alpha/beta beta/teacher_beta prompt/response prompt/chosen val/test
    ids/texts step/steps keys/values first/second start/size min/max argmin/argmax ceil/floor
    amin/amax all/any sum/mean sum/amax cumsum/cumprod logsumexp/amax softmax/log_softmax
    sigmoid/logsigmoid softsign/logsigmoid startswith/endswith Add/Sub Mult/Div Mult/FloorDiv
    BitAnd/BitOr Eq/NotEq In/NotIn Is/IsNot Lt/LtE Lt/Gt LtE/GtE Gt/GtE""".split()]
STRINGS = {"zero": ("hold",), "hold": ("zero",), "value": ("hold", "zero")}
NO_NUMBERS = (ast.Constant, ast.JoinedStr, ast.Dict, ast.List, ast.ListComp, ast.Tuple, ast.Compare)
DROPPED = ("detach", "bool", "float", "abs", "sign", "clamp", "strip", "lower")     # x.abs() -> x

# The changed line, or the line that is dropped: why no test can tell.
EQUIVALENT = {
    "states = states.masked_fill(states.logsumexp(-1, keepdim=True).isneginf(), 0.0)":
        "it is -inf in the same rows",
    "states = states.masked_fill(states.amax(-1, keepdim=True).isneginf(), 1.0)":
        "any constant makes the distribution uniform",
    "last = torch.where(mask, actions, (0)).amax(-1, keepdim=True)":
        "no row is without a response, so the maximum is the index of a real action",
    "last = torch.where(mask, actions, (-2)).amax(-1, keepdim=True)": "as above",
    "_expect_shape((teacher_logits.shape[0], student_logits.shape[1] - 1), mask=mask)":
        "the line above makes sure that both shapes are the same",
    "_expect_shape((student_logits.shape[0], teacher_logits.shape[1] - 1), mask=mask)": "as above",
}


class Mutant(NamedTuple):
    function: str
    line: int
    before: str
    after: str
    source: str                                                         # of the whole file


def changed(node, **fields):
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return ast.unparse(other)


def replacements(node):
    """What may replace the node, as source."""
    match node:
        case ast.BinOp() | ast.AugAssign():
            for op in partners(type(node.op).__name__):
                yield changed(node, op=getattr(ast, op)())
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
                yield from (ast.unparse(node.left), ast.unparse(node.right))
        case ast.BoolOp():
            for i in range(len(node.values)):
                yield changed(node, values=node.values[:i] + node.values[i + 1:])
        case ast.Compare():
            for i, old in enumerate(node.ops):
                for op in partners(type(old).__name__):
                    yield changed(node, ops=[*node.ops[:i], getattr(ast, op)(), *node.ops[i + 1:]])
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
            yield from map(repr, (*STRINGS.get(node.value, ()), *partners(node.value)))
        case ast.Name(ctx=ast.Load()):
            yield from partners(node.id)
        case ast.Attribute(ctx=ast.Load()):
            yield from (changed(node, attr=name) for name in partners(node.attr))
        case ast.Slice():
            yield from (changed(node, **{end: None}) for end in ("lower", "upper"))
        case ast.Call():
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in DROPPED and isinstance(node.func, ast.Attribute):
                yield f"({ast.unparse(node.func.value)})"
            for i in range(len(node.args) - 1 if called not in ("min", "max") else 0):
                first, second = node.args[i:i + 2]
                yield changed(node, args=[*node.args[:i], second, first, *node.args[i + 2:]])
            for keyword in node.keywords:
                if keyword.arg != "device":                             # only a GPU would tell
                    yield changed(node, keywords=[x for x in node.keywords if x is not keyword])
        case ast.Return(value=ast.expr() as value) if not isinstance(value, NO_NUMBERS):
            yield f"return -({ast.unparse(value)})"
        case ast.If():
            yield from ("False", f"not ({ast.unparse(node.test)})")     # replaces the condition
        case ast.Raise() | ast.Expr():
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in names_in(node.value):
            yield "pass"                                                # x = f(x): x stays


def partners(name):
    return [b if name == a else a for a, b in PAIRS if name in (a, b)]


def names_in(node):
    return {getattr(x, "id", getattr(x, "arg", None)) for x in ast.walk(node)} | {"min", "max"}


def parts(node):
    """The node and all below it but docstrings, decorators, and what is printed."""
    yield node
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
    if negative or isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    for child in ast.iter_child_nodes(node):
        text = isinstance(child, ast.Expr) and (isinstance(child.value, ast.Constant)
                                                or ast.unparse(child).startswith("print("))
        if not text and child not in getattr(node, "decorator_list", ()):
            yield from parts(child)


def definitions(source):
    """(name, node) of every function, constant, method (GPT.forward) and field of a class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for x in node.body:
                if isinstance(x, (ast.FunctionDef, ast.AnnAssign)):
                    yield f"{node.name}.{getattr(x, 'name', '')}".removesuffix("."), x
        elif isinstance(node, (ast.FunctionDef, ast.Assign)):
            yield getattr(node, "name", None) or ast.unparse(node.targets[0]), node


def mutants(source):
    """Every change of one place of one definition, without repetition. All compile."""
    result, known = [], {ast.dump(ast.parse(source))}
    for name, definition in definitions(source):
        here = names_in(definition)
        for node in parts(definition):
            for new in replacements(node):
                if isinstance(node, ast.Name) and new not in here:
                    continue                            # it means nothing here
                mutant = mutate(source, name, node, new)
                tree = ast.dump(ast.parse(mutant.source))
                if tree not in known:
                    known.add(tree)
                    result.append(mutant)
    return result


def mutate(source, function, node, new):
    """The source with `new` in place of the node, or of the condition of an `if`."""
    place = node.test if isinstance(node, ast.If) else node
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp)):
        new = f"({new})"
    lines = source.encode().splitlines(keepends=True)           # ast counts columns in bytes
    before = b"".join(lines[:place.lineno - 1]) + lines[place.lineno - 1][:place.col_offset]
    after = lines[place.end_lineno - 1][place.end_col_offset:] + b"".join(lines[place.end_lineno:])
    text = (before + new.encode() + after).decode()
    old_line, new_line = (x.splitlines()[place.lineno - 1].split("  #")[0].strip()
                          for x in (source, text))
    return Mutant(function, place.lineno, old_line, new_line, text)


def grade(output, *options, module=None, source=None):
    """Exit status of pytest in a fork of this process, None if it took too long.

    source: what `import module` gives there. What pytest prints goes to the file `output`.
    """
    faster = [f"-pno:{plugin}" for plugin in ("cacheprovider", "logging", "unraisableexception")]
    child = os.fork()                                   # the parent has already imported torch
    if child == 0:
        status = 3
        try:
            signal.alarm(SECONDS)                       # kills the child
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            read = SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, name: (
                compile(source, self.path, "exec") if name == module else read(self, name))
            import pytest
            status = int(pytest.main(["-q", *faster, *options]))
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else None


def prepare():
    """Import once what every child needs. One thread, because threads do not survive a fork."""
    os.environ["OMP_NUM_THREADS"] = "1"                 # torch reads it when it is imported
    import harness  # noqa: F401                        # first: it sets how threads wait
    import pytest  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    torch.optim.SGD([torch.zeros(1)])


def source_of(module):
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def chosen(name, sample):
    """model.py, steps.cut or shaping -> (the module, at most `sample` changes of what it names)."""
    modules = {module.split(".")[-1]: module for module in TESTS}
    file, _, function = name.removeprefix("harness/").removesuffix(".py").partition(".")
    if file not in modules:
        file, function = "tvkd", name
    found = [x for x in mutants(source_of(modules[file])) if function in ("", x.function)]
    n = min(len(found), sample)
    return modules[file], [found[i * len(found) // n] for i in range(n)]


def explained(module, todo):
    """Grade the mutants of a module; print the survivors and the score."""
    file, survivors, equivalent = module.split(".")[-1] + ".py", 0, 0
    with tempfile.TemporaryDirectory() as folder:
        tests = [str(ROOT / "tests" / f"{name}.py") for name in TESTS[module]]
        options = [os.devnull, "-x", "-mnot slow", f"--basetemp={folder}/pytest", *tests]
        if grade(*options) != 0:
            sys.exit(f"course.mutate: the tests fail on {file} itself; run pytest first")
        for i, mutant in enumerate(todo):
            if grade(*options, module=module, source=mutant.source) == 0:
                reason = EQUIVALENT.get(mutant.before if mutant.after == "pass" else mutant.after)
                survivors, equivalent = survivors + 1, equivalent + bool(reason)
                print(f"survived  {file}:{mutant.line}  {mutant.function}", f"- {mutant.before}",
                      f"+ {mutant.after}", f"  {reason or 'NO REASON GIVEN: sharpen a test'}\n",
                      sep="\n", flush=True)
            if sys.stderr.isatty():
                print(f"{i + 1}/{len(todo)}", end="\r", file=sys.stderr, flush=True)
    caught = len(todo) - survivors
    print(f"{file}: caught {caught} of {len(todo)} ({caught / len(todo):.0%}); "
          f"{survivors} survivors, {equivalent} of them equivalent", flush=True)
    return equivalent == survivors


def main(arguments=()):
    if list(arguments) == ["--help"]:
        print(__doc__)
        return 0
    samples = [int(x[9:]) for x in arguments if re.fullmatch(r"--sample=[1-9]\d*", x)]
    names = [x for x in arguments if not re.fullmatch(r"--sample=[1-9]\d*", x)]
    jobs = [chosen(name, min(samples, default=sys.maxsize)) for name in names or ["tvkd.py"]]
    if not all(todo for _, todo in jobs) or not hasattr(os, "fork"):
        print("course.mutate: expected Linux or macOS, --sample=N, and names such as shaping, "
              f"model.py or steps.cut, got {ascii(' '.join(arguments))[:200]}", file=sys.stderr)
        return 2
    prepare()
    return int(not all([explained(module, todo) for module, todo in jobs]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
