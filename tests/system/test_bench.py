"""The benchmark: its arithmetic by hand, and that every figure of a quick run is there."""

import math

import torch

from conftest import close
from evidence import bench
from model import GPTConfig, pair_logps


def test_every_figure_is_there(capsys, monkeypatch):
    """One a line, none negative or not a number; what is counted is within a tenth."""
    monkeypatch.setattr(bench, "CORES", 2)
    monkeypatch.setattr(bench, "with_threads", lambda n, function: function())
    assert bench.main(["--quick"]) == 0
    figures = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    assert list(figures) == ["tvkd_over_dpo_step", "dpo_cached_over_uncached",
                             "second_thread_gain", "memory_formula_error"]
    assert all(0 <= float(x) < 100 and math.isfinite(float(x)) for x in figures.values())
    assert float(figures["memory_formula_error"]) < 0.1
    assert bench.main(["--sizes"]) == 0 and "124,439,808" in capsys.readouterr().out


def test_memory_by_hand():
    """1 pair of rows of 4 tokens, half scored, two layers of 2 channels and one head, 3 ids.

    6 + 8 + 2 (8 + 18 + 6 + 24 + 18) + 4 = 166 parameters; a token keeps 16 * 2 + 1 + 4 = 37 floats
    in a layer and 2 for its id, but where it is not scored 10 * 2 + 2 fewer in the last one, so
    2 * 37 + 2 - 22 / 2 = 65 on average; a scored one 3 + 2 * 2 + 12; two of each row are scored."""
    computed = bench.training_bytes(GPTConfig(3, 4, 2, 1, 2), 1, 4, 0.5, others=10)
    assert computed == {"weights": 24 * 166, "others": 40, "activations": 4 * 8 * 65,
                        "head": 4 * 4 * 19, "spare": 3 * 4 * 2 * 3}


def test_saved_bytes_by_hand():
    """exp keeps its result and sin its input, the same 400 bytes; a weight does not count."""
    x, layer = torch.ones(1, 100, requires_grad=True), torch.nn.Linear(100, 1, bias=False)
    assert bench.saved_bytes(layer, lambda: x.exp().sin().sum()) == 400
    assert bench.saved_bytes(layer, lambda: layer(x)) == 400


def test_ratios_and_gains_by_hand(monkeypatch):
    """A ratio is the median of 1/4, 1/4 and 1/2, not 8/22 of the sums. Of two stages of 3 and 1
    steps, 3 * 8 + 4 = 28 s on one thread, 3 * 4 + 4 = 16 on two."""
    monkeypatch.setattr(bench, "in_turn", lambda repeats, *functions: [[1, 4], [2, 8], [5, 10]])
    assert bench.ratio(3, None, None) == 0.25
    times = iter([[[8, 4]], [[4, 4]]])
    monkeypatch.setattr(bench, "in_turn", lambda repeats, *functions: next(times))
    key, gain, what = bench.second_thread([(3, None), (1, None)], 1)
    close(gain, 28 / 16)
    assert what.endswith("2.00, 1.00")


def test_the_uncached_loss_is_dpo():
    """The same loss as with the reference's log-probs computed before."""
    pairs = bench.random_pairs(3, 8, 9)
    torch.manual_seed(0)
    model, ref = (bench.GPT(GPTConfig(9, 8, 1, 1, 8)) for _ in range(2))
    cached = bench.DPO(pairs, pair_logps(ref, pairs).detach(), 1.0)(model, [0, 1, 2])
    uncached = bench.UncachedDPO(pairs, torch.zeros(2, 3), 1.0, ref)(model, [0, 1, 2])
    close(uncached["loss"].detach(), cached["loss"].detach())
    assert bench.pairs_at_once(64, 64) == 22 and bench.pairs_at_once(8, 1024) == 2
