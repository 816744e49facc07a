"""The report page, parsed again and compared with the numbers it was drawn from.

Its panel is driven in a real browser and compared with tvkd.py.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import tvkd
from harness import report, table
from harness.numbers import landmarks
from harness.table import Row

HOSTILE = ["<script>alert(1)</script>", ' "', "&amp;", "\n", " ", "\ufffd", "<|endoftext|>"]
ATTACK = '</script></style>"\'><script>alert(2)</script><img src=x>\x1b[31m\x07\x9b\u202e\u2066\n'
TAGS = set("html meta title style script h1 h2 h3 h4 p b small span br div article svg path "
           "polyline circle g text table thead tbody tr th td figure figcaption form label input "
           "output select option".split())


def make_pair(chosen, rejected, value="implicit", terminal="value", seed=0, prompt="p"):
    """chosen, rejected: (tokens, psi, values)."""
    names = ("tokens", "psi", "values")
    return {"seed": seed, "prompt": prompt, "value": value, "terminal": terminal,
            "chosen": dict(zip(names, chosen)), "rejected": dict(zip(names, rejected))}


def make_row(method, reward, vs_dpo=None, seed=0, value=None, terminal=None, ci=0.5):
    return {"method": method, "value": value, "terminal": terminal, "seed": seed, "pref_n": 20,
            "reward": reward, "reward_ci": None if reward is None else ci, "vs_dpo": vs_dpo,
            "vs_dpo_ci": None if vs_dpo is None else 0.25, "pref_acc": 0.75,
            "pref_acc_ci": 0.125, "pref_margin": 0.1, "kl": 3.5, "length": 12.25}


ROWS = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0),
        make_row("tvkd", 4.0, 2.0, value="implicit", terminal="value")]
PAIR = make_pair(
    (HOSTILE, [1.0, -2.0, -0.5, 0.0, 0.0, 0.0, 3.5],
     [0.0, 1.0, -1.0, -1.5, -1.5, -1.5, -1.5, 2.0]),
    (["a", "<|endoftext|>"], [0.5, -1.5], [0.0, 0.5, -1.0]))


def make_results(rows=ROWS, pairs=(PAIR,), **config):
    config = {"data": "", "alpha": 0.5, "beta": 2.0, "teacher_beta": 1.0, "gamma": 1.0, **config}
    return {"config": config, "rows": list(rows), "pairs": list(pairs), "made": {}}


class Page(HTMLParser):
    """The parts of a page that tests ask for.

    tokens: hover text, text, tint and line of each; cells: of tables; figures: the charts.
    """

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.text = text, [], ""
        self.tokens, self.cells, self.figures = [], [], []
        self.into = None                                    # where text goes, besides self.text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("class", "").startswith("token"):
            self.tokens.append({"title": attributes["title"], "text": "",
                                "note": attributes["class"].split()[1:]})
        elif "--a:" in attributes.get("style", "") and self.tokens:
            tint = float(attributes["style"][4:])
            self.tokens[-1].update(word=attributes["class"], tint=tint)
            self.into = self.tokens[-1]
        elif tag == "figure" and attributes.get("class") != "picture":
            self.figures.append({"text": "", "names": [], "lines": []})
            self.into = self.figures[-1]
        elif tag == "td":
            title = attributes.get("title", "")
            self.cells.append({"text": "", "title": title, "cx": [], "path": []})
            self.into = self.cells[-1]
        elif tag == "polyline":
            points = attributes["points"].split()
            line = [tuple(map(float, point.split(","))) for point in points]
            if self.figures:
                self.figures[-1]["lines"].append(line)
            else:
                self.tokens[-1]["line"] = line
        elif tag == "path" and self.tokens and "line" not in self.tokens[-1]:
            self.tokens[-1]["zero"] = attributes["d"]
        elif tag == "circle" and self.into is not None and "cx" in self.into:
            self.into["cx"].append(float(attributes["cx"]))
        elif tag == "path" and self.into is not None and "path" in self.into:
            self.into["path"].append((attributes["class"], attributes["d"]))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag in ("figure", "td", "span"):
            self.into = None

    def handle_data(self, data):
        self.text += data
        if self.into is not None:
            self.into["text"] += data
            if "names" in self.into and data in ("student-sft", "kd", "dpo"):
                self.into["names"].append(data)


def make_page(tmp_path, results=None, log=()):
    report.write_report(results or make_results(), list(log), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]    # no temporary file
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def write_run(folder, results, log=()):
    """results: a dict or the text of results.json."""
    text = results if isinstance(results, str) else json.dumps(results)
    (folder / "results.json").write_text(text, encoding="utf-8")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in log]
    (folder / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")


# --- rows and the terminal ----------------------------------------------------------------------

def test_row_is_flat_in_results_json():
    row = Row("tvkd", "implicit", "value", 3, {"reward": 2.0, "kl": None})
    assert row.flat() == {"method": "tvkd", "value": "implicit", "terminal": "value", "seed": 3,
                          "reward": 2.0, "kl": None}
    assert Row.from_flat(row.flat()) == row and row.label == "tvkd implicit/value"
    assert Row("dpo").label == "dpo"


def test_printable_leaves_nothing_that_a_terminal_obeys():
    signs = "\x1b\x07\x00\n\r\x9b\x9d\u202a\u202e\u2066\u2069\u2028"
    assert table.printable(f"a{signs}b \u00e9\u4e2d") == f"a{12 * chr(0xfffd)}b \u00e9\u4e2d"


def test_psi_in_the_terminal(capsys):
    """psi 2, -1, 0 of a largest 2: tint levels 4 (more), 2 (less), 0; white space gets a sign."""
    response = {"tokens": [" red", "\n", "x"], "psi": [2.0, -1.0, 0.0]}
    pair = {"value": "implicit", "terminal": "value", "chosen": response, "rejected": response}
    table.show_psi(pair, colour=False, width=80)
    expected = "chosen (sum +1.00):\n  red[+2.00] \u2423[-1.00] x[+0.00]\n"
    assert expected in capsys.readouterr().out
    table.show_psi(pair, colour=False, width=14)                # too narrow for two in a line
    assert "\n  red[+2.00]\n  \u2423[-1.00]\n  x[+0.00]\n" in capsys.readouterr().out
    table.show_psi(pair, colour=True, width=80, most=2)
    out = capsys.readouterr().out
    assert f"48;5;{table.MORE[3]}mred\033[0m[+2.00]" in out
    assert f"48;5;{table.LESS[1]}m\u2423" in out and out.count("... and 1 more") == 2


def test_interval_by_hand():
    """1, 2, 3, 4: variance 5/3, standard error sqrt(5/12) = 0.645497, times t = 3.182: 2.053972."""
    assert table.interval([1, 2, 3, 4]) == pytest.approx(2.053972, abs=1e-5)
    assert table.interval([1]) is None


def test_table_over_seeds_by_hand():
    """Rewards 1 and 3 of two seeds: 2 +- 12.706 sqrt(2)/sqrt(2) = 12.71; one seed: its interval."""
    flat = [make_row("dpo", 1.0), make_row("dpo", 3.0, seed=1)]
    rows = [Row.from_flat(row) for row in flat]
    assert "2.00 \u00b1 12.71" in table.table(rows) and "2 seeds" in table.table(rows)
    assert "1.00 \u00b1 0.50" in table.table(rows[:1]) and "n = 20" in table.table(rows[:1])


# --- pairs --------------------------------------------------------------------------------------

def test_hover_has_the_numbers_of_every_token(tmp_path):
    page = make_page(tmp_path)
    expected = []
    for response in (PAIR["chosen"], PAIR["rejected"]):
        V = response["values"]
        for token, psi, before, after in zip(response["tokens"], response["psi"], V, V[1:]):
            expected.append((repr(token), f"{psi:+.4f}", f"V(s_t) {before:.4f}",
                             f"V(s_t+1) {after:.4f}"))
    assert len(page.tokens) == len(expected) == 9
    for token, parts in zip(page.tokens, expected):
        assert all(part in token["title"] for part in parts)
    words = [token["title"].split(": ")[1].split("\n")[0] for token in page.tokens[:4]]
    assert words == ["worth more", "worth less", "worth less", "worth the same"]
    assert [i for i, token in enumerate(page.tokens) if token["note"] == ["eos"]] == [6, 8]


def test_numbers_of_a_token_by_tap(tmp_path):
    """A tap gives focus where there is a tabindex, and the style then shows the hover text."""
    page = make_page(tmp_path)
    tokens = [a for _, a in page.tags if a.get("class", "").startswith("token")]
    assert tokens and all(attributes["tabindex"] == "0" for attributes in tokens)
    assert "[tabindex]:focus::after { content: attr(title)" in page.source


def test_hostile_tokens_come_out_as_text(tmp_path):
    prompt = '</p><script>alert(2)</script> & "'
    page = make_page(tmp_path, make_results(pairs=[{**PAIR, "prompt": prompt}], data="<b>&"))
    expected = [*HOSTILE[:3], "\u21b5", "\u2423", *HOSTILE[5:]]
    assert [token["text"] for token in page.tokens[:7]] == expected
    assert prompt in page.text and "data: <b>&." in page.text
    assert "<script" not in page.source
    assert ("br", {}) in page.tags                                          # after the newline


def test_half_a_character_is_written(tmp_path):
    response = (["\ud800"], [1.0], [0.0, 1.0])
    pairs = [make_pair(response, response, prompt="p\ud800")]
    page = make_page(tmp_path, make_results(pairs=pairs))
    assert page.tokens[0]["text"] == "\ufffd" and "1. p?" in page.text


def test_tint_is_linear_in_psi(tmp_path):
    """The largest |psi| is 3.5 and gets 0.75 of the colour; psi = -2: 0.75 * 2 / 3.5 = 0.429."""
    page = make_page(tmp_path)
    assert [(token["word"], token["tint"]) for token in page.tokens] == [
        ("more", 0.214), ("less", 0.429), ("less", 0.107), *[("same", 0.0)] * 3, ("more", 0.75),
        ("more", 0.107), ("less", 0.321)]
    assert "psi: less -3.50  +3.50 more. Line: from -1.50 to +2.00" in page.text


def test_line_runs_through_the_values(tmp_path):
    """V - V(s_p) goes from -1.5 (pixel 34) to 2 (pixel 2): 34 - 32 * (V + 1.5) / 3.5.

    So 0 -> 20.29, 1 -> 11.14, -1 -> 29.43.
    """
    page = make_page(tmp_path)
    heights = [20.29, 11.14, 29.43, 34.0, 34.0, 34.0, 34.0, 2.0]
    steps = [[(0.0, a), (1.0, b)] for a, b in zip(heights, heights[1:])]
    assert [token["line"] for token in page.tokens[:7]] == steps
    assert {token["zero"] for token in page.tokens} == {"M0 20.29H1"}
    assert [token["line"] for token in page.tokens[7:]] == [
        [(0.0, 20.29), (1.0, 15.71)], [(0.0, 15.71), (1.0, 29.43)]]


@pytest.mark.parametrize("terminal, psi, last, total", [("hold", 0.0, 12.0, "+2.000"),
                                                        ("zero", -12.0, 0.0, "-10.000")])
def test_last_potential(tmp_path, terminal, psi, last, total):
    """Values 10, 12, 9. hold: Phi(s_end) = 12, psi = 2, 0, sum 12 - 10 = 2.

    zero: Phi(s_end) = 0, psi = 2, -12, sum -10.
    """
    response = (["a", "<|endoftext|>"], [2.0, psi], [10.0, 12.0, 9.0])
    pairs = [make_pair(response, response, "logits", terminal)]
    page = make_page(tmp_path, make_results(pairs=pairs))
    title = f"V(s_t) 12.0000, V(s_t+1) 9.0000, but taken as {last:.4f}"
    assert title in page.tokens[1]["title"] and report.SUM[terminal] in page.text
    assert page.text.count(f"sum of psi {total}") == 2
    assert "chosen - rejected: +0.000" in page.text
    step = report.scale(*((0, 2) if terminal == "hold" else (-10, 2)), 34, 2)
    assert page.tokens[1]["line"] == [(0.0, 2.0), (1.0, round(step(last - 10.0), 2))]


def test_no_room_above_and_below_the_line_of_a_pair(tmp_path):
    """Lines of all pairs lie from 2 to 34; those of a flat pair at 20.29: 18.29 above, 13.71 below.

    In the first pair the lines reach both ends.
    """
    flat = (["a"], [0.0], [5.0, 5.0])
    page = make_page(tmp_path, make_results(pairs=[PAIR, make_pair(flat, flat)]))
    styles = [a["style"] for _, a in page.tags if a.get("class") == "sides"]
    assert styles == ["--above:0.00px;--below:0.00px", "--above:-18.29px;--below:-13.71px"]
    assert "margin: var(--above) 0 var(--below)" in page.source


def test_sums_of_a_pair(tmp_path):
    """chosen: 1 - 2 - 0.5 + 3.5 = 2; rejected: 0.5 - 1.5 = -1; difference 3."""
    text = make_page(tmp_path).text
    assert "chosen sum of psi +2.000" in text and "rejected sum of psi -1.000" in text
    assert "chosen - rejected: +3.000" in text and "true reward +" not in text


def test_true_reward_and_its_words(tmp_path):
    pair = copy.deepcopy(PAIR)
    pair["rejected"].update(reward=-1.5, kinds=["wrong", ""])
    page = make_page(tmp_path, make_results(pairs=[pair]))
    assert "rejected sum of psi -1.000, true reward -1.5" in page.text
    assert [token["note"] for token in page.tokens[-2:]] == [["wrong"], ["eos"]]
    assert "'a' (wrong)\n" in page.tokens[-2]["title"] and "Marked by the true reward" in page.text
    assert "Marked by" not in make_page(tmp_path).text


def test_gamma_is_explained_where_it_matters(tmp_path):
    assert "with gamma = 0.9 the sum also" in make_page(tmp_path, make_results(gamma=0.9)).text
    assert "the sum also keeps" not in make_page(tmp_path).text


def test_pairs_of_the_first_seed_alone_by_kind(tmp_path):
    other = make_pair((["b"], [1.0], [0.0, 1.0]), (["c"], [1.0], [0.0, 1.0]), "logits", "hold")
    page = make_page(tmp_path, make_results(pairs=[PAIR, other, {**PAIR, "seed": 1}]))
    assert len(page.tokens) == 9 + 2
    assert "implicit/value" in page.text and "logits/hold" in page.text


# --- the table ----------------------------------------------------------------------------------

def test_every_number_of_every_row(tmp_path):
    cells = [cell["text"] for cell in make_page(tmp_path).cells]
    rest = ["0.750 \u00b1 0.125", "3.50", "12.2"]
    assert cells == ["", "1.00 \u00b1 0.50", "-1.00 \u00b1 0.25", *rest,
                     "", "2.00 \u00b1 0.50", "-", *rest,
                     "", "4.00 \u00b1 0.50", "+2.00 \u00b1 0.25", *rest]


def test_intervals_on_one_axis(tmp_path):
    """From 1 - 0.5 (pixel 12) to 4 + 0.5 (pixel 268), 64 pixels for 1.

    So points at 44, 108 and 236, and 32 pixels to both sides.
    """
    drawn = [cell for cell in make_page(tmp_path).cells if cell["cx"]]
    assert [cell["cx"] for cell in drawn] == [[44.0], [108.0], [236.0]]
    assert [dict(cell["path"])["ci"] for cell in drawn] == [
        "M12.00 13H76.00", "M76.00 13H140.00", "M204.00 13H268.00"]
    assert {dict(cell["path"])["zero"] for cell in drawn} == {"M108.00 0V26"}       # DPO


def test_real_preferences_draw_the_accuracy(tmp_path):
    """No rewards: accuracy 0.75 - 0.125 = 0.625 (pixel 12) to 0.875 (pixel 268), point at 140."""
    page = make_page(tmp_path, make_results([make_row("sft", None), make_row("dpo", None)]))
    expected = 2 * ["", "0.750 \u00b1 0.125", "3.50", "12.2"]
    assert [cell["text"] for cell in page.cells] == expected
    assert "Drawn: held-out accuracy" in page.text and "true reward" not in page.text
    assert page.cells[0]["cx"] == [140.0] and ("ci", "M12.00 13H268.00") in page.cells[0]["path"]


def test_one_prompt_has_no_interval(tmp_path):
    row = {**make_row("sft", 1.0), "reward_ci": None, "pref_acc_ci": None}
    cells = make_page(tmp_path, make_results([row])).cells
    assert [cell["text"] for cell in cells] == ["", "1.00", "0.750", "3.50", "12.2"]


def test_an_unknown_number_is_not_drawn(tmp_path):
    cells = make_page(tmp_path, make_results([make_row("sft", None), make_row("dpo", 2.0)])).cells
    assert cells[1]["text"] == "-" and (cells[0]["cx"], cells[6 - 1]["cx"]) == ([], [140.0])


def test_several_seeds(tmp_path):
    """sft 1 and 2, dpo 2 and 5: means 1.5 and 3.5.

    From 1 (pixel 12) to 5 (pixel 268) 64 pixels for 1, so means at 44 and 172.
    """
    rows = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0),
            make_row("sft", 2.0, -3.0, seed=1), make_row("dpo", 5.0, seed=1)]
    page = make_page(tmp_path, make_results(rows))
    sft, dpo = page.cells[:6], page.cells[6:]
    assert [cell["text"] for cell in sft[1:3]] == ["1.50 (1.00 to 2.00)", "-2.00 (-3.00 to -1.00)"]
    assert sft[1]["title"] == "seed 0: 1.00 \u00b1 0.50\nseed 1: 2.00 \u00b1 0.50"
    assert dpo[1]["title"] == "seed 0: 2.00 \u00b1 0.50\nseed 1: 5.00 \u00b1 0.50"
    assert (sft[0]["cx"], dpo[0]["cx"]) == ([12.0, 76.0], [76.0, 268.0])
    assert ("mean", "M44.00 3V23") in sft[0]["path"] and ("mean", "M172.00 3V23") in dpo[0]["path"]
    assert "seed 0, 1" in page.text and "a point for each seed" in page.text


# --- the curves ---------------------------------------------------------------------------------

def make_log():
    logps = dict(zip(report.LOGPS, (-10.0, -14.0, -11.0, -12.0)))
    log = [{"seed": 0, "stage": "student-sft", "step": step, "loss": 8.0 / step}
           for step in (1, 2, 4)]
    log += [{"seed": 0, "stage": "kd", "step": step, "loss": 1.0, "val_kl": 2.0,
             "val_reward": None} for step in (1, 2)]
    for seed in (0, 1):
        log += [{"seed": seed, "stage": "dpo", "step": step, "loss": 0.5, "margin": float(step),
                 **logps} for step in (1, 5, 10)]
        log[-1].update(val_kl=1.0, val_reward=0.5)
    return log


def test_curves(tmp_path):
    """Three kinds of loss, a named line for each stage; None is no point; val_ has fewer steps."""
    figures = make_page(tmp_path, log=make_log()).figures
    assert [figure["text"].split()[0] for figure in figures] == [
        *3 * ["loss"], "margin", *report.LOGPS, "val_kl", "val_reward"]
    assert [[len(line) for line in figure["lines"]] for figure in figures] == [
        [3], [2], *6 * [[3]], [2, 1], [1]]
    assert [figure["names"] for figure in figures] == [
        ["student-sft"], ["kd"], *6 * [["dpo"]], ["kd", "dpo"], ["dpo"]]


def test_curve_heights(tmp_path):
    """Loss 8, 4, 2 at steps 1, 2, 4: 50 pixels a step from 40, 27 for 1 from 172 up to 10."""
    figure = make_page(tmp_path, log=make_log()).figures[0]
    assert figure["lines"] == [[(90.0, 10.0), (140.0, 118.0), (240.0, 172.0)]]


def test_curves_are_means_over_seeds(tmp_path):
    """dpo's margin is 1, 5, 10 and 1, 9, 10: means 1 (pixel 172), 7, 10 (pixel 10), 18 for 1."""
    log = [line for line in make_log() if "margin" in line]
    log[4]["margin"] = 9.0
    lines = make_page(tmp_path, log=log).figures[1]["lines"]
    assert lines == [[(60.0, 172.0), (140.0, 64.0), (240.0, 10.0)]]


