"""Grades a file that has the functions of tvkd.py. tests/conftest.py loads this as a pytest plugin.

    python -m pytest -q --impl=my_tvkd.py                       points, one failure per function
    python -m pytest -v --impl=my_tvkd.py                       every failure
    python -m pytest -q --impl=my_tvkd.py --function=kd_loss    one function
    python -m pytest -q --impl=my_tvkd.py --json=points.json    the points, for other programs
    python -m pytest -q --impl=my_tvkd.py --gradescope=results.json     the same, for Gradescope

The file runs in a process of its own (course/worker.py), which has no tests and no solution; the
tests here see the tensors that come back. A function earns its points for the equation, and those
for robustness, if all tests of that kind pass; an equation of several parts earns each part alone.
Robustness is judged once the equation is right; until then it counts 0 points, and the table and
the files say that it was not judged. A function is judged alone: an earlier one that it calls is
taken from tvkd.py. Only the tests "all together" run the file as it is.
"""

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import as_text
from course.assignment import FUNCTIONS, GRADED, TOGETHER, VARIANT
from course.variants import Variant
from course.worker import Peer, raise_error
from harness.errors import printable

GRADED_FILES = ("test_tvkd.py", "test_hidden.py", "test_shaping_invariance.py")
KINDS = ("equation", "robustness")
SECONDS, ALL_SECONDS = 20, 300  # for one call, which needs a thousandth of it, and for all calls
NOT_JUDGED = "robustness is judged once the equation is right"
WORKER = Path(__file__).with_name("worker.py")


class Failure(NamedTuple):
    test: str
    by_hand: str                # the test's docstring, which holds the arithmetic
    calls: tuple                # the latest call of each function, with its arguments
    result: str
    line: str                   # where the graded file raised an exception, or ""
    size: int                   # how many numbers the calls got

    @property
    def has_hint(self):
        return "likely mistake:" in self.result


class Tests:
    """The tests of one kind of one function."""

    def __init__(self):
        self.count, self.failures = 0, []
        self.parts = {}                         # part of the equation -> did each test pass?

    @property
    def ran(self):
        return sum(map(len, self.parts.values()))

    @property
    def passed(self):
        return sum(map(sum, self.parts.values()))

    @property
    def most_telling(self):
        """A failure that names a mistake; if there is none, the one with the smallest input."""
        return min(self.failures, key=lambda failure: (not failure.has_hint, failure.size))


