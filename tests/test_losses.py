"""train.py's losses, the gradient of a batch and `fit`; what models are measured by: by hand."""

import copy
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import data
from conftest import close
from data import Example, Pair
from harness import steps
from harness.errors import CheckFailed
from harness.evaluate import HeldOut, Validation, evaluate, rows_of
from harness.options import Recipe
from harness.progress import Progress
from harness.steps import cut, gradient, padded, parts_of, two_at_once
from model import (GPT, GPTConfig, action_psi, both_responses, frozen_copy, pair_logps,
                   response_logps, rows_logps, state_values, summed_psi)
from test_model import fixed
from train import DPO, KD, TVKD, Likelihood, SoftDPO, check_start, fit
from tvkd import implicit_value, sequence_logps

LN2 = math.log(2)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small():
    """A student, its frozen reference, a teacher, and 5 pairs with responses of 1 to 30 tokens. In
    float64, so that sums of 155 terms in another order differ by less than 1e-12 of their size."""
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(50, 40, 1, 2, 8)).double() for _ in range(2))
    pairs = [Pair([1, 2], list(range(n)), [5] * (31 - n)) for n in (3, 30, 7, 1, 12)]
    ref = frozen_copy(student)
    return SimpleNamespace(student=student, ref=ref, teacher=frozen_copy(teacher), pairs=pairs,
                           both=both_responses(pairs), ref_logps=pair_logps(ref, pairs))


def recipe(steps, lr, batch_size=8):
    return Recipe(steps, lr, batch_size, micro_batch=0, log_interval=1, eval_interval=1)


# --- the losses ----------------------------------------------------------------------------------

UNIFORM = fixed(0.25, 0.25, 0.25, 0.25)                     # log pi = -2 ln 2 for every token
# Prompts of 1 token; chosen 2 tokens, rejected 3 and the other way round: -4 ln 2 and -6 ln 2. The
# log-ratios to these references are 2 ln 2 (chosen), ln 2 (rejected), and in the second 0, 2 ln 2.
PAIRS = [Pair([1], [2, 0], [2, 3, 0]), Pair([1], [3, 2, 0], [3, 0])]
REF_LOGPS = LN2 * torch.tensor([[-6.0, -6.0], [-7.0, -6.0]])


def test_likelihood_by_hand():
    """Index 0 stands for 2 + 3 tokens, index 1 for 3: 16 ln 2 in sum; 1 + 2, 1 + 3, 1 + 3 ids."""
    rows = both_responses(PAIRS)
    loss = Likelihood([(rows[0], rows[2]), (rows[1],)])
    sums = loss(UNIFORM, [0, 1])
    close(sums["loss"], 16 * LN2, 1e-5)
    close(loss(UNIFORM, [1])["loss"], 6 * LN2, 1e-5)
    assert sums["n"] == 8 and loss.lengths == [[3, 4], [4]]


def test_dpo_by_hand():
    """beta 1/2: margins (2 - 1)/2 ln 2 = ln 2 / 2 and (0 - 2)/2 ln 2 = -ln 2.
    Losses ln(1 + 2^-1/2) = 0.534800 and ln(1 + 2) = 1.098612; one of two is ordered rightly."""
    loss = DPO(PAIRS, REF_LOGPS, 0.5)
    expected = {"loss": 0.534800 + 1.098612, "n": 2, "policy_chosen": -10 * LN2,
                "policy_rejected": -10 * LN2, "ref_chosen": -12 * LN2, "ref_rejected": -13 * LN2,
                "margin": -LN2 / 2, "accuracy": 1}
    with torch.no_grad():
        sums = {name: float(x) for name, x in loss(UNIFORM, [1, 0]).items()}
    assert sums == pytest.approx(expected, abs=1e-5) and loss.lengths == [[3, 4], [4, 3]]
    close(loss(UNIFORM, [1])["loss"], 1.098612, 1e-5)