def test_log_probs_share_a_scale(tmp_path):
    """-10 is the highest (pixel 10), -14 the lowest (172); -11 and -12 lie 40.5 and 81 below."""
    figures = make_page(tmp_path, log=make_log()).figures[4:8]
    heights = [{y for line in figure["lines"] for _, y in line} for figure in figures]
    assert heights == [{10.0}, {172.0}, {50.5}, {91.0}]


@pytest.mark.parametrize("low, high, expected", [
    (0, 60, [0, 20, 40, 60]), (0, 94, [0, 20, 40, 60, 80]), (-1.2, 0.3, [-1, -0.5, 0]),
    (3, 3.1, [3, 3.05, 3.1])])
def test_ticks(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


def test_names_do_not_overlap():
    assert report.spread([5, 6, 38], 10, 40) == [5, 15, 38]
    assert report.spread([30, 39, 40], 10, 40) == [20, 30, 40]


# --- the panel ----------------------------------------------------------------------------------

VALUES = {"implicit": (([0.0, 0.7, -0.4, 1.1, 2.0], [0.0, -0.3, -1.2]),     # chosen, rejected
                       ([0.0, 0.2, 0.1], [0.0, 0.5, 0.9, 0.8])),
          "logits": (([10.0, 12.0, 9.0, 11.5], [10.0, 13.0, 8.0]),
                     ([20.0, 21.0], [20.0, 18.0, 22.0]))}
MARGINS = (0.6, -1.4)                                                       # of beta = 2
HASHES = {          # address -> alpha, beta, gamma, terminal, value, the pair picked
    "#alpha=3&terminal=zero": (3.0, 2.0, 1.0, "zero", "implicit", 0),
    "#alpha=1.25&beta=0.5&gamma=.9&value=logits&pair=2": (1.25, 0.5, 0.9, "hold", "logits", 1),
    "#alpha=x&beta=&terminal=none&pair=9&value=%3C": (0.5, 2.0, 1.0, "value", "implicit", 0)}


def make_panel_results():
    """Two pairs each under implicit/value and logits/hold, with margins and true rewards."""
    results = make_results(pairs=[])
    results["scatter"] = []
    for value, terminal in (("implicit", "value"), ("logits", "hold")):
        for responses, margin in zip(VALUES[value], MARGINS):
            made = [(["t"] * (len(V) - 1), [0.0] * (len(V) - 1), V) for V in responses]
            results["pairs"].append(make_pair(*made, value, terminal))
            chosen, rejected = map(landmarks, responses)
            results["scatter"].append({"seed": 0, "value": value, "chosen": chosen,
                                       "rejected": rejected, "margin": margin, "reward_gap": -1.0})
    results["scatter"].append({"seed": 0, "value": "implicit", "chosen": 4 * [0.0],     # not below
                               "rejected": 4 * [0.0], "margin": -5.0, "reward_gap": 3.0})
    return results


def expected_numbers(V_chosen, V_rejected, margin, alpha, beta, gamma, terminal):
    """The eight numbers of a row of the panel, by tvkd.py."""
    sums = []
    for V in (V_chosen, V_rejected):
        V = torch.tensor([V], dtype=torch.double)
        sums.append(tvkd.shaping(V, torch.ones(1, V.shape[1] - 1), gamma, terminal).sum(-1))
    zero, numbers = torch.zeros(1, dtype=torch.double), []
    logratio = torch.tensor([margin / 2.0], dtype=torch.double, requires_grad=True)
    dpo = tvkd.dpo_loss(logratio, zero, zero, zero, beta)
    tvkd_ = tvkd.tvkd_loss(logratio, zero, zero, zero, *sums, beta, alpha)
    weights = [-torch.autograd.grad(loss.sum(), logratio)[0] / beta for loss in (dpo, tvkd_)]
    margins = [beta * logratio, beta * logratio - alpha * (sums[0] - sums[1])]
    of_dpo, of_tvkd = zip(margins, (dpo, tvkd_), weights)
    return [x.item() for x in (*of_tvkd, *of_dpo, *sums)]


class Panel(HTMLParser):
    """What the browser made of the panel: rows of numbers, bars, points of both pictures."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.bars, self.picked, self.points, self.inside = [], [], [], [], False
        self.hidden, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form":
            self.inside = True
        if "hidden" in attributes:
            self.hidden.append(tag)
        if self.inside and tag == "tr" and "class" in attributes:
            self.rows.append([])
            self.bars.append([])
            self.picked.append(attributes["class"] == "picked")
        elif self.inside and tag == "td" and "title" in attributes:
            self.rows[-1].append(float(attributes["title"]))
        elif self.inside and tag == "rect":
            self.bars[-1].append(float(attributes["width"]))
        elif self.inside and tag == "figure":
            self.points.append([])
        elif self.inside and tag == "circle":
            self.points[-1].append([float(attributes[k]) for k in ("cx", "cy", "fill-opacity")])

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "form"


def browse(tmp_path, address):
    """The page as a browser without network and window sees it, JavaScript run."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium found: the panel was NOT driven in a browser")
    environment = {**os.environ, "HOME": str(tmp_path)}     # where it may keep files
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-sync",
               f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", address]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("address", HASHES)
