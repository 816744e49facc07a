"""The experiments: controls by hand, settings and pairing, resuming, and documents from records."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import data
from conftest import ROOT, close
from evidence import bench, cells, controls, figures, records, run, tables
from evidence.cells import Cell, Experiment, with_options
from harness.errors import UserError
from harness.options import Config
from harness.texts import load_task
from model import GPT, GPTConfig, both_responses, rows_logps
from small_run import write_pairs
from train import DPO, KD
from tvkd import kd_loss

TINY = {"batch_size": 8, "block_size": 64, "max_new_tokens": 4, "samples": 1, "student_heads": 2,
        "student_layers": 1, "student_pairs": 8, "student_sft_steps": 3, "student_width": 8,
        "teacher_dpo_steps": 2, "teacher_heads": 2, "teacher_layers": 1, "teacher_sft_steps": 3,
        "teacher_width": 8, "test_pairs": 4, "train_pairs": 20, "val_pairs": 4, "vocab_size": 300,
        "steps": 3, "teacher_dpo_lr": 3e-2}


def tiny(cell, **options):
    return with_options(cell._replace(options=()), **{**TINY, **options})


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return controls.Seed(tmp_path_factory.mktemp("work"), 0)


@pytest.fixture
def loss_of(at):
    """A cell's loss at tiny sizes."""
    return lambda cell: controls.loss_of(cell, replace(Config(**TINY), **dict(cell.options)), at)


@pytest.fixture
def models():           # (student, teacher, six pairs of ids), with random weights
    task, both = load_task(Config(**TINY), 0), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        both.append(GPT(GPTConfig(task.tokenizer.n_vocab, 64, 1, 2, 8)))
    return *both, task.ids.train[:6]

# --- labels and teachers --------------------------------------------------------------------------

def test_soft_labels_by_hand():
    """dpsi = ln 3: the teacher says sigmoid(ln 3) = 3/4. The mean with a label that says 1 is 7/8.
    As evidence a label is worth ln 6: sigmoid(ln 3 + ln 6) = 18/19. dpsi = 0: 1/2, 3/4, 6/7. For
    one label in seven is wrong: of 2,000 pairs some 286 are labelled against their rewards."""
    difference = torch.tensor([math.log(3), 0.0])
    close(controls.soft_label("soft", difference), [3 / 4, 1 / 2])
    close(controls.soft_label("mean", difference), [7 / 8, 3 / 4])
    close(controls.soft_label("evidence", difference), [18 / 19, 6 / 7])
    wrong = sum(data.reward(prompt, chosen) < data.reward(prompt, rejected)
                for prompt, chosen, rejected, *_ in data.toy_splits(2000, 1, 1, 0).train)
    assert 250 < wrong < 330


def test_a_soft_label_reads_the_whole_difference(loss_of, at):
    """Its probability is the sigmoid of the teacher's difference of implicit rewards, worked out
    here from the teacher's log-probs: not of a part of it, and of nobody else's."""
    soft = loss_of(cells.SOFT)
    teacher_ref, teacher = at.teacher(Config(**TINY), "")
    both = both_responses(soft.pairs)
    gaps = (rows_logps(teacher, both, 4) - rows_logps(teacher_ref, both, 4)).view(2, -1)
    assert (gaps[0] - gaps[1]).abs().max() > 0.1
    close(soft.probability, (gaps[0] - gaps[1]).sigmoid(), 1e-4)
    close(loss_of(cells.TVKD).psi, gaps, 1e-4)


def test_soft_labels_are_a_share_of_dpo():
    """Margin ln 3: DPO's losses are -ln(3/4) for the label and -ln(1/4) against it. At p = 3/4:
    ln 4 - 3/4 ln 3 = .562335; at p = 1 ln 4 - ln 3, at p = 0 ln 4."""
    logps, ref = torch.tensor([[math.log(3)] * 3, [0.0] * 3]), torch.zeros(2, 3)
    loss = controls.Labelled([None] * 3, ref, 1.0, torch.tensor([0.75, 1.0, 0.0]))
    close(loss.losses(logps, [0, 1, 2]), [0.562335, math.log(4 / 3), math.log(4)], 1e-5)


