"""evidence.py and figures.py: the controls by hand, runs that go on where they were, and a README that its records rebuild."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import data
import evidence
import figures
import measure
import train
from conftest import ROOT, close
from evidence import Cell
from model import GPT, GPTConfig, frozen
from options import Config
from tvkd import kd_loss

TINY = (("batch_size", 8), ("block_size", 64), ("max_new_tokens", 8), ("samples", 1), ("student_heads", 2), ("student_layers", 1),
        ("student_pairs", 8), ("student_sft_steps", 3), ("student_width", 8), ("teacher_dpo_steps", 2), ("teacher_heads", 2),
        ("teacher_layers", 1), ("teacher_sft_steps", 3), ("teacher_width", 8), ("test_pairs", 6), ("train_pairs", 20),
        ("val_pairs", 4), ("vocab_size", 300), ("steps", 3))


# --- the controls, by hand -------------------------------------------------------------------------------------------------

@pytest.fixture
def models():
    tokenizer = data.learn_tokenizer(data.toy_splits(30, 1, 1, 0).train, 300)
    pairs = data.encode(data.toy_splits(6, 1, 1, 0).train, tokenizer, 128)[1]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(GPT(GPTConfig(tokenizer.n_vocab, 128, 1, 2, 8)))
    return *found, pairs


def test_soft_labels_by_hand(models):
    """At policy = reference ln 2 for every p, with gradient (1/2 - p) of the margin: p = 3/4 turns DPO's -1/2 into -1/4, p = 1/2
    into 0, p = 1 is DPO itself."""
    student, _, pairs = models
    ref_logps = measure.cached_logps(frozen(student), measure.both_responses(pairs), 2, torch.device("cpu")).view(2, -1)
    parameters, ids = list(student.parameters()), list(range(6))

    def gradient(loss_of):
        loss = loss_of(student, ids)["loss"] / 6
        close(loss.detach(), math.log(2), 1e-5)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    dpo = gradient(train.preference(pairs, ref_logps, 2.0, torch.device("cpu")))
    for p, share in ((1.0, 1.0), (0.75, 0.5), (0.5, 0.0), (0.0, -1.0)):
        soft = gradient(evidence.soft_preference(pairs, ref_logps, 2.0, torch.full((6,), p)))
        torch.testing.assert_close(soft, share * dpo, atol=1e-5, rtol=1e-4)


def test_soft_labels_away_from_the_reference(models):
    """Reference log-probs moved so that every margin is ln 3 (beta 1): -p ln(3/4) - (1 - p) ln(1/4) at p = 3/4 is
    ln 4 - 3/4 ln 3 = .562335."""
    student, _, pairs = models
    logps = measure.cached_logps(student, measure.both_responses(pairs), 12, torch.device("cpu")).view(2, -1)
    logps[0] -= math.log(3)
    loss = evidence.soft_preference(pairs, logps, 1.0, torch.full((6,), 0.75))(student, list(range(6)))["loss"]
    close(loss.detach(), 6 * 0.562335, 1e-5)


def test_top_k_kd_by_hand():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2). Of the whole vocabulary, as kd_loss: 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2.
    Of one stored token and the rest, (1/2, 1/2) against (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3. A state outside the mask
    and the last one have no part."""
    teacher, student = (torch.tensor(p).log().expand(1, 3, 3).clone() for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    for logits, peak in ((teacher, 0), (student, 1)):
        logits[0, [0, 2]] = 9.0 * F.one_hot(torch.tensor(peak), 3).float()
    mask = torch.tensor([[False, True]])
    close(evidence.top_k_kd_loss(student, teacher, mask, 3), math.log(2) / 4, 1e-5)
    close(kd_loss(student, teacher, mask), math.log(2) / 4)
    close(evidence.top_k_kd_loss(student, teacher, mask, 1), math.log(4 / 3) / 2)


def test_swapped_by_hand():
    pairs = [data.Pair([1], [2], [3]), data.Pair([4], [5], [6])]
    two = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned, logps, psi = evidence.swapped(torch.tensor([False, True]), pairs, two, 10 * two)
    assert turned == [pairs[0], data.Pair([4], [6], [5])]
    assert logps.tolist() == [[1, 4], [3, 2]] and psi.tolist() == [[10, 40], [30, 20]]


def test_gauge_moves_the_logits_value_and_nothing_else(models):
    """c(s_t) = t/2: bit-identical log-probs, the implicit values too; the logits value of state t rises by beta t/2, so that
    psi = V(s') - V(s) rises by beta/2 a token: with "value" the sum by beta n/2, with "hold" by beta (n - 1)/2."""
    student, teacher, pairs = models
    rows, moved = measure.both_responses(pairs), (evidence.Gauge(student, 0.5), evidence.Gauge(teacher, 0.5))
    evidence.check_same_policy(evidence.Gauge(teacher, 0.0), moved[1], pairs, 4)
    with pytest.raises(RuntimeError, match="gauge: expected the same policy"):
        evidence.check_same_policy(evidence.Gauge(teacher, 0.0), moved[0], pairs, 4)

    def values(kind, *models):
        return measure.cached_values(kind, *models, rows, 2.0, 4, torch.device("cpu"))
    for before, after in zip(values("implicit", teacher, student), values("implicit", moved[1], moved[0])):
        torch.testing.assert_close(after.float(), before, atol=1e-4, rtol=0)
    before, after = values("logits", teacher, student), values("logits", moved[1], moved[0])
    for terminal, less in (("value", 0), ("hold", 1)):
        change = measure.cached_psi(after, rows, 1.0, terminal).sum(-1) - measure.cached_psi(before, rows, 1.0, terminal).sum(-1)
        torch.testing.assert_close(change, torch.tensor([len(row.response) - less for row in rows]).double(), atol=1e-3, rtol=0)


def test_stored_bytes_by_hand():
    """Two pairs of 2 + 3 tokens each, of which KD may read one. V = 100. A float of 4 bytes a response: 16/10 a token; a bit
    a pair: 2/8/10; 400 a token; the same of half the tokens: 200; an id of 2 bytes and its float: 6."""
    pairs = [data.Pair([1], [2, 0], [3, 4, 0])] * 2
    for cell, of, expected in ((Cell("tvkd", "implicit", "value"), 2, 1.6), (Cell("dpo", "implicit", "value", "soft"), 2, 1.6),
                               (Cell("dpo", "implicit", "value", "relabel"), 2, 0.025), (Cell("kd"), 2, 400),
                               (Cell("kd"), 1, 200), (Cell("kd", control="top", dose=1), 2, 6), (Cell("bc"), 2, 2),
                               (Cell("dpo"), 2, 0), (Cell("kd+tvkd", "implicit", "value"), 2, 401.6)):
        assert evidence.stored_bytes(cell, pairs[:of], pairs, 100) == pytest.approx(expected), cell


def test_words_by_hand():
    """"Ugh, fine." is rude: .5 - 1.5 = -1. The cat is right, blue wrong, and what is neither word nor sentence is left out."""
    pieces = [" Ugh", ",", " fine", ".", " The", " cat", " is", " blue", ".", "<eos>"]
    psi = [0.5, 0.0, -1.5, 0.0, 9.0, 1.0, 9.0, -2.0, 9.0, 9.0]
    found = evidence.by_kind("Describe the cat: red, small.", " Ugh, fine. The cat is blue.", pieces, psi)
    assert sorted(found) == [("right", 1.0), ("rude", -1.0), ("wrong", -2.0)]
    pieces = [" The", " cat is red.", " Have a", " nice day.", ""]
    assert evidence.by_kind("the cat: red", " The cat is red. Have a nice day.", pieces, [1, 2, 3, 4, 5]) == [("polite", 7.0)]


# --- choosing, pairing, resuming -------------------------------------------------------------------------------------------

def test_settings_are_chosen_by_mean_validation_reward():
    """Two seeds: (1 + 5)/2 = 3 against (3 + 4)/2 = 3.5, though 5 is the highest; a control takes the setting of the method it is compared with."""
    rows = [{**evidence.as_row(evidence.with_options(evidence.TVKD, steps=60, lr=lr)), "reward": reward}
            for lr, rewards in ((1e-3, (1, 5)), (1e-2, (3, 4))) for reward in rewards]
    pick = evidence.picker({"rows": rows, "options": {"steps": 60, "lr": 3e-4}})
    assert pick(evidence.TVKD) == evidence.TVKD._replace(options=(("lr", 1e-2),))                  # 60 steps are the default
    assert dict(pick(evidence.PLUS).options) == {"lr": 1e-2, "alpha": -1.0}
    assert evidence.with_options(evidence.TVKD, alpha=1.0) == evidence.TVKD                         # equal cells are equal


def test_every_method_has_the_same_tries():
    seeds, cells, _ = evidence.TUNE
    assert len(evidence.GRID) == len(set(evidence.GRID)) == 10 and len(cells) == 10 * len({*evidence.TUNED, *evidence.FEW})
    assert all(cell.split == "val" for cell in cells) and not set(seeds) & {*evidence.SEEDS, *evidence.SWEEP_SEEDS}


def test_difference_is_to_dpo_at_the_same_x():
    """TVKD on 100 pairs is compared with DPO on 100 pairs: (3 + 4)/2 - (1 + 1)/2 = 2.5; on 300, the default, with DPO on 300."""
    cells = [evidence.with_options(Cell(method), student_pairs=n) for n in (100, 300) for method in ("dpo", "tvkd")]
    rewards = [(1.0, 1.0), (3.0, 4.0), (2.0, 4.0), (5.0, 5.0)]
    found = {evidence.key(cell): ({**evidence.as_row(cell), "reward": sum(x) / 2, "pref_acc": x[0] / 8}, {"reward": list(x)})
             for cell, x in zip(cells, rewards)}
    rows = evidence.paired(found, cells, "student_pairs")
    assert [row.get("vs_dpo") for row in rows] == [None, 2.5, None, 2.0]
    assert [row["acc_vs_dpo"] for row in rows] == [None, 2 / 8, None, 3 / 8]


def test_runs_go_on_where_they_were(tmp_path, monkeypatch):
    """Two processes, two seeds, three cells: strict TVKD equals DPO in every number. With the record gone and the last line of
    one seed cut in two, as by a kill, the same rows come back, and that one cell alone is trained again."""
    cells = [Cell("dpo", options=TINY), *(Cell("tvkd", "implicit", end, options=TINY) for end in ("zero", "value"))]
    plan = {"tiny": ((0, 1), cells, None)}
    evidence.run(plan, tmp_path, jobs=2)
    record = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    first = record["rows"]
    assert [(row["seed"], row["terminal"]) for row in first] == [(s, t) for s in (0, 1) for t in (None, "zero", "value")]
    same = [key for key, value in first[0].items() if isinstance(value, float)]
    assert "reward" in same and "kl" in same
    for dpo, zero, tvkd in (first[:3], first[3:]):
        assert {key: dpo[key] for key in same if key not in ("seconds", "bytes")} == {
            key: zero[key] for key in same if key not in ("seconds", "bytes")}
        assert zero["vs_dpo"] == 0 and tvkd["kl"] != dpo["kl"]
    assert record["made"]["threads"] == 1 and record["options"]["beta"] == 1.0

    (tmp_path / "tiny.json").unlink()
    path = evidence.kept(tmp_path, 1) / "cells.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    again = []

    def counted(cell, bench):
        again.append((bench.seed, cell))
        return measured(cell, bench)
    measured = evidence.measured
    monkeypatch.setattr(evidence, "measured", counted)

    class Pool:                                             # the same work in this process, where it can be counted
        def __init__(self, *args): pass
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def map(self, function, *lists): return map(function, *lists)
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Pool)
    evidence.run(plan, tmp_path, jobs=1)
    second = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))["rows"]
    assert again == [(1, cells[2])]
    assert [{**row, "seconds": 0} for row in second] == [{**row, "seconds": 0} for row in first]
    evidence.run(plan, tmp_path, jobs=1)                    # a record that is complete is left alone
    assert len(again) == 1


