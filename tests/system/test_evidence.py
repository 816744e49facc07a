"""The experiments: controls by hand, settings and pairing, resuming, and documents from records."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
from conftest import ROOT, close
from evidence import cells, controls, figures, records, run, tables
from evidence.cells import Cell, Experiment, with_options
from harness.options import Config
from harness.texts import load_task
from model import GPT, GPTConfig, both_responses, rows_logps, action_psi, state_values, frozen_copy
from train import DPO
from tvkd import kd_loss

TINY = {"batch_size": 8, "block_size": 64, "max_new_tokens": 4, "samples": 1, "student_heads": 2,
        "student_layers": 1, "student_pairs": 8, "student_sft_steps": 3, "student_width": 8,
        "teacher_dpo_steps": 2, "teacher_heads": 2, "teacher_layers": 1, "teacher_sft_steps": 3,
        "teacher_width": 8, "test_pairs": 4, "train_pairs": 20, "val_pairs": 4, "vocab_size": 300,
        "steps": 3, "teacher_dpo_lr": 3e-2}


def tiny(cell, **options):
    return with_options(cell._replace(options=()), **{**TINY, **options})


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return run.Stages(tmp_path_factory.mktemp("work"), 0)


@pytest.fixture
def loss_of(stages):
    """A cell's loss at tiny sizes."""
    return lambda cell: controls.loss_of(cell, replace(Config(**TINY), **dict(cell.options)),
                                         stages)


@pytest.fixture
def models():
    """(student, teacher, six pairs of ids), with random weights."""
    task, both = load_task(Config(**TINY), 0), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        both.append(GPT(GPTConfig(task.tokenizer.n_vocab, 64, 1, 2, 8)))
    return *both, task.ids.train[:6]


# --- labels ---------------------------------------------------------------------------------------

def test_soft_labels_by_hand():
    """dpsi = ln 3: the teacher says sigmoid(ln 3) = 3/4. The mean with a label that says 1 is 7/8.
    As evidence a label is worth ln 6: sigmoid(ln 3 + ln 6) = 18/19. dpsi = 0: 1/2, 3/4, 6/7."""
    difference = torch.tensor([math.log(3), 0.0])
    close(controls.soft_label("soft", difference), [3 / 4, 1 / 2])
    close(controls.soft_label("mean", difference), [7 / 8, 3 / 4])
    close(controls.soft_label("evidence", difference), [18 / 19, 6 / 7])


def test_one_label_in_seven_is_wrong():
    """LABEL_NATS is the log-odds of a right label: ln(6/7 / (1/7)) = ln 6. Of 2,000 pairs, some 300
    are labelled against their rewards."""
    close(controls.LABEL_NATS, math.log(6))
    pairs = data.toy_splits(2000, 1, 1, 0).train
    wrong = sum(data.reward(p.prompt, p.chosen) < data.reward(p.prompt, p.rejected) for p in pairs)
    assert 250 < wrong < 330


def test_a_soft_label_reads_the_whole_difference(loss_of, stages):
    """Its probability is the sigmoid of the teacher's difference of implicit rewards, worked out
    here from the teacher's log-probs: not of a part of it, and of nobody else's."""
    soft = loss_of(cells.SOFT)
    teacher_ref, teacher = stages.teacher("", Config(**TINY))
    both = both_responses(soft.pairs)
    gaps = (rows_logps(teacher, both, 4) - rows_logps(teacher_ref, both, 4)).view(2, -1)
    assert (gaps[0] - gaps[1]).abs().max() > 0.1
    close(soft.probability, (gaps[0] - gaps[1]).sigmoid(), 1e-4)
    close(loss_of(cells.TVKD).psi, gaps, 1e-4)


def test_soft_dpo_is_a_share_of_dpo(models):
    """At policy = reference ln 2 for every p, with gradient (1/2 - p) of the margin: p = 3/4 turns
    DPO's -1/2 into -1/4, p = 1/2 into 0, p = 1 is DPO itself."""
    student, _, pairs = models
    ref_logps = rows_logps(frozen_copy(student), both_responses(pairs), 2).view(2, -1)
    dpo = gradient(student, DPO(pairs, ref_logps, 2.0))
    for p, share in ((1.0, 1.0), (0.75, 0.5), (0.5, 0.0), (0.0, -1.0)):
        soft = controls.SoftDPO(pairs, ref_logps, torch.full((6,), p), 2.0)
        close(soft(student, torch.arange(6))["loss"].detach() / 6, math.log(2), 1e-5)
        close(gradient(student, soft), share * dpo, 1e-4)


def gradient(student, loss):
    total = loss(student, torch.arange(6))["loss"] / 6
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(student.parameters()))])


