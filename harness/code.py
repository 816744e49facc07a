"""Which code a stage reads: every definition that a name reaches, over any number of calls."""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The modules that make weights, values and numbers. What they import from beside them counts, too.
SOURCES = ("tvkd", "model", "data", "train", "harness.steps", "harness.sampling",
           "harness.evaluate", "harness.tokenizers")
OUTSIDE = "code outside of definitions"         # as torch.set_default_dtype(...): it reaches all


@functools.cache
def definitions():
    """Name -> (SHA-256, names that it reads) of every definition in SOURCES. Comments, docstrings
    and line breaks do not count. Read once: later edits are not imported."""
    texts, reads, sources = {}, {}, list(SOURCES)
    for source in sources:                      # it grows
        path = ROOT / f"{source.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
        for name, text, read in (found for node in tree.body for found in described(node)):
            texts.setdefault(name, set()).add(text)         # one name may stand in two modules
            reads.setdefault(name, set()).update(read)
        imports = {getattr(node, "module", alias.name) or "" for node in tree.body
                   if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        sources += [x for x in sorted(imports) if x not in sources and x.split(".")[0] != "harness"]
    return {name: (hashlib.sha256("\n".join(sorted(texts[name])).encode()).hexdigest(), reads[name])
            for name in texts}


def described(node):
    """What a statement of a module defines: (name, its text without docstrings, names it reads)."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name, f"{getattr(node, 'module', '')} {alias.name}",
                 {alias.name}) for alias in node.names]
    parts = list(ast.walk(node))
    for part in parts:
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):     # a docstring
            part.value.value = ""
    read = {x.id for x in parts if isinstance(x, ast.Name)}
    read |= {x.attr for x in parts if isinstance(x, ast.Attribute)}     # data.reward
    stored = [x.id for target in getattr(node, "targets", [node]) for x in ast.walk(target)
              if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
    names = [node.name] if hasattr(node, "name") else stored or [OUTSIDE]
    runs_the_program = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
    return [] if runs_the_program else [(name, ast.dump(node), read) for name in names]


def reached(names):
    """{definition: SHA-256} of all that these names reach, over any number of calls."""
    known, todo, digests = definitions(), [OUTSIDE, *names], {}
    while todo:
        name = todo.pop()
        if name in known and name not in digests:
            digests[name], read = known[name]
            todo += read
    return digests
