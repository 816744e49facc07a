"""The losses and the training loop of train.py: sums by hand, steps by hand, what stays frozen."""

import copy
import math
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import data
import train
from conftest import close
from data import Example, Pair
from harness.evaluate import is_correct, reward_margins
from harness.options import Recipe
from harness.processes import two_at_once, two_halves
from harness.progress import Progress
from model import (GPT, GPTConfig, action_psi, both_responses, frozen_copy, response_logps,
                   rows_logps, state_values, summed_psi)
from train import (DPO, KD, TVKD, Likelihood, check_start, dpo_loss_at_start, fit, gradient,
                   schedule, tvkd_loss_at_start)
from tvkd import implicit_value, kd_loss, sequence_logps

EVERY = torch.arange(5)


@pytest.fixture
def small():
    """A student, its frozen reference, a teacher, and 5 pairs with responses of 1 to 30 tokens."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(50, 40, 1, 2, 8)))
    pairs = [Pair([1, 2], list(range(n)), [5] * (31 - n)) for n in (3, 30, 7, 1, 12)]
    return SimpleNamespace(student=models[0], ref=frozen_copy(models[0]),
                           teacher=frozen_copy(models[1]), pairs=pairs, both=both_responses(pairs))


def logps_of(model, small):
    return rows_logps(model, small.both, 3).view(2, -1)


# --- the losses ----------------------------------------------------------------------------------

def uniform():
    """A model of 4 ids whose logits are all 0: log pi = -ln 4 for every token."""
    model = GPT(GPTConfig(4, 8, 1, 1, 4))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    return model


# Both prompts 1 token; chosen 2 tokens, rejected 3 and the other way round.
PAIRS = [Pair([1], [2, 0], [2, 3, 0]), Pair([1], [3, 2, 0], [3, 0])]
LN2 = math.log(2)
# log pi is -2 ln 4 = -4 ln 2 for 2 tokens and -6 ln 2 for 3. The log-ratios to these references:
# 2 ln 2 (chosen) and ln 2 (rejected) in the first pair, 0 and 2 ln 2 in the second.
REF_LOGPS = LN2 * torch.tensor([[-6.0, -6.0], [-7.0, -6.0]])


def test_likelihood_by_hand():
    """Index 0 stands for 2 + 3 tokens, index 1 for 3: 8 ln 4 in sum; 1 + 2, 1 + 3, 1 + 3 ids."""
    rows = both_responses(PAIRS)
    sums = Likelihood([(rows[0], rows[2]), (rows[1],)])(uniform(), torch.arange(2))
    close(sums["loss"], 8 * math.log(4), 1e-5)
    assert sums["n"] == 8 and sums["tokens"] == 3 + 4 + 4


def test_dpo_by_hand():
    """beta 1/2: margins (2 - 1)/2 ln 2 = ln 2 / 2 and (0 - 2)/2 ln 2 = -ln 2.

    Losses ln(1 + 2^-1/2) = 0.534800 and ln(1 + 2) = 1.098612; one of two is ordered rightly.
    """
    sums = DPO(PAIRS, REF_LOGPS, 0.5)(uniform(), torch.arange(2))
    close(sums["loss"], 0.534800 + 1.098612, 1e-5)
    close(sums["policy_chosen"], -10 * LN2, 1e-5)
    close(sums["policy_rejected"], -10 * LN2, 1e-5)
    close(sums["ref_chosen"], -12 * LN2, 1e-5)
    close(sums["ref_rejected"], -13 * LN2, 1e-5)
    close(sums["margin"], -LN2 / 2, 1e-5)
    assert sums["accuracy"] == 1 and sums["n"] == 2 and sums["tokens"] == 3 + 4 + 4 + 3


def test_tvkd_by_hand():
    """As above with alpha 2 and psi ln 2 / 4 and 0, 0 and ln 2 / 2: offsets ln 2 / 2 and -ln 2.

    Both margins minus their offsets are 0, and so both losses are ln 2. The margin that is logged
    is DPO's.
    """
    psi = LN2 * torch.tensor([[0.25, 0.0], [0.0, 0.5]])
    sums = TVKD(PAIRS, REF_LOGPS, psi, 0.5, 2.0)(uniform(), torch.arange(2))
    close(sums["loss"], 2 * LN2, 1e-5)
    close(sums["margin"], -LN2 / 2, 1e-5)


def test_an_index_selects_its_pair_and_what_belongs_to_it():
    """Index 1 alone, then 1 and 0: the second pair's loss without psi, then the sum of both."""
    psi = LN2 * torch.tensor([[0.25, 0.0], [0.0, 0.5]])
    loss = TVKD(PAIRS, REF_LOGPS, psi, 0.5, 0.0)
    close(loss(uniform(), torch.tensor([1]))["loss"], 1.098612, 1e-5)
    close(loss(uniform(), torch.tensor([1, 0]))["loss"], 0.534800 + 1.098612, 1e-5)
    shifted = TVKD(PAIRS, REF_LOGPS, psi, 0.5, 2.0)
    close(shifted(uniform(), torch.tensor([1]))["loss"], LN2, 1e-5)


