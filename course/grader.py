"""Grades a file that has the functions of tvkd.py. tests/conftest.py loads this as a pytest plugin.

    python -m pytest -q --impl=my_tvkd.py                       points, one failure per function
    python -m pytest -v --impl=my_tvkd.py                       every failure
    python -m pytest -q --impl=my_tvkd.py --function=kd_loss    one function
    python -m pytest -q --impl=my_tvkd.py --json=points.json    the points, for Gradescope, too

The file runs in a process of its own (course/worker.py), which has no tests and no solution; the
tests here see the tensors that come back. A function earns its points for the equation, and those
for robustness, if all tests of that kind pass; an equation of several parts earns each part alone.
"""

import contextlib
import functools
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
from course.worker import decode, encode, send, with_gradient
from harness.errors import one_line, printable

GRADED_FILES = ("test_tvkd.py", "test_hidden.py", "test_shaping_invariance.py")
SECONDS, ALL_SECONDS = 20, 300  # for one call, which needs a thousandth of it, and for all calls
LONGEST = 2 ** 24               # bytes of one answer
WORKER = Path(__file__).with_name("worker.py")
MARK = '{\n "extra_data": {\n  "graded by": "course/grader.py"'      # how the file of --json begins


# --- the graded file ---------------------------------------------------------------------------

class Student:
    """The graded file in its process. A process that ends or hangs is started again."""

    def __init__(self, path):
        self.process, self.seconds = None, 0.0          # seconds: that its calls took so far
        try:
            if not path.is_file():                      # a pipe would be read for ever
                raise OSError("no regular file")
            self.source = path.read_bytes().decode("latin-1")  # as it is: it may say how to read it
            self.start()
        except Exception as error:
            self.stop()
            place = f" (line {error.line})" if getattr(error, "line", None) else ""
            raise pytest.UsageError(one_line(
                f"--impl: {path.name}: expected a Python file that can be imported, got {error}"
                f"{place}")) from None

    def start(self):
        """In an empty folder, without a variable that says where the course is."""
        self.folder = tempfile.TemporaryDirectory()
        hidden = ("PYTHON", "PYTEST", "PWD", "OLDPWD")
        env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER.read_text(encoding="utf-8")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=self.folder.name, env={**env, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        self.ask(10 * SECONDS, do="load", source=self.source)       # it imports torch first

    def stop(self):
        if self.process:
            with contextlib.suppress(OSError), self.process:       # a child may hold the pipes open
                kill(self.process)
            self.folder.cleanup()
            self.process = None

    def ask(self, seconds, **request):
        """What the process answers. An error of the file is raised, TimeoutError without answer."""
        process, start = self.process, time.monotonic()
        timer = threading.Timer(seconds, kill, (process,))
        timer.start()
        try:
            send(process.stdin, request)
            answer = json.loads(process.stdout.readline(LONGEST))
        except (AttributeError, OSError, ValueError):
            late = not timer.is_alive()
            self.stop()
            raise TimeoutError(f"no answer within {seconds} seconds; an endless loop?" if late else
                               "the process ended by itself, exit status "
                               f"{process.returncode}") from None
        finally:
            timer.cancel()
            self.seconds += time.monotonic() - start
        if "error" in answer:
            known = [x for x in (ValueError, NotImplementedError) if x.__name__ in answer["types"]]
            error = (known[0](answer["error"]) if known else
                     Exception(f"{answer['types'][0]}: {answer['error']}"))
            error.line = answer["line"]
            raise error
        return answer

    def call(self, name, *args, **kwargs):
        """A function of the file, as if it were here: gradients, too, and changed arguments."""
        if self.seconds > ALL_SECONDS:
            raise TimeoutError(f"the file took more than {ALL_SECONDS} seconds in all")
        if self.process is None:
            self.start()
        inputs = {str(i): x for i, x in enumerate(args)} | kwargs
        answer = self.ask(SECONDS, do="call", name=name,
                          args={key: encode(x) for key, x in inputs.items()})
        with torch.no_grad():
            for key, value in answer["changed"].items():
                inputs[key].copy_(decode(value))
        result = decode(answer["result"])
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"expected a tensor, got {result!r}")
        if not answer["result"]["grad"]:
            return result
        return Remote.apply(self, answer["of"], result, *with_gradient(inputs))


class Remote(torch.autograd.Function):
    """A result whose graph is in the other process."""

    @staticmethod
    def forward(ctx, student, of, result, *inputs):
        ctx.student, ctx.of = student, of
        return result

    @staticmethod
    def backward(ctx, gradient):
        answer = ctx.student.ask(SECONDS, do="gradient", of=ctx.of, gradient=encode(gradient))
        return (None, None, None, *map(decode, answer["gradients"]))


