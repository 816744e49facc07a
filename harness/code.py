"""Which code a stage reads: every definition that a name reaches, over any number of calls."""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The modules that make weights, values and numbers: edits to them count.
SOURCES = ("tvkd", "model", "data", "train", "harness.steps", "harness.sampling",
           "harness.evaluate", "harness.numbers")


@functools.cache
def definitions():
    """Name -> (SHA-256, names that it reads) of every definition in SOURCES.

    Comments, docstrings and line breaks do not count. Read once: later edits are not imported.
    """
    found = {}
    for source in SOURCES:
        tree = ast.parse((ROOT / f"{source.replace('.', '/')}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            parts = list(ast.walk(node))
            for part in parts:
                documented = isinstance(part, (ast.FunctionDef, ast.ClassDef))
                if documented and ast.get_docstring(part, clean=False) is not None:
                    part.body[0].value.value = ""
            reads = {x.id for x in parts if isinstance(x, ast.Name)}
            reads |= {x.attr for x in parts if isinstance(x, ast.Attribute)
                      and isinstance(x.value, ast.Name) and x.value.id in SOURCES}
            digest = hashlib.sha256(ast.dump(node).encode()).hexdigest()
            targets = (getattr(x, "id", None) for x in getattr(node, "targets", ()))
            for name in (getattr(node, "name", None), *targets):
                found[name] = digest, reads
    return found


def reached(names):
    """{definition: SHA-256} of all that these names reach, over any number of calls."""
    known, todo, digests = definitions(), list(names), {}
    while todo:
        name = todo.pop()
        if name in known and name not in digests:
            digests[name], reads = known[name]
            todo += reads
    return digests
