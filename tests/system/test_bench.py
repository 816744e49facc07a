"""The benchmark: every figure is there, and what is counted, not timed, is within its limit."""

import io
import json
import math
import subprocess
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import close
from evidence import bench
from harness.options import parse_args
from model import GPT, GPTConfig
from small_run import write_pairs

ONCE = {"teacher_bytes_per_token", "head_memory_ratio", "memory_formula_error", "padding_waste",
        "second_thread_gain"}
ALONE = {"large_memory", "exponent_reading", "exponent_precomputing"}       # --large and --pairs


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two would wait for each other on a busy machine."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


@pytest.fixture(scope="module")
def quickstarts():
    """The commands that would have run the quickstart, and their threads."""
    return []


@pytest.fixture(scope="module")
def figures(tmp_path_factory, quickstarts):
    """A quick run on a preference file of 141 lines, of 121 prompts once and 10 twice."""
    pairs = [(f"Say {n % 131}.", " yes" * (1 + n % 7), " no" * (1 + n % 5)) for n in range(141)]
    path = write_pairs(tmp_path_factory.mktemp("bench") / "pairs.jsonl", pairs)

    def run(command, env, **options):
        quickstarts.append((command[1:], env["OMP_NUM_THREADS"]))
    threads = [1]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(subprocess, "run", run)
        patch.setattr(torch, "set_num_threads", threads.append)
        patch.setattr(torch, "get_num_threads", lambda: threads[-1])
        patch.setattr(bench, "CORES", 2)
        patch.setattr(bench, "THREADS", (1, 2))
        assert bench.main(["--quick", "--json", f"--data={path}"]) == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
def test_every_figure_is_there(figures):
    """Twice what is timed: on one thread and on two. None is negative or not a number."""
    assert set(figures) == set(bench.ON_TWO_THREADS) - ALONE | {"matmul_fraction"}
    for key, figure in figures.items():
        assert figure["limit"] == bench.LIMITS.get(key) and figure["what"]
        values = [figure["value"]]
        if key in ONCE:
            assert set(figure) == {"value", "limit", "what"}
        else:
            assert figure["limit_2_threads"] == bench.ON_TWO_THREADS.get(key)
            values.append(figure["value_2_threads"])
        assert all(math.isfinite(value) and 0 <= value < 100 for value in values)


@pytest.mark.slow
def test_what_is_counted(figures):
    """Not timed, so the same on every machine."""
    assert figures["teacher_bytes_per_token"]["value"] == 4
    assert figures["memory_formula_error"]["value"] < 0.1
    assert figures["head_memory_ratio"]["value"] < 0.5
    assert 0 < figures["padding_waste"]["value"] < 0.1


@pytest.mark.slow
def test_the_quickstart_is_the_command_of_the_readme(figures, quickstarts):
    """`train.py` in a new folder, on one thread and on two; --quick adds options that it takes."""
    assert [threads for _, threads in quickstarts] == ["1", "2"]
    for (script, out, *tiny), _ in quickstarts:
        assert script == "train.py" and out.startswith("--out=")
        assert tiny == bench.TINY and parse_args(tiny, train.METHODS).steps == 1
    assert bench.machine() in figures["quickstart_seconds"]["what"]


def test_memory_by_hand():
    """2 rows of 4 tokens, half scored, two layers of 2 channels and one head, 3 ids.

    6 + 8 + 2 (8 + 18 + 6 + 24 + 18) + 4 = 166 parameters; a token keeps 16 * 2 + 1 + 4 = 37 floats
    in a layer and 2 for its id, but where it is not scored 10 * 2 + 2 fewer in the last one, so
    2 * 37 + 2 - 22 / 2 = 65 on average; a scored one 3 + 2 * 2 + 12; both rows are one part.
    """
    computed = bench.training_bytes(GPTConfig(3, 4, 2, 1, 2), 2, 4, 0.5, others=10)
    assert computed == {"weights": 16 * 166, "others": 40, "activations": 4 * 8 * 65,
                        "head": 4 * 4 * 19, "spare": 3 * 4 * 4 * 3}


def test_saved_and_peak_bytes_by_hand():
    """exp keeps its result and sin its input, the same 400 bytes; the sum of two temporaries of
    400 bytes is a third."""
    x = torch.ones(100, requires_grad=True)
    assert bench.saved_bytes(torch.nn.Linear(1, 1), lambda: x.exp().sin().sum()) == 400
    assert bench.peak_bytes(lambda: torch.ones(100) + torch.ones(100)) == 1200