def test_tvkd_by_hand():
    """As above with alpha 2 and psi ln 2 / 4 and 0, 0 and ln 2 / 2: offsets ln 2 / 2 and -ln 2.
    Both margins minus their offsets are 0, and so both losses are ln 2. The margin that is logged
    is DPO's. At the start -offset is left: ln(1 + 2^1/2) = 0.881374 and ln(1 + 2^-1) = 0.405465."""
    psi = LN2 * torch.tensor([[0.25, 0.0], [0.0, 0.5]])
    loss = TVKD(PAIRS, REF_LOGPS, 0.5, psi, 2.0)
    sums = loss(UNIFORM, [0, 1])
    close(sums["loss"], 2 * LN2, 1e-5)
    close(sums["margin"], -LN2 / 2, 1e-5)
    close(loss(UNIFORM, [1])["loss"], LN2, 1e-5)
    close(loss.at_start([1, 0]), [0.405465, 0.881374], 1e-5)


def test_soft_dpo_by_hand():
    """psi differs by 0 and ln 3, so p = 1/2 and 3/4. Margins m as above: ln 2 / 2 and -ln 2.
    Loss p ln(1 + e^-m) + (1 - p) ln(1 + e^m): (0.534800 + 0.881374) / 2 = 0.708087, and
    3/4 ln 3 + 1/4 ln(3/2) = 0.925326. Its slope in m is sigmoid(m) - p: 0.585786 - 1/2, 1/3 - 3/4;
    times beta 1/2 in log pi(y_w), the opposite in log pi(y_l). At the start m = 0: ln 2."""
    psi = torch.tensor([[1.0, math.log(3)], [1.0, 0.0]])
    loss, logps = SoftDPO(PAIRS, REF_LOGPS, 0.5, psi), pair_logps(UNIFORM, PAIRS).detach()
    losses = loss.losses(logps.requires_grad_(), [0, 1])
    close(losses, [0.708087, 0.925326], 1e-5)
    slopes = torch.tensor([0.585786 - 0.5, 1 / 3 - 3 / 4]) / 2
    close(torch.autograd.grad(losses.sum(), logps)[0], torch.stack([slopes, -slopes]), 1e-5)
    close(loss(UNIFORM, [1])["loss"], 0.925326, 1e-5)
    close(loss.at_start([0, 1]), [LN2, LN2])


def test_what_is_computed_once_is_the_live_score_of_each_row(small):
    """In batches sorted by length, looked up by index: what scoring each row alone gives. psi sums
    to V(s_end) - V(s_p), and V(s_p) = 0."""
    both, logps = small.both, rows_logps(small.ref, small.both, 3)
    values, soft = (state_values(kind, small.teacher, small.ref, both, 0.5, 3)
                    for kind in ("implicit", "logits"))
    psi = summed_psi(values, both, 1.0, "value", at_once=3)
    for i, row in enumerate(both):
        tokens, mask = data.collate([row])
        ref, teacher = (response_logps(model, tokens, mask) for model in (small.ref, small.teacher))
        live = implicit_value(teacher, ref, mask, 0.5)[0]
        close(logps[i], sequence_logps(ref, mask)[0], 1e-10)
        close(values[i], live, 1e-10)
        close(psi[i], live[-1], 1e-5)
        first = len(row.prompt) - 1                                     # no value before s_p
        close(soft[i][first:], 0.5 * small.teacher(tokens)[0].logsumexp(-1)[first:], 1e-10)
        assert values[i].shape == (len(row.prompt) + len(row.response),)
        assert not soft[i][:first].any()


def test_psi_is_summed_in_float64():
    """60 values of size 1e4: with "zero" psi adds up to -V(s_p); float32 would be off by 1e-2."""
    values = 1e4 * torch.randn(62, generator=torch.Generator().manual_seed(0))
    psi = action_psi([values], [Example([0, 0], [0] * 60)], 1.0, "zero")
    close(psi.sum(), -values[1].double(), 1e-9)