def test_controls_train(tmp_path, monkeypatch):
    """Every kind of cell runs, at toy sizes, and each control changes the student. Relabel with a teacher that agrees with every
    label is DPO, with one that disagrees with all of them it is not."""
    plan, tiny, kinds = evidence.experiments(lambda cell: cell), dict(TINY, block_size=96), {}
    for cell in (cell for _, cells, _ in plan.values() for cell in cells):
        own = {name: x for name, x in cell.options if name in ("alpha", "beta", "teacher_tokenizer")}
        kinds[cell[:4]] = cell._replace(options=tuple({**tiny, **own}.items()))
    relabel = kinds.pop(("dpo", "implicit", "value", "relabel"))
    evidence.work([(0, cell) for cell in kinds.values()], tmp_path, 1)
    found = evidence.done(evidence.kept(tmp_path, 0))
    kl = {kind: found[evidence.key(cell)][0].get("kl") for kind, cell in kinds.items() if kind[0] not in ("values", "sft")}
    assert kl.pop(("tvkd", "implicit", "zero", "")) == kl[("dpo", None, None, "")]
    assert kl.pop(("tvkd", "implicit", "value", "gauge")) == pytest.approx(kl[("tvkd", "implicit", "value", "")], abs=1e-5)
    assert len(kl) > 14 and len(set(kl.values())) == len(kl), kl
    bench = evidence.Bench(0, evidence.kept(tmp_path, 0))
    for chosen, same in ((1.0, True), (-1.0, False)):
        monkeypatch.setattr(evidence, "summed_psi", lambda *args: torch.tensor([[chosen] * 8, [0.0] * 8]))
        assert (evidence.measured(relabel, bench)[0]["kl"] == kl[("dpo", None, None, "")]) == same