def test_the_counter_sees_both_halves(monkeypatch):
    """It sees one thread alone, so the products of a step must be counted on one: as many
    operations with two threads as with one, and the number of threads stays."""
    monkeypatch.undo()                                          # real threads
    monkeypatch.setattr(bench, "ratio", lambda repeats, multiply, step: sum(
        2 * a.numel() * b.shape[-1] for a, b in multiply.args[0]))
    model, pairs, counted = GPT(GPTConfig(9, 16, 1, 1, 8)), bench.random_pairs(4, 8, 9), []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        counted += [value for _, value, _ in bench.of_matmuls(model, pairs, 1)]
        assert torch.get_num_threads() == threads
    assert counted[0] == counted[1] > 0


def test_exponents_ratios_and_limits(monkeypatch):
    """Times of 1, 4, 16 at sizes 1, 2, 4 grow with the square. A ratio is the median of 1/4, 1/4
    and 1/2, not 8/22 of the sums."""
    close(bench.exponent([1, 2, 4], [1, 4, 16]), 2.0)
    monkeypatch.setattr(bench, "in_turn", lambda repeats, *functions: [[1, 4], [2, 8], [5, 10]])
    assert bench.ratio(3, None, None) == 0.25 and bench.medians(3, None, None) == [2, 8]
    limits = ("<= 2", "<= 1", ">= 2", ">= 3", "= 2", "= 3")
    assert [bench.holds(2, limit) for limit in limits] == [True, False] * 3
    assert not bench.holds(float("nan"), "<= 1")


def test_the_gain_weighs_stages_by_their_steps(monkeypatch):
    """Teacher 3 and 2 steps, student 1 and 4: 3 * 8 + 2 * 6 + 1 * 4 + 4 * 2 = 48 ms on one thread,
    3 * 4 + 2 * 3 + 1 * 4 + 4 * 1 = 26 on two. The plain step has no weight."""
    times = iter([(8, 4), (6, 3), (4, 4), (2, 1), (1000, 1)])
    monkeypatch.setattr(bench, "medians", lambda repeats, *functions: next(times))
    config = SimpleNamespace(teacher_sft_steps=3, teacher_dpo_steps=2, student_sft_steps=1, steps=4)
    model = torch.nn.Linear(1, 1)
    pairs = bench.random_pairs(2, 4, 9)
    ids = SimpleNamespace(train=pairs, sft=pairs)
    [(_, gain, what)] = bench.of_two_threads(config, model, model, ids, 2, 1)
    close(gain, 48 / 26)
    assert "teacher's DPO 2.00" in what


def test_growth_in_pairs(monkeypatch):
    """Measured for real at 200 pairs; the exponents of 1, 2, 4, 8 times the seconds are 1."""
    assert all(0 < number < 100 for number in bench.run_of_pairs(200))
    monkeypatch.setattr(bench, "run_of_pairs", lambda n: (n, 3 * n, 5, n ** 2))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    for (key, got, what), expected in zip(bench.of_pairs(80), (1, 1, 0, 2)):
        close(got, float(expected))
    assert key == "exponent_peak" and what.endswith("10 to 80 pairs: 100, 400, 1.6e+03, 6.4e+03")


class Here:
    """A pool that does its work at once and in this process."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        return SimpleNamespace(result=lambda: function(*args))


def test_large_runs(capsys):
    """With tiny models in the place of GPT-2: three figures, the formula named beside the peak."""
    assert bench.main(["--large", "--quick", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"large_step", "large_values", "large_memory"}
    assert "computed 0.0" in figures["large_memory"]["what"]


def test_what_is_printed(capsys, monkeypatch):
    """Within the limit, beyond it, beyond it on two threads alone, without one."""
    figures = [("padding_waste", [0.1], "a"), ("generate_speedup", [4.9, 9.0], "b"),
               ("step_over_plain_lm", [0.79, 0.91], "c"), ("matmul_fraction", [9.0, 9.0], "d"),
               ("memory_formula_error", [0.0], "e")]
    monkeypatch.setattr(bench, "measured", lambda args: figures)
    assert bench.main([]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert first == ["ok", "MISSED", "MISSED", "matmul_fraction", "ok", "padding_waste"]
    assert bench.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_over_plain_lm"] == {
        "value": 0.79, "limit": "<= 0.80", "what": "c",
        "value_2_threads": 0.91, "limit_2_threads": "<= 0.90"}
    assert bench.main(["--sizes"]) == 0 and "124,439,808" in capsys.readouterr().out


def test_mistakes_of_the_user(capsys, monkeypatch):
    """A file that is not there, too few pairs, a device that is not there, no such option."""
    monkeypatch.setattr(bench, "measured", lambda args: bench.of_padding(args.data))
    assert bench.main(["--data=nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in ("--pairs=1999", "--large=cuda", "--fast"):
        with pytest.raises(SystemExit, match="2"):
            bench.main([option])
        assert option.partition("=")[0] in capsys.readouterr().err