def test_evaluate_by_hand():
    """A model that says "cat" for ever; its reference has 1/2, 1/4, 1/4 for EOS, cat, dog. Behind a
    prompt of 10 the context has room for two tokens: "cat cat" earns 1 - 1 where a cat was asked
    for, else -2: mean -2/3, variance 4/3, interval 4.303 sqrt(4/3) / sqrt(3) = 2.868. KL: ln 4 in
    each state. beta 1/2 and log pi = 0 for cat, ln 1e-30 = -69.0776 for the others. Margins: right,
    69.0776 / 2; wrong, -ln 4 / 2; a tie. By reward: equal, wrong, wrong. True accuracy: 1.5 / 2."""
    pairs = [Pair([1] * 10, *ids) for ids in (([1, 0], [2, 0]), ([0], [1, 0]), ([1, 0], [1, 0]))]
    texts = [Pair("red cat", "dog", ""), Pair("red dog", "cat", "dog"), Pair("cat", "dog", "cat")]
    words = SimpleNamespace(eot_token=0, decode_single_token_bytes=[b"", b" cat"].__getitem__)
    model, ref, held_out = fixed(0.0, 1.0, 0.0), fixed(0.5, 0.25, 0.25), HeldOut(
        pairs, texts, words, toy=True, samples=2, max_new_tokens=3, batch_size=2, seed=0)
    expected = {"reward": -2 / 3, "pref_acc": 0.5, "true_acc": 0.75, "kl": 2 * math.log(4),
                "length": 2, "pref_margin": (69.0776 - math.log(4)) / 6}
    measured, curve = evaluate(model, ref, 0.5, held_out), Validation(ref, 0.5, held_out)(model)
    assert curve == pytest.approx({f"val_{name}": x for name, x in expected.items()}, abs=1e-3)
    row, = rows_of({"x": measured}, 0)
    assert row.items() >= {name[4:]: x for name, x in curve.items()}.items()
    assert measured[1]["reward"].tolist() == [0, -2, 0] and row["pref_n"] == 3
    assert row["reward_ci"] == pytest.approx(2.868, abs=1e-3)


# --- the gradient of a batch ---------------------------------------------------------------------

@dataclass
class Slopes:
    """The loss slope * w of a model with one weight, for the slope of each index of 10 tokens."""
    slopes: list
    begun: int = 1              # calls wait until so many have begun
    slow: int = -1              # the index that comes late
    def __post_init__(self):
        self.lengths, self.seen = [[10]] * len(self.slopes), []
        self.barrier = threading.Barrier(self.begun)

    def __call__(self, model, ids):
        self.barrier.wait(timeout=60)
        self.seen.append((ids, torch.get_num_threads(), threading.get_ident()))
        time.sleep(0.02 * (self.slow in ids))
        slopes = torch.tensor([self.slopes[i] for i in ids])
        return {"loss": (slopes * model.weight.squeeze()).sum(), "n": len(ids)}


def one_weight(value=1.0):
    model = torch.nn.Linear(1, 1, bias=False)
    model.load_state_dict({"weight": torch.tensor([[value]])})
    return model


def test_gradient_by_hand(threads):
    """Slopes 8, 1, 1, 2: the gradient is 12 / 4 = 3 in micro-batches of any size, in 3 + 1 as well,
    where the mean of means would be (10/3 + 2) / 2 = 8/3."""
    for n in (1, 2):
        threads(n)
        for micro_batch in (0, 1, 2, 3, 9):
            model, loss = one_weight(0.5), Slopes([8.0, 1, 1, 2])
            total = gradient(model, loss, [0, 1, 2, 3], micro_batch)
            assert total == {"loss": 6.0, "n": 4, "tokens": 40} and model.weight.grad.item() == 3
            assert max(len(ids) for ids, *_ in loss.seen) <= (micro_batch or 4)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_parts_give_the_gradient_of_the_batch(small, threads, n_threads):
    """Responses of unequal length: every loss on 5 pairs at once, or in halves and parts. What
    differs is rounding, relative to the norm of the whole gradient."""
    threads(n_threads)
    psi, pairs = torch.randn(2, 5).double(), (small.pairs, 2 * small.ref_logps, 0.5)
    for loss in (Likelihood([[row] for row in small.both[:5]]), KD(small.pairs, small.teacher),
                 DPO(*pairs), TVKD(*pairs, psi, 1.0), SoftDPO(*pairs, psi)):
        sums = loss(small.student, list(range(5)))
        parameters = list(small.student.parameters())
        expected = torch.autograd.grad(sums["loss"] / sums["n"], parameters)
        norm = torch.cat([x.flatten() for x in expected]).norm()
        for micro_batch in (0, 1, 3):
            total = gradient(small.student, loss, [3, 1, 0, 2, 4], micro_batch)
            assert total["loss"] == pytest.approx(sums["loss"].item(), rel=1e-6)    # in float32
            for parameter, grad in zip(parameters, expected):
                close(parameter.grad / norm, grad / norm, 1e-12)