# --- the README and its records --------------------------------------------------------------------------------------------

def test_readme_is_rebuilt_from_the_records(tmp_path):
    """Not a character of a table and not a figure differs from what the records give; every record has its place."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("work"))
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    assert figures.main([], tmp_path) == 0
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme == (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()}
    assert drawn == {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in drawn}
    assert len(drawn) == 7 and all(f"docs/{name}" in readme for name in drawn)
    for name in (*figures.tables(figures.load(tmp_path / "results")), "cost"):
        assert f"<!-- {name} -->" in readme, name


def test_a_missing_record_is_named(tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- alpha -->\n<!-- /alpha -->\n", encoding="utf-8")
    assert figures.main([], tmp_path) == 2
    assert capsys.readouterr().err == "figures.py: README.md: expected a record in results/ for the mark alpha, got cost\n"


def test_unknown_experiment(capsys):
    with pytest.raises(SystemExit) as stop:
        evidence.main(["mian"])
    assert stop.value.code == 2 and "expected some of tune, main, values, gauge" in capsys.readouterr().err


def test_main_record():
    """At least 8 seeds of every row; strict shaping has DPO's very numbers in each."""
    rows = json.loads((ROOT / "results" / "main.json").read_text(encoding="utf-8"))["rows"]
    seeds = {row["seed"] for row in rows}
    groups = figures.grouped(rows)
    assert len(seeds) >= 8 and all({row["seed"] for row in group} == seeds for group in groups.values())
    for dpo, zero in zip(groups["dpo"], groups["tvkd implicit/zero"]):
        keys = [key for key, value in dpo.items() if isinstance(value, (int, float)) and key not in ("seconds", "bytes")]
        assert len(keys) > 8 and [dpo[key] for key in keys] == [zero[key] for key in keys] and zero["vs_dpo"] == 0