def test_kd_reads_the_teacher(small):
    """From itself: 0 and no gradient. From another teacher: the mean of all states at once."""
    for teacher, is_zero in ((small.ref, True), (small.teacher, False)):
        sums = KD(small.pairs, teacher)(small.student, EVERY)
        loss = sums["loss"] / sums["n"]
        gradients = torch.autograd.grad(loss, list(small.student.parameters()))
        largest = max(gradient.abs().max().item() for gradient in gradients)
        assert (abs(loss.item()) < 1e-6) == is_zero == (largest < 1e-6)
    tokens, mask = data.collate(small.both)
    close(loss, kd_loss(small.student(tokens), small.teacher(tokens), mask), 1e-5)
    assert sums["n"] == 5 * 31


def test_margins_by_hand():
    """beta 0.1; log-ratios 2 and 0, 0 and 1, 3 and 3: margins 0.2, -0.1, 0: right, wrong, tie."""
    zero = torch.zeros(3)
    margins = reward_margins(torch.tensor([2.0, 0, 3]), torch.tensor([0.0, 1, 3]), zero, zero, 0.1)
    close(margins, [0.2, -0.1, 0.0])
    close(is_correct(margins), [1.0, 0.0, 0.5])


# --- what is cached ------------------------------------------------------------------------------

def test_cache_is_the_live_score_of_each_row(small):
    """Cached in batches sorted by length, looked up by index: what scoring each row alone gives.

    psi sums to V(s_end) - V(s_p), and V(s_p) = 0.
    """
    both = small.both
    logps = rows_logps(small.ref, both, 3)
    values = state_values("implicit", small.teacher, small.ref, both, 0.5, 3)
    soft = state_values("logits", small.teacher, small.ref, both, 0.5, 3)
    psi = action_psi(values, both, 1.0, "value").sum(-1)
    for at_once in (3, 1000):
        close(summed_psi(values, both, 1.0, "value", at_once), psi, 1e-5)
    for i, row in enumerate(both):
        tokens, mask = data.collate([row])
        ref, teacher = (response_logps(model, tokens, mask) for model in (small.ref, small.teacher))
        live = implicit_value(teacher, ref, mask, 0.5)[0]
        close(logps[i], sequence_logps(ref, mask)[0], 1e-4)
        close(values[i], live, 1e-4)
        close(psi[i], live[-1], 1e-4)
        first = len(row.prompt) - 1                                     # no value before s_p
        close(soft[i][first:], 0.5 * small.teacher(tokens)[0].logsumexp(-1)[first:], 1e-4)
        assert values[i].shape == (len(row.prompt) + len(row.response),)
        assert values[i].element_size() == 4 and not soft[i][:first].any()


def test_psi_is_summed_in_float64():
    """60 values of size 1e4: with "zero" psi adds up to -V(s_p); float32 would be off by 1e-2."""
    values = 1e4 * torch.randn(2, 62, generator=torch.Generator().manual_seed(0))
    psi = action_psi(list(values), [Example([0, 0], [0] * 60)] * 2, 1.0, "zero")
    close(psi.sum(-1), -values[:, 1].double(), 1e-9)