def test_panel_in_a_browser(tmp_path, address):
    """Every number of the panel equals tvkd.py's, in the settings that the address asks for."""
    alpha, beta, gamma, terminal, value, picked = HASHES[address]
    page = tmp_path / "report.html"
    report.write_report(make_panel_results(), [], page)
    source = browse(tmp_path, page.as_uri() + address)
    panel = Panel(source)
    expected = [expected_numbers(*responses, margin, alpha, beta, gamma, terminal)
                for responses, margin in zip(VALUES[value], MARGINS)]
    mean = [sum(numbers) / len(expected) for numbers in zip(*expected)]
    assert len(panel.rows) == len(expected) + 1 and "form" not in panel.hidden
    for row, numbers in zip(panel.rows, [mean, *expected]):
        assert row == pytest.approx(numbers, abs=1e-9)
    for row, bars in zip(panel.rows, panel.bars):
        assert bars == pytest.approx([100 * row[2], 100 * row[5]])
    assert panel.picked == [False, *(i == picked for i in range(len(expected)))]
    if terminal == "zero":                                  # the lemma: TVKD is DPO
        assert all(row[:3] == pytest.approx(row[3:6]) for row in panel.rows)

    # The pictures. Their axes reach to a power of two: pixels -> numbers needs no more than that.
    first, second = panel.points
    more = [[-5 * beta / 2, 3.0]] if value == "implicit" else []        # the pair not shown below
    xy = [[n[6] - n[7], n[3], -1.0] for n in expected] + [[0.0, *point] for point in more]
    shades = [n[2] for n in expected] + [1 / (1 + math.exp(y)) for y, _ in more]
    reach = max(1, *(abs(size) for x, y, _ in xy for size in (alpha * x, y)))
    reach = next(2.0 ** k for k in range(20) if 2.0 ** k >= reach)
    assert len(first) == len(second) == len(xy) + 1                     # and the ring
    for point, (x, y, _), shade in zip(first, xy, shades):
        assert point == pytest.approx([150 + 130 * alpha * x / reach, 110 - 95 * y / reach, shade],
                                      abs=0.006)
    assert first[-1] == pytest.approx(first[picked], abs=1e-9)
    across = next(2.0 ** k for k in range(20) if 2.0 ** k >= max(1, *(abs(x) for x, *_ in xy)))
    up = 4 if more else 1
    for point, (x, _, gap) in zip(second, xy):
        assert point[:2] == pytest.approx([150 + 130 * x / across, 110 - 95 * gap / up], abs=0.006)
    axes = [f'<text x="20" y="122">{-end:g}</text>' for end in (reach, across)]
    assert all(axis in source for axis in axes)             # at least from -1 to 1
    assert panel.text.count(f"{len(xy)} held-out pairs") == 2
    assert f"mean of\u00a0these\u00a0{len(expected)}" in panel.text


