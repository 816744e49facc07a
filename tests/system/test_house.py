"""The layout of the repository: who imports whom, widths, encodings, names in the README."""

import ast
import re
import sys
from dataclasses import fields

import pytest

from conftest import ROOT
from harness.options import Config

BOOK = ("tvkd.py", "model.py", "data.py", "train.py")
ROOMS = ("harness", "evidence", "course", "tests")
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py"))]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted(FILES)}
CODE = [name for name in TREES if not name.startswith("tests/")]
# Arrows go from a later line to itself and the lines before it.
ORDER = (("tvkd",), ("data",), ("model",), ("harness",), ("train",), ("evidence", "course"))
THIRD_PARTY = {"torch", "numpy", "tiktoken"}


def imported(tree):
    """Names of the modules that a file imports, dots included."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def roots(tree):
    return {name.split(".")[0] for name in imported(tree)}


def test_the_top_level_is_the_four_files_of_the_method():
    assert {path.name for path in ROOT.glob("*.py")} == set(BOOK)


@pytest.mark.parametrize("name", CODE)
def test_imports(name):
    """Nothing imports what comes after it, and nothing but torch, numpy and tiktoken is needed.
    The grader of course/ is a part of pytest."""
    room = name.partition("/")[0].removesuffix(".py")
    place = next(i for i, rooms in enumerate(ORDER) if room in rooms)
    allowed = {module for rooms in ORDER[:place + 1] for module in rooms}
    third_party = {"tvkd": {"torch"}, "model": {"torch"}}.get(room, THIRD_PARTY)
    if room == "course":
        third_party = third_party | {"pytest", "conftest"}
    if place < 3:
        allowed -= {room}                           # a file of its own
    assert roots(TREES[name]) - sys.stdlib_module_names <= allowed | third_party, name


def test_no_import_goes_in_a_circle():
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
               for name in CODE}
    below = {module: imported(TREES[name]) & set(modules) - {module}
             for module, name in modules.items()}
    while leaves := [module for module, others in below.items() if not others]:
        below = {module: others - set(leaves) for module, others in below.items()
                 if module not in leaves}
    assert below == {}


@pytest.mark.parametrize("name", BOOK)
def test_no_function_in_a_function_and_none_too_long(name):
    """At most 70 lines, which is a page; a function defined in another has to be read twice."""
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert [inner.name for outer in functions for inner in ast.walk(outer)
            if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner is not outer
            ] == []
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 70] == []


@pytest.mark.parametrize("name", TREES)
def test_100_columns(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("name", CODE)
def test_text_files_are_opened_as_utf8(name):
    """On Windows the default encoding is another."""
    for node in ast.walk(TREES[name]):
        call = ast.unparse(node) if isinstance(node, ast.Call) else ""
        if re.match(r"open\(|.*\.(read_text|write_text|fdopen)\(", call):
            assert "encoding=" in call or re.search(r"'[rwa]b'", call), call


def test_readme_names_exist():
    """Every test, option and path that the README names is there, and every function of its table
    of equations."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = {node.name for name, tree in TREES.items() if name.startswith("tests/")
             for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(r"`(test_\w+)`", readme)) <= tests
    known = {f.name for f in fields(Config)} | {"help", "impl", "function", "json", "index-url",
                                                "standalone", "nproc_per_node", "sizes", "quick"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", readme)) <= known
    for path in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", readme):
        assert (ROOT / path).exists(), path
    table = readme.partition("| function |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert named and set(named) <= {getattr(node, "name", "") for node in TREES["tvkd.py"].body}
