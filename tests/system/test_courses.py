"""What a course uses: assignment, release, grader, wrong solutions, mutation test, pages.

Exact: which points each wrong solution loses. Not run here: the minutes of `course.mutate`.
"""

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
from dataclasses import fields

import pytest
import torch

import conftest
import test_hidden
import test_tvkd
import tvkd
from conftest import ROOT
from course import assignment, grader, mutate, release, wrong
from course.assignment import FUNCTIONS, GRADED, KEPT_HELPERS, TOGETHER, exercise
from course.grader import MARK, Grader, Student
from course.variants import VARIANTS, Variant
from course.wrong import MISTAKES, NAIVE, SOURCE, solution
from harness.options import Config


def rounds():
    """The mistakes in few files: the first one of each function, the second one of each, ..."""
    result = {}
    for name, mistake in MISTAKES.items():
        i, function = 0, mistake.function.replace("token", "action")    # the one calls the other
        while function in result.setdefault(f"round{i}", {}):
            i += 1
        result[f"round{i}"][function] = name
    return {file: list(names.values()) for file, names in result.items()}


ROUNDS = rounds()
ROUND_OF = {name: file for file, names in ROUNDS.items() for name in names}


def stubs_with(body):
    return solution(bodies=dict.fromkeys(FUNCTIONS, body))


# Files that try for points without a solution: an empty file gets 0.
CHEATS = {
    "skips": stubs_with("import pytest; pytest.skip()"),
    "exits": stubs_with("import os; os._exit(0)"),
    "exits_by_pytest": "import pytest\npytest.exit('enough', returncode=0)\n",
    "patches_all": "import sys\nfor module in list(sys.modules.values()):\n"
                   "    for name in ('points', 'close', 'is_close', 'Grader'):\n"
                   "        if hasattr(module, name):\n"
                   "            setattr(module, name, lambda *a, **k: True)\n"
                   + stubs_with("return torch.zeros(1)"),
    "fakes_answers": "import os\nfor pipe in range(3, 20):\n"
                     "    try: os.write(pipe, b'{}\\n' * 99)\n    except OSError: pass\n",
}

# file -> (its source, options of the grader)
JOBS = {file: (solution(names), []) for file, names in {"plus": ["plus"], **ROUNDS}.items()}
JOBS |= {name: (source, []) for name, source in CHEATS.items()}
JOBS |= {
    "naive": (solution(bodies=NAIVE), []), "right": (SOURCE, []), "empty": (exercise(SOURCE), []),
    "one_function": (exercise(SOURCE), ["--function=kd_loss"]),
    "no_such_function": (SOURCE, ["--function=loss"]),
    "last_year": (Variant(1).key(), ["--variant=2"]),
}

# Grades them in forks of one process. Only two run the slow tests of the tree.
GRADE_ALL = """
import json, sys
from course import mutate
mutate.prepare()
mutate.SECONDS = 600
status = {}
for name, options in json.loads(sys.argv[1]).items():
    files = ["test_tvkd.py", "test_hidden.py"]
    files += ["test_shaping_invariance.py"] * (name in ("plus", "right"))
    options += [f"--impl={name}.py", f"--json={name}.json"]
    status[name] = mutate.grade(name + ".txt", *options, *(sys.argv[2] + file for file in files))
print(json.dumps(status))
"""