def test_panel_is_hidden_until_the_script_ran(tmp_path):
    page = make_page(tmp_path, make_panel_results())
    form, = [attributes for tag, attributes in page.tags if tag == "form"]
    assert "hidden" in form
    assert "<form" not in make_page(tmp_path).source                        # no scatter
    assert "<form" not in make_page(tmp_path, make_results(pairs=[])).source


def test_landmarks_by_hand():
    """Values 1, 2, 4, 8: 1, 2 + 4 between, 4 before EOS, 8. EOS alone: 1, 0, 1, 8."""
    assert landmarks([1.0, 2.0, 4.0, 8.0]) == [1.0, 6.0, 4.0, 8.0]
    assert landmarks([1.0, 8.0]) == [1.0, 0.0, 1.0, 8.0]


# --- the page -----------------------------------------------------------------------------------

def test_settings(tmp_path):
    expected = "alpha = 0.5, beta = 2 (the teacher's: 1), gamma = 1, seed 0, data: the toy task"
    assert expected in make_page(tmp_path).text


def test_nothing_on_the_network(tmp_path):
    page = make_page(tmp_path, make_panel_results(), make_log())
    source, policies = re.subn(r"<meta http-equiv[^>]*default-src 'none'[^>]*>", "", page.source)
    assert policies == 1
    assert not re.search(r"https?:|//|url\(|@import|\bsrc\b|\bhref\b|<link", source)
    assert not re.search(r"fetch|XMLHttp|WebSocket|sendBeacon|import\(|eval", source)
    assert {tag for tag, _ in page.tags} <= TAGS