def test_soft_dpo_away_from_the_reference(models):
    """Reference log-probs moved so that every margin is ln 3: -p ln(3/4) - (1 - p) ln(1/4) at
    p = 3/4 is ln 4 - 3/4 ln 3 = .562335."""
    student, _, pairs = models
    logps = rows_logps(student, both_responses(pairs), 12).view(2, -1)
    logps[0] -= math.log(3)
    soft = controls.SoftDPO(pairs, logps, torch.full((6,), 0.75), 1.0)
    close(soft(student, torch.arange(6))["loss"].detach(), 6 * 0.562335, 1e-4)


def test_swapped_by_hand():
    pairs = [data.Pair([1], [2], [3]), data.Pair([4], [5], [6])]
    two = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    where = torch.tensor([False, True])
    turned, logps, psi = controls.swapped(where, pairs, two, 10 * two)
    assert turned == [pairs[0], data.Pair([4], [6], [5])]
    assert logps.tolist() == [[1, 4], [3, 2]] and psi.tolist() == [[10, 40], [30, 20]]


def test_noise_turns_pairs_log_probs_and_psi_together(loss_of):
    """Each pair is either as it was, in its texts, its reference log-probs and its psi, or turned
    in all three; the label of a turned pair is wrong, the teacher's opinion is still right."""
    clean = loss_of(cells.TVKD)
    noisy = loss_of(cells.noise(cells.TVKD, 0.5))
    turned = [new != old for new, old in zip(noisy.pairs, clean.pairs)]
    assert 0 < sum(turned) < 8
    for i, turn in enumerate(turned):
        old, new = clean.pairs[i], noisy.pairs[i]
        assert not turn or (new.chosen, new.rejected) == (old.rejected, old.chosen)
        for name in ("ref_logps", "psi"):
            before, after = getattr(clean, name)[:, i], getattr(noisy, name)[:, i]
            assert torch.equal(after, before.flip(0) if turn else before) and before[0] != before[1]


def test_noise_is_of_the_stated_share(loss_of):
    """Of 10,000 labels 4,000 are turned at 0.4, within 4 standard deviations of 49. `loss_of`
    passes the dose on as it is: at 1 every pair is turned."""
    turned = controls.turned_labels(10_000, 0.4, torch.Generator().manual_seed(0)).sum().item()
    assert abs(turned - 4000) < 200
    clean, noisy = loss_of(cells.DPO), loss_of(cells.noise(cells.DPO, 1.0))
    assert [pair.chosen for pair in noisy.pairs] == [pair.rejected for pair in clean.pairs]


def test_teachers_labels_ignore_the_students(loss_of):
    """Hard labels: the chosen response is the one with more psi, whatever noise did before. Soft
    labels: the same probability for the same response."""
    tvkd = loss_of(cells.TVKD)
    better = [pair.chosen if w >= l else pair.rejected for pair, w, l in zip(tvkd.pairs, *tvkd.psi)]
    for cell in (cells.HARD, cells.noise(cells.HARD, 1.0)):
        assert [pair.chosen for pair in loss_of(cell).pairs] == better
    soft, noisy = loss_of(cells.SOFT), loss_of(cells.noise(cells.SOFT, 1.0))
    close(noisy.probability, 1 - soft.probability)


def test_psi_of_another_pair():
    """The same columns in another order, none in its old place."""
    psi = torch.arange(20.0).view(2, 10)
    dealt = controls.psi_of_another_pair(psi, torch.Generator().manual_seed(0))
    assert sorted(dealt.T.tolist()) == psi.T.tolist() and (dealt != psi).all()


# --- teachers -------------------------------------------------------------------------------------

def test_what_a_teacher_is_taught():
    """+1 thing, +1 fact, -1 wrong fact, +1/2 polite: facts 1, manners 1/2, contrary 1 - 1/2."""
    of = {name: label("Describe the cat: red, small, fast, old.",
                      "Of course! The cat is red and big.")
          for name, label in controls.LABELS.items()}
    assert of == {"full": 1.5, "facts": 1.0, "manners": 0.5, "contrary": 0.5}


def test_pairs_of_a_teacher(stages, monkeypatch):
    """facts: the same prompts and responses, in the order of their facts where 20 pairs differ by
    much. unseen: those after the student's 8. The student's own are never changed."""
    monkeypatch.setattr(run, "train_teacher", lambda config, seed, ids, *args: ids.train)
    config = replace(Config(**TINY), teacher_sft_steps=1)          # another teacher than above
    usual, facts, contrary, unseen = (stages.teacher(name, config)
                                      for name in ("", "facts", "contrary", "unseen"))
    task = stages.task(config)
    assert usual == task.ids.train and unseen == usual[8:]
    assert [sorted(pair[1:3]) for pair in facts] == [sorted(pair[1:3]) for pair in usual]
    differing = 0
    for text, old, *others in zip(task.texts.train, usual, facts, contrary):
        gaps = [label(text.prompt, text.chosen) - label(text.prompt, text.rejected)
                for label in (controls.facts_alone, controls.contrary_manners)]
        for gap, new in zip(gaps, others):
            if abs(gap) >= 4:                   # labelled otherwise once in 55 times
                differing += 1
                assert (new.chosen == old.chosen) == (gap > 0)
    assert differing > 4