class Graded:
    """What the grader printed and wrote about a file."""

    def __init__(self, folder, name, status):
        self.status = status
        self.output = (folder / f"{name}.txt").read_text(encoding="utf-8")
        record = folder / f"{name}.json"
        self.record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        self.tests = {test["name"]: test for test in self.record.get("tests", ())}
        # of failures: {"kd_loss: equation": text}
        blocks = self.output.split("\n====")[0].split("\n---- ")[1:]
        self.blocks = dict(block.split("\n", 1) for block in blocks)

    def lost(self, kind):
        return [name for name in FUNCTIONS if self.tests[f"{name}: {kind}"]["score"]
                < self.tests[f"{name}: {kind}"]["max_score"]]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    for file, (source, _) in JOBS.items():
        (folder / f"{file}.py").write_text(source, encoding="utf-8")
    jobs = json.dumps({file: options for file, (_, options) in JOBS.items()})
    process = subprocess.run([sys.executable, "-c", GRADE_ALL, jobs, f"{ROOT / 'tests'}{os.sep}"],
                             cwd=folder, text=True, capture_output=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    return {file: Graded(folder, file, x) for file, x in json.loads(process.stdout).items()}


# --- the assignment -----------------------------------------------------------------------------

def test_assignment_keeps_the_task_and_drops_the_solution():
    """Docstrings, signatures, equations and helpers stay; a comment in a body, which could give
    the solution away, goes with it. The graded functions stand in tvkd.py's order."""
    source = exercise(SOURCE)
    module, lines = wrong.as_module(source), source.splitlines()
    assert module.__doc__ == tvkd.__doc__ and not hasattr(module, "_reward_margin")
    assert all(hasattr(module, name) for name in KEPT_HELPERS)
    graded = [node for node in ast.parse(source).body if getattr(node, "name", "") in FUNCTIONS]
    assert [*[node.name for node in graded], TOGETHER] == list(GRADED)
    for node in graded:
        original, given = getattr(tvkd, node.name), getattr(module, node.name)
        assert inspect.signature(given) == inspect.signature(original)
        assert given.__doc__ == original.__doc__
        assert lines[node.body[0].end_lineno:node.end_lineno] == ["    raise NotImplementedError"]
    assert {line for line in SOURCE.splitlines() if line.startswith("#")} <= set(lines)
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("command, arguments", [
    (assignment, ["my.py"]), (wrong, ["nosuch"]), (wrong, ["plus", "x"]), (mutate, ["nosuch"]),
    (release, ["a"]), (release, ["a", "--variant=x"]), (release, ["--x", "a"])])
def test_other_arguments_are_refused(capsys, monkeypatch, tmp_path, command, arguments):
    """Exit status 2, one printable line on stderr, nothing on stdout; --help prints the help."""
    monkeypatch.chdir(tmp_path)
    assert command.main([*arguments, "\x1b[31m"]) == 2 and list(tmp_path.iterdir()) == []
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{command.__name__}: expected ")
    assert err.count("\n") == 1 and err[:-1].isprintable()
    assert command.main(["--help"]) == 0
    assert capsys.readouterr().out == f"{command.__doc__}\n"


# --- the grader ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_tvkd_itself_gets_all_points_and_a_naive_file_those_of_the_equations(graded):
    """32, and 22 with ten short messages."""
    right, naive = graded["right"], graded["naive"]
    assert naive.record["score"] == 22 and naive.lost("robustness") == list(FUNCTIONS)
    assert len(naive.blocks) == 10 and len(naive.output.splitlines()) < 130
    assert right.status == 0 and "32 of 32 points" in right.output and right.blocks == {}
    assert right.record["score"] == sum(x["max_score"] for x in right.record["tests"]) == 32
    assert len(right.tests) == 21 and right.record["tests"][0] == {
        "name": "action_logps: equation", "score": 1, "max_score": 1, "output": "",
        "extra_data": {"tests": 2, "passed": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHEATS, "last_year", "empty"])
def test_a_cheat_gets_what_an_empty_file_gets(graded, name):
    """Nothing. For the empty file, the table says "not written" and nothing else is printed."""
    output = graded[name].output
    assert graded[name].status != 0 and graded[name].record["score"] == 0
    assert name != "empty" or output.count("not written") == 10 and output.count("\n") < 25


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_its_points_and_is_named(graded, name):
    """The equation's points where the equation is wrong; only robustness where it is right."""
    mistake, result = MISTAKES[name], graded[ROUND_OF[name]]
    assert mistake.function in result.lost(mistake.kind)
    assert (mistake.function in result.lost("equation")) == (mistake.kind == "equation")
    block = result.blocks[f"{mistake.function}: {mistake.kind}"]
    assert mistake.message in block.split("\nresult ")[1]          # the docstring is no message
    parts = {"gamma_on_both": 2, "end_from_padding": 3, "psi_zero_at_the_end": 2}   # of shaping
    assert name not in parts or result.tests["shaping: equation"]["score"] == parts[name]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["plus", *ROUNDS])
def test_a_mistake_costs_points_of_its_function_alone(graded, file):
    """One message per wrong function, exit status 1, and the others keep all points. token_logps
    calls action_logps and needs it right."""
    mistaken = {MISTAKES[name].function for name in ROUNDS.get(file, [file])}
    mistaken |= {"token_logps"} if "action_logps" in mistaken else set()
    result = graded[file]
    assert f"equation   {FUNCTIONS[min(mistaken)].equation}\n" in result.output
    assert result.status == 1 and f"{result.record['score']} of 32 points" in result.output
    assert {*result.lost("equation"), *result.lost("robustness")} == mistaken
    assert [key.split(":")[0] for key in result.blocks] == [f for f in FUNCTIONS if f in mistaken]