class Student:
    """The graded file in its process. A process that ends or hangs is started again."""

    def __init__(self, path, names, reference):
        self.path, self.names, self.reference, self.process = path, names, reference, None
        self.seconds = 0.0                      # that its calls took so far
        try:
            self.source = importlib.util.decode_source(path.read_bytes())
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise pytest.UsageError(f"--impl: expected a Python file, got {printable(str(path))}: "
                                    f"{one_line(error)}") from None
        self.start()

    def start(self):
        """In an empty folder, without a variable that says where the course is."""
        self.stop()
        self.folder = tempfile.TemporaryDirectory()
        hidden = ("PYTHON", "PYTEST", "PWD", "OLDPWD")
        env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER.read_text(encoding="utf-8")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=self.folder.name, env={**env, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        self.peer = Peer(self.process.stdout, self.process.stdin)
        try:
            self.limited(self.peer.receive, seconds=10 * SECONDS)
            answer = self.limited(self.peer.ask, ask="load", source=self.source, names=self.names)
            raise_error(answer)
            self.missing = [name for name in self.names if name not in answer["functions"]]
        except Exception as error:
            self.stop()
            place = f" (line {error.line})" if getattr(error, "line", None) else ""
            raise pytest.UsageError(f"--impl: {printable(self.path.name)} cannot be imported: "
                                    f"{one_line(error)}{place}") from None

    def stop(self):
        if self.process:
            kill(self.process)
            self.process.communicate()
            self.folder.cleanup()
            self.process = None

    def call(self, name, served, *args, **kwargs):
        if self.seconds > ALL_SECONDS:
            raise TimeoutError(f"the file took more than {ALL_SECONDS} seconds in all")
        if self.process is None:
            self.start()
        self.peer.functions = {other: getattr(self.reference, other) for other in served}
        return self.limited(self.peer.call, name, *args, request={"served": served}, **kwargs)

    def limited(self, function, *args, seconds=None, **kwargs):
        """A call in its process; TimeoutError where it does not come back in time or at all."""
        timer = threading.Timer(seconds or SECONDS, kill, (self.process,))
        timer.start()
        start = time.monotonic()
        try:
            return function(*args, **kwargs)
        except (EOFError, OSError, json.JSONDecodeError):
            late = not timer.is_alive()
            process = self.process
            self.stop()
            reason = f"no answer within {SECONDS} seconds; an endless loop?" if late else (
                f"the process ended by itself, exit status {process.returncode}")
            raise TimeoutError(reason) from None
        finally:
            timer.cancel()
            self.seconds += time.monotonic() - start


class Grader:
    def __init__(self, path, only=None, variant=None, json_path=None, gradescope=None):
        variant = str(VARIANT) if variant is None else variant
        if not (variant.isascii() and variant.isdigit() and len(variant) < 10):
            raise pytest.UsageError(f"--variant: expected a whole number, got {variant[:100]!a}")
        self.variant = Variant(int(variant))
        names = {theirs: ours for ours, theirs in self.variant.names.items()}
        if only is not None and only not in names:
            expected = ", ".join(names)
            raise pytest.UsageError(f"--function: expected one of {expected}, got {only[:100]!a}")
        self.path, self.only = path, names.get(only)
        self.targets = {self.record: json_path, self.gradescope: gradescope}
        for option, target in (("--json", json_path), ("--gradescope", gradescope)):
            if target is not None:
                remove_own(option, target)
        self.tests = {name: {kind: Tests() for kind in KINDS} for name in GRADED}
        self.tested, self.problem = TOGETHER, None
        self.calls = {}                         # function -> its latest call in this test
        self.line = ""                          # where the latest exception came from
        self.unwritten, self.dead = set(), {}
        self.reference = self.variant.key()     # None in a release, which has no solution
        self.student = None
        try:
            self.student = Student(path, list(self.variant.names.values()), self.reference)
        except pytest.UsageError as error:
            self.write(str(error))
            raise
        self.missing = [names[theirs] for theirs in self.student.missing]
        functions = types.SimpleNamespace(**{
            theirs: functools.partial(self.call, ours) for theirs, ours in names.items()})
        sys.modules["tvkd"] = self.variant.adapter(functions)

    # --- running -------------------------------------------------------------------------------

    def call(self, name, *args, **kwargs):
        """A function of the graded file; its latest arguments are kept, to be shown in a failure.

        What it calls of the functions before it is taken from the solution. Those after it are
        not: or each of two functions could be the other one in disguise.
        """
        theirs, names = self.variant.names[name], list(FUNCTIONS)
        self.calls[theirs] = [copied(x) for x in args], {k: copied(x) for k, x in kwargs.items()}
        before = names[:names.index(self.tested)] if self.tested in names and self.reference else []
        served = [self.variant.names[other] for other in before]
        if name in self.missing:
            raise NotImplementedError(f"{self.path.name} has no function {theirs}")
        if name in self.dead:
            raise TimeoutError(f"{theirs}: in an earlier test, {self.dead[name]}")
        try:
            return self.student.call(theirs, served, *args, **kwargs)
        except Exception as error:
            line = getattr(error, "line", None)
            self.line = f"{self.path.name}:{line}" if line else ""
            if isinstance(error, NotImplementedError):
                self.unwritten.add(name)
            if isinstance(error, TimeoutError):
                self.dead[name] = str(error)
            raise

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session):
        """The grader prints its own, shorter failures, unless other options ask for pytest's."""
        options = session.config.option
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if options.tbstyle == "auto":
            options.tbstyle = "no"
        if reporter and options.reportchars == "fE":
            reporter.reportchars = ""

    def pytest_ignore_collect(self, collection_path):
        if collection_path.suffix == ".py" and collection_path.name not in GRADED_FILES:
            return True                         # tests of other files than tvkd.py

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        marked = [item for item in items if points_of(item)]
        for item in marked:
            self.tests_of(item).count += 1
        graded = [item for item in marked if self.only in (None, points_of(item)[0])]
        graded.sort(key=lambda item: (list(self.tests).index(points_of(item)[0]),
                                      GRADED_FILES.index(item.path.name)))
        config.hook.pytest_deselected(items=[item for item in items if item not in graded])
        items[:] = graded

    def tests_of(self, item):
        function, kind, _ = points_of(item)
        return self.tests[function][kind]

    def pytest_runtest_setup(self, item):
        self.calls.clear()
        self.line = ""
        self.tested = points_of(item)[0]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Only "passed" earns: not "skipped", not "xfailed"."""
        report = yield
        if report.when == "call":
            passed = report.outcome == "passed" and not hasattr(report, "wasxfail")
            self.tests_of(item).parts.setdefault(points_of(item)[2], []).append(passed)
            if not passed:
                self.tests_of(item).failures.append(self.failure(item, call))
        return report

    def failure(self, item, call):
        text = call.excinfo.exconly() if call.excinfo else "not passed"
        result = text.removeprefix("AssertionError: ").removeprefix("course.worker.GradedError: ")
        lines = [printable(line)[:500] for line in result.splitlines()[:6]]
        by_hand = inspect.cleandoc(item.function.__doc__ or "")
        calls = tuple(self.inputs())
        if points_of(item)[0] == TOGETHER:
            calls = (", ".join(self.calls),)    # names only: the arguments would fill a page
        size = sum(x.numel() for args, kwargs in self.calls.values()
                   for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return Failure(item.name, by_hand, calls, "\n".join(lines), printable(self.line), size)

    def inputs(self):
        parameters = {theirs: self.variant.parameters(ours)
                      for ours, theirs in self.variant.names.items()}
        for name, (args, kwargs) in self.calls.items():
            named = {**dict(zip(parameters[name], args)), **kwargs}
            yield f"{name}({', '.join(f'{key}={as_text(x)}' for key, x in named.items())})"

    # --- reporting -----------------------------------------------------------------------------

    def entry(self, name, kind):
        """What is known of one kind of points. They are None while nothing failed and not all
        tests have run."""
        tests, before = self.tests[name][kind], self.tests[name]["equation"]
        out_of = getattr(GRADED[name], "points" if kind == "equation" else kind)
        judged = kind == "equation" or not before.failures
        decided = not judged or bool(tests.failures) or all(
            t.ran == t.count for t in (tests, before))
        points, message = None, None
        if decided:
            whole = [all(passed) for passed in tests.parts.values()]
            points = out_of * sum(whole) // max(1, len(whole)) if judged else 0
        if tests.failures:
            message = " ".join(f"{tests.most_telling.test}: {tests.most_telling.result}".split())
        return {"points": points, "out_of": out_of, "judged": judged and decided,
                "tests": tests.count, "passed": tests.passed,
                "message": message if judged else NOT_JUDGED}

    def entries(self):
        return {name: {kind: self.entry(name, kind) for kind in KINDS} for name in self.tests}

    def total(self, kind, key="points"):
        return sum(kinds[kind][key] or 0 for kinds in self.entries().values())

    def pytest_terminal_summary(self, terminalreporter, config):
        out, show_all = terminalreporter, config.get_verbosity() > 0
        for name in self.tests:
            for kind, failure in self.failures_to_show(name, show_all):
                out.write_line("")
                out.write_line(f"---- {self.variant.names.get(name, name)}: {kind}", bold=True)
                out.write_line(self.block(name, failure))
        out.section(f"points: {printable(self.path.name)}")
        for line in self.table():
            out.write_line(line)
        if self.problem:
            raise self.problem

    def pytest_sessionfinish(self, session):
        self.student.stop()
        try:
            self.write()
        except pytest.UsageError as error:
            self.problem = error                # after the table, which is all that is left

    def pytest_unconfigure(self):
        self.student.stop()                     # after an error before the tests, too

    def failures_to_show(self, name, show_all):
        """By default one per function, none if it is not written yet.

        A test of several functions is shown if nothing else explains its failure.
        """
        explained = name == TOGETHER and any(self.failures_of(f) for f in FUNCTIONS)
        unwritten = name in self.unwritten and self.only is None
        if show_all:
            return self.failures_of(name)
        if explained or unwritten:
            return []
        return [(kind, tests.most_telling) for kind, tests in self.tests[name].items()
                if tests.failures][:1]

    def failures_of(self, name):
        return [(kind, failure) for kind, tests in self.tests[name].items()
                for failure in tests.failures]

    def block(self, name, failure):
        parts = {"equation": GRADED[name].equation,
                 "unlike it": self.variant.unlike(name), "test": failure.test,
                 "by hand": failure.by_hand, "input": "\n".join(failure.calls),
                 "result": failure.result, "line": failure.line}
        return "\n".join(textwrap.indent(text, 11 * " ").replace(11 * " ", f"{label:11}", 1)
                         for label, text in parts.items() if text)

    def table(self):
        """The lines `function, points and tests of both kinds, remark`."""
        yield f"{'':24}{'equation':10}{'(tests)':>10}    {'robustness':10}{'(tests)':>10}"
        for name in self.tests if self.only is None else [self.only]:
            cells = "".join(f"{self.cell(**self.entry(name, kind)):24}" for kind in KINDS)
            yield f"{self.variant.names.get(name, name):24}{cells}{self.remark(name)}".rstrip()
        if self.complete:
            pairs = [(self.total(kind), self.total(kind, "out_of")) for kind in KINDS]
            columns = "".join(f"{'{:2} of {:2}'.format(*pair):24}" for pair in pairs)
            yield f"{'total':24}{columns}{'{} of {} points'.format(*map(sum, zip(*pairs)))}"
        if any(self.tests[name]["equation"].failures for name in FUNCTIONS):
            yield f"not judged: {NOT_JUDGED}; until then it counts 0 points"

    def cell(self, points, out_of, judged, tests, passed, **rest):
        """`" 2 of  4    (3 of 9)"`; "-" where the tests that ran do not decide the points."""
        if points is not None and not judged:
            return "not judged" if out_of else ""
        cell = " -" if points is None else f"{points:2} of {out_of:2}"
        return f"{cell:10}{f'({passed} of {tests})':>10}" if out_of else ""

    def remark(self, name):
        left = sum(tests.count - tests.ran for tests in self.tests[name].values())
        if name in self.missing:
            return "not defined"
        if name in self.unwritten:
            return "not written"
        if name in self.dead:
            return self.dead[name]
        return f"{left} not run" if left else ""          # by --function, -k or -x

    @property
    def complete(self):
        return all(t.ran == t.count for kinds in self.tests.values() for t in kinds.values())

    def write(self, error=None):
        """The files of --json and --gradescope, whole or not at all. error: why nothing ran."""
        for content, path in self.targets.items():
            if path is not None:
                part = path.with_name(f"{path.name}.{os.getpid()}")
                try:
                    part.write_text(json.dumps(content(error), indent=1) + "\n", encoding="utf-8")
                    os.replace(part, path)
                except OSError as problem:
                    part.unlink(missing_ok=True)
                    raise pytest.UsageError(f"{printable(str(path))} cannot be written: "
                                            f"{one_line(problem)}") from None

    def record(self, error):
        """Points by function and the message that tells most of each; null where the tests that
        ran do not decide them."""
        equation, robustness = (self.total(kind) for kind in KINDS)
        points = {"points": equation + robustness, "equation": equation, "robustness": robustness}
        if not self.complete and not error:
            points = dict.fromkeys(points)
        return {MARK: True, "file": self.path.name, "error": error,
                "complete": self.complete and not error,
                "out_of": sum(self.total(kind, "out_of") for kind in KINDS), **points,
                "functions": self.entries()}

    def gradescope(self, error):
        """The results.json of that service: one test for each kind of each function."""
        tests = [{"name": f"{name}: {kind}", "score": entry["points"] or 0,
                  "max_score": entry["out_of"], "output": entry["message"] or ""}
                 for name, kinds in self.entries().items() for kind, entry in kinds.items()
                 if entry["out_of"]]
        return {"score": sum(test["score"] for test in tests), "output": error or "",
                "extra_data": {MARK: True}, "tests": tests}


MARK = "graded by course/grader.py"


def remove_own(option, path):
    """Remove the file of an earlier grading. Any other file stays, and nothing is graded."""
    shown = printable(str(path))
    try:
        if path.is_symlink() or path.exists():
            record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if path.is_symlink() or not (record.get(MARK) or record["extra_data"][MARK]):
                raise KeyError
            path.unlink()
        if not path.name or not path.parent.is_dir():
            raise pytest.UsageError(f"{option}: expected a file in a folder that exists, got "
                                    f"{shown}")
    except OSError as error:
        raise pytest.UsageError(f"{option}: {shown}: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise pytest.UsageError(f"{option}: expected a new file or one that the grader wrote, got "
                                f"{shown}, which exists") from None


def points_of(item):
    """(function, kind, part) of the mark `points`; None where there is no such mark."""
    marker = item.get_closest_marker("points")
    if marker is None:
        return None
    return (*marker.args, *("equation", "")[len(marker.args) - 1:])[:3]


def copied(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def one_line(error):
    text = printable(" ".join(str(error).split()))[:500]
    return text if type(error).__name__ in ("GradedError", "TimeoutError") else (
        f"{type(error).__name__}: {text}")


def kill(process):
    """The process and all that it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
