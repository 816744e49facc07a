"""Grades a file that has the functions of tvkd.py. tests/conftest.py loads this as a pytest plugin.

    python -m pytest -q --impl=my_tvkd.py                       points, one failure per function
    python -m pytest -v --impl=my_tvkd.py                       every failure
    python -m pytest -q --impl=my_tvkd.py --function=kd_loss    one function
    python -m pytest -q --impl=my_tvkd.py --json=points.json    the points, for other programs

A function earns its points for the equation, and those for robustness, if all tests of that kind
pass. Robustness is judged once the equation is right; until then it counts 0 points, and both the
table and the JSON file say that it was not judged. A function is judged alone: any of the other
nine that it calls is taken from tvkd.py. Only the tests "all together" run the file as it is. They
give no points, but they do decide the exit status.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import signal
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch

from conftest import as_text
from course.assignment import FUNCTIONS, ROOT, TOGETHER

GRADED_FILES = ("test_tvkd.py", "test_shaping_invariance.py")
KINDS = ("equation", "robustness")
SECONDS = 10                    # of the processor, for one call: it needs far less than one
NOT_JUDGED = "robustness is judged once the equation is right"


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
        self.count, self.ran, self.failures = 0, 0, []

    @property
    def passed(self):
        return self.ran - len(self.failures)

    @property
    def most_telling(self):
        """A failure that names a mistake; if there is none, the one with the smallest input."""
        return min(self.failures, key=lambda failure: (not failure.has_hint, failure.size))


class Grader:
    def __init__(self, path, only=None, json_path=None):
        if only not in (None, *FUNCTIONS):
            expected = ", ".join(FUNCTIONS)
            raise pytest.UsageError(f"--function: expected one of {expected}, got {only}")
        self.path, self.only, self.json_path = path, only, json_path
        self.tests = {name: {kind: Tests() for kind in KINDS} for name in (*FUNCTIONS, TOGETHER)}
        self.calls = {}                         # function -> its latest call in this test
        self.line = ""                          # where the latest exception came from
        self.unwritten, self.endless = set(), set()
        try:
            self.module = load(path)
        except pytest.UsageError as error:
            self.write_json(str(error))
            raise
        self.reference = load_as("reference_tvkd", ROOT / "tvkd.py")
        self.missing = [f for f in FUNCTIONS if not callable(getattr(self.module, f, None))]
        self.functions = {name: self.recorded(name) for name in FUNCTIONS}
        vars(self.module).update(self.functions)

    # --- running -------------------------------------------------------------------------------

    def recorded(self, name):
        """The graded function; it keeps its latest arguments, to be shown if a test fails."""
        function = getattr(self.module, name, None)
        if name in self.missing:
            function = functools.partial(self.absent, name)

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.calls[name] = function, [copied(x) for x in args], {
                key: copied(x) for key, x in kwargs.items()}
            if name in self.endless:
                raise TimeoutError(f"{name} did not return in an earlier test")
            try:
                with time_limit(name):
                    return function(*args, **kwargs)
            except Exception as error:
                self.line = self.line_in_file(error)
                if isinstance(error, NotImplementedError):
                    self.unwritten.add(name)
                if isinstance(error, TimeoutError):
                    self.endless.add(name)
                raise
        return wrapper

    def absent(self, name, *args, **kwargs):
        raise NotImplementedError(f"{self.path.name} has no function {name}")

    def line_in_file(self, error):
        """`my_tvkd.py:57`, the innermost line of the graded file in the error's traceback."""
        line, trace = "", error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == str(self.path):
                line = f"{self.path.name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return line

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
        graded.sort(key=lambda item: (points_of(item)[0] == TOGETHER,
                                      GRADED_FILES.index(item.path.name)))
        config.hook.pytest_deselected(items=[item for item in items if item not in graded])
        items[:] = graded

    def tests_of(self, item):
        function, kind = points_of(item)
        return self.tests[function][kind]

    def pytest_runtest_setup(self, item):
        self.calls.clear()
        self.line = ""
        tested = points_of(item)[0]
        for name, function in self.functions.items():
            alone = tested not in (name, TOGETHER)
            setattr(self.module, name, getattr(self.reference, name) if alone else function)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call":
            self.tests_of(item).ran += 1
            if report.failed:
                self.tests_of(item).failures.append(self.failure(item, call))
        return report

    def failure(self, item, call):
        result = call.excinfo.exconly().removeprefix("AssertionError: ").splitlines()[:6]
        by_hand = inspect.cleandoc(item.function.__doc__ or "")
        calls = tuple(self.inputs())
        if points_of(item)[0] == TOGETHER:
            calls = (", ".join(self.calls),)    # names only: the arguments would fill a page
        size = sum(x.numel() for _, args, kwargs in self.calls.values()
                   for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return Failure(item.name, by_hand, calls, "\n".join(result), self.line, size)

    def inputs(self):
        for name, (function, args, kwargs) in self.calls.items():
            try:
                named = inspect.signature(function).bind(*args, **kwargs).arguments
            except TypeError:                   # other parameters than asked for
                named = {**{f"argument {i + 1}": x for i, x in enumerate(args)}, **kwargs}
            yield f"{name}({', '.join(f'{key}={as_text(x)}' for key, x in named.items())})"

    # --- reporting -----------------------------------------------------------------------------

    def points(self, name, kind):
        """(earned, available). Earned is None while nothing failed and not all tests have run."""
        if name == TOGETHER:
            return 0, 0
        graded, tests = FUNCTIONS[name], self.tests[name]
        available = graded.points if kind == "equation" else graded.robustness
        kinds = KINDS[:KINDS.index(kind) + 1]               # robustness needs the equation, too
        if any(tests[k].failures or tests[k].count == 0 for k in kinds):
            return 0, available
        decided = all(tests[k].ran == tests[k].count for k in kinds)
        return available if decided else None, available

    def is_judged(self, name, kind):
        equation_failed = name != TOGETHER and self.tests[name]["equation"].failures
        return self.points(name, kind)[0] is not None and not (
            kind == "robustness" and equation_failed)

    def total(self, kind):
        earned, available = zip(*(self.points(name, kind) for name in FUNCTIONS))
        return sum(points or 0 for points in earned), sum(available)

    def pytest_terminal_summary(self, terminalreporter, config):
        out, show_all = terminalreporter, config.get_verbosity() > 0
        for name in (*FUNCTIONS, TOGETHER):
            for kind, failure in self.failures_to_show(name, show_all):
                out.write_line("")
                out.write_line(f"---- {name}: {kind}", bold=True)
                out.write_line(block(FUNCTIONS.get(name), failure))
        out.section(f"points: {self.path.name}")
        for line in self.table():
            out.write_line(line)
        self.write_json()

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

    def table(self):
        """The lines `function, points and tests of both kinds, remark`."""
        yield f"{'':16}{'equation':10}{'(tests)':>10}    {'robustness':10}{'(tests)':>10}"
        for name in self.tests if self.only is None else [self.only]:
            cells = "".join(f"{self.cell(name, kind):24}" for kind in KINDS)
            yield f"{name:16}{cells}{self.remark(name)}".rstrip()
        if self.complete:
            equation, robustness = self.total("equation"), self.total("robustness")
            both = f"{equation[0] + robustness[0]} of {equation[1] + robustness[1]} points"
            columns = ["{:2} of {:2}".format(*pair) for pair in (equation, robustness)]
            yield f"{'total':16}{columns[0]:24}{columns[1]:24}{both}"
        if any(self.tests[name]["equation"].failures for name in FUNCTIONS):
            yield f"not judged: {NOT_JUDGED}; until then it counts 0 points"

    def cell(self, name, kind):
        """`" 2 of  4    (3 of 9)"`; "-" where the tests that ran do not decide the points."""
        tests, (earned, available) = self.tests[name][kind], self.points(name, kind)
        passed = f"({tests.passed} of {tests.count})"
        if name == TOGETHER:
            return f"{'no points':10}{passed:>10}"
        if earned is None:
            return f"{' -':10}{passed:>10}"
        if not self.is_judged(name, kind):
            return "not judged"
        return f"{f'{earned:2} of {available:2}':10}{passed:>10}"

    def remark(self, name):
        left = sum(tests.count - tests.ran for tests in self.tests[name].values())
        if name in self.missing:
            return "not defined"
        if name in self.unwritten:
            return "not written"
        if name in self.endless:
            return "does not return"
        return f"{left} not run" if left else ""          # by --function, -k or -x

    @property
    def complete(self):
        return all(t.ran == t.count for kinds in self.tests.values() for t in kinds.values())

    def write_json(self, error=None):
        """Points by function and the message that tells most of each; null where the tests that
        ran do not decide them. error: why nothing could run."""
        if self.json_path is None:
            return
        (equation, _), (robustness, _) = self.total("equation"), self.total("robustness")
        points = {"points": equation + robustness, "equation": equation, "robustness": robustness}
        if not self.complete:
            points = dict.fromkeys(points)
        record = {"file": self.path.name, "error": error, "complete": self.complete and not error,
                  "out_of": sum(self.total(kind)[1] for kind in KINDS), **points, "functions": {}}
        for name, kinds in self.tests.items():
            record["functions"][name] = {kind: self.entry(name, kind) for kind in kinds}
        text = json.dumps(record, indent=1)
        self.json_path.write_text(text + "\n", encoding="utf-8")

    def entry(self, name, kind):
        tests, (earned, available) = self.tests[name][kind], self.points(name, kind)
        judged, message = self.is_judged(name, kind), None
        if tests.failures:
            failure = tests.most_telling
            message = f"{failure.test}: {' '.join(failure.result.split())}"
        if not judged and earned is not None:
            message = NOT_JUDGED
        return {"points": earned, "out_of": available, "judged": judged, "tests": tests.count,
                "passed": tests.passed, "message": message}


def points_of(item):
    """(function, kind) of the mark `points`; None where there is no such mark."""
    marker = item.get_closest_marker("points")
    if marker is None:
        return None
    function, kind = (*marker.args, "equation")[:2]
    return function, kind


def block(graded, failure):
    parts = {"equation": graded.equation if graded else "", "test": failure.test,
             "by hand": failure.by_hand, "input": "\n".join(failure.calls),
             "result": failure.result, "line": failure.line}
    lines = []
    for label, text in parts.items():
        if text:
            lines.append(textwrap.indent(text, 11 * " ").replace(11 * " ", f"{label:11}", 1))
    return "\n".join(lines)


def copied(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


@contextlib.contextmanager
def time_limit(name):
    """Stops an endless loop. It counts seconds of the processor, so a busy machine is no excuse."""
    if not hasattr(signal, "SIGPROF"):                      # Windows: no limit
        yield
        return
    handler = signal.signal(signal.SIGPROF, functools.partial(stop, name))
    left = signal.setitimer(signal.ITIMER_PROF, SECONDS)    # of the call that made this one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *left)
        signal.signal(signal.SIGPROF, handler)


def stop(name, *signal_and_frame):
    raise TimeoutError(f"{name} did not return within {SECONDS} seconds; an endless loop?")


def load_as(name, path):
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load(path):
    """Import the file as the module `tvkd`, before a test imports that name."""
    if not path.is_file():
        raise pytest.UsageError(f"--impl: expected a Python file, got {path}: no such file")
    try:
        with time_limit("the import"):
            return load_as("tvkd", path)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise pytest.UsageError(f"--impl: {path.name} cannot be imported: "
                                f"{type(error).__name__}: {reason}") from None