@pytest.mark.slow
def test_what_a_student_reads_about_a_plus_sign(graded):
    """beta 1, alpha 1/2, log-ratios ln 4 and ln 2, psi ln 4 and 0: margin ln 2 - ln 2 = 0, loss
    ln 2 = 0.693147; with the plus ln 4, loss ln(1 + 1/4) = 0.223144. 32 - 3 - 2 points: the file
    as a whole is wrong, too."""
    plus = graded["plus"]
    assert re.search(r"input      tvkd_loss\(policy_chosen=\[-3.613706], .*, alpha=0.5\)\n"
                     r"result     expected \[0.693147\]\n +got \[0.223144\]\n", plus.output)
    assert "test       test_tvkd_by_hand[0.5" in plus.output and "27 of 32 points" in plus.output
    assert re.search(r"^tvkd_loss +0 of  3 +\(1 of 6\) +1 of  1 +\(9 of 9\)$", plus.output, re.M)
    assert plus.tests["tvkd_loss: equation"]["output"].startswith("test_tvkd_by_hand[0.5")
    assert plus.tests[f"{TOGETHER}: equation"]["score"] == 0


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
            if len(marks) < 2 and "call" not in names and "inputs" not in names:
                for row in (getattr(row, "values", row) for row in rows):
                    test(*row) if "," in names else test(*([row] if names else []))
    assert sum(bool(mistakes) for _, mistakes in calls) > 20
    for expected, mistakes in calls:
        right = torch.as_tensor(expected, dtype=torch.double).detach()
        values = [conftest.as_text(torch.as_tensor(value).double())
                  for value in mistakes.values() if not conftest.is_close(right, value, 1e-6)]
        assert len(set(values)) == len(values), mistakes


@pytest.mark.slow
def test_one_function_of_an_unfinished_file(graded):
    """--function=kd_loss runs kd_loss's tests alone; the table has one line and no total, the file
    null for what was not run. What is not written gets its message, with the line that raised."""
    result = graded["one_function"]
    assert result.status == 1 and result.record["score"] is None
    assert re.search(r"^kd_loss +0 of +2 +\(0 of 2\) .* not written$", result.output, re.M)
    assert not re.search("^(total|tvkd_loss|dpo_loss|all together)", result.output, re.M)
    scores = [result.tests[f"{name}: equation"]["score"] for name in FUNCTIONS]
    assert scores == [None] * 8 + [0, None]
    line = int(re.search(r"^line +one_function.py:(\d+)$", result.output, re.M)[1])
    assert JOBS["one_function"][0].splitlines()[line - 1] == "    raise NotImplementedError"
    assert "--function: expected one of action_logps, " in graded["no_such_function"].output


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(grader, "SECONDS", 300)         # a busy machine is no reason to fail


def student(folder, source):
    path = folder / "solution.py"
    source = source.encode() if isinstance(source, str) else source
    os.mkfifo(path) if source is None else path.write_bytes(source)
    return Student(path)


def test_a_call_goes_there_and_back(tmp_path):
    """Value, gradient and changed arguments: y = 3 x0 + x1, x1 written into."""
    there = student(tmp_path, "def shaping(a, b, k=1):\n    y = k * a + b\n    b.zero_()\n"
                              "    return y\n")
    a, b = torch.ones(2, requires_grad=True), torch.tensor([1.0, math.nan])
    y = there.call("shaping", a, b, k=3)
    y[0].backward()
    assert conftest.as_text(y.detach()) == "[4.0, nan]" and a.grad.tolist() == [3, 0]
    assert b.tolist() == [0, 0]
    with pytest.raises(NotImplementedError, match="no function kd_loss"):
        there.call("kd_loss")
    there.stop()