def test_two_threads_repeat_every_bit(threads):
    """1e8 + 1 is 1e8 in float32, so the order of a sum shows. Whichever part comes late, one half
    adds up to 1e8 and the other to -1e8."""
    threads(2)
    for slow in range(6):
        model = one_weight(0.5)
        gradient(model, Slopes([1e8, 1, 1, -1e8, 1, -1], slow=slow), list(range(6)), 2)
        assert model.weight.grad.item() == 0


@pytest.mark.parametrize("lengths, most, sizes", [
    ([9, 10, 10, 12], 4, [2, 2]), ([9, 10, 11, 12], 4, [4]),        # 41 of 48 < 7/8; 42 of 48
    # 78n of 144n, of 6n (6 + 12) = 108n in two, of 4n (4 + 8 + 12) = 96n in three, of 90n in four
    # (and five), of 2 * 42n = 84n in six, for any n
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 12, [2] * 6),
    ([124] * 12, 12, [12]), ([125] * 12, 12, [6, 6]),           # 1,488 and 1,500 ids
    ([2000] * 12, 12, [2] * 6), ([2 ** k for k in range(12)], 12, [2] * 6),     # at most 8 parts
    ([10] * 12, 5, [4, 4, 4]), ([10] * 12, 1, [1] * 12),        # but never more than `most` in one
])
def test_parts_of_by_hand(lengths, most, sizes):
    parts = parts_of(list(range(len(lengths))), [[n] for n in lengths], most)
    assert sum(parts, []) == list(range(len(lengths))) and [len(part) for part in parts] == sizes


def test_cut_by_hand():
    """Rows of 5, 2, 3, 2, 4 tokens, 16 in all. Sorted 2, 2, 3, 4, 5: the first three have 7 of 8
    tokens, four would have 11; 7 of 3 * 3 is too much padding, 9 of 2 * 5 is not. Of one index,
    one thread or one index at a time there is no second half; of three at a time, each half has
    one. Pairs are read two rows at a time, short ones first: of 1, 9 and 2, 8 tokens 4 + 18."""
    lengths = [[5], [2], [3], [2], [4]]
    assert cut(lengths, [0, 1, 2, 3, 4], 0, 2) == [[[1, 3], [2]], [[4, 0]]]
    assert cut(lengths, [2], 0, 2) == [[[2]]] and cut(lengths, [1, 3], 0, 1) == [[[1, 3]]]
    assert cut(lengths, [1, 3], 1, 2) == [[[1], [3]]] and padded([0, 1], [[1, 9], [2, 8]]) == 22
    assert cut([[9]] * 4, [0, 1, 2, 3], 3, 2) == [[[0], [1]], [[2], [3]]]
    assert parts_of([0, 1, 2, 3], [[375, 375]] * 4, 4) == [[0, 1], [2, 3]]      # 1,500 at a time