def test_every_tag_is_closed(tmp_path):
    page = make_page(tmp_path, make_panel_results(), make_log())
    source = re.sub("<script>.*</script>", "", page.source, flags=re.DOTALL)
    for tag in TAGS - {"html", "meta", "script", "br", "path", "polyline", "circle", "input"}:
        assert len(re.findall(rf"<{tag}[ >]", source)) == source.count(f"</{tag}>"), tag


def test_without_pairs_and_log(tmp_path):
    page = make_page(tmp_path, make_results(pairs=[]))
    assert "No pairs" in page.text and "The log is empty" in page.text
    assert not page.tokens and not page.figures


def test_command(tmp_path, capsys):
    write_run(tmp_path, make_results(), make_log())
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert len(Page((tmp_path / "report.html").read_text(encoding="utf-8")).figures) == 10


@pytest.mark.parametrize("results", [None, "{", "[]", "{}", "[" * 100_000, "1" * 5000,
                                     json.dumps({"config": {}, "rows": [], "pairs": []})])
def test_bad_folder(tmp_path, capsys, results):
    if results is not None:
        write_run(tmp_path, results)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("harness.report: expected a folder with results.json")
    assert error.count("\n") == 1 and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["no\nsuch\x1b[31mfolder"]])
def test_one_argument(capsys, argv):
    assert report.main(argv) == 2
    error = capsys.readouterr().err
    assert "expected a folder" in error and error.rstrip("\n").isprintable()