# --- the gradient of a batch ---------------------------------------------------------------------

@dataclass
class Slopes:
    """The loss slope * w of a model with one weight, for the slope of each index."""
    slopes: list

    def __len__(self):
        return len(self.slopes)

    def rows(self, ids):
        return [Example([0], [0] * 9) for _ in ids]

    def __call__(self, model, ids):
        slopes = torch.tensor([self.slopes[i] for i in ids.tolist()])
        return {"loss": (slopes * model.weight.squeeze()).sum(), "n": len(ids),
                "tokens": 10 * len(ids)}


def one_weight(value=1.0):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_sums_by_hand():
    """Slopes 8, 1, 1, 2: the gradient is 12 / 4 = 3 in micro-batches of any size.

    In 3 + 1 as well, where the mean of means would be (10/3 + 2) / 2 = 8/3.
    """
    for micro_batch in (0, 1, 2, 3, 4, 9):
        model = one_weight(0.5)
        total = gradient(model, model, Slopes([8.0, 1, 1, 2]), torch.arange(4), micro_batch)
        close(model.weight.grad, [[3.0]])
        assert total == {"loss": 6.0, "n": 4, "tokens": 40}


def test_micro_batches_give_the_gradient_of_the_batch(small):
    """Responses of unequal length: every loss on 5 pairs at once, or on 1, 2, 3 at a time."""
    ref_logps, psi = logps_of(small.teacher, small), torch.randn(2, 5)
    for loss in (Likelihood([[row] for row in small.both[:5]]), KD(small.pairs, small.teacher),
                 DPO(small.pairs, ref_logps, 0.5), TVKD(small.pairs, ref_logps, psi, 0.5, 1.0)):
        sums = loss(small.student, EVERY)
        mean = sums["loss"] / sums["n"]
        expected = torch.autograd.grad(mean, list(small.student.parameters()))
        for micro_batch in (0, 1, 2, 3):
            small.student.zero_grad()
            total = gradient(small.student, small.student, loss, EVERY, micro_batch)
            close(total["loss"] / total["n"], mean, 1e-5)
            for parameter, grad in zip(small.student.parameters(), expected):
                torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def test_parts_leave_the_loss_as_it_is(small, monkeypatch):
    """The rows of a batch pass the model in parts by length: of 1, 4 or all 6, the same sums."""
    results = []
    for size in (1, 4, 6):
        monkeypatch.setattr(train, "part_size", lambda rows: size)
        sums = DPO(small.pairs, torch.zeros(2, 5), 1.0)(small.student, torch.tensor([3, 0, 1]))
        results.append([torch.as_tensor(x).item() for x in sums.values()])
    assert results[0] == pytest.approx(results[1], abs=1e-3)
    assert results[0] == pytest.approx(results[2], abs=1e-3)
    assert results[0][-1] == 3 * (2 * 2 + 31)                           # "tokens"


def test_part_size_by_hand():
    """12 rows of n, 2n, ..., 12n ids, 78n in all, sorted, padded in parts.

    78n of 144n in one part, of 6n (6 + 12) = 108n in two, of 4n (4 + 8 + 12) = 96n in three, of 90n
    in four (and five), of 2 * 42n = 84n in six: more than seven eighths, for any n. Rows of 9, 10,
    10, 12 ids: 41 of 48, and of 2 (10 + 12) = 44 in two; of 9, 10, 11, 12: 42 of 48 is seven
    eighths. Rows of one length: 12 * 124 = 1,488 ids stay together, 12 * 125 = 1,500 do not. Never
    more than 8 parts.
    """
    for last, size in ((10, 2), (11, 4)):
        assert train.part_size([Example([1], [0] * (n - 1)) for n in (12, 9, 10, last)]) == size
    for n in (1, 10):
        rows = [Example([1], [0] * (n * i - 1)) for i in range(1, 13)]
        assert train.part_size(rows[6:] + rows[:6]) == 2
    for length, size in ((124, 12), (125, 6), (2000, 2)):
        assert train.part_size([Example([1], [0] * (length - 1))] * 12) == size