def test_noise_flips_pairs_log_probs_and_psi_together(loss_of):
    """Each pair is either as it was, in its texts, its reference log-probs and its psi, or flipped
    in all three; the label of a flipped pair is wrong, the teacher's opinion is still right."""
    clean = loss_of(cells.TVKD)
    noisy = loss_of(cells.noise(cells.TVKD, 0.5))
    turned = [new != old for new, old in zip(noisy.pairs, clean.pairs)]
    assert 0 < sum(turned) < 8
    for i, turn in enumerate(turned):
        for name in ("ref_logps", "psi"):
            before, after = getattr(clean, name)[:, i], getattr(noisy, name)[:, i]
            assert torch.equal(after, before.flip(0) if turn else before) and before[0] != before[1]


def test_what_is_drawn():
    """Of 10,000 labels 4,000 at 0.4, within 4 standard deviations of 49; others of another seed.
    psi of another pair: the same columns in another order, none in its old place."""
    many = controls.which_flip(10_000, 0.4, 0)
    assert abs(many.sum().item() - 4000) < 200
    assert not torch.equal(many, controls.which_flip(10_000, 0.4, 1))
    psi = torch.arange(20.0).view(2, 10)
    dealt = controls.psi_of_another_pair(psi, 0)
    assert sorted(dealt.T.tolist()) == psi.T.tolist() and (dealt != psi).all()


def test_a_teacher_with_flipped_labels_sees_the_students_noise(at, loss_of):
    """The student's first 8 of the teacher's 20 pairs have the same labels on both sides."""
    taught = at.pairs_of_teacher(Config(**TINY), "flipped 0.4")
    usual, noisy = at.task(Config(**TINY)).ids.train, loss_of(cells.noise(cells.DPO, 0.4)).pairs
    assert taught[:8] == noisy and 0 < sum(old != new for old, new in zip(usual, taught)) < 20


def test_teachers_labels_ignore_the_students(loss_of):
    """Hard labels: the chosen response is the one with more psi, whatever noise did before. Soft
    labels: the same probability for the same response."""
    tvkd = loss_of(cells.TVKD)
    better = [pair.chosen if w >= l else pair.rejected for pair, w, l in zip(tvkd.pairs, *tvkd.psi)]
    for cell in (cells.HARD, cells.noise(cells.HARD, 1.0)):
        assert [pair.chosen for pair in loss_of(cell).pairs] == better
    soft, noisy = loss_of(cells.SOFT), loss_of(cells.noise(cells.SOFT, 1.0))
    close(noisy.probability, 1 - soft.probability)


def test_what_a_teacher_is_taught(at):
    """+1 thing, +1 fact, -1 wrong fact, +1/2 polite: facts 1, manners 1/2, contrary 1 - 1/2. And
    `unseen`: the pairs after the student's 8; of `opposite` every wide gap is labelled so."""
    of = {name: label("Describe the cat: red, small, fast, old.",
                      "Of course! The cat is red and big.")
          for name, label in controls.LABELS.items()}
    assert of == {"full": 1.5, "facts": 1.0, "manners": 0.5, "contrary": 0.5, "opposite": -1.5}
    config, task = Config(**TINY), at.task(Config(**TINY))
    assert at.pairs_of_teacher(config, "unseen") == task.ids.train[8:]
    wide = [(old, new) for text, old, new in zip(
        task.texts.train, task.ids.train, at.pairs_of_teacher(config, "opposite"))
        if data.reward(text.prompt, text.chosen) - data.reward(text.prompt, text.rejected) >= 4]
    assert wide and all(new.chosen == old.rejected for old, new in wide)


# --- losses ---------------------------------------------------------------------------------------

def test_warm_kd_by_hand(models):
    """At temperature 1 kd_loss; at 2 four times kd_loss of halved logits."""
    student, teacher, pairs = models
    tokens, mask = data.collate(both_responses(pairs))
    for t in (1, 2):
        sums = controls.WarmKD(pairs, teacher, t)(student, range(6))
        expected = t ** 2 * kd_loss(student(tokens) / t, teacher(tokens) / t, mask)
        close((sums["loss"] / sums["n"]).detach(), expected.detach(), 1e-5)