def places(value, path=()):
    """The path of every place in a JSON value, containers too."""
    yield path
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    result = copy.copy(value)
    result[path[0]] = replaced(value[path[0]], path[1:], new)
    return result


WRONG = (None, ATTACK, [], {}, -1, float("nan"), 1e308, 1e-320)


@pytest.mark.slow
def test_results_of_unknown_origin(tmp_path, capsys):
    """Something else at any one place: a page without foreign tags, or one line and exit code 2."""
    results, log = make_panel_results(), [make_log()[0], make_log()[-1]]
    results["pairs"], results["rows"] = results["pairs"][1:2], results["rows"][1:]
    results["pairs"][0]["chosen"]["kinds"] = ["right", ""]
    results["scatter"] = results["scatter"][:1]
    run, ends = {"results": results, "log": log}, {0: 0, 2: 0}
    for path in places(run):
        for wrong in WRONG if path[:1] in (("results",), ("log",)) and len(path) > 1 else ():
            attacked = replaced(run, path, wrong)
            write_run(tmp_path, attacked["results"], attacked["log"])
            end = report.main([str(tmp_path)])
            error, ends[end] = capsys.readouterr().err, ends[end] + 1
            if end == 2:
                assert error.count("\n") == 1 and error[:-1].isprintable(), (path, wrong)
                continue
            page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
            assert page.source.count("<script") == page.source.count("<form") < 2, path
            assert {tag for tag, _ in page.tags} <= TAGS, (path, wrong)
    assert min(ends.values()) > 100, ends