@pytest.mark.slow
@pytest.mark.parametrize("body, kind, text", [
    ("return [1.0]", TypeError, "expected a tensor"), ("1 / 0", Exception, "ZeroDivisionError"),
    ("raise ValueError('no')", ValueError, "no"), ("exit(0)", Exception, "SystemExit"),
    ("import os; os._exit(0)", TimeoutError, "ended by itself"),
    ("import ctypes; ctypes.string_at(0)", TimeoutError, "ended by itself"),
    ("import os; os.closerange(0, 99)", TimeoutError, "ended by itself"),
    ("while True: pass", TimeoutError, "no answer within"),
    ("import time; x.register_hook(lambda _: time.sleep(99)); return x + 1", TimeoutError,
     "no answer within"),
    ("return torch.zeros(3 * 10 ** 9)", Exception, "memory")])
def test_what_a_function_may_do_instead_of_an_answer(tmp_path, monkeypatch, body, kind, text):
    there = student(tmp_path, f"import torch\ndef nll_loss(x):\n    {body}\n")
    if "within" in text:
        monkeypatch.setattr(grader, "SECONDS", 1)
    with pytest.raises(kind, match=text):
        there.call("nll_loss", torch.zeros(1, requires_grad=True)).sum().backward()
    there.stop()


@pytest.mark.slow
@pytest.mark.parametrize("source, text", [
    ("def f(:", r"SyntaxError: invalid syntax"), ("1 / 0", r"ZeroDivisionError: .*\(line 1\)"),
    (b"x = '\xff'", "SyntaxError|UnicodeDecodeError"), ("import tvkd", "tvkd"),
    ("import os; os._exit(0)", "ended by itself"), ("import course", "No module named 'course'"),
    (None, "no regular file")])
def test_a_file_that_cannot_be_graded(tmp_path, source, text):
    """In one line."""
    with pytest.raises(pytest.UsageError, match=f"--impl: .*solution.py.*{text}") as error:
        student(tmp_path, source)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("option", [option for option, _, _ in conftest.GRADING])
def test_options_of_the_grader_need_impl(option):
    config = types.SimpleNamespace(getoption={option: "x"}.get, addinivalue_line=print)
    with pytest.raises(pytest.UsageError, match=f"{option}: expected --impl=FILE beside it"):
        conftest.pytest_configure(config)


@pytest.mark.parametrize("name", ["mine.py", "other.json", "", "folder", "no/file", "link"])
def test_a_file_of_another_stays(tmp_path, name):
    """The student's file, a folder, a link: refused in one line before anything is graded."""
    for file in ("mine.py", "other.json"):
        (tmp_path / file).write_text('{"score": 32}', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("own")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(pytest.UsageError, match="^--json: expected") as error:
        Grader(tmp_path / "mine.py", target=tmp_path / name)
    assert str(error.value).isprintable() and before == sorted(tmp_path.rglob("*"))
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == '{"score": 32}'


def test_a_record_of_an_earlier_grading_goes_first(tmp_path):
    """Also where the new file cannot be imported: then the record says 0."""
    (tmp_path / "bad.py").write_text("1 / 0", encoding="utf-8")
    points = tmp_path / "points.json"
    points.write_text(f"{MARK}}}, \"score\": 32}}", encoding="utf-8")
    with pytest.raises(pytest.UsageError, match="bad.py: expected a Python file that can be"):
        Grader(tmp_path / "bad.py", target=points)
    text = points.read_text(encoding="utf-8")
    assert text.startswith(MARK) and '"score": 0,\n "output": "--impl: bad.py: expected' in text


# --- the release ---------------------------------------------------------------------------------

@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_a_key_under_its_adapter_is_tvkd(number):
    """Every function of the key, called through the adapter, gives tvkd.py's numbers."""
    variant = Variant(number)
    adapted = variant.adapted(wrong.as_module(variant.key()))
    for name, _, *options in test_hidden.CASES:
        given = test_hidden.arguments(name, number, *options)
        got, right = (test_hidden.called(getattr(module, name), name, given)
                      for module in (adapted, tvkd))
        conftest.close(got[0], right[0], 1e-12)
        for gradient, expected in zip(got[1], right[1]):
            conftest.close(gradient, expected, 1e-12)
    assert len({*variant.names.values()}) == 10
    assert all(len(line) <= 102 for source in (release.stubs(variant), variant.adapter())
               for line in source.splitlines())


@pytest.mark.slow
def test_the_release_has_no_solution_and_works(tmp_path):
    """0 points as it is and all with the key; nothing of the bodies, the loops or the proofs."""
    folder, key = tmp_path / "course", tmp_path / "course-key"
    assert release.main([str(folder), "--variant=3"]) == 0
    assert release.main([str(folder)]) == 2                     # not over what is there
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*")
                     if path.suffix in (".py", ".md"))
    for body in NAIVE.values():
        assert max((line.strip() for line in body.splitlines()), key=len) not in text
    for proof in ("Phi(s_p) is the same", "sum r = beta log-ratio", "sums to -Phi"):
        assert proof not in text
    assert {"answers.md", "my_tvkd.py"} == {path.name for path in key.iterdir()}
    points = []
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", "--impl="
                        "my_tvkd.py", "--json=points.json", "tests/test_tvkd.py"], cwd=folder)
        points.append(json.loads((folder / "points.json").read_text(encoding="utf-8"))["score"])
        (folder / "my_tvkd.py").write_bytes((key / "my_tvkd.py").read_bytes())
    assert points == [0, 32]