def test_sum_of_two_losses(models):
    """KD's mean over tokens plus DPO's over pairs; two halves of a batch add up to the whole."""
    student, teacher, pairs = models
    kd, dpo = KD(pairs, teacher), DPO(pairs, torch.zeros(2, 6), 1.0)
    both = controls.Both(pairs, kd, dpo)
    means = [loss(student, range(6))["loss"] / loss(student, range(6))["n"] for loss in (kd, dpo)]
    whole = both(student, range(6))
    close((whole["loss"] / whole["n"]).detach(), sum(means).detach(), 1e-4)
    halves = [both(student, ids)["loss"] for ids in (range(2), range(2, 6))]
    close(sum(halves).detach(), whole["loss"].detach(), 1e-3)


# --- experiments ----------------------------------------------------------------------------------

def as_it_is(cell, family=None, steps=None):
    return with_options(cell, **({"steps": steps} if steps else {}))


def test_settings_are_chosen_by_mean_validation_reward():
    """Two seeds: (1 + 5)/2 = 3 against (3 + 4)/2 = 3.5, though 5 is the highest; a control takes
    the setting of the method it is compared with. Of 60 steps alone, the first; of a family, the
    variant of the highest mean."""
    rows = [{**cells.as_row(with_options(cell, lr=lr, steps=steps)), "reward": reward}
            for cell, lr, steps, rewards in ((cells.TVKD, 1e-3, 60, (1, 5)),
                                             (cells.TVKD, 1e-2, 90, (3, 4)),
                                             (cells.TVKD_MEAN, 1e-3, 60, (4, 4)))
            for reward in rewards]
    pick = cells.Picker(rows)
    assert pick(cells.TVKD) == with_options(cells.TVKD, lr=1e-2, steps=90)
    assert dict(pick(cells.PLUS).options) == {"lr": 1e-2, "steps": 90, "alpha": -1.0}
    assert dict(pick(cells.TVKD, steps=60).options) == {"lr": 1e-3}
    assert pick(cells.TVKD, [cells.TVKD, cells.TVKD_MEAN]) == with_options(cells.TVKD_MEAN, lr=1e-3)
    assert with_options(cells.TVKD, alpha=1.0) == cells.TVKD           # equal cells are equal


@pytest.mark.parametrize("name, tries", [
    ("tune", 6), ("tune_knowledge", 3), ("tune_sizes", 4), ("tune_epochs", 12), ("tune_real_x", 3),
    ("tune_human_x", 12), ("tune_care", 16)])
def test_every_method_has_the_same_tries(name, tries):
    """On seeds that are in no table. What `tune` has tried already is not tried again."""
    planned = cells.tuning_experiment(name, "x.jsonl")
    known = cells.tuning_experiment("tune").cells if name == "tune_care" else []
    all_tries, of_method = {*planned.cells, *known}, {}
    if name == "tune_care":
        all_tries &= {*cells.tuning(sum(cells.FAMILIES.values(), []), (30, 60, 120, 240)).cells}
    for cell in all_tries:
        of_method.setdefault(cells.without_setting(cells.as_row(cell)), set()).add(cell)
    assert {len(settings) for settings in of_method.values()} == {tries}
    assert len(planned.cells) == len(set(planned.cells))
    assert not set(planned.seeds) & {*cells.SEEDS}
    assert {cell.split for cell in planned.cells} == {"choice" if "human" in name else "val"}