@pytest.mark.parametrize("path, wrong, message", [
    (("rows",), [], "results.json.rows: expected at least one row with a number, got []"),
    (("rows", 0, "seed"), "<b>", "results.json.rows[0].seed: expected a finite whole number"),
    (("rows", 1, "pref_n"), "<b>", "results.json.rows[1].pref_n: expected a finite whole number"),
    (("rows", 0, "reward"), float("inf"), "results.json.rows[0].reward: expected a finite number"),
    (("pairs", 0, "chosen", "values"), [1.0], "results.json.pairs[0].chosen: expected n tokens"),
    (("pairs", 0, "terminal"), "end", "results.json.pairs[0].terminal: expected one of ('value', "),
    (("pairs", 0, "chosen", "kinds"), ["good"] * 7, "pairs[0].chosen.kinds[0]: expected one of"),
    (("config", "beta"), 0, "results.json.config.beta: expected a number above 0, got 0")])
def test_a_wrong_number_is_named(tmp_path, capsys, path, wrong, message):
    results = copy.deepcopy(make_results())
    results["pairs"][0]["chosen"]["kinds"] = [""] * 7
    write_run(tmp_path, replaced(results, path, wrong))
    assert report.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_line_of_the_log_is_named(tmp_path, capsys):
    write_run(tmp_path, make_results(), [*make_log()[:2], {"stage": "dpo", "step": "3"}])
    assert report.main([str(tmp_path)]) == 2
    assert "log.jsonl:3.step: expected a finite whole number, got '3'" in capsys.readouterr().err


def test_no_room_names_the_file(tmp_path, monkeypatch):
    def no_room(path, target):                              # after the content was written
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="No space left.*report.html"):
        report.write_report(make_results(), [], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [report, table])
def test_needs_no_library(module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imported) <= {*sys.stdlib_module_names, "harness"}
