"""The layout of the repository: who imports whom, the four files, names in the README.

Widths, unused names and encodings are ruff's (pyproject.toml).
"""

import ast
import re
import sys
from dataclasses import fields

import pytest

from conftest import ROOT
from harness.options import Config

BOOK = ("tvkd.py", "model.py", "data.py", "train.py")
FILES = [*ROOT.glob("*.py"), *(path for room in ("harness", "evidence", "course", "tests")
                               for path in ROOT.glob(f"{room}/**/*.py"))]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted(FILES)}
# Arrows go from a later line to itself and the lines before it.
ORDER = (("tvkd",), ("data",), ("model",), ("harness",), ("train",), ("evidence", "course"))


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("tests/")])
def test_imports(name):
    """Nothing imports what comes after it, and nothing but torch, numpy and tiktoken is needed.
    The grader of course/ is a part of pytest."""
    room = name.partition("/")[0].removesuffix(".py")
    place = next(i for i, rooms in enumerate(ORDER) if room in rooms)
    allowed = {module for rooms in ORDER[:place + 1] for module in rooms} | {"torch"}
    allowed |= {"numpy", "tiktoken"} if room not in ("tvkd", "model") else set()
    allowed |= {"pytest", "conftest"} if room == "course" else set()
    nodes = list(ast.walk(TREES[name]))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
    assert {x.split(".")[0] for x in imported} - sys.stdlib_module_names <= allowed


def test_the_top_level_is_the_four_files_without_functions_in_functions():
    assert {name for name in TREES if "/" not in name} == set(BOOK)
    functions = [node for name in BOOK for node in ast.walk(TREES[name])
                 if isinstance(node, ast.FunctionDef)]
    assert [inner.name for outer in functions for inner in ast.walk(outer)
            if isinstance(inner, ast.FunctionDef) and inner is not outer] == []
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []


def test_readme_names_exist():
    """Every test, option and path that the README names is there, and it names the functions of
    its equations."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = {node.name for tree in TREES.values() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(r"`(test_\w+)`", readme)) <= tests
    known = {f.name for f in fields(Config)} | {"help", "impl", "function", "json", "index-url",
                                                "standalone", "nproc_per_node", "sizes", "quick"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", readme)) <= known
    paths = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", readme)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    functions = [node.name for node in TREES["tvkd.py"].body if isinstance(node, ast.FunctionDef)]
    assert sum(f"`{name}`" in readme for name in functions) >= 10