class Elsewhere:
    """all_reduce of a process to whose sums the others add theirs."""

    def __init__(self, others):
        self.others, self.seen = torch.tensor(others), []

    def __call__(self, total):
        self.seen.append(total.tolist())
        total += self.others


@pytest.mark.parametrize("rank, world, slopes, sums, others, grad", [
    (0, 2, [8.0, 1, 1, 2], [9, 2, 20], [3.0, 2, 20], 9 * 2 / 4),
    (1, 2, [8.0, 1, 1, 2], [3, 2, 20], [9.0, 2, 20], 3 * 2 / 4),
    (2, 3, [7.0, 5], [0, 0, 0], [12.0, 2, 20], 0.0),
])
def test_the_share_of_a_process_by_hand(monkeypatch, rank, world, slopes, sums, others, grad):
    """Of slopes 8, 1, 1, 2 one process has 9 and the other 3: times 2 / 4, so that the mean that
    torch takes of the two, (4.5 + 1.5) / 2, is the 3 of the batch. The third of three processes
    has no share of two pairs. It joins with 0 and learns the sums of the batch."""
    model, all_reduce = one_weight(), Elsewhere(others)
    monkeypatch.setattr(train, "rank_and_world", lambda: (rank, world))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    total = gradient(model, model, Slopes(slopes), torch.arange(len(slopes)), 0)
    assert all_reduce.seen == [sums]
    assert total == {"loss": 12, "n": len(slopes), "tokens": 10 * len(slopes)}
    close(model.weight.grad, [[grad]])


# --- steps ---------------------------------------------------------------------------------------

class Watch(Progress):
    """Notes the weight after every step."""

    def __init__(self):
        super().__init__("watched")
        self.weights = []

    def after(self, step, steps, total, model, *others):
        self.weights.append(model.weight.item())


class InTurn(Slopes):
    """Slopes of successive steps instead of successive indices; one index."""

    def __len__(self):
        return 1

    def __call__(self, model, ids):
        return {"loss": self.slopes.pop(0) * model.weight.sum(), "n": 1, "tokens": 1}


class Root:
    """The loss sqrt(0 w)."""

    def __len__(self):
        return 1

    def __call__(self, model, ids):
        return {"loss": (0 * model.weight.sum()).sqrt(), "n": 1, "tokens": 1}


@dataclass
class Noting(Slopes):
    """Notes the indices of every batch."""
    seen: list

    def __call__(self, model, ids):
        self.seen.append(ids.tolist())
        return super().__call__(model, ids)


