"""What a course uses: the assignment, the grader, the wrong solutions and the mutation test.

Exact: which points each wrong solution loses. Not run here: the minutes of `course.mutate`.
"""

import ast
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import types

import pytest
import torch

import conftest
import test_tvkd
import tvkd
from conftest import ROOT
from course import grader, mutate, wrong
from course.assignment import FUNCTIONS, KEPT_HELPERS, TOGETHER, exercise
from course.grader import NOT_JUDGED, Failure, Grader
from course.wrong import MISTAKES, bodies_of, solution

SOURCE = (ROOT / "tvkd.py").read_text(encoding="utf-8")


def rounds():
    """The mistakes in few files: the first one of each function, the second one of each, ..."""
    result = []
    for name, mistake in MISTAKES.items():
        free = [r for r in result if mistake.function not in (MISTAKES[n].function for n in r)]
        if not free:
            result.append([])
        (free or result[-1:])[0].append(name)
    return result


ROUNDS = {f"round{i}": names for i, names in enumerate(rounds())}
ROUND_OF = {name: file for file, names in ROUNDS.items() for name in names}

# file -> (its source, options of the grader)
JOBS = {name: (solution(SOURCE, bodies_of(name)), [])
        for name in ("plus", "no_logsumexp", "naive")}
for file, names in ROUNDS.items():
    JOBS[file] = solution(SOURCE, {MISTAKES[n].function: MISTAKES[n].body for n in names}), []
JOBS |= {
    "right": (SOURCE, []),
    "empty": (exercise(SOURCE), []),
    "log_softmax_first": (solution(SOURCE, bodies_of("log_softmax_first")),
                          ["--function=soft_value"]),
    "one_function": (exercise(SOURCE), ["--function=kd_loss"]),
    "no_such_function": (SOURCE, ["--function=loss"]),
    "verbose": (JOBS["round0"][0], ["-vv", "--function=dpo_loss"]),    # one v undoes a q
}

# Grades them in one process. Only `plus` runs the slow tests of the tree.
GRADE_ALL = """
import json, sys
from course import mutate
mutate.prepare()
status = {}
for name, options in json.loads(sys.argv[1]).items():
    tree = name in ("plus", "log_softmax_first")
    files = ["test_shaping_invariance", "test_tvkd"] if tree else ["test_tvkd"]
    options += [f"--impl={name}.py", f"--json={name}.json"]
    status[name] = mutate.grade(files, *options, output=name + ".txt")
print(json.dumps(status))
"""


