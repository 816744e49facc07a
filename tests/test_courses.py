"""What a course uses: the assignment, the grading of a solution, and the changes that measure the tests themselves.

Exact: which tests fail on which planted mistake. Not run here: the minutes of `python tests/mutate.py`.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
import types

import pytest

import conftest
import mutate
import tvkd
from conftest import ROOT
from make_exercise import FUNCTIONS, TOGETHER, exercise

SOURCE = (ROOT / "tvkd.py").read_text(encoding="utf-8")
NAMES = [name for name in FUNCTIONS if name != TOGETHER]

PLANTED = {
    "right.py": SOURCE,
    "plus.py": SOURCE.replace("margin - alpha *", "margin + alpha *"),
    "end.py": SOURCE.replace("torch.where(mask, actions, -1).amax(-1, keepdim=True)", "mask.shape[1] - 1"),     # as if unpadded
    "empty.py": exercise(SOURCE),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Solution -> (exit status, output, functions some of whose tests failed); each graded in a process of its own."""
    folder = tmp_path_factory.mktemp("course")
    for name, source in PLANTED.items():
        (folder / name).write_text(source, encoding="utf-8")
    code = "import mutate, sys; mutate.prepare(); print(*(mutate.grade(name, name + '.txt') for name in sys.argv[1:]))"
    process = subprocess.run([sys.executable, "-c", code, *PLANTED], cwd=folder, capture_output=True, text=True, timeout=120,
                             env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    outcomes = {}
    for name, status in zip(PLANTED, process.stdout.split(), strict=True):
        output = (folder / f"{name}.txt").read_text(encoding="utf-8")
        table = {f: re.search(rf"^{f} +(\d+) of +(\d+) tests", output, re.MULTILINE) for f in FUNCTIONS}
        assert all(table.values()), output
        outcomes[name] = int(status), output, [f for f, found in table.items() if found[1] != found[2]]
    return outcomes


# --- the assignment --------------------------------------------------------------------------------------------------------

def test_exercise_keeps_what_is_asked_and_drops_what_is_sought():
    module = types.ModuleType("my_tvkd")
    exec(compile(exercise(SOURCE), "my_tvkd.py", "exec"), module.__dict__)
    assert module.__doc__ == tvkd.__doc__ and not hasattr(module, "_reward_margin")
    for name in NAMES:
        mine, given = getattr(tvkd, name), getattr(module, name)
        assert inspect.signature(given) == inspect.signature(mine) and given.__doc__ == mine.__doc__
        with pytest.raises(NotImplementedError):
            given(*inspect.signature(given).parameters)
    text = exercise(SOURCE)
    assert all(line in text.splitlines() for line in SOURCE.splitlines() if line.startswith("#"))   # the equations
    assert "    # " not in text.split('"""', 2)[2]                                              # no comment of a body
    assert all(len(line) <= 130 for line in text.splitlines())


def test_functions_are_those_of_tvkd():
    """Graded: the public functions of tvkd.py, in its order, for 20 points with those for all together."""
    public = [node.name for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert NAMES == public
    assert sum(graded.points for graded in FUNCTIONS.values()) == 20


# --- pytest --impl ---------------------------------------------------------------------------------------------------------

def test_grading_tvkd_itself(graded):
    status, output, failed = graded["right.py"]
    assert status == 0 and failed == [] and "20 of 20 points" in output


def test_grading_the_assignment(graded):
    """Not one test passes, and each says why."""
    status, output, failed = graded["empty.py"]
    assert status == 1 and failed == list(FUNCTIONS) and " 0 of 20 points" in output and " passed" not in output
    assert output.count("\nresult     NotImplementedError") == int(re.search(r"(\d+) failed", output)[1])


def test_grading_a_plus_sign(graded):
    """beta 1, alpha 1/2, log-ratios ln 4 and ln 2, psi ln 4 and 0: margin ln 2 - ln 2 = 0, loss ln 2 = 0.693147; with the plus
    ln 4, loss ln(1 + 1/4) = 0.223144."""
    status, output, failed = graded["plus.py"]
    assert status == 1 and failed == ["tvkd_loss", TOGETHER] and "16 of 20 points" in output
    assert f"equation   {FUNCTIONS['tvkd_loss'].equation}" in output
    assert re.search(r"input      tvkd_loss\(policy_chosen=\[-3.613706\], .*, psi_chosen=\[1.386294\], .*, alpha=0.5\)", output)
    assert re.search(r"expected \[0.693147\]\n +got \[0.223144\]", output)


def test_grading_a_shaping_that_takes_padding_for_the_end(graded):
    """Potential 10 everywhere, gamma 0.7, "zero", one token of three: -10; where the end is not found, 7 - 10 = -3."""
    status, output, failed = graded["end.py"]
    assert status == 1 and failed == ["shaping", TOGETHER] and "15 of 20 points" in output
    assert f"equation   {FUNCTIONS['shaping'].equation}" in output
    assert "mask=[[True, True, True], [True, False, False]], gamma=0.7, terminal='zero')" in output
    assert re.search(r"expected \[-16.0, -10.0\]\n +got \[-16.0, -3.0\]", output)


@pytest.mark.parametrize("text, said", [
    (None, "expected a Python file, got .*solution.py, which is not there"),
    ("def f(:", "solution.py cannot be imported: SyntaxError: invalid syntax"),
    ("import torch\n1 / 0", "solution.py cannot be imported: ZeroDivisionError: division by zero"),
])
def test_a_file_that_cannot_be_graded(tmp_path, monkeypatch, text, said):
    monkeypatch.setitem(sys.modules, "tvkd", tvkd)                                              # put back afterwards
    if text:
        (tmp_path / "solution.py").write_text(text)
    with pytest.raises(pytest.UsageError, match=said) as error:
        conftest.Grader(tmp_path / "solution.py")
    assert "\n" not in str(error.value)


def test_a_missing_function_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvkd", tvkd)
    (tmp_path / "solution.py").write_text(SOURCE.replace("def shaping(", "def shapping("), encoding="utf-8")
    assert conftest.Grader(tmp_path / "solution.py").missing == ["shaping"]
    with pytest.raises(NotImplementedError, match="solution.py has no function shaping"):
        sys.modules["tvkd"].shaping()


def test_each_test_calls_the_function_it_is_marked_with_alone():
    """So a wrong function fails no other's tests. Unmarked tests, which --impl leaves out, call none: they are about the tree."""
    def called(node):
        return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & set(NAMES)

    for file in ("test_tvkd.py", "test_shaping_invariance.py"):
        for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [mark.args[0] for mark in node.decorator_list if ast.unparse(mark.func).endswith("points")]
                owner = ast.unparse(marks[0]).strip("'") if marks else None
                assert owner == "TOGETHER" or called(node) == ({owner} if owner else set()), node.name
            if isinstance(node, ast.Tuple) and len(node.elts) == 3 and isinstance(node.elts[1], ast.Lambda):
                assert called(node.elts[1]) == {node.elts[0].value}                             # a row of ERRORS or MASKS


# --- mutate.py -------------------------------------------------------------------------------------------------------------

def test_mutants():
    """Enough of them, no two alike, in every function; all compile; each excuse belongs to one that exists."""
    mutants = mutate.mutants(SOURCE)
    assert len(mutants) >= 60 and len({mutant.source for mutant in mutants} | {SOURCE}) == len(mutants) + 1
    assert set(NAMES) <= {mutant.function for mutant in mutants}
    for mutant in mutants:
        compile(mutant.source, "mutant.py", "exec")
    assert set(mutate.EQUIVALENT) <= {(mutant.before, mutant.after) for mutant in mutants}
    after = {mutant.after for mutant in mutants}
    assert {"return -F.logsigmoid((margin + alpha * (psi_chosen - psi_rejected).detach()))",
            "return -F.logsigmoid(margin - alpha * (psi_chosen - psi_rejected))"} <= after


# --- EXERCISES.md ----------------------------------------------------------------------------------------------------------

def test_one_function_alone(tmp_path):
    """--function=kd_loss runs its tests and not tvkd_loss's, whose name holds the same letters; the rest is "not run", no total."""
    (tmp_path / "solution.py").write_text(SOURCE, encoding="utf-8")

    def grade(function):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT, ROOT / "tests",
                   "--impl=solution.py", f"--function={function}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    done = grade("kd_loss")
    assert done.returncode == 0 and re.search(r"^kd_loss +(\d+) of +\1 tests +2 of +2 points$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^tvkd_loss +0 of +\d+ tests .* not run$", done.stdout, re.MULTILINE) and "total" not in done.stdout
    assert "--function: expected one of action_logps, " in grade("loss").stderr


def test_exercises_names_exist():
    """Every test, option and function the exercises name is there."""
    text = (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    options = re.findall(r"^    (\w+): \w+ = option\(", (ROOT / "options.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(options) > 30 and set(re.findall(r"--([a-z]\w*)", text)) <= {*options, "impl", "function"}
    assert re.findall(r"^## (\d+)\.", text, re.MULTILINE) == [str(i) for i in range(1, 11)]