def kill(process):
    """The process and all that it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


# --- the tests ---------------------------------------------------------------------------------

class Failure(NamedTuple):
    rank: tuple                 # the lowest tells most
    message: str
    text: str                   # the equation, the test, the arithmetic by hand, input and result


class Tests:
    """The tests of one kind of one function."""

    def __init__(self, out_of):
        self.out_of, self.count, self.failures = out_of, 0, []
        self.parts = {}                         # part of the equation -> did each test pass?

    @property
    def ran(self):
        return sum(map(len, self.parts.values()))

    @property
    def passed(self):
        return sum(map(sum, self.parts.values()))

    @property
    def points(self):
        """None until all tests have run."""
        if self.ran < self.count:
            return None
        whole = [all(passed) for passed in self.parts.values()]
        return self.out_of * sum(whole) // max(1, len(whole))

    def cell(self):
        """`" 2 of  4    (3 of 9)"`."""
        points = " -" if self.points is None else f"{self.points:2} of {self.out_of:2}"
        return f"{points:10}{f'({self.passed} of {self.count})':>10}" if self.out_of else ""

    def result(self, name):
        """The element of `tests` in results.json."""
        return {"name": name, "score": self.points, "max_score": self.out_of,
                "output": self.failures[0].message if self.failures else "",
                "extra_data": {"tests": self.count, "passed": self.passed}}


class Grader:
    def __init__(self, path, only=None, variant=None, target=None):
        variant = str(VARIANT) if variant is None else variant
        if not (variant.isascii() and variant.isdigit() and len(variant) < 10):
            raise pytest.UsageError(f"--variant: expected a whole number, got {variant[:100]!a}")
        self.variant = Variant(int(variant))
        names = {theirs: ours for ours, theirs in self.variant.names.items()}
        if only is not None and only not in names:
            raise pytest.UsageError(f"--function: expected one of {', '.join(names)}, got "
                                    f"{only[:100]!a}")
        self.path, self.only, self.target = path, names.get(only), target
        self.tests = {name: {"equation": Tests(graded.points),
                             "robustness": Tests(graded.robustness)}
                      for name, graded in GRADED.items()}
        self.calls = {}                         # function -> its latest call in this test
        self.stopped = {}                       # function -> it is not written, or gave no answer
        if target:
            remove_own(target)
        try:
            self.student = Student(path)
        except pytest.UsageError as error:
            self.write(str(error))
            raise
        sys.modules["tvkd"] = self.variant.adapted(types.SimpleNamespace(**{
            theirs: functools.partial(self.call, ours) for theirs, ours in names.items()}))

    # --- running -------------------------------------------------------------------------------

    def call(self, name, *args, **kwargs):
        """A function of the graded file. A failure shows its latest arguments."""
        theirs = self.variant.names[name]
        if name == "shaping" and args[2:] == (1.0, "value"):
            args = args[:2]                             # then the file's own defaults have to hold
        self.calls[name] = [copied(x) for x in args], {k: copied(x) for k, x in kwargs.items()}
        if isinstance(self.stopped.get(name), TimeoutError):
            raise TimeoutError(f"{theirs}: in an earlier test, {self.stopped[name]}")
        try:
            return self.student.call(theirs, *args, **kwargs)
        except (NotImplementedError, TimeoutError) as error:
            self.stopped[name] = error
            raise

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

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Only "passed" earns: not "skipped", not "xfailed"."""
        report = yield
        if report.when == "call":
            passed = report.outcome == "passed" and not hasattr(report, "wasxfail")
            self.tests_of(item).parts.setdefault(points_of(item)[2], []).append(passed)
            if not passed:
                failures = self.tests_of(item).failures
                failures.append(self.failure(item, call))
                failures.sort(key=lambda failure: failure.rank)
        return report

    def failure(self, item, call):
        name, by_hand = points_of(item)[0], inspect.cleandoc(item.function.__doc__ or "")
        text, line = "not passed", None
        if call.excinfo:
            text, line = call.excinfo.exconly(), getattr(call.excinfo.value, "line", None)
        result = text.removeprefix("AssertionError: ").removeprefix("Exception: ")
        result = "\n".join(printable(line)[:500] for line in result.splitlines()[:6])
        parts = {"equation": GRADED[name].equation, "unlike it": self.variant.unlike.get(name),
                 "test": item.name, "by hand": by_hand, "input": "\n".join(self.inputs()),
                 "result": result, "line": line and printable(f"{self.path.name}:{line}")}
        block = "\n".join(textwrap.indent(text, 11 * " ").replace(11 * " ", f"{label:11}", 1)
                          for label, text in parts.items() if text)
        # One that names a mistake tells most, then the one with the smallest input.
        size = sum(x.numel() for args, kwargs in self.calls.values()
                   for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return Failure(("likely mistake:" not in result, size),
                       " ".join(f"{item.name}: {result}".split()), block)

    def inputs(self):
        for name, (args, kwargs) in self.calls.items():
            named = {**dict(zip(self.variant.parameters(name), args)), **kwargs}
            arguments = ", ".join(f"{key}={as_text(x)}" for key, x in named.items())
            yield f"{self.shown(name)}({arguments})"

    # --- reporting -----------------------------------------------------------------------------

    def shown(self, name):
        return self.variant.names.get(name, name)

    def pytest_terminal_summary(self, terminalreporter, config):
        out, show_all = terminalreporter, config.get_verbosity() > 0
        for name in self.tests:
            for kind, failure in self.failures_to_show(name, show_all):
                out.write_line("")
                out.write_line(f"---- {self.shown(name)}: {kind}", bold=True)
                out.write_line(failure.text)
        out.section(f"points: {printable(self.path.name)}")
        for line in self.table():
            out.write_line(line)
        self.student.stop()                             # nothing it started may change the record
        self.write()

    def pytest_unconfigure(self):
        self.student.stop()

    def failures_to_show(self, name, show_all):
        """By default one per function, none if it is not written yet. A test of several functions
        is shown if nothing else explains its failure."""
        failures = self.failures_of(name)
        explained = name == TOGETHER and any(map(self.failures_of, FUNCTIONS))
        if show_all:
            return failures
        return [] if explained or (name in self.stopped and not self.only) else failures[:1]

    def failures_of(self, name):
        return [(kind, failure) for kind, tests in self.tests[name].items()
                for failure in tests.failures]

    def table(self):
        """The lines `function, points and tests of both kinds, remark`."""
        yield f"{'':24}{'equation':10}{'(tests)':>10}    {'robustness':10}{'(tests)':>10}"
        for name in self.tests if self.only is None else [self.only]:
            cells = "".join(f"{tests.cell():24}" for tests in self.tests[name].values())
            yield f"{self.shown(name):24}{cells}{self.remark(name)}".rstrip()
        pairs = [(sum(tests.points or 0 for tests in kind), sum(tests.out_of for tests in kind))
                 for kind in zip(*(kinds.values() for kinds in self.tests.values()))]
        if self.results()["score"] is not None:
            columns = "".join(f"{'{:2} of {:2}'.format(*pair):24}" for pair in pairs)
            yield f"{'total':24}{columns}{'{} of {} points'.format(*map(sum, zip(*pairs)))}"

    def remark(self, name):
        left = sum(tests.count - tests.ran for tests in self.tests[name].values())
        if name in self.stopped:
            return one_line(self.stopped[name]) or "not written"
        return f"{left} not run" if left else ""          # by --function, -k or -x

    def results(self, error=None):
        """The results.json of Gradescope: one test for each kind of each function. A score is null
        where not all of its tests ran. error: why none did."""
        tests = [of_kind.result(f"{name}: {kind}") for name, kinds in self.tests.items()
                 for kind, of_kind in kinds.items() if of_kind.out_of]
        scores = [test["score"] for test in tests]
        return {"extra_data": {"graded by": "course/grader.py", "file": self.path.name},
                "score": None if None in scores else sum(scores), "output": error or "",
                "tests": tests}

    def write(self, error=None):
        if self.target:
            try:
                self.target.write_text(json.dumps(self.results(error), indent=1) + "\n",
                                       encoding="utf-8")
            except OSError as problem:
                raise pytest.UsageError(one_line(f"--json: {self.target}: expected a file that can "
                                                 f"be written, got {problem}")) from None


def remove_own(path):
    """Remove the file of an earlier grading. Any other file stays, and nothing is graded."""
    try:
        if path.is_file() and not path.is_symlink():
            if path.read_bytes().startswith(MARK.encode()):
                path.unlink()
        if path.is_symlink() or path.exists() or not path.parent.is_dir():
            raise OSError
    except OSError:
        raise pytest.UsageError(one_line("--json: expected a file that the grader wrote, or a new "
                                         f"one in a folder that exists, got {path}")) from None


def points_of(item):
    """(function, kind, part) of the mark `points`; None where there is no such mark."""
    marker = item.get_closest_marker("points")
    if marker is None:
        return None
    return (*marker.args, *("equation", "")[len(marker.args) - 1:])[:3]


def copied(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x