@pytest.mark.parametrize("rank, world, slopes, mine, others, mean", [
    (1, 2, [8.0, 1, 1, 2], [[3, 2], [3]], [[9.0, 2], [9.0]], 3),
    (2, 3, [7.0, 5], [[0, 0], [0]], [[12.0, 2], [12.0]], 6),
])
def test_the_share_of_a_process_by_hand(monkeypatch, rank, world, slopes, mine, others, mean):
    """Of slopes 8, 1, 1, 2 one process has 8 + 1 and the other 1 + 2: 12 / 4 = 3 in both. The third
    of three processes has no share of two pairs. It joins with 0, and has the mean of the batch."""
    model, others, seen = one_weight(), list(others), []
    monkeypatch.setattr(steps, "rank_and_world", lambda: (rank, world))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: (
        seen.append(tensor.flatten().tolist()), tensor.add_(torch.tensor(others.pop(0)))))
    total = gradient(model, Slopes(slopes), list(range(len(slopes))))
    assert seen == mine and model.weight.grad.item() == mean
    assert total == {"loss": 12, "n": len(slopes), "tokens": 10 * len(slopes)}


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_two_halves_side_by_side(threads, n_threads):
    """Each half waits for the other to have begun, and has one of two threads, two of five."""
    threads(n_threads)
    loss = Slopes([8.0, 1, 1, 2], begun=min(2, n_threads))
    gradient(one_weight(), loss, [0, 1, 2, 3])
    halves, each, who = zip(*sorted(loss.seen))
    assert halves == (([0, 1], [2, 3]) if n_threads > 1 else ([0, 1, 2, 3],))
    assert set(each) == {max(1, n_threads // 2)} and len(set(who)) == min(2, n_threads)
    assert torch.get_num_threads() == n_threads


@pytest.mark.parametrize("bad, good", [("first", "second"), ("second", "first")])
def test_an_error_in_one_half_waits_for_the_other(threads, bad, good):
    """The error comes through once it has ended; the number of threads is what it was."""
    threads(2)
    ended = []
    with pytest.raises(ValueError, match="half"):
        two_at_once(partial(fail_at, bad, ended), ["first", "second"], torch.device("cpu"))
    assert ended == [good] and torch.get_num_threads() == 2


def fail_at(bad, ended, item):
    if item == bad:
        raise ValueError("half")
    time.sleep(0.05)
    ended.append(item)


# --- steps ---------------------------------------------------------------------------------------

class Watch(Progress):
    """Notes the weight after every step, in place of lines."""
    def after(self, step, total):
        self.lines.append(self.model.weight.item())


class InTurn(Slopes):
    """Slopes of successive steps instead of successive indices."""
    def __call__(self, model, ids):
        return {"loss": self.slopes.pop(0) * model.weight.sum(), "n": 1}


class Root(Slopes):
    """The loss sqrt(0 w)."""
    def __call__(self, model, ids):
        return {"loss": (0 * model.weight.sum()).sqrt(), "n": 1}


def test_learning_rate_by_hand():
    """A constant slope of 1: Adam's step is the learning rate, here 1/10 of its share. Of 20 steps
    two are warm-up (1/2, 1), then 1 to step 11, then down by 1/10 a step to 1/10."""
    watch = Watch("watched")
    fit(one_weight(), Slopes([1.0]), recipe(20, 0.1), 0, progress=watch)
    steps = [before - after for before, after in zip([1.0, *watch.lines], watch.lines)]
    shares = [0.5, *[1] * 10, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    close(steps, [0.1 * share for share in shares], 1e-5)


def test_clipping_and_no_weight_decay_by_hand():
    """Slopes 1/2 and 100, learning rate 0.1 (its share is 1 in the first two of four steps).
    Step 1: m / (1 - 0.9) = g and v / (1 - 0.95) = g^2, so w = 1 - 0.1. Step 2, with 100 clipped to
    1: m = (0.9 0.05 + 0.1) / (1 - 0.81) = 0.763158, v = (0.95 0.0125 + 0.05) / (1 - 0.9025) =
    0.634615, m / sqrt(v) = 0.957986: w = 0.9 - 0.0957986. Without clipping the step would be
    0.0738, and with a weight decay of 0.3 w would shrink by 3% a step."""
    watch = Watch("watched")
    fit(one_weight(), InTurn([0.5, 100.0, 1.0, 1.0]), recipe(4, 0.1), 0, progress=watch)
    close(watch.lines[:2], [0.9, 0.9 - 0.0957986], 1e-5)


def test_the_seed_orders_the_batches():
    """Batches of 2 of 5 indices in the order of shuffled_batches: two and a half epochs."""
    loss, order = Slopes([1.0] * 5), data.shuffled_batches(5, 2, torch.Generator().manual_seed(3))
    fit(one_weight(), loss, recipe(5, 0.1, 2), seed=3)
    assert [ids for ids, *_ in loss.seen] == [next(order).tolist() for _ in range(5)]


def test_training_moves_the_policy_alone(small):
    """After 3 steps of KD all weights have moved and are frozen. Those of the start and the teacher
    have not, and took no gradient."""
    still = small.student, small.teacher
    before = copy.deepcopy([model.state_dict() for model in still])
    trained = fit(small.student, KD(small.pairs, small.teacher), recipe(3, 1e-2), 0)
    for model, state in zip(still, before):
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items())
        assert all(p.grad is None for p in model.parameters())
    for name, x in trained.named_parameters():
        assert not x.requires_grad and not torch.equal(x, before[0][name])


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    """sqrt(0 w) is 0 with a gradient of NaN. The line names stage and step."""
    watch = Watch("watched")
    with pytest.raises(FloatingPointError, match=r"watched: loss 0.0, gradient norm nan at step 1; "
                                                 r".* not finite or too large"):
        fit(one_weight(), Root([1.0]), recipe(3, 0.1), 0, progress=watch)
    assert watch.lines == []


# --- the check of the first batch ----------------------------------------------------------------

def test_another_reference_is_noticed(small, capsys):
    """alpha 2, psi 1 and 0: the loss is -log sigmoid(-2) = ln(1 + e^2) = 2.1269 at the start."""
    psi = torch.tensor([[1.0] * 5, [0.0] * 5])
    fit(small.student, TVKD(small.pairs, small.ref_logps, 1.0, psi, 2.0), recipe(1, 0.1), 0)
    assert "first batch: loss 2.1269, expected 2.1269; gradient" in capsys.readouterr().out
    wrong = TVKD(small.pairs, pair_logps(small.teacher, small.pairs), 1.0, psi, 2.0)
    with pytest.raises(CheckFailed, match="policy and reference are not scored alike"):
        fit(small.student, wrong, recipe(1, 0.1), 0)


@pytest.mark.parametrize("allowed, nats, beta, bfloat16", [
    (0.0016, 300, 1, False), (0.061, 30_000, 1, False),         # 1e-3 + 2e-6 nats: long answers
    (0.016, 300, 10, False), (0.0016, 300, 0.1, False), (0.2, 300, 1, True)])
def test_rounding_grows_with_the_answers_and_beta(allowed, nats, beta, bfloat16):
    """Two pairs, of which the rejected answers have `nats` each, of a mean that is a little off."""
    model = SimpleNamespace(config=SimpleNamespace(bfloat16=bfloat16))
    sums = {"loss": 2 * LN2, "n": 2, "ref_chosen": -2.0, "ref_rejected": -2.0 * nats}
    check_start(model, DPO(PAIRS, REF_LOGPS, beta), sums, 1.0, LN2 + 0.99 * allowed)
    with pytest.raises(CheckFailed, match="not scored alike"):
        check_start(model, DPO(PAIRS, REF_LOGPS, beta), sums, 1.0, LN2 + 1.01 * allowed)


def test_a_sigmoid_that_is_flat_is_named(small):
    """psi of 1,000 and 0: the loss is ln(1 + e^-1000) = 0 and so is its gradient in float64."""
    psi = torch.tensor([[0.0] * 5, [1000.0] * 5])
    with pytest.raises(CheckFailed, match="gradient 0 at a loss of 0, where the sigmoid is flat; "
                                          "scale the teacher's values down, lower --alpha"):
        fit(small.student, TVKD(small.pairs, small.ref_logps, 1.0, psi, 1.0), recipe(1, 0.1), 0)
