"""The figures of bench.py: all there, finite, and those that are counted rather than timed within their limits."""

import io
import json
import math
from contextlib import redirect_stdout

import pytest
import torch

import bench
from conftest import close
from model import GPTConfig


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The figures of a quick run, on a preference file of 141 lines, 121 prompts of which stand once and 10 twice."""
    path = tmp_path_factory.mktemp("bench") / "pairs.jsonl"
    lines = [{"prompt": f"Say {n % 131}.", "chosen": " yes" * (1 + n % 7), "rejected": " no" * (1 + n % 5)} for n in range(141)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with redirect_stdout(io.StringIO()) as printed:
        assert bench.main(["--quick", "--json", f"--data={path}"]) == 0
    return json.loads(printed.getvalue())


def test_every_figure_is_there(found):
    reported = {"matmul_fraction"} | {f"exponent_{name}" for name in ("T", "B", "V", "size", "pairs")}
    assert set(found) == set(bench.LIMITS) | reported
    for key, figure in found.items():
        assert set(figure) == {"value", "limit", "what"} and math.isfinite(figure["value"]) and figure["what"]
        assert figure["limit"] == bench.LIMITS.get(key)
        assert key.startswith("exponent") or 0 <= figure["value"] < 100
        assert not key.startswith("exponent") or -1 < figure["value"] < 3


def test_what_is_counted(found):
    """Not timed, so the same on every machine."""
    assert found["teacher_bytes_per_token"]["value"] == 4
    assert found["memory_formula_error"]["value"] < 0.1
    assert found["head_memory_ratio"]["value"] < 0.5


def test_memory_by_hand():
    """2 rows of 4 tokens, half scored, one layer of 2 channels and one head, 3 ids: 6 + 8 + (8 + 18 + 6 + 24 + 18) + 4 = 92
    parameters; a token keeps 16 * 2 + 1 + 4 floats in the layer, 2 for its id, a scored one 3 + 2 * 2 + 12; a part is one row."""
    computed = bench.training_bytes(GPTConfig(3, 4, 1, 1, 2), 2, 4, 0.5, frozen=10)
    assert computed == {"weights": 16 * 92, "frozen": 40, "activations": 4 * 8 * 39, "head": 4 * 4 * 19, "spare": 3 * 4 * 2 * 3}


def test_kept_and_peak_bytes_by_hand():
    """exp keeps its own result and sin its input, of 4 bytes each; a sum of two temporaries of 400 bytes is a third."""
    x = torch.ones(100, requires_grad=True)
    assert bench.kept_bytes(torch.nn.Linear(1, 1), lambda: x.exp().sin().sum()) == 400
    assert bench.peak_bytes(lambda: torch.ones(100) + torch.ones(100)) == 1200


def test_exponents_and_limits(monkeypatch):
    """Times of 1, 4, 16 at sizes 1, 2, 4 grow with the square; a ratio is the median of 1/4, 1/4 and 1/2."""
    monkeypatch.setattr(bench, "in_turn", lambda repeats, *functions: [[1, 4, 16], [1, 4, 17], [1, 4, 15]])
    close(bench.exponent(3, [1, 2, 4], [None] * 3), 2.0)
    monkeypatch.setattr(bench, "in_turn", lambda repeats, *functions: [[1, 4], [2, 8], [5, 10]])
    assert bench.ratio(3, None, None) == 0.25 and not bench.holds(float("nan"), "<= 1")
    assert [bench.holds(2, limit) for limit in ("<= 2", "<= 1", ">= 2", ">= 3", "= 2", "= 3", None)] == [True, False] * 3 + [True]


def test_what_is_printed(capsys, monkeypatch):
    """A figure within its limit, one that misses it, one without; a file that is not there; the table; an unknown option."""
    figures = [("padding_waste", 0.1, "a"), ("generate_speedup", 4.9, "b"), ("exponent_T", 9.0, "c")]
    monkeypatch.setattr(bench, "measured", lambda quick, path: bench.of_padding(path) if path else figures)
    assert bench.main([]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first[1:] == ["ok", "MISSED", "exponent_T", "padding_waste"]
    assert bench.main(["--data=nowhere.jsonl"]) == 2 and "nowhere.jsonl" in capsys.readouterr().err
    assert bench.main(["--sizes"]) == 0 and "124,439,808" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--fast"])