def test_schedule_by_hand():
    """20 steps: two of warm-up (1/2, 1), full to step 11, then down by 1/10 a step to 1/10."""
    shares = [schedule(step, 20) for step in range(1, 21)]
    assert shares == pytest.approx([0.5, *[1] * 10, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_a_step_takes_its_share_of_the_learning_rate():
    """A constant slope of 1: Adam's step is the learning rate itself, here 0.1 times the share."""
    watch, before = Watch(), 1.0
    fit(one_weight(), InTurn([1.0] * 20), Recipe(20, 0.1, 1, 0), 0, progress=watch)
    for step, after in enumerate(watch.weights, 1):
        close(before - after, 0.1 * schedule(step, 20), 1e-5)
        before = after


def test_clipping_and_no_weight_decay_by_hand():
    """Slopes 1/2 and 100, learning rate 0.1 (its share is 1 in the first two of four steps).

    Step 1: m / (1 - 0.9) = g and v / (1 - 0.95) = g^2, so w = 1 - 0.1. Step 2, with 100 clipped to
    1: m = (0.9 0.05 + 0.1) / (1 - 0.81) = 0.763158, v = (0.95 0.0125 + 0.05) / (1 - 0.9025) =
    0.634615, m / sqrt(v) = 0.957986: w = 0.9 - 0.0957986. Without clipping the step would be
    0.0738, and with a weight decay of 0.3 w would shrink by 3% a step.
    """
    watch = Watch()
    fit(one_weight(), InTurn([0.5, 100.0, 1.0, 1.0]), Recipe(4, 0.1, 1, 0), 0, progress=watch)
    close(watch.weights[:2], [0.9, 0.9 - 0.0957986], 1e-5)


def test_the_seed_orders_the_batches():
    """Batches of 2 of 5 indices in the order of shuffled_batches: two and a half epochs, one
    index at a time."""
    for seed in (0, 1):
        seen = []
        loss = Noting([1.0] * 5, seen)
        fit(one_weight(), loss, Recipe(5, 0.1, 2, micro_batch=1), seed)
        order = data.shuffled_batches(5, 2, torch.Generator().manual_seed(seed))
        assert sum(seen, []) == sum((next(order).tolist() for _ in range(5)), [])


class Waiting(Slopes):
    """Slopes that wait until `begun` shares have begun, and note them with their threads."""

    def __init__(self, slopes, begun):
        super().__init__(slopes)
        self.barrier, self.seen = threading.Barrier(begun), []

    def __call__(self, model, ids):
        self.barrier.wait(timeout=60)
        self.seen.append((ids.tolist(), torch.get_num_threads(), threading.get_ident()))
        return super().__call__(model, ids)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_halves_side_by_side_by_hand(threads):
    """Slopes 8, 1, 1, 2 as 8 + 1 and 1 + 2: gradient 12 / 4 = 3. On two threads each half has one
    and waits for the other to have begun; on five, two. One thread takes the whole batch."""
    before, loss = torch.get_num_threads(), Waiting([8.0, 1, 1, 2], min(2, threads))
    torch.set_num_threads(threads)
    try:
        model = one_weight(0.5)
        total = gradient(model, model, loss, torch.arange(4), 0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert total == {"loss": 6.0, "n": 4, "tokens": 40} and model.weight.grad.item() == 3.0
    halves, each, who = zip(*sorted(loss.seen))
    assert halves == (([0, 1], [2, 3]) if threads > 1 else ([0, 1, 2, 3],))
    assert set(each) == {max(1, threads // 2)} and len(set(who)) == min(2, threads)


def test_two_halves_by_hand():
    """Rows of 5, 2, 3, 2, 4 tokens, 16 in all. Sorted 2, 2, 3, 4, 5: the first three have 7 of 8
    tokens, four would have 11. Equal rows stay in their order. With 9 in place of 5 there are 20,
    and 2 + 2 + 3 = 7, with 4 more 11. Of one row the first half is empty."""
    for ids, first, second in (([0, 1, 2, 3, 4], [1, 3, 2], [4, 0]),
                               ([3, 5, 4, 2, 1], [3, 1, 2], [4, 5]), ([2], [], [2])):
        loss = Likelihood([[Example([1], [0] * (n - 1))] for n in (5, 2, 3, 2, 4, 9)])
        halves = two_halves(loss, torch.tensor(ids))
        assert [half.tolist() for half in halves] == [first, second]


def test_one_index_is_read_once():
    """Its second half would be empty, and the loss would be computed twice."""
    before, model, seen = torch.get_num_threads(), one_weight(), []
    torch.set_num_threads(2)
    try:
        gradient(model, model, Noting([1.0, 5.0], seen), torch.tensor([1]), 0)
    finally:
        torch.set_num_threads(before)
    assert seen == [[1]]


def test_an_error_in_one_half_waits_for_the_other():
    """Whichever half fails, the error comes through, the other half has ended and the number of
    threads is what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for bad, good in (("first", "second"), ("second", "first")):
            ended = []
            with pytest.raises(ValueError, match="half"):
                two_at_once(fail_at, ["first", "second"], torch.device("cpu"), bad, ended)
            assert ended == [good] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def fail_at(bad, ended, item):
    if item == bad:
        raise ValueError("half")
    time.sleep(0.05)
    ended.append(item)


def test_training_moves_the_policy_alone(small):
    """After 3 TVKD steps the student has moved. Its start, the reference and the teacher have not,
    took no gradient, and the trained student is frozen itself."""
    values = state_values("logits", small.teacher, small.ref, small.both, 1.0, 8)
    psi = summed_psi(values, small.both, 1.0, "hold").view(2, -1)
    still = (small.student, small.ref, small.teacher)
    before = [copy.deepcopy(model.state_dict()) for model in still]
    loss = TVKD(small.pairs, logps_of(small.ref, small), psi, 1.0, 1.0)
    trained = fit(small.student, loss, Recipe(3, 1e-2, 8, 0), 0, loss_at_start=tvkd_loss_at_start)
    for model, state in zip(still, before):
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items())
        assert all(p.grad is None for p in model.parameters())
    for model in (small.ref, small.teacher, trained):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = trained.state_dict()
    assert all(not torch.equal(x, state[name]) for name, x in before[0].items())


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    """sqrt(0 w) is 0 with a gradient of NaN. The line names stage, step and batch."""
    watch = Watch()
    with pytest.raises(FloatingPointError, match=r"watched: loss 0.0, gradient norm nan at step 1; "
                                                 r".* not finite or too large; batch \[0\]"):
        fit(one_weight(), Root(), Recipe(3, 0.1, 1, 0), 0, progress=watch)
    assert watch.weights == []


# --- the check before step 1 ---------------------------------------------------------------------

def test_step_0_check_notices_another_reference(small):
    for source, is_right in ((small.ref, True), (small.teacher, False)):
        loss = DPO(small.pairs, logps_of(source, small), 1.0)
        if is_right:
            check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))
        else:
            with pytest.raises(RuntimeError, match="step 0 check failed: policy and reference"):
                check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))


def test_step_0_check_expects_what_psi_alone_gives(small, capsys):
    """alpha 2, psi 1 and 0: -log sigmoid(-2) = ln(1 + e^2) = 2.1269. ln 2 is not what it is."""
    psi = torch.tensor([[1.0] * 5, [0.0] * 5])
    loss = TVKD(small.pairs, logps_of(small.ref, small), psi, 1.0, 2.0)
    check_start(loss, small.student, EVERY, tvkd_loss_at_start(loss, EVERY))
    assert "loss 2.1269, expected 2.1269; margin " in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="policy and reference"):
        check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))


def test_step_0_check_allows_for_rounding_in_proportion_to_beta(small):
    """At beta 1e4 a reference off by 1e-5 nats (a margin of 0.1) is rounding, off by 1 it isn't."""
    chosen, rejected = logps_of(small.ref, small)
    for off, is_rounding in ((1e-5, True), (1.0, False)):
        loss = DPO(small.pairs, torch.stack([chosen + off, rejected]), 1e4)
        if is_rounding:
            check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))
        else:
            with pytest.raises(RuntimeError, match="policy and reference"):
                check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))


def test_step_0_check_names_a_beta_that_is_too_small(small):
    loss = DPO(small.pairs, logps_of(small.ref, small), 1e-46)
    with pytest.raises(RuntimeError, match="expected a gradient, got 0; beta=1e-46 may be too sm"):
        check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))


def test_step_0_check_stops_where_weights_are_not_finite(small):
    loss = DPO(small.pairs, logps_of(small.ref, small), 1.0)
    with torch.no_grad():
        small.student.transformer.wte.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="expected a finite loss and gradient"):
        check_start(loss, small.student, EVERY, dpo_loss_at_start(loss, EVERY))


def test_step_0_check_takes_no_more_than_a_micro_batch(small, monkeypatch):
    """It needs a gradient too: of min(pairs, batch, micro-batch) pairs, the first ones."""
    seen = []
    monkeypatch.setattr(train, "check_start", lambda loss, model, ids, expected:
                        seen.append((ids.tolist(), len(expected))))
    loss = DPO(small.pairs, logps_of(small.ref, small), 1.0)
    for batch_size, micro_batch in ((4, 3), (2, 0), (8, 0)):
        fit(small.student, loss, Recipe(1, 1e-3, batch_size, micro_batch), 0,
            loss_at_start=dpo_loss_at_start)
    assert seen == [([0, 1, 2], 3), ([0, 1], 2), ([0, 1, 2, 3, 4], 5)]