def test_difference_is_to_dpo_at_the_same_point():
    """TVKD on 100 pairs is compared with DPO on 100 pairs: 3.5 - 1 = 2.5; on 300, the default, with
    DPO on 300: 5 - 3 = 2; soft labels are no base."""
    rows = [{**cells.as_row(with_options(cell, student_pairs=n)), "reward": reward, "pref_acc": x}
            for n, cell, reward, x in ((100, cells.SOFT, 9.0, 0.5), (100, cells.DPO, 1.0, 0.5),
                                       (100, cells.TVKD, 3.5, 0.75),
                                       (300, cells.DPO, 3.0, 0.5), (300, cells.TVKD, 5.0, 0.25))]
    rows = records.paired(rows, ("student_pairs",))
    assert [row["vs_dpo"] for row in rows] == [8.0, None, 2.5, None, 2.0]
    assert [row["acc_vs_dpo"] for row in rows] == [0.0, None, 0.25, None, -0.25]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Two seeds of DPO, strict TVKD (DPO in every number) and TVKD. Stopped in the second seed,
    the record holds what was done, and tables read the whole seed alone; the same command trains
    the rest and nothing twice. Rows of another plan or of other defaults are refused."""
    planned = Experiment((0, 1), [tiny(cell) for cell in (cells.DPO, cells.ZERO, cells.TVKD)])
    trained, numbers_of = [], controls.numbers_of

    def stopping(cell, at):
        trained.append((at.seed, cell))
        if len(trained) == 6:
            raise KeyboardInterrupt
        return numbers_of(cell, at)
    monkeypatch.setattr(controls, "numbers_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run("small", planned, tmp_path)
    assert len(json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))["rows"]) == 5
    assert {row["seed"] for row in records.load(tmp_path)["small"]["rows"]} == {0}
    run.run("small", planned, tmp_path)
    assert len(trained) == 7 and trained[5] == trained[6]
    rows = records.load(tmp_path)["small"]["rows"]
    assert [(row["seed"], row["terminal"]) for row in rows] == [
        (seed, end) for seed in (0, 1) for end in (None, "zero", "value")]
    for dpo, zero, tvkd in (rows[:3], rows[3:]):
        same = [key for key, x in dpo.items() if isinstance(x, float) and key != "seconds"]
        assert len(same) > 5 and [dpo[key] for key in same] == [zero[key] for key in same]
        assert zero["vs_dpo"] == 0 and tvkd["kl"] != dpo["kl"]
    with pytest.raises(UserError, match="expected rows of today's plan, got tvkd"):
        run.run("small", planned._replace(cells=planned.cells[:2]), tmp_path)
    path = tmp_path / "small.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"alpha": 1.0', '"alpha": 0.5', 1),
                    encoding="utf-8")
    with pytest.raises(UserError, match="today's defaults, got others of alpha"):
        run.run("small", planned, tmp_path)


def test_settings_are_chosen_first(tmp_path, monkeypatch):
    """Two learning rates are tried on validation prompts; the better one trains the experiment, of
    which --seeds=1 does the first seed."""
    tried = cells.tuning([tiny(cells.DPO)], (3,), (1e-3, 1e-2), seeds=(100,))
    monkeypatch.setattr(run, "tuning_experiment", lambda name, file: tried)
    monkeypatch.setattr(run, "experiment", lambda name, pick, file: Experiment(
        (0, 1), [pick(tiny(cells.DPO))]))
    assert run.main(["alpha", f"--results={tmp_path}", "--seeds=1"]) == 0
    made = records.load(tmp_path)
    best = max(made["tune"]["rows"], key=lambda row: row["reward"])
    [row] = made["alpha"]["rows"]
    assert row["seed"] == 0 and row["options"]["lr"] == best["options"]["lr"]


def test_every_kind_of_cell_trains(at):
    """One of each method, control and teacher. Each changes the student: no two KLs are the same
    but those that must be. The parts of the reward add up to it."""
    kinds = {}
    for name in cells.EXPERIMENTS:
        for cell in cells.experiment(name, as_it_is).cells:
            changes = {key: x for key, x in cell.options if key in ("alpha", "beta")}
            kinds.setdefault((*cell[:4], cell.teacher if cell.method == "tvkd" else ""),
                             tiny(cell, **changes))
    rows = {kind: controls.numbers_of(cell, at) for kind, cell in kinds.items()}
    kl = {kind: row["kl"] for kind, row in rows.items() if kind[0] != "sft"}
    dpo = kl[("dpo", None, None, "", "")]
    assert kl.pop(("tvkd", "implicit", "zero", "", "")) == dpo
    hard = ("dpo", "implicit", "value", "relabel")      # ignores what noise does to the labels
    assert kl.pop((*hard[:3], "relabel noise", "")) == kl[(*hard, "")]
    assert len(kl) > 20 and len(set(kl.values())) == len(kl), sorted(kl.items(), key=str)
    parts = [row for row in rows.values() if "facts" in row]
    assert parts and all(row["facts"] + row["manners"] == pytest.approx(row["reward"])
                         for row in parts)


def test_on_a_file_settings_are_chosen_by_accuracy(tmp_path):
    """On "choice" the held-out pairs of the test split are ordered, and the student that is its own
    reference ties in all: 1/2."""
    path = write_pairs(tmp_path / "pairs.jsonl", [(f"Say {n}.", " yes", " no") for n in range(40)])
    seed = controls.Seed(tmp_path, 0)
    for method, split in (("sft", "choice"), ("dpo", "choice"), ("teacher", "test")):
        cell = tiny(Cell(method, split=split), data=str(path), train_pairs=20, test_pairs=6)
        numbers = controls.numbers_of(cell, seed)
        assert numbers["reward"] is None and numbers["pref_n"] == 6
        assert ("kl" in numbers) == (split == "test") and (numbers["pref_acc"] == 0.5) \
            == (method == "sft")


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("module, argv, message", [
    *((module, [option], "unrecognized arguments: --no") for module in (run, tables, bench)
      for option in ("--no\x1b[31m\nsuch", "--nosuch" + "x" * 100_000)),
    (run, ["mian\x1b"], "expected some of main, care"),
    (run, ["main", "--seeds=0"], "--seeds: expected at least 1, got 0"),
    (run, ["real"], "--data: expected a file beside human or real"),
    (run, ["main", "--data=x.jsonl"], "--data: expected a file beside human or real"),
    (run, ["real", "--data=missing.jsonl"], "missing.jsonl: expected")])
def test_mistakes_end_in_one_line(module, argv, message, tmp_path, capsys):
    """Exit 2, no usage, nothing that a terminal would obey, and not all of a long argument."""
    assert module.main([*argv, *([f"--results={tmp_path}"] if module is run else [])]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("evidence: ") and message in shown.err and not shown.out
    assert shown.err.count("\n") == 1 and shown.err[:-1].isprintable() and len(shown.err) < 700


def test_one_run_a_folder(tmp_path, capsys):
    with run.locked(tmp_path):
        assert run.main(["main", f"--results={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"evidence: --results: expected a folder that no other run is using, got {tmp_path}\n")


@pytest.mark.parametrize("wrong", [
    "{", "[]", '{"rows": []}', '{"rows": ["x"]}', '{"made": {}, "rows": [{"seed": 0}]}', "no KL"])
def test_a_record_of_the_wrong_shape_is_one_line(wrong, tmp_path, capsys, monkeypatch):
    root = copy_of_documents(tmp_path)
    path = root / "evidence" / "results" / "main.json"
    if wrong == "no KL":
        wrong = path.read_text(encoding="utf-8").replace('"kl": ', '"kl": "x", "was": ')
    path.write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(tables, "command", partial(tables.command, root=root))
    assert tables.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evidence: ") and error.count("\n") == 1 and "main" in error


# --- tables and documents -------------------------------------------------------------------------

def test_p_values_by_hand():
    """Two numbers: tan of the angle is t, and two thirds of the angles lie beyond pi/6, one in two
    beyond pi/4. 1 and 3: t = 2 / (sqrt(2) / sqrt(2)) = 2, p = 1 - 2 atan(2) / pi. Three numbers: t
    = 2 / (1 / sqrt(3)), p = 1 - t / sqrt(t^2 + 2). No spread: certain, or, all 0, no test."""
    close(records.p_value([1.0, 3.0]), 1 - 2 * math.atan(2) / math.pi, 1e-9)
    close(records.p_value([1.0, 2.0, 3.0]), 1 - math.sqrt(12 / 14), 1e-6)
    assert [records.p_value(x) for x in ([2.0, 2.0], [0.0, 0.0], [5.0])] == [0.0, 1.0, 1.0]


def test_holm_by_hand():
    """Three tests at 5%: .01 < .05/3; .02 < .05/2; .06 > .05. Once one fails, all that follow do:
    .03 > .05/2, so .04 < .05 does not count."""
    assert records.holm({"a": 0.06, "b": 0.01, "c": 0.02}) == {"b", "c"}
    assert records.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == {"b"}
    assert records.holm({"a": 0.02, "b": 0.02, "c": 0.02}) == set()


def record_of(*settings, code="abcdefgh"):
    """(cell, {key: numbers of the seeds}) -> a record as `load` gives it."""
    rows = [{**cells.as_row(cell), "seed": seed, **{key: x[seed] for key, x in numbers.items()}}
            for cell, numbers in settings for seed in range(len(next(iter(numbers.values()))))]
    return {"rows": rows, "codes": {code}}


def test_a_table_by_hand():
    """Two seeds: 1 and 3 are 2 +- 12.706 * sqrt(2) / sqrt(2). Of two differences, 1 and 3 (p .30)
    and 2 and 2 (p 0), the second survives."""
    text = tables.comparison(record_of(
        (cells.TVKD, {"reward": [1.0, 3.0], "vs_dpo": [1.0, 3.0]}),
        (cells.SHUFFLED, {"reward": [2.0, 2.0], "vs_dpo": [2.0, 2.0]})), ("reward", "vs_dpo"))
    assert text.splitlines() == [
        "| model | true reward | minus DPO |", "| --- | ---: | ---: |",
        "| tvkd implicit/value | 2.00 ± 12.71 | +2.00 ± 12.71 |",
        "| tvkd implicit/value, psi of other pairs | 2.00 ± 0.00 | **+2.00 ± 0.00** |", "",
        "*n = 2 seeds; ±: 95% interval of the mean over seeds, Student's t. Bold: not 0 by Holm's "
        "correction over the 2 differences here, at 5%. Code abcdefgh.*"]


def test_between_by_hand(monkeypatch):
    """Seed by seed, and only under the teacher that is named: 5 - 1 = 4 and 7 - 3 = 4, not 9 - 1. A
    record that is not there has no line."""
    of_facts = [cell._replace(teacher="facts") for cell in (cells.KD, cells.SOFT)]
    record = record_of((of_facts[0], {"reward": [5.0, 7.0]}),
                       (cells.KD._replace(teacher="manners"), {"reward": [9.0, 9.0]}),
                       (of_facts[1], {"reward": [1.0, 3.0]}))
    wanted = [(name, "facts", tables.KD, tables.SOFT) for name in ("knowledge", "main")]
    monkeypatch.setattr(tables, "BETWEEN", wanted)
    assert tables.between({"knowledge": record}).splitlines()[2] == (
        f"| kd | {tables.SOFT} | knowledge, taught facts | **+4.00 ± 0.00** |")


def test_settings_by_hand():
    """Of 60 steps the better rate, .003 (a mean of .6 and 1), is the highest tried; of 120 the
    lowest. The best score of the method is bold, unless one number of steps leaves no choice."""
    rows = [{**cells.as_row(with_options(cells.DPO, steps=steps, lr=lr)), "reward": reward}
            for steps, lr, reward in ((60, 1e-3, 0.5), (60, 3e-3, 0.6), (60, 3e-3, 1.0),
                                      (120, 1e-3, 0.7), (120, 3e-3, 0.6), (120, 1e-2, 0.1))]
    assert [tables.settings(some, "tune").splitlines()[-1] for some in (rows, rows[:3])] == [
        "| dpo | **0.800 (0.003*)** | 0.700 (0.001*) |", "| dpo | 0.800 (0.003*) |"]


def test_a_sweep_by_hand():
    """Lines by steps, then by pairs, whatever the order of the record; what nobody trained is -."""
    text = tables.sweep(record_of(*(
        (with_options(cell, steps=steps, student_pairs=n), {"reward": [x, x]})
        for cell, steps, n, x in ((cells.DPO, 120, 100, 4.0), (cells.DPO, 60, 300, 2.0),
                                  (cells.TVKD, 60, 100, 1.5), (cells.DPO, 60, 100, 1.0)))),
        ("steps", "student_pairs"), "steps, pairs", ("reward",))
    assert text.splitlines()[:5] == [
        "| steps, pairs | tvkd implicit/value: true reward | dpo: true reward |",
        "| --- | ---: | ---: |", "| 60, 100 | 1.50 ± 0.00 | 1.00 ± 0.00 |",
        "| 60, 300 | - | 2.00 ± 0.00 |", "| 120, 100 | - | 4.00 ± 0.00 |"]


def copy_of_documents(folder):
    shutil.copytree(ROOT / "evidence" / "results", folder / "evidence" / "results",
                    ignore=shutil.ignore_patterns("work"))
    (folder / "docs").mkdir()
    for name in tables.DOCS:
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_documents_are_rebuilt_from_the_records(tmp_path, monkeypatch):
    """Not a character of a table and not a figure differs from what the records give; every record
    has its place, and every figure."""
    root = copy_of_documents(tmp_path)
    made = tables.tables(records.load(root / "evidence" / "results"))
    monkeypatch.setattr(tables, "tables", lambda _: made)               # they take a second
    tables.command([], root)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in tables.DOCS}
    for name, text in texts.items():
        assert text == (ROOT / name).read_text(encoding="utf-8"), name
    for path in (root / "docs").glob("*.svg"):
        assert path.read_text(encoding="utf-8") == (
            ROOT / "docs" / path.name).read_text(encoding="utf-8")
        assert any(f"({path.name})" in text or f'"{path.name}"' in text for text in texts.values())
    for mark in made:
        assert any(f"<!-- {mark} -->" in text for text in texts.values()), mark


def test_filled_by_hand():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- note -->\n"
    new = "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n<!-- note -->\n"
    assert tables.filled(text, {"x": "new"}, "f.md") == new
    with pytest.raises(UserError, match="f.md: expected a record for the mark x, got y"):
        tables.filled(text, {"y": ""}, "f.md")


def test_every_table_and_figure_can_be_drawn(tmp_path):
    """Of made-up numbers for every cell of every experiment, of two seeds or one: none without its
    table, and names tell all cells of a table apart."""
    plan = {name: cells.experiment(name, as_it_is) for name in cells.EXPERIMENTS}
    for name in ("real_x", "human_x"):
        plan[name] = cells.experiment(name, as_it_is, "x.jsonl")
    for name in [of for name in plan for of in cells.tunings_of(name)]:
        plan[name] = cells.tuning_experiment(name, "x.jsonl")
    for name, (seeds, of_name) in plan.items():
        on_file = "_x" in name
        rows = [{**cells.as_row(cell), "seed": seed, "reward": None if on_file else 1.0 + i + seed,
                 "pref_acc": 0.5 + i / 1000, "true_acc": 0.5, "kl": 1.0, "length": 15.0,
                 "seconds": 60, "facts": 1.0, "manners": 2.0, "pref_n": 3}
                for seed in seeds[:1 + (name != "sizes")] for i, cell in enumerate(of_name)]
        record = {"made": {"code": "0" * 12}, "options": cells.defaults(on_file), "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    made = records.load(tmp_path)
    pick = cells.Picker(made["tune"]["rows"] + made["tune_care"]["rows"])
    care = cells.experiment("care", pick).cells
    made["care"]["rows"] = [{**cells.as_row(cell), "seed": seed, "reward": 1.0 + i}
                            for i, cell in enumerate(care) for seed in (0, 1)]
    texts = tables.tables(made)
    assert set(texts) == {*cells.EXPERIMENTS, "human", "real", "parts", "readme", "between", "tune",
                          "tune_human", "tune_sizes", "tune_epochs"} and all(texts.values())
    assert set(figures.figures(made)) == {"knowledge", "sizes"}
    for mark in ("main", "unseen"):
        assert texts[mark].count("\n|") == 1 + len(plan[mark].cells), mark