def test_gauge_moves_the_logits_value_and_nothing_else(models):
    """c(s_t) = t/2: bit-identical log-probs, the implicit values too; the logits value of state t
    rises by beta t/2, so psi by beta/2 a token: with "value" the sum by beta n/2, with "hold" by
    beta (n - 1)/2."""
    student, teacher, pairs = models
    rows, moved = both_responses(pairs), (controls.Gauge(teacher, 0.5),
                                          controls.Gauge(student, 0.5))
    controls.check_same_policy(controls.Gauge(teacher, 0.0), moved[0], pairs, 4)
    with pytest.raises(RuntimeError, match="gauge: expected the same policy"):
        controls.check_same_policy(controls.Gauge(teacher, 0.0), moved[1], pairs, 4)
    before, after = (state_values("implicit", *both, rows, 2.0, 4)
                     for both in ((teacher, student), moved))
    for old, new in zip(before, after):
        close(new.float(), old, 1e-4)
    before, after = (state_values("logits", *both, rows, 2.0, 4)
                     for both in ((teacher, student), moved))
    for terminal, less in (("value", 0), ("hold", 1)):
        old, new = (action_psi(values, rows, 1.0, terminal).sum(-1) for values in (before, after))
        close(new - old, [len(row.response) - less for row in rows], 1e-3)


def test_values_of_normalised_log_probs(models):
    """Temperature 1: logsumexp(log p) = 0. Temperature 2: 2 ln sum sqrt(p), of the uniform
    distribution over V tokens 2 ln(V / sqrt(V)) = ln V, and less of any other."""
    student, _, pairs = models
    rows = both_responses(pairs)
    for temperature, low, high in ((1, -1e-9, 1e-9), (2, 0.5, math.log(student.config.vocab_size))):
        wrapped = controls.Normalised(student, temperature)
        values = torch.cat([value[len(row.prompt) - 1:] for row, value in zip(
            rows, state_values("logits", wrapped, None, rows, temperature, 4))])
        assert low <= values.min() and values.max() <= high
    student.lm_head.weight.data.zero_()
    wrapped = controls.Normalised(student, 2)
    close(state_values("logits", wrapped, None, rows[:1], 2, 4)[0][-1],
          math.log(student.config.vocab_size), 1e-6)


# --- losses ---------------------------------------------------------------------------------------

