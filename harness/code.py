"""Which code a stage reads: every definition that a name reaches, over any number of calls."""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The modules that make weights, values and numbers, and what they import outside of harness/:
# edits to them count.
SOURCES = ("tvkd", "model", "data", "train", "harness.steps", "harness.sampling",
           "harness.evaluate", "harness.numbers", "harness.psi", "harness.tokenizers")
OUTSIDE = "code outside of definitions"         # as torch.set_default_dtype(...): it reaches all


@functools.cache
def definitions():
    """Name -> (SHA-256, names that it reads) of every definition in SOURCES.

    Comments, docstrings and line breaks do not count. Read once: later edits are not imported.
    """
    texts, reads, sources = {}, {}, list(SOURCES)
    for source in sources:                      # it grows
        for node in ast.parse(path_of(source).read_text(encoding="utf-8")).body:
            for name, text, read in described(node):
                texts.setdefault(name, set()).add(text)     # one name may stand in two modules
                reads.setdefault(name, set()).update(read)
            for module in modules_of(node):
                if module not in sources and path_of(module).is_file():
                    sources.append(module)
    return {name: (hashlib.sha256("\n".join(sorted(texts[name])).encode()).hexdigest(), reads[name])
            for name in texts}


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def modules_of(node):
    """The modules that a statement imports, without those of harness/."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
        [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [name for name in names if name.split(".")[0] != "harness"]


def described(node):
    """What a statement of a module defines: (name, its text without docstrings, names it reads)."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield (alias.asname or alias.name, f"{getattr(node, 'module', '')} {alias.name}",
                   {alias.name})
        return
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    runs_the_program = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
    if is_text or runs_the_program:             # the latter reaches all
        return
    parts = list(ast.walk(node))
    for part in parts:
        documented = isinstance(part, (ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(part, clean=False) is not None:
            part.body[0].value.value = ""
    read = {x.id for x in parts if isinstance(x, ast.Name)}
    read |= {x.attr for x in parts if isinstance(x, ast.Attribute)}     # data.reward
    names = [node.name] if hasattr(node, "name") else [
        x.id for target in getattr(node, "targets", [node]) for x in ast.walk(target)
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
    for name in names or [OUTSIDE]:
        yield name, ast.dump(node), read


def reached(names):
    """{definition: SHA-256} of all that these names reach, over any number of calls."""
    known, todo, digests = definitions(), [OUTSIDE, *names], {}
    while todo:
        name = todo.pop()
        if name in known and name not in digests:
            digests[name], read = known[name]
            todo += read
    return digests