LARGE = torch.zeros(6, 9)
LARGE[1, 2], LARGE[4, 0] = 0.5, math.nan


@pytest.mark.parametrize("got, expected, mistakes, text", [
    (torch.ones(1), 1.0, {}, r"got \[1.0\] \(shape \(1,\), expected \(\)\)"),
    (torch.tensor(2.0), 1.0, {"one too many": 2, "a zero": 0},
     "^expected 1.0\n     got 2.0\nlikely mistake: one too many$"),
    (torch.tensor([math.inf]), [1], {"too large": [math.inf]}, "likely mistake: too large"),
    (math.nan, 0.0, {}, "got"), (math.nan, math.nan, {}, "got"), (0.0, math.nan, {}, "got"),
    (LARGE, torch.zeros(6, 9), {}, r"at index \[1, 2\]\n     got 0.5; 2 of 54 differ")])
def test_close_says_what_differs(got, expected, mistakes, text):
    """A shape, a value with the mistake that has it, NaN, which is close to nothing, an index."""
    conftest.close(torch.tensor([1.0, 2.0]), [1.0, 2.0 + 1e-7])
    with pytest.raises(AssertionError, match=text):
        conftest.close(got, expected, mistakes=mistakes)


def test_mutants():
    """In every function, no two alike; every reason in EQUIVALENT belongs to one that exists."""
    mutants = mutate.mutants(SOURCE)
    assert len({mutant.source for mutant in mutants} | {SOURCE}) == len(mutants) + 1 > 60
    assert set(FUNCTIONS) <= {mutant.function for mutant in mutants}
    assert set(mutate.EQUIVALENT) <= {line for x in mutants for line in (x.before, x.after)}


def test_mutants_of_two_lines():
    """Every change of `return -(x - y.detach())`, by the list at the top of course/mutate.py."""
    source = "def f(x, y):\n    return -(x - y.detach())\n"
    assert {mutant.after for mutant in mutate.mutants(source)} == {
        "return -(-(x - y.detach()))", "return (x - y.detach())", "return -((x + y.detach()))",
        "return -(x - (y))"}


# --- the pages ------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", ["exercises.md", "instructors.md", "answers.md", "students.md"])
def test_names_on_the_pages_exist(page):
    """Every test, option, module and file that the pages name is there."""
    text = (ROOT / "course" / page).read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    allowed = {*(f.name for f in fields(Config)), "impl", "function", "json", "variant", "help"}
    assert set(re.findall(r"--([a-z]\w*)", text)) <= allowed
    for module in re.findall(r"python -m ([a-z]+\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for file in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert (ROOT / file).is_file() or "autograder" in file, file


def test_eleven_exercises_with_their_points():
    """The same minutes and points on both pages, an answer to each; those of 7 are the grader's."""
    pages = {name: (ROOT / "course" / f"{name}.md").read_text(encoding="utf-8")
             for name in ("exercises", "instructors", "answers")}
    points = re.findall(r"^## (\d+)\. .*\n\n\*You learn to .* (\d+) points\.\*$",
                        pages["exercises"], re.M)
    assert [int(number) for number, _ in points] == list(range(1, 12))
    assert points == re.findall(r"^\| (\d+) [^|]*\|[^|]*\|[^|]*\| (\d+) \|", pages["instructors"],
                                re.M)
    assert dict(points)["7"] == str(sum(sum(graded[1:]) for graded in GRADED.values()))
    assert re.findall(r"^\*\*(\d+)\. ", pages["answers"], re.M) == [n for n, _ in points]