class Graded:
    def __init__(self, folder, name, status):
        self.status = status
        self.output = (folder / f"{name}.txt").read_text(encoding="utf-8")
        record = folder / f"{name}.json"
        self.record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None

    @property
    def blocks(self):
        """What the grader prints about failures: {"kd_loss: equation": text}."""
        text = self.output.split("\n====")[0]
        return dict(block.split("\n", 1) for block in text.split("\n---- ")[1:])

    def lost(self, kind):
        entries = self.record["functions"]
        return [name for name in FUNCTIONS
                if entries[name][kind]["points"] < entries[name][kind]["out_of"]]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    for file, (source, _) in JOBS.items():
        (folder / f"{file}.py").write_text(source, encoding="utf-8")
    jobs = json.dumps({file: options for file, (_, options) in JOBS.items()})
    process = subprocess.run([sys.executable, "-c", GRADE_ALL, jobs], cwd=folder, text=True,
                             capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    statuses = json.loads(process.stdout)
    return {file: Graded(folder, file, status) for file, status in statuses.items()}


# --- the assignment -----------------------------------------------------------------------------

def test_assignment_keeps_the_task_and_drops_the_solution():
    module = types.ModuleType("my_tvkd")
    exec(compile(exercise(SOURCE), "my_tvkd.py", "exec"), module.__dict__)
    assert module.__doc__ == tvkd.__doc__ and not hasattr(module, "_reward_margin")
    assert all(hasattr(module, name) for name in KEPT_HELPERS)
    for name in FUNCTIONS:
        original, given = getattr(tvkd, name), getattr(module, name)
        assert inspect.signature(given) == inspect.signature(original)
        assert given.__doc__ == original.__doc__
        with pytest.raises(NotImplementedError):
            given(*inspect.signature(given).parameters)
    lines = exercise(SOURCE).splitlines()
    comments = [line for line in SOURCE.splitlines() if line.startswith("#")]
    assert set(comments) <= set(lines)                                  # the equations
    assert all(len(line) <= 100 for line in lines)


def test_assignment_has_no_comment_from_a_body():
    """`# A mean is wrong` in a body would give the solution away. Those of the helpers stay."""
    tree = ast.parse(exercise(SOURCE))
    lines = exercise(SOURCE).splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            assert lines[node.body[0].end_lineno:node.end_lineno] == [
                "    raise NotImplementedError"]


def test_graded_functions_are_those_of_tvkd():
    """The public functions of tvkd.py in its order; 20 points for equations, 10 for robustness."""
    public = [node.name for node in ast.parse(SOURCE).body
              if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert list(FUNCTIONS) == public
    assert sum(graded.points for graded in FUNCTIONS.values()) == 20
    assert sum(graded.robustness for graded in FUNCTIONS.values()) == 10


# --- the grader ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_tvkd_itself_gets_all_points(graded):
    right = graded["right"]
    assert right.status == 0 and right.record["points"] == right.record["out_of"] == 30
    assert "30 of 30 points" in right.output and right.blocks == {}


@pytest.mark.slow
def test_the_empty_assignment_gets_none_and_a_short_answer(graded):
    """No test passes; the table says "not written" ten times and nothing else is printed."""
    empty = graded["empty"]
    assert empty.status == 1 and empty.record["points"] == 0 and " passed" not in empty.output
    assert empty.output.count("not written") == 10
    assert len(empty.output.splitlines()) < 25


@pytest.mark.slow
def test_a_naive_solution_gets_the_points_for_the_equations(graded):
    """All 20 for the equations, none of the 10 for robustness; one short message per function."""
    naive = graded["naive"]
    assert naive.record["equation"] == 20 and naive.lost("equation") == []
    assert naive.lost("robustness") == list(FUNCTIONS)
    assert len(naive.blocks) == 10 and len(naive.output.splitlines()) < 100


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_its_points_and_is_named(graded, name):
    """The equation's points where the equation is wrong; only robustness where it is right."""
    mistake, result = MISTAKES[name], graded[ROUND_OF[name]]
    assert mistake.function in result.lost(mistake.kind)
    assert (mistake.function in result.lost("equation")) == (mistake.kind == "equation")
    block = result.blocks[f"{mistake.function}: {mistake.kind}"]
    assert mistake.message in block.split("\nresult ")[1]          # the docstring is no message
    assert f"equation   {FUNCTIONS[mistake.function].equation}\n" in block


@pytest.mark.slow
@pytest.mark.parametrize("file", ["plus", "no_logsumexp", *ROUNDS])
def test_a_mistake_costs_points_of_its_function_alone(graded, file):
    """One message per wrong function, exit status 1, and the others keep all points. token_logps
    calls action_logps: a wrong action_logps does not count against it."""
    wrong = {MISTAKES[name].function for name in ROUNDS.get(file, [file])}
    result = graded[file]
    assert result.status == 1 and result.record["complete"]
    assert {*result.lost("equation"), *result.lost("robustness")} == wrong
    assert f"{result.record['points']} of 30 points" in result.output
    assert [key.split(":")[0] for key in result.blocks] == [f for f in FUNCTIONS if f in wrong]


@pytest.mark.slow
def test_what_a_student_reads_about_a_plus_sign(graded):
    """beta 1, alpha 1/2, log-ratios ln 4 and ln 2, psi ln 4 and 0: margin ln 2 - ln 2 = 0, loss
    ln 2 = 0.693147; with the plus ln 4, loss ln(1 + 1/4) = 0.223144. 20 + 10 - 3 - 1 = 26."""
    plus = graded["plus"]
    assert re.search(r"input      tvkd_loss\(policy_chosen=\[-3.613706\], .*, alpha=0.5\)\n"
                     r"result     expected \[0.693147\]\n +got \[0.223144\]\n", plus.output)
    assert "test       test_tvkd_by_hand[0.5" in plus.output
    assert plus.record["equation"] == 17 and "26 of 30 points" in plus.output
    message = plus.record["functions"]["tvkd_loss"]["equation"]["message"]
    assert message.startswith("test_tvkd_by_hand[0.5") and "a plus before alpha" in message
    together = plus.record["functions"][TOGETHER]["equation"]
    assert 0 < together["passed"] < together["tests"] and together["out_of"] == 0


@pytest.mark.slow
def test_robustness_is_not_judged_where_the_equation_is_wrong(graded):
    """The table and the file say so, even if every test of robustness passes, as with abs(alpha).
    Where the equation is right, robustness is judged, and can be 0 of 1."""
    plus, entry = graded["plus"], graded["plus"].record["functions"]["tvkd_loss"]
    assert re.search(r"^tvkd_loss +0 of  3 +\(1 of 5\) +not judged$", plus.output, re.MULTILINE)
    assert f"not judged: {NOT_JUDGED}; until then" in plus.output
    assert entry["equation"]["judged"] and not entry["robustness"]["judged"]
    assert (entry["robustness"]["points"], entry["robustness"]["message"]) == (0, NOT_JUDGED)
    lucky = graded[ROUND_OF["absolute_alpha"]].record["functions"]["tvkd_loss"]["robustness"]
    assert lucky["passed"] == lucky["tests"] and (lucky["points"], lucky["judged"]) == (0, False)
    naive = graded["naive"]
    assert "not judged" not in naive.output
    assert all(naive.record["functions"][name]["robustness"]["judged"] for name in FUNCTIONS)


@pytest.mark.slow
def test_the_message_has_a_hint_and_else_the_smallest_input(graded):
    """log_softmax before logsumexp fails in the tree first, where no hint is given."""
    block = graded["log_softmax_first"].blocks["soft_value: equation"]
    assert "test       test_soft_value\n" in block and "likely mistake: log_softmax" in block
    tests = grader.Tests()
    for name, hint, size in (("a", "", 9), ("b", "", 3), ("c", "", 3)):
        tests.failures.append(Failure(name, "", (), hint, "", size))
    assert tests.most_telling.test == "b"
    tests.failures.append(Failure("d", "", (), "got 2\nlikely mistake: the sum", "", 99))
    assert tests.most_telling.test == "d"


def test_no_two_mistakes_have_one_value(monkeypatch):
    """Two hints for one wrong number would contradict each other. In every call of `close` with
    `mistakes`, those that differ from the right value differ from one another."""
    calls = []
    monkeypatch.setattr(test_tvkd, "close", lambda got, expected, tolerance=0, mistakes=None:
                        calls.append((expected, mistakes or {})))
    for name, test in vars(test_tvkd).items():
        if name.startswith("test_"):
            marks = [m.args for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            names, rows = marks[0] if len(marks) == 1 else ("", [()])
            if len(marks) < 2 and "call" not in names:
                for row in rows:
                    test(*row) if "," in names else test(*([row] if names else []))
    assert sum(bool(mistakes) for _, mistakes in calls) > 12
    for expected, mistakes in calls:
        right = torch.as_tensor(expected, dtype=torch.double).detach()
        values = [value for value in mistakes.values()
                  if not conftest.is_close(right, value, 1e-6)]
        for i, value in enumerate(values):
            for other in values[:i]:
                assert conftest.as_text(torch.tensor(value)) != conftest.as_text(
                    torch.tensor(other)), mistakes


@pytest.mark.slow
def test_one_function_of_an_unfinished_file(graded):
    """--function=kd_loss runs kd_loss's tests, not tvkd_loss's or dpo_loss's; the table has one
    line and no total, the file null for what was not run. A function that is not written yet then
    gets its message, with the line that raised."""
    result = graded["one_function"]
    assert result.status == 1 and not result.record["complete"]
    assert re.search(r"^kd_loss +0 of +2 +\(0 of 1\) .* not written$", result.output, re.MULTILINE)
    assert not re.search("^(total|tvkd_loss|dpo_loss|all together)", result.output, re.MULTILINE)
    entries = result.record["functions"]
    assert [entries[name]["equation"]["points"] for name in FUNCTIONS] == [None] * 8 + [0, None]
    assert [result.record[key] for key in ("points", "equation", "robustness")] == [None] * 3
    line = int(re.search(r"^line +one_function.py:(\d+)$", result.output, re.MULTILINE)[1])
    assert JOBS["empty"][0].splitlines()[line - 1] == "    raise NotImplementedError"
    assert "--function: expected one of action_logps, " in graded["no_such_function"].output


@pytest.mark.slow
def test_verbose_shows_every_failure(graded):
    result = graded["verbose"]
    assert result.output.count("\n---- ") == int(re.search(r"(\d+) failed", result.output)[1]) > 1


@pytest.mark.parametrize("text, message", [
    (None, "expected a Python file, got .*solution.py: no such file"),
    ("def f(:", "solution.py cannot be imported: SyntaxError: invalid syntax"),
    ("import torch\n1 / 0", "solution.py cannot be imported: ZeroDivisionError: division by zero"),
])
def test_a_file_that_cannot_be_graded(tmp_path, monkeypatch, text, message):
    """One line, and 0 points with the same line in the file of --json."""
    monkeypatch.setitem(sys.modules, "tvkd", tvkd)                      # restored afterwards
    if text:
        (tmp_path / "solution.py").write_text(text)
    with pytest.raises(pytest.UsageError, match=message) as error:
        Grader(tmp_path / "solution.py", json_path=tmp_path / "points.json")
    assert "\n" not in str(error.value)
    record = json.loads((tmp_path / "points.json").read_text())
    assert (record["points"], record["out_of"], record["complete"]) == (0, 30, False)
    assert record["error"] == str(error.value)


def test_a_missing_function_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvkd", tvkd)
    monkeypatch.setitem(sys.modules, "reference_tvkd", tvkd)
    text = SOURCE.replace("def shaping(", "def shapping(")
    (tmp_path / "solution.py").write_text(text, encoding="utf-8")
    assert Grader(tmp_path / "solution.py").missing == ["shaping"]
    with pytest.raises(NotImplementedError, match="solution.py has no function shaping"):
        sys.modules["tvkd"].shaping()


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="Windows counts no processor time")
def test_an_endless_loop_fails_with_its_line(tmp_path, monkeypatch):
    """Once the limit is over, later calls fail at once. So does a file whose import never ends."""
    for name in ("tvkd", "reference_tvkd"):
        monkeypatch.setitem(sys.modules, name, tvkd)
    path = tmp_path / "solution.py"
    path.write_text(solution(SOURCE, {"shaping": "while True:\n    pass"}), encoding="utf-8")
    graded, limit = Grader(path), signal.getitimer(signal.ITIMER_PROF)
    monkeypatch.setattr(grader, "SECONDS", 0.05)
    values, mask = torch.zeros(1, 2), torch.ones(1, 1)
    with pytest.raises(TimeoutError, match="shaping did not return within 0.05 seconds"):
        sys.modules["tvkd"].shaping(values, mask)
    line = int(graded.line.removeprefix("solution.py:"))
    assert path.read_text().splitlines()[line - 1].strip() in ("while True:", "pass")
    with pytest.raises(TimeoutError, match="shaping did not return in an earlier test"):
        sys.modules["tvkd"].shaping(values, mask)
    assert graded.remark("shaping") == "does not return"
    assert signal.getitimer(signal.ITIMER_PROF) == limit == (0.0, 0.0)
    path.write_text("while True:\n    pass\n", encoding="utf-8")
    with pytest.raises(pytest.UsageError, match="TimeoutError: the import did not return"):
        Grader(path)


@pytest.mark.parametrize("option", ["--function", "--json"])
def test_options_of_the_grader_need_impl(option):
    config = types.SimpleNamespace(getoption={option: "x"}.get, addinivalue_line=print)
    with pytest.raises(pytest.UsageError, match=f"{option}: expected --impl=FILE beside it"):
        conftest.pytest_configure(config)


def test_close_says_what_differs():
    """A shape, a value with the mistake that has it, and NaN, which is close to nothing."""
    with pytest.raises(AssertionError, match=r"got \[1.0\] \(shape \(1,\), expected \(\)\)"):
        conftest.close(torch.ones(1), 1.0)
    with pytest.raises(AssertionError) as error:
        conftest.close(torch.tensor(2.0), 1.0, mistakes={"one too many": 2, "a zero": 0})
    assert str(error.value) == "expected 1.0\n     got 2.0\nlikely mistake: one too many"
    for got, expected in ((math.nan, 0.0), (math.nan, math.nan), (0.0, math.nan)):
        with pytest.raises(AssertionError):
            conftest.close(got, expected)
    with pytest.raises(AssertionError, match="likely mistake: too large"):
        conftest.close(torch.tensor([math.inf]), [1], mistakes={"too large": [math.inf]})
    conftest.close(torch.tensor([1.0, 2.0]), [1.0, 2.0 + 1e-7])


def test_close_names_the_first_difference_in_a_large_tensor():
    """Of 54 numbers two differ, at (1, 2) and (4, 0). In a small one all digits are printed where
    six are not enough."""
    expected, got = torch.zeros(6, 9).double(), torch.zeros(6, 9).double()
    got[1, 2], got[4, 0] = 0.5, math.nan
    with pytest.raises(AssertionError) as error:
        conftest.close(got, expected)
    assert str(error.value) == "expected 0.0 at index [1, 2]\n     got 0.5; 2 of 54 differ"
    with pytest.raises(AssertionError) as error:
        conftest.close(torch.tensor([1, 2 + 2e-9], dtype=torch.double), [1, 2], 1e-9)
    assert str(error.value) == "expected 2.0 at index [1]\n     got 2.000000002; 1 of 2 differ"


def test_an_unknown_mistake_is_refused(capsys):
    """Exit status 2, the argument on stderr and nothing on stdout, which goes to a file."""
    assert wrong.main(["nosuch"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("course.wrong: expected one of .*, got nosuch\n", err)
    assert wrong.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MISTAKES) + 1


def test_each_test_calls_the_function_it_is_marked_with_alone():
    """So a wrong function fails no other's tests. A test without a mark is not graded: it calls
    none, or it checks the texts in ERRORS."""
    for file in ("test_tvkd.py", "test_shaping_invariance.py"):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark.args[0]).strip("'") for mark in node.decorator_list
                         if ast.unparse(mark.func).endswith("points")]
                if marks not in (["TOGETHER"], [TOGETHER]):
                    assert called(node) == set(marks), node.name
            if isinstance(node, ast.Tuple) and len(node.elts) == 3:     # a row of ERRORS or MASKS
                name, call, _ = node.elts
                if isinstance(call, ast.Lambda):
                    assert called(call) == {name.value}


def called(node):
    names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    return names & set(FUNCTIONS)


# --- the mutation test --------------------------------------------------------------------------

def test_mutants():
    """Enough of them, no two alike, in every function; all compile; every reason in EQUIVALENT
    belongs to a mutant that exists."""
    mutants = mutate.mutants(SOURCE)
    assert len(mutants) >= 60
    assert len({mutant.source for mutant in mutants} | {SOURCE}) == len(mutants) + 1
    assert set(FUNCTIONS) <= {mutant.function for mutant in mutants}
    for mutant in mutants:
        compile(mutant.source, "mutant.py", "exec")
    lines = {line for mutant in mutants for line in (mutant.before, mutant.after)}
    assert set(mutate.EQUIVALENT) <= lines


def test_mutants_of_two_lines():
    """Every change of `return -(x - y.detach())`, by the list at the top of course/mutate.py."""
    source = "def f(x, y):\n    return -(x - y.detach())\n"
    assert {mutant.after for mutant in mutate.mutants(source)} == {
        "return -(-(x - y.detach()))",          # the whole result
        "return (x - y.detach())",              # the unary minus
        "return -((x + y.detach()))",           # the operator
        "return -(x - (y))",                    # the .detach()
    }


# --- course/*.md --------------------------------------------------------------------------------

@pytest.mark.parametrize("page", ["exercises.md", "instructors.md"])
def test_names_on_the_pages_exist(page):
    """Every test, option, module and file that the pages name is there."""
    text = (ROOT / "course" / page).read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    options = re.findall(r"^    (\w+): \w+ = option\(", (ROOT / "harness" / "options.py").read_text(
        encoding="utf-8"), re.MULTILINE)
    allowed = {*options, "impl", "function", "json", "help"}
    assert len(options) > 30 and set(re.findall(r"--([a-z]\w*)", text)) <= allowed
    for module in re.findall(r"python -m ([a-z]+\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for file in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


def test_exercises_are_numbered():
    text = (ROOT / "course" / "exercises.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^## (\d+)\.", text, re.MULTILINE)
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)]