def test_top_k_kd_by_hand():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2). Of the whole vocabulary, as kd_loss:
    1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2. Of one token and the rest, (1/2, 1/2) against (1/4, 3/4):
    1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3. States outside the mask have no part."""
    teacher, student = (torch.tensor(p).log().expand(1, 3, 3).clone()
                        for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    for logits, peak in ((teacher, 0), (student, 1)):
        logits[0, [0, 2]] = 9.0 * F.one_hot(torch.tensor(peak), 3).float()
    mask = torch.tensor([[False, True]])
    close(controls.top_k_kd_loss(student, teacher, mask, 3), math.log(2) / 4, 1e-5)
    close(kd_loss(student, teacher, mask), math.log(2) / 4)
    close(controls.top_k_kd_loss(student, teacher, mask, 1), math.log(4 / 3) / 2)


class Rows(torch.nn.Module):
    """A "model" with given logits (B, T+1, V)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, tokens, states):
        return self.logits[states]


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_rewards_by_hand(sign):
    """Prompt [0], response [1, 0], V = 2. s_p gives token 1 probability 3/4: ln 3/4. The next state
    is uniform: ln 1/2, and its entropy ln 2 is taken off. After the end nothing is read. A response
    of one token has no next state: ln 3/4 alone."""
    first, even, far = [math.log(1), math.log(3)], [0.0, 0.0], [50.0, 0.0]
    model = Rows(torch.tensor([[first, even, far], [first, far, far]]))
    tokens = torch.tensor([[0, 1, 0], [0, 1, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    rewards = controls.entropy_rewards(model, tokens, mask, sign)
    close(rewards, [math.log(3 / 8) - sign * math.log(2), math.log(3 / 4)], 1e-5)
    assert torch.autograd.grad(rewards[0], model.logits)[0][0, :2].abs().sum() > 0


def test_next_entropy_loss(models):
    """-log sigmoid(R_w - R_l), summed, whatever order the rows went through the model in."""
    student, _, pairs = models
    rewards = []
    for row in both_responses(pairs):
        rewards.append(controls.entropy_rewards(student, *data.collate([row]), 1))
    chosen, rejected = torch.cat(rewards).chunk(2)
    loss = controls.NextEntropy(pairs, 1)(student, torch.arange(6))
    close(loss["loss"].detach(), -F.logsigmoid(chosen - rejected).sum().detach(), 1e-3)


def test_sum_of_two_losses(models):
    """The mean of one and the mean of the other: DPO's is over 6 pairs, KD's over tokens."""
    student, teacher, pairs = models
    ref_logps = rows_logps(student, both_responses(pairs), 12).view(2, -1)
    dpo, ids = DPO(pairs, ref_logps, 1.0), torch.arange(6)
    kd = controls.KD(pairs, teacher)
    means = [loss(student, ids)["loss"] / loss(student, ids)["n"] for loss in (kd, dpo)]
    both = controls.Both(kd, dpo)(student, ids)
    close(both["loss"].detach() / both["n"], sum(means).detach(), 1e-5)


def test_which_losses_are_added(loss_of):
    for cell, second in ((cells.KD_DPO, DPO), (cells.KD_SOFT, controls.SoftDPO),
                         (cells.KD_TVKD, controls.TVKD)):
        both = loss_of(cell)
        assert (type(both.first), type(both.second)) == (controls.KD, second)


def test_stored_bytes_by_hand():
    """Two pairs of 2 + 3 tokens each, of which KD may read one. V = 100. A float of 4 bytes a pair:
    8/10 a token; a bit a pair: 2/8/10; 400 a token; the same of half the tokens: 200; an id of 2
    bytes and its float: 6."""
    pairs = [data.Pair([1], [2, 0], [3, 4, 0])] * 2
    for cell, of, expected in (
            (cells.TVKD, 2, 0.8), (cells.SOFT, 2, 0.8), (cells.HARD, 2, 0.025), (cells.KD, 2, 400),
            (cells.KD, 1, 200), (cells.TOP, 2, 6), (cells.BC, 2, 2), (cells.DPO, 2, 0),
            (cells.KD_DPO, 2, 400), (cells.KD_TVKD, 2, 400.8), (cells.RECIPE, 2, 0)):
        assert controls.stored_bytes(cell, pairs[:of], pairs, 100) == pytest.approx(expected), cell


def test_psi_by_kind_of_word():
    """A rude opening of three tokens: .5 + 0 - 1.5 = -1, as a whole; words one by one."""
    kinds = ["rude", "rude", "rude", "", "right", "", "wrong", "", "polite", "polite", ""]
    psi = [0.5, 0.0, -1.5, 9.0, 1.0, 9.0, -2.0, 9.0, 0.25, 0.5, 9.0]
    assert controls.by_kind(kinds, psi) == [("rude", -1.0), ("right", 1.0), ("wrong", -2.0),
                                            ("polite", 0.75)]


# --- experiments ----------------------------------------------------------------------------------

def as_it_is(cell):
    return cell


def test_settings_are_chosen_by_mean_validation_reward():
    """Two seeds: (1 + 5)/2 = 3 against (3 + 4)/2 = 3.5, though 5 is the highest; a control takes
    the setting of the method it is compared with."""
    rows = [{**cells.as_row(with_options(cells.TVKD, lr=lr)), "reward": reward}
            for lr, rewards in ((1e-3, (1, 5)), (1e-2, (3, 4))) for reward in rewards]
    pick = cells.picker({"rows": rows, "options": {"steps": 60, "lr": 3e-4}})
    assert pick(cells.TVKD) == cells.TVKD._replace(options=(("lr", 1e-2),))
    assert dict(pick(cells.PLUS).options) == {"lr": 1e-2, "alpha": -1.0}
    assert with_options(cells.TVKD, alpha=1.0) == cells.TVKD           # equal cells are equal


def test_options_are_left_out_at_the_defaults_of_their_task():
    """--lr is 3e-4 on the toy task and 1e-4 beside --data."""
    assert with_options(Cell("dpo"), lr=3e-4).options == ()
    [real] = cells.on_file([Cell("dpo")], "x.jsonl")
    assert dict(with_options(real, lr=3e-4).options)["lr"] == 3e-4
    assert "lr" not in dict(with_options(real, lr=1e-4).options)


@pytest.mark.parametrize("name", cells.tunings(["x.jsonl"]))
def test_every_method_has_the_same_tries(name):
    planned = cells.tunings(["x.jsonl"])[name]
    tries = {}
    for cell in planned.cells:
        options = dict(cell.options)
        setting = options.pop("steps", 60), options.pop("lr", None)
        tries.setdefault((cell[:5], cell.teacher, str(options)), []).append(setting)
    grids = set(map(tuple, tries.values()))
    assert len(grids) == 1 and len(grids.pop()) == (6 if name == "tune" else 3)
    assert all(cell.split == "val" for cell in planned.cells)
    assert not set(planned.seeds) & {*cells.SEEDS, *cells.KNOWLEDGE_SEEDS, *cells.SWEEP_SEEDS}


def test_difference_is_to_dpo_at_the_same_x():
    """TVKD on 100 pairs is compared with DPO on 100 pairs: 3.5 - 1 = 2.5; on 300, the default, with
    DPO on 300: 5 - 3 = 2."""
    rows = [{**cells.as_row(with_options(cell, student_pairs=n)), "reward": reward, "pref_acc": x}
            for n, cell, reward, x in ((100, cells.DPO, 1.0, 0.5), (100, cells.TVKD, 3.5, 0.75),
                                       (300, cells.DPO, 3.0, 0.5), (300, cells.TVKD, 5.0, 0.25))]
    rows = run.paired(rows, "student_pairs")
    assert [row["vs_dpo"] for row in rows] == [None, 2.5, None, 2.0]
    assert [row["acc_vs_dpo"] for row in rows] == [None, 0.25, None, -0.25]


def test_seeds_are_dealt_out_evenly():
    """5, 3 and 2 cells to two processes: 5 to one, 3 + 2 to the other, a seed never to both."""
    tasks = [(seed, i) for seed, n in ((0, 3), (1, 5), (2, 2)) for i in range(n)]
    assert run.dealt(tasks, 2) == {1: 0, 0: 1, 2: 1}


def test_plan_fits_four_hours(capsys):
    assert run.main(["--plan", "--jobs=2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(re.search(r"([\d.]+) h with --jobs=2", last)[1]) < 4


class Here:
    """A ProcessPoolExecutor that works at once and in this process."""

    def __init__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **options):
        pass


def test_runs_go_on_where_they_were(tmp_path, monkeypatch):
    """Strict TVKD equals DPO in every number. With the record gone and one cell's file damaged the
    same rows come back, and that one cell alone is trained again. A complete record is left alone.
    """
    monkeypatch.setattr(run, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(run, "STAGES", {})
    three = [tiny(cell) for cell in (cells.DPO, cells.ZERO, cells.TVKD)]
    plan = {"small": Experiment((0, 1), three)}
    run.run(plan, tmp_path, jobs=2)
    record = records.load(tmp_path)["small"]
    rows = [(row["seed"], row["terminal"]) for row in record["rows"]]
    assert rows == [(seed, end) for seed in (0, 1) for end in (None, "zero", "value")]
    for dpo, zero, tvkd in (record["rows"][:3], record["rows"][3:]):
        same = [key for key, x in dpo.items() if isinstance(x, float)
                and key not in ("seconds", "bytes")]
        assert len(same) > 5 and [dpo[key] for key in same] == [zero[key] for key in same]
        assert zero["vs_dpo"] == 0 and tvkd["kl"] != dpo["kl"]
    assert record["made"]["code"] == run.digest_of_code() and record["made"]["threads"] == 1

    (tmp_path / "small.json").unlink()
    path = sorted((tmp_path / "work" / "seed1").glob("cell-*"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    again, fit = [], controls.fit
    monkeypatch.setattr(controls, "fit", lambda *args, **aside: again.append(1) or fit(*args))
    monkeypatch.setattr(run, "STAGES", {})
    run.run(plan, tmp_path, jobs=1)
    second = records.load(tmp_path)["small"]["rows"]
    assert len(again) == 1
    assert [{**row, "seconds": 0} for row in second] == [{**row, "seconds": 0}
                                                         for row in record["rows"]]

    monkeypatch.setattr(run, "do", None)                    # would be called for a cell to train
    run.run(plan, tmp_path, jobs=1)
    record["options"]["alpha"] = 0.5                        # a default that was another one then
    assert not run.complete(record, plan["small"])
    assert not run.complete({**record, "rows": second[1:]}, plan["small"])


def test_settings_are_chosen_first(tmp_path, monkeypatch, capsys):
    """Two learning rates are tried on validation prompts; the better one trains the experiment, and
    its table is printed."""
    monkeypatch.setattr(run, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(run, "STAGES", {})
    tried = cells.tuning([tiny(cells.DPO)], [{"lr": 1e-3}, {"lr": 1e-2}], seeds=(100,))
    monkeypatch.setattr(run, "tunings", lambda files: {"tune": tried})
    monkeypatch.setattr(run, "experiment", lambda name, pick, file: Experiment(
        (0,), [pick(tiny(cells.DPO))]))
    assert run.main(["gauge", f"--results={tmp_path}", "--jobs=1"]) == 0
    shown = capsys.readouterr().out
    best = max(records.load(tmp_path)["tune"]["rows"], key=lambda row: row["reward"])
    assert records.load(tmp_path)["gauge"]["rows"][0]["options"]["lr"] == best["options"]["lr"]
    assert "\ngauge\n| model | true reward |" in shown and "; 1 cells left" in shown


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, monkeypatch):
    plan = {"small": Experiment((0, 1), [tiny(cells.DPO), tiny(cells.TVKD)])}
    run.run(plan, tmp_path / "two", jobs=2)
    monkeypatch.setattr(run, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(run, "STAGES", {})
    run.run(plan, tmp_path / "one", jobs=1)
    one, two = ([{**row, "seconds": 0} for row in records.load(tmp_path / name)["small"]["rows"]]
                for name in ("one", "two"))
    assert one == two


def test_every_kind_of_cell_trains(stages):
    """One of each method, control, value and teacher. Each changes the student: no two KLs are the
    same but those that must be. The parts of the reward add up to it."""
    kinds = {}
    for name in cells.NAMES:
        for cell in cells.experiment(name, as_it_is).cells:
            changes = {key: x for key, x in cell.options if key in ("alpha", "beta", "gamma")}
            kinds.setdefault((*cell[:4], cell.teacher if cell.method == "tvkd" else ""),
                             tiny(cell, **changes))
    rows = {kind: run.row_of(cell, stages) for kind, cell in kinds.items()}
    kl = {kind: row["kl"] for kind, row in rows.items() if kind[0] not in ("values", "sft")}
    dpo = kl[("dpo", None, None, "", "")]
    for value, control in (("implicit", ""), ("logits", "normalised")):     # at temperature 1
        assert kl.pop(("tvkd", value, "zero", control, "")) == dpo, value
    assert kl.pop(("tvkd", "implicit", "value", "gauge", "")) == pytest.approx(
        kl[("tvkd", "implicit", "value", "", "")], abs=1e-4)
    for control in ("relabel", "soft"):         # they ignore what noise does to the labels
        assert kl.pop(("dpo", "implicit", "value", f"{control} noise", "")) == pytest.approx(
            kl[("dpo", "implicit", "value", control, "")], abs=1e-5)
    assert len(kl) > 25 and len(set(kl.values())) == len(kl), sorted(kl.items(), key=str)
    parts = [row for row in rows.values() if "facts" in row]
    assert parts and all(row["facts"] + row["manners"] == pytest.approx(row["reward"])
                         for row in parts)


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["mian"], "expected some of main, values"),
    (["--jobs=0"], "--jobs: expected at least 1, got 0"),
    (["real"], "real: expected --data=FILE.jsonl beside it"),
    (["main", "--data=x.jsonl"], "--data: expected real among the experiments"),
    (["real", "--data=missing.jsonl"], "missing.jsonl: expected a readable JSONL file")])
def test_mistakes_end_in_one_line(argv, message, tmp_path, capsys):
    assert run.main([*argv, f"--results={tmp_path}"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("evidence: ") and message in shown.err and not shown.out
    assert shown.err.count("\n") == 1


def test_one_run_a_folder(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    with run.lock(tmp_path / "work"):
        assert run.main(["values", f"--results={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"evidence: --results: expected a folder that no other run is using, got {tmp_path}\n")


def test_a_reader_that_goes_away():
    """As in `python -m evidence.run --plan | head -1`: no traceback."""
    process = subprocess.Popen([sys.executable, "-m", "evidence.run", "--plan"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": ""})
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


WRONG = {"not JSON": "{", "a list": [], "no rows": {"rows": []},
         "a row of text": {"rows": ["x"]}, "a text for a number": {"rows": [{"reward": "high"}]},
         "an option of text": {"rows": [{"options": {"beta": "x"}}]},
         "a teacher alone": {"rows": [{"method": "teacher"}]},
         "words of other kinds": {"rows": [{"words": {"long": {}}}]}}


@pytest.mark.parametrize("kind", WRONG)
def test_a_record_of_the_wrong_shape_is_one_line(kind, tmp_path, capsys):
    root = copy_of_documents(tmp_path)
    path = root / "evidence" / "results" / "main.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    wrong = WRONG[kind]
    if isinstance(wrong, dict) and wrong["rows"] and isinstance(wrong["rows"][0], dict):
        wrong = {**record, "rows": [{**record["rows"][0], **wrong["rows"][0]}]}
    elif isinstance(wrong, dict):
        wrong = {**record, **wrong}
    path.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong), encoding="utf-8")
    assert tables.main([], root) == 2
    error = capsys.readouterr().err
    assert error.startswith("evidence: ") and error.count("\n") == 1 and "main" in error


# --- documents and records ------------------------------------------------------------------------

def copy_of_documents(folder):
    shutil.copytree(ROOT / "evidence" / "results", folder / "evidence" / "results",
                    ignore=shutil.ignore_patterns("work"))
    (folder / "docs").mkdir()
    for name in tables.DOCS:
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_documents_are_rebuilt_from_the_records(tmp_path):
    """Not a character of a table and not a figure differs from what the records give; every record
    has its place, and every figure."""
    root = copy_of_documents(tmp_path)
    assert tables.main([], root) == 0
    texts = {name: (root / name).read_text(encoding="utf-8") for name in tables.DOCS}
    for name, text in texts.items():
        assert text == (ROOT / name).read_text(encoding="utf-8"), name
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (root / "docs").glob("*.svg")}
    assert drawn == {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in drawn}
    for name in drawn:
        assert any(f"({name})" in text or f'"{name}"' in text for text in texts.values())
    for mark in tables.tables(records.load(root / "evidence" / "results")):
        assert any(f"<!-- {mark} -->" in text for text in texts.values()) \
            or f"{mark}.svg" in drawn or mark.startswith("tune_"), mark


def test_main_record():
    """At least 8 seeds of every row; strict shaping has DPO's very numbers in each."""
    record = records.load(ROOT / "evidence" / "results")["main"]
    groups = records.grouped(record["rows"])
    seeds = {row["seed"] for row in record["rows"]}
    assert len(seeds) >= 8
    assert all({row["seed"] for row in rows} == seeds for rows in groups.values())
    for dpo, zero in zip(groups["dpo"], groups["tvkd implicit/zero"]):
        keys = [key for key, x in dpo.items() if type(x) in (int, float)
                and key not in ("seconds", "bytes", "dose")]
        assert len(keys) > 5 and [dpo[key] for key in keys] == [zero[key] for key in keys]
        assert zero["vs_dpo"] == 0


def test_filled_by_hand():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- note -->\n"
    new = "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n<!-- note -->\n"
    assert tables.filled(text, {"x": "new"}, "f.md") == new
    with pytest.raises(UserError, match="f.md: expected a record for the mark x, got y"):
        tables.filled(text, {"y": ""}, "f.md")


ROW = {**cells.as_row(cells.SHUFFLED), "bytes": 0.25, "pref_acc": 0.5, "true_acc": 0.5, "kl": 1.0,
       "length": 15.0}


def test_comparison_by_hand():
    """Two seeds: mean 2, half-width 12.706 * sqrt(2) / sqrt(2) = 12.71 at a standard deviation of
    sqrt(2)."""
    rows = [{**ROW, "seed": seed, "reward": reward} for seed, reward in ((0, 1.0), (1, 3.0))]
    assert tables.comparison({"rows": rows}).splitlines()[-1] == (
        "| tvkd implicit/value, psi of other pairs | 2.00 \u00b1 12.71 | - | 0.500 \u00b1 0.000 | "
        "0.500 \u00b1 0.000 | 1.00 \u00b1 0.00 | 15.0 \u00b1 0.0 | 0.25 |")


def test_equal_distance_by_hand():
    """Soft labels at beta 1 (KL 0.8) against tvkd at beta 4 (1.1 = 1.375 * 0.8), seed by seed: 5 -
    3 = 2 and 6 - 4 = 2; and at the same beta: 5 - 9 = -4. At beta 2 (KL 0.7) the nearest has 1.1 =
    1.57 * 0.7: too far."""
    rows = [{**cells.as_row(with_options(cell, beta=beta)), "seed": seed, "reward": reward + seed,
             "kl": kl} for cell, beta, reward, kl in ((cells.SOFT, 1.0, 5.0, 0.8),
                                                      (cells.SOFT, 2.0, 4.0, 0.7),
                                                      (cells.TVKD, 4.0, 3.0, 1.1),
                                                      (cells.TVKD, 1.0, 9.0, 5.0))
            for seed in (0, 1)]
    assert tables.distance({"rows": rows, "options": {"beta": 1.0}}).splitlines()[2:] == [
        "| soft labels at 1, tvkd at 1 | 0.80 \u00b1 0.00 | 5.00 \u00b1 0.00 | -4.00 \u00b1 0.00 |",
        "| soft labels at 1, tvkd at 4 | 0.80 \u00b1 0.00 | 1.10 \u00b1 0.00 | +2.00 \u00b1 0.00 |"]


def test_between_by_hand(monkeypatch):
    """Seed by seed, whatever the order of the rows, and only under the teacher that is named: 5 - 1
    = 4 and 7 - 3 = 4, not 5 - 3 or 9 - 1. A record that is not there has no line."""
    rows = [{**cells.as_row(cell._replace(teacher=teacher)), "seed": seed, "reward": reward}
            for cell, teacher, seed, reward in (
                (cells.KD, "facts", 0, 5.0), (cells.KD, "facts", 1, 7.0),
                (cells.KD, "manners", 0, 9.0), (cells.KD, "manners", 1, 9.0),
                (cells.SOFT, "facts", 1, 3.0), (cells.SOFT, "facts", 0, 1.0))]
    wanted = [(name, "facts", "kd", tables.SOFT) for name in ("knowledge", "main")]
    monkeypatch.setattr(tables, "BETWEEN", wanted)
    assert tables.between({"knowledge": {"rows": rows}}).splitlines()[2:] == [
        f"| kd | {tables.SOFT} | knowledge, taught facts | +4.00 \u00b1 0.00 |"]


@pytest.fixture(scope="module")
def invented():
    """Records with rows of made-up numbers for every cell of every experiment."""
    files, made = ["x.jsonl"], {}
    plan = {name: cells.experiment(name, as_it_is) for name in cells.NAMES}
    plan |= {"real_x": cells.experiment("real_x", as_it_is, "x.jsonl"), **cells.tunings(files)}
    for name, (seeds, of_name, swept) in plan.items():
        rows = []
        for seed in seeds:
            rows += run.paired([{
                **cells.as_row(cell), "seed": seed, "reward": 1.0 + i + seed, "pref_acc": 0.5,
                "true_acc": 0.5, "kl": 1.0 + i, "length": 15.0, "bytes": 0.5 + i, "seconds": 60,
                "facts": 1.0, "manners": float(i + seed), "n": 3, "pref_n": 3, "correlation": 0.5,
                "agrees": 0.5, "words": {kind: {"n": 1, "psi": 1.0} for kind in (
                    "right", "wrong", "polite", "rude")}} for i, cell in enumerate(of_name)], swept)
        if "real" in name:
            rows = [{**row, "reward": None, "vs_dpo": None} for row in rows]
        made[name] = {"rows": rows, "options": cells.defaults("real" in name),
                      "made": {"machine": "m", "python": "3", "torch": "2", "code": "0"}}
    return made, plan


def test_every_table_and_figure_can_be_drawn(invented):
    """None without its table, no sweep without its figure, every cell counted once."""
    made, plan = invented
    texts = tables.tables(made)
    assert set(texts) == {*(set(made) - {"real_x"}), "words", "distance", "parts", "real",
                          "readme", "between"} and all(texts.values())
    assert set(figures.figures(made)) == {*figures.TITLES, "frontier", "bytes", "gains",
                                          "knowledge"}
    assert re.findall(r"^\| ([\d.]+) ", texts["alpha"], re.MULTILINE) == [
        "0", "0.25", "0.5", "1", "2", "4"]
    assert texts["unseen"].count("\n") == 1 + 6         # the methods that read a teacher
    for name in ("main", "released"):                   # names tell all cells apart
        assert texts[name].count("\n") == 1 + len(plan[name].cells), name
    unique = {(seed, cell) for seeds, of_name, _ in plan.values() for seed in seeds
              for cell in of_name}
    assert tables.cost(made).startswith(f"{len(unique):,} cells took {len(unique)} minutes")


def test_the_documents_are_filled_from_the_records(invented, tmp_path):
    """Every mark of both documents stands for a record, and all tables come from it."""
    root = copy_of_documents(tmp_path)
    for name, record in invented[0].items():
        path = root / "evidence" / "results" / f"{name}.json"
        path.write_text(json.dumps(record), encoding="utf-8")
    assert tables.main([], root) == 0
    results = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert "<!-- knowledge -->\n| what the teacher was taught | all | facts |" in results
    assert "minus DPO, teacher taught facts |" in (root / "README.md").read_text(encoding="utf-8")


def test_edges_by_hand():
    """Within the grid 1.0 and 0.8 (a mean of 0.6 and 1.0), beyond it 0.5 and 2.0: one is higher."""
    made = {"tune": [(60, 1e-3, 1.0), (60, 3e-3, 0.6), (60, 3e-3, 1.0)],
            "edges": [(60, 1e-4, 0.5), (60, 1e-2, 2.0)]}
    invented = {name: {"rows": [
        {**cells.as_row(with_options(cells.DPO, steps=steps, lr=lr)._replace(split="val")),
         "reward": reward, "seed": 0} for steps, lr, reward in scores]}
        for name, scores in made.items()}
    for record in invented.values():
        record["options"] = {"steps": 60, "lr": 3e-4}
    assert tables.edges(invented).splitlines()[2:] == ["| dpo | 1.00 | 0.50 | **2.00** |"]


def test_knowledge_by_hand(invented):
    """Two seeds, tvkd minus DPO 1 and 3: 2 +- 12.71, not clear of 0; 2 and 2: bold."""
    rows = []
    for seed, gap in ((0, 1.0), (1, 3.0)):
        rows.append({**cells.as_row(cells.DPO._replace(teacher="full")), "seed": seed})
        for teacher in cells.TEACHERS:
            row = cells.as_row(cells.TVKD._replace(teacher=teacher))
            rows.append({**row, "seed": seed, "vs_dpo": 2.0 if teacher == "facts" else gap})
    assert tables.knowledge({"rows": rows}).splitlines()[-1] == (
        "| tvkd implicit/value | +2.00 \u00b1 12.71 | **+2.00 \u00b1 0.00** | +2.00 \u00b1 12.71 | "
        "+2.00 \u00b1 12.71 |")


def test_figure_by_hand():
    """x from 0 to 2 is 48 to 330 pixels, y from 1 (a bar reaches to 1) to 3 is 226 to 46: the point
    (1, 2) at 189, 136, the bar of half-width 1 at x = 0, y = 2 from 46 to 226."""
    line = [(0.0, 2.0, 1.0), (1.0, 2.0, None), (2.0, 3.0, None)]
    drawn = figures.figure({"dpo": line}, "t", "x", "y")
    assert 'points="48.0,136.0 189.0,136.0 330.0,46.0"' in drawn
    assert '<path d="M48.0 46.0V226.0"/>' in drawn
