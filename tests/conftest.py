"""Puts the project's root on the path, keeps every test off the network and on few threads, and grades other people's tvkd.py.

    pytest --impl=my_tvkd.py        the tests of the equations on that file's functions, and a table of points (make_exercise.py)
"""

import functools
import importlib.machinery
import importlib.util
import inspect
import socket
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from make_exercise import FUNCTIONS, TOGETHER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)         # these tensors are too small to share: two threads would only wait for each other


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("tests do not use the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def shown(value):
    """A tensor as a nested list of at most 6 decimals, a large one as its shape; anything else as it prints."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() > 36:
        return f"a tensor of shape {tuple(value.shape)}"
    return str(value.tolist()) if not value.is_floating_point() else str(_rounded(value.tolist()))


def _rounded(x):
    return [_rounded(item) for item in x] if isinstance(x, list) else round(x, 6) + 0.0        # + 0.0: no -0.0


def close(got, expected, tolerance=1e-6):
    """Same shape, and no element further off than `tolerance`. NaN is never close."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.double).detach()
    if isinstance(got, (torch.Tensor, float, list)):
        got = torch.as_tensor(got, dtype=torch.double).detach()
        if got.shape == expected.shape and ((got - expected).abs() <= tolerance).all():
            return
    shapes = f" (shape {tuple(expected.shape)}, got {tuple(got.shape)})" if getattr(got, "shape", None) != expected.shape else ""
    raise AssertionError(f"expected {shown(expected)}\n     got {shown(got)}{shapes}")


# --- pytest --impl ---------------------------------------------------------------------------------------------------------

def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FILE", help="grade FILE, which holds functions of its own in place of tvkd.py's")
    parser.addoption("--function", metavar="NAME", help="with --impl: only the tests of this function")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by the README's command, run by .ci/run")
    config.addinivalue_line("markers", "points(function): the function of tvkd.py whose points this test decides")
    if config.getoption("--impl") is not None:
        path = config.invocation_params.dir / config.getoption("--impl")
        config.pluginmanager.register(Grader(path, config.getoption("--function")))
    elif config.getoption("--function") is not None:
        raise pytest.UsageError("--function: expected --impl=FILE beside it")


def load(path):
    """Import the file as the module `tvkd`, before any test imports that name."""
    spec = importlib.util.spec_from_file_location("tvkd", path, loader=importlib.machinery.SourceFileLoader("tvkd", str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tvkd"] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise pytest.UsageError(f"--impl: {path.name} cannot be imported: {type(error).__name__}: {said}") from None
    return module


class Grader:
    def __init__(self, path, only=None):
        if only not in (None, *FUNCTIONS):
            raise pytest.UsageError(f"--function: expected one of {', '.join(FUNCTIONS)}, got {only}")
        self.only = only
        if not path.is_file():
            raise pytest.UsageError(f"--impl: expected a Python file, got {path}, which is not there")
        self.name, module = path.name, load(path)
        self.calls = {}
        self.tests, self.ran, self.passed = (dict.fromkeys(FUNCTIONS, 0) for _ in range(3))
        self.missing = [f for f in FUNCTIONS if f != TOGETHER and not callable(getattr(module, f, None))]
        for function in FUNCTIONS:
            if function != TOGETHER:
                setattr(module, function, self.recorded(function, getattr(module, function, None)))

    def recorded(self, name, function):
        """The function, whose last arguments are kept to be shown where a test fails; a missing one fails its own tests alone."""
        if not callable(function):
            def function(*args, **kwargs):
                raise NotImplementedError(f"{self.name} has no function {name}")

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            keep = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in (*args, *kwargs.values())]
            self.calls[name] = function, keep[:len(args)], dict(zip(kwargs, keep[len(args):]))
            return function(*args, **kwargs)
        return wrapper

    def inputs(self, owner):
        """The last call of the function, of every function where all are tested together."""
        for name, (function, args, kwargs) in self.calls.items():
            if owner in (name, TOGETHER):
                try:
                    kwargs = inspect.signature(function).bind(*args, **kwargs).arguments
                except TypeError:                                                           # other parameters than asked for
                    kwargs = {**{f"argument {i + 1}": x for i, x in enumerate(args)}, **kwargs}
                yield f"{name}({', '.join(f'{key}={shown(x)}' for key, x in kwargs.items())})"

    def pytest_ignore_collect(self, collection_path):
        if collection_path.suffix == ".py" and collection_path.name not in ("test_tvkd.py", "test_shaping_invariance.py"):
            return True                                                                     # tests of other files than tvkd.py

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        graded = [item for item in items if owner(item) and self.only in (None, owner(item))]
        for item in items:
            if owner(item):
                self.tests[owner(item)] += 1
        config.hook.pytest_deselected(items=[item for item in items if item not in graded])
        items[:] = graded

    def pytest_runtest_setup(self):
        self.calls.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call":
            self.ran[owner(item)] += 1
        if report.when == "call" and report.passed:
            self.passed[owner(item)] += 1
        if report.when == "call" and report.failed:
            doc = inspect.cleandoc(item.function.__doc__ or "")
            lines = {"equation": FUNCTIONS[owner(item)].equation, "by hand": doc, "input": "\n".join(self.inputs(owner(item))),
                     "result": call.excinfo.exconly()}
            text = [textwrap.indent(body, 11 * " ").replace(11 * " ", f"{name:11}", 1) for name, body in lines.items() if body]
            report.longrepr.addsection(f"{self.name}: {owner(item)}", "\n".join(text), "-")
        return report

    def pytest_terminal_summary(self, terminalreporter):
        """Points are for functions all of whose tests pass."""
        out, total = terminalreporter, 0
        out.section(f"points: {self.name}")
        for name, (points, _) in FUNCTIONS.items():
            earned = points if self.passed[name] == self.tests[name] > 0 else 0
            total += earned
            left = self.tests[name] - self.ran[name]                                        # by --function, -k or -x
            remark = "not defined" if name in self.missing else f"{left} not run" if left else ""
            line = f"{name:16}{self.passed[name]:4} of {self.tests[name]:2} tests{earned:6} of {points:2} points    {remark}"
            out.write_line(line.rstrip())
        if self.ran == self.tests:
            out.write_line(f"{'total':16}{'':16}{total:4} of {sum(f.points for f in FUNCTIONS.values())} points")


def owner(item):
    marker = item.get_closest_marker("points")
    return marker.args[0] if marker else None