def test_unreadable_preferences_are_refused_first(tmp_path, capsys):
    assert evidence.main(["real", "--data=missing.jsonl", f"--results={tmp_path}"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "evidence.py: missing.jsonl: expected a readable JSONL file, got: No such file or directory\n"
    assert not shown.out


def test_filled_by_hand():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- note -->\n"
    assert figures.filled(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n<!-- note -->\n"
    with pytest.raises(ValueError, match="the mark x, got y"):
        figures.filled(text, {"y": ""})


def test_comparison_by_hand():
    """Two seeds: mean 2, half-width 12.706 * sqrt(2) / sqrt(2) = 12.71 at a standard deviation of sqrt(2)."""
    row = {"method": "tvkd", "value": "implicit", "terminal": "value", "control": "shuffled", "dose": 0.0, "options": {},
           "bytes": 0.25, "vs_dpo": None, "pref_acc": 0.5, "true_acc": 0.5, "kl": 1.0, "length": 15.0}
    rows = [{**row, "seed": 0, "reward": 1.0}, {**row, "seed": 1, "reward": 3.0}]
    line = figures.comparison({"rows": rows}).splitlines()[-1]
    assert line == ("| tvkd implicit/value, psi of other pairs | 2.00 \u00b1 12.71 | - | 0.500 \u00b1 0.000 | "
                    "0.500 \u00b1 0.000 | 1.00 \u00b1 0.00 | 15.0 \u00b1 0.0 | 0.25 |")


def test_every_table_and_figure_can_be_drawn():
    """From rows of made-up numbers for every cell of every experiment: none without its table, no sweep without its figure."""
    records = {}
    for name, (seeds, cells, swept) in {**evidence.experiments(lambda cell: cell, "x.jsonl"), "tune": evidence.TUNE}.items():
        rows = []
        for seed in seeds:
            found = {}
            for i, cell in enumerate(cells):
                row = {**evidence.as_row(cell), "seed": seed, "reward": 1.0 + i + seed, "pref_acc": 0.5, "true_acc": 0.5,
                       "kl": 1.0 + i, "length": 15.0, "bytes": 0.5 + i, "vs_dpo": None, "seconds": 60, "n": 3,
                       "correlation": 0.5, "agrees": 0.5,
                       "words": {kind: {"n": 1, "psi": 1.0} for kind in ("right", "wrong", "polite", "rude")}}
                found[evidence.key(cell)] = row, {} if cell.method == "values" else {"reward": [row["reward"], 0.0]}
            rows += evidence.paired(found, cells, swept)
        records[name] = {"rows": rows, "options": evidence.asdict(Config()), "seconds": 60.0,
                         "made": {"machine": "m", "python": "3", "torch": "2"}}
    tables = figures.tables(records)
    assert set(tables) == {*records, "words", "psi"} and all(tables.values())
    assert set(figures.figures(records)) == {*figures.SWEEPS, "bytes"}
    assert re.findall(r"^\| ([\d.]+) ", tables["alpha"], re.MULTILINE) == ["0", "0.25", "0.5", "1", "2", "4"]
    assert tables["main"].count("\n") == 1 + len(records["main"]["rows"]) / 8
    plan = {**evidence.experiments(lambda cell: cell, "x.jsonl"), "tune": evidence.TUNE}
    cells = {(seed, cell) for seeds, cells, _ in plan.values() for seed in seeds for cell in cells}
    assert figures.cost(records).startswith(f"{len(cells)} cells took {len(cells)} minutes of one thread")


def test_figure_by_hand():
    """x from 0 to 2 is 48 to 330 pixels, y from 1 (a bar reaches to 1) to 3 is 226 to 46: the point (1, 2) at 189, 136, the bar
    of half-width 1 at x = 0, y = 2 from 46 to 226."""
    svg = figures.figure({"dpo": [(0.0, 2.0, 1.0), (1.0, 2.0, None), (2.0, 3.0, None)]}, "t", "x", "y")
    assert 'points="48.0,136.0 189.0,136.0 330.0,46.0"' in svg and '<path d="M48.0 46.0V226.0"/>' in svg
