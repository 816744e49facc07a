"""What all tests share: the import path, no network, one thread, and `close`.

    pytest --impl=my_tvkd.py        grade another tvkd.py; the grader is course/grader.py
"""

import contextlib
import io
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "system")]

import harness  # noqa: E402,F401   before torch: it sets how threads wait, else two spin
import torch    # noqa: E402

torch.set_num_threads(1)        # the tensors are small: two threads would wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job ignores it


GRADING = (("--function", "NAME", "test this function only"),
           ("--variant", "N", "the convention that course/release.py gave to students"),
           ("--json", "FILE", "write the points to FILE, as Gradescope reads them"))


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FILE", help="grade FILE instead of tvkd.py")
    for option, metavar, text in GRADING:
        parser.addoption(option, metavar=metavar, help=f"with --impl: {text}")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by the README's command, run by .ci/run")
    config.addinivalue_line("markers", "points(function, kind, part): what the test decides")
    function, variant, target = (config.getoption(option) for option, _, _ in GRADING)
    if config.getoption("--impl") is not None:
        from course.grader import Grader
        folder = config.invocation_params.dir
        config.pluginmanager.register(Grader(folder / config.getoption("--impl"), function, variant,
                                             None if target is None else folder / target))
        # The grader prints its own, shorter failures, unless other options ask for pytest's.
        if config.option.tbstyle == "auto" and config.option.reportchars == "fE":
            config.option.tbstyle, config.option.reportchars = "no", ""
    for option, _, _ in GRADING:
        if config.getoption(option) is not None and config.getoption("--impl") is None:
            raise pytest.UsageError(f"{option}: expected --impl=FILE beside it")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", refuse_network)
    monkeypatch.setattr(socket, "create_connection", refuse_network)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """One run with the options of SMALL, to read only: folder, rows, log and what it printed."""
    from small_run import run
    out, printed = tmp_path_factory.mktemp("default") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows, log = run(out)
    return SimpleNamespace(out=out, rows=rows, log=log, printed=printed.getvalue())


@pytest.fixture
def out(default_run, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(default_run.out, tmp_path / "runs" / "out")


def refuse_network(*args, **kwargs):
    raise OSError("tests do not use the network")


def close(got, expected, tolerance=1e-6, mistakes=None):
    """Same shape, and no element further off than `tolerance`. NaN is never close.

    mistakes: {"the mean, not the sum": -3}; where `got` is -3, the message names this mistake."""
    __tracebackhide__ = True
    if is_close(got, expected, tolerance):
        return
    expected = torch.as_tensor(expected, dtype=torch.double).detach()
    lines = [f"expected {as_text(expected)}", f"     got {as_text(got)}"]
    shape = getattr(got, "shape", None)
    if shape is not None and shape != expected.shape:
        lines[1] += f" (shape {tuple(shape)}, expected {tuple(expected.shape)})"
    elif shape is not None and as_text(got) == as_text(expected):       # large, or many digits
        wrong = ~((got.detach() - expected).abs() <= tolerance)
        first = wrong.nonzero()[0].tolist()
        lines = [f"expected {expected[(*first,)].item()!r} at index {first}",
                 f"     got {got[(*first,)].item()!r}; {wrong.sum()} of {got.numel()} differ"]
    for mistake, value in (mistakes or {}).items():
        value = torch.as_tensor(value, dtype=torch.double)
        same_text = value.isinf().any() and as_text(got) == as_text(value)      # inf - inf is NaN
        if is_close(got, value, tolerance) or same_text:
            lines.append(f"likely mistake: {mistake}")
    raise AssertionError("\n".join(lines))


def is_close(got, expected, tolerance):
    if not isinstance(got, (torch.Tensor, float, list)):
        return False
    got, expected = (torch.as_tensor(x, dtype=torch.double).detach() for x in (got, expected))
    return got.shape == expected.shape and bool(((got - expected).abs() <= tolerance).all())


def as_text(value):
    """A small tensor as nested lists with at most 6 decimals, a large one as its shape."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() > 36:
        return f"a tensor of shape {tuple(value.shape)}"
    return str(rounded(value.tolist()))


def rounded(x):
    if isinstance(x, list):
        return [rounded(item) for item in x]
    return round(x, 6) + 0.0 if isinstance(x, float) else x         # + 0.0 turns -0.0 into 0.0
