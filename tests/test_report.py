"""The report page, parsed again and checked against the numbers it was made from."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

import report

HOSTILE = ["<script>alert(1)</script>", ' "', "&amp;", "\n", " ", "\ufffd", "<|endoftext|>"]


def make_pair(chosen, rejected, value="implicit", terminal="value", seed=0, prompt="p"):
    """chosen, rejected: (tokens, psi, values)."""
    responses = [dict(zip(("tokens", "psi", "values"), response)) for response in (chosen, rejected)]
    sides = dict(zip(("chosen", "rejected"), responses))
    return {"seed": seed, "prompt": prompt, "value": value, "terminal": terminal, **sides}


def make_row(method, reward, vs_dpo=None, seed=0, value=None, terminal=None, ci=0.5):
    return {"method": method, "value": value, "terminal": terminal, "seed": seed, "pref_n": 20, "reward": reward,
            "reward_ci": None if reward is None else ci, "vs_dpo": vs_dpo, "vs_dpo_ci": None if vs_dpo is None else 0.25,
            "pref_acc": 0.75, "pref_acc_ci": 0.125, "pref_margin": 0.1, "kl": 3.5, "length": 12.25}


ROWS = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0), make_row("tvkd", 4.0, 2.0, value="implicit", terminal="value")]
PAIR = make_pair((HOSTILE, [1.0, -2.0, -0.5, 0.0, 0.0, 0.0, 3.5], [0.0, 1.0, -1.0, -1.5, -1.5, -1.5, -1.5, 2.0]),
                 (["a", "<|endoftext|>"], [0.5, -1.5], [0.0, 0.5, -1.0]))


def make_results(rows=ROWS, pairs=(PAIR,), **config):
    config = {"data": "", "alpha": 0.5, "beta": 2.0, "teacher_beta": 1.0, "gamma": 1.0, **config}
    return {"config": config, "rows": list(rows), "pairs": list(pairs), "made": {}}


class Page(HTMLParser):
    """What the tests ask for. tokens: hover text, text, tint and line of each; figures: text and lines of each chart."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.text, self.tokens, self.cells, self.figures = text, [], "", [], [], []
        self.into = None                                        # where text goes, besides self.text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("class", "").startswith("token"):
            self.tokens.append({"title": attributes["title"], "text": "", "eos": "eos" in attributes["class"]})
        elif "--a" in attributes.get("style", "") and self.tokens:
            self.tokens[-1].update(word=attributes["class"], tint=float(attributes["style"][4:]))
            self.into = self.tokens[-1]
        elif tag == "figure":
            self.figures.append({"text": "", "names": [], "lines": []})
            self.into = self.figures[-1]
        elif tag == "td":
            self.cells.append({"text": "", "title": attributes.get("title", ""), "cx": [], "path": []})
            self.into = self.cells[-1]
        elif tag == "polyline":
            line = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
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
        if tag in ("figure", "td") or tag == "span":
            self.into = None

    def handle_data(self, data):
        self.text += data
        if self.into is not None:
            self.into["text"] += data
            if data in ("student-sft", "kd", "dpo"):
                self.into["names"].append(data)


def make_page(tmp_path, results=None, log=()):
    report.write_report(results or make_results(), list(log), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]                        # no temporary file stays
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


# --- pairs -----------------------------------------------------------------------------------------------------------------

def test_hover_has_the_numbers_of_every_token(tmp_path):
    page = make_page(tmp_path)
    responses = [PAIR["chosen"], PAIR["rejected"]]
    expected = [(repr(token), f"{psi:+.4f}", f"V(s_t) {v:.4f}", f"V(s_t+1) {after:.4f}") for r in responses
                for token, psi, v, after in zip(r["tokens"], r["psi"], r["values"], r["values"][1:])]
    assert len(page.tokens) == len(expected) == 9
    for token, parts in zip(page.tokens, expected):
        assert all(part in token["title"] for part in parts)
    words = [token["title"].split(": ")[1].split("\n")[0] for token in page.tokens[:4]]
    assert words == ["worth more", "worth less", "worth less", "worth the same"]
    assert [i for i, token in enumerate(page.tokens) if token["eos"]] == [6, 8]


def test_hostile_tokens_come_out_as_text(tmp_path):
    prompt = '</p><script>alert(2)</script> & "'
    page = make_page(tmp_path, make_results(pairs=[{**PAIR, "prompt": prompt}], data="<b>&"))
    assert [token["text"] for token in page.tokens[:7]] == [*HOSTILE[:3], "\u21b5", "\u2423", *HOSTILE[5:]]
    assert prompt in page.text and "data: <b>&." in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert ("br", {}) in page.tags                                                              # after the newline token


def test_half_a_character_is_written(tmp_path):
    response = (["\ud800"], [1.0], [0.0, 1.0])
    page = make_page(tmp_path, make_results(pairs=[make_pair(response, response, prompt="p\ud800")]))
    assert page.tokens[0]["text"] == "\ufffd" and "1. p?" in page.text


def test_tint_is_linear_in_psi(tmp_path):
    """The largest |psi| of the two responses is 3.5; it gets 0.75 of the full colour, so psi = -2 gets 0.75 * 2 / 3.5 = 0.429."""
    page = make_page(tmp_path)
    assert [(token["word"], token["tint"]) for token in page.tokens] == [
        ("more", 0.214), ("less", 0.429), ("less", 0.107), *[("same", 0.0)] * 3, ("more", 0.75), ("more", 0.107), ("less", 0.321)]
    assert "psi: less -3.50  +3.50 more. Line: from -1.50 to +2.00" in page.text


def test_line_runs_through_the_values(tmp_path):
    """V - V(s_p) goes from -1.5 (pixel 34) to 2 (pixel 2): 34 - 32 * (V + 1.5) / 3.5, so 0 -> 20.29, 1 -> 11.14, -1 -> 29.43."""
    page = make_page(tmp_path)
    heights = [20.29, 11.14, 29.43, 34.0, 34.0, 34.0, 34.0, 2.0]
    assert [token["line"] for token in page.tokens[:7]] == [[(0.0, a), (1.0, b)] for a, b in zip(heights, heights[1:])]
    assert {token["zero"] for token in page.tokens} == {"M0 20.29H1"}
    assert [token["line"] for token in page.tokens[7:]] == [[(0.0, 20.29), (1.0, 15.71)], [(0.0, 15.71), (1.0, 29.43)]]


@pytest.mark.parametrize("terminal, psi, last, total", [("hold", 0.0, 12.0, "+2.000"), ("zero", -12.0, 0.0, "-10.000")])
def test_last_potential(tmp_path, terminal, psi, last, total):
    """Values 10, 12, 9. hold: Phi(s_end) = 12, psi = 2, 0, sum 12 - 10 = 2. zero: Phi(s_end) = 0, psi = 2, -12, sum -10."""
    response = (["a", "<|endoftext|>"], [2.0, psi], [10.0, 12.0, 9.0])
    page = make_page(tmp_path, make_results(pairs=[make_pair(response, response, "logits", terminal)]))
    assert f"V(s_t) 12.0000, V(s_t+1) 9.0000, but taken as {last:.4f}" in page.tokens[1]["title"]
    assert page.text.count(f"sum of psi {total}") == 2 and "chosen - rejected: +0.000" in page.text
    assert report.SUM[terminal] in page.text
    step = report.scale(*((0, 2) if terminal == "hold" else (-10, 2)), 34, 2)
    assert page.tokens[1]["line"] == [(0.0, 2.0), (1.0, round(step(last - 10.0), 2))]


def test_sums_of_a_pair(tmp_path):
    """chosen: 1 - 2 - 0.5 + 3.5 = 2; rejected: 0.5 - 1.5 = -1; difference 3."""
    page = make_page(tmp_path)
    assert "chosen sum of psi +2.000" in page.text and "rejected sum of psi -1.000" in page.text
    assert "chosen - rejected: +3.000" in page.text


def test_gamma_is_explained_where_it_matters(tmp_path):
    assert "with gamma = 0.9 the sum also keeps" in make_page(tmp_path, make_results(gamma=0.9)).text
    assert "the sum also keeps" not in make_page(tmp_path).text


def test_pairs_of_the_first_seed_alone_by_kind(tmp_path):
    other = make_pair((["b"], [1.0], [0.0, 1.0]), (["c"], [1.0], [0.0, 1.0]), "logits", "hold")
    page = make_page(tmp_path, make_results(pairs=[PAIR, other, {**PAIR, "seed": 1}]))
    assert len(page.tokens) == 9 + 2 and "implicit/value" in page.text and "logits/hold" in page.text


# --- the table -------------------------------------------------------------------------------------------------------------

def test_every_number_of_every_row(tmp_path):
    cells = [cell["text"] for cell in make_page(tmp_path).cells]
    rest = ["0.750 \u00b1 0.125", "3.50", "12.2"]
    assert cells == ["", "1.00 \u00b1 0.50", "-1.00 \u00b1 0.25", *rest, "", "2.00 \u00b1 0.50", "-", *rest,
                     "", "4.00 \u00b1 0.50", "+2.00 \u00b1 0.25", *rest]


def test_intervals_on_one_axis(tmp_path):
    """From 1 - 0.5 (pixel 12) to 4 + 0.5 (pixel 268): 64 pixels for 1, so points at 44, 108 and 236, each 32 to both sides."""
    drawn = [cell for cell in make_page(tmp_path).cells if cell["cx"]]
    assert [cell["cx"] for cell in drawn] == [[44.0], [108.0], [236.0]]
    assert [dict(cell["path"])["ci"] for cell in drawn] == ["M12.00 13H76.00", "M76.00 13H140.00", "M204.00 13H268.00"]
    assert {dict(cell["path"])["zero"] for cell in drawn} == {"M108.00 0V26"}                   # DPO


def test_real_preferences_draw_the_accuracy(tmp_path):
    """No rewards: accuracy 0.75 - 0.125 = 0.625 (pixel 12) to 0.875 (pixel 268), the point in the middle, at 140."""
    page = make_page(tmp_path, make_results([make_row("sft", None), make_row("dpo", None)]))
    assert [cell["text"] for cell in page.cells] == 2 * ["", "0.750 \u00b1 0.125", "3.50", "12.2"]
    assert "Drawn: held-out accuracy" in page.text and "true reward" not in page.text
    assert page.cells[0]["cx"] == [140.0] and ("ci", "M12.00 13H268.00") in page.cells[0]["path"]


def test_one_prompt_has_no_interval(tmp_path):
    row = {**make_row("sft", 1.0), "reward_ci": None, "pref_acc_ci": None}
    assert [cell["text"] for cell in make_page(tmp_path, make_results([row])).cells] == ["", "1.00", "0.750", "3.50", "12.2"]


def test_several_seeds(tmp_path):
    """sft 1 and 2, dpo 2 and 5: means 1.5 and 3.5; from 1 (pixel 12) to 5 (pixel 268) 64 pixels for 1: means at 44 and 172."""
    rows = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0), make_row("sft", 2.0, -3.0, seed=1), make_row("dpo", 5.0, seed=1)]
    page = make_page(tmp_path, make_results(rows))
    sft, dpo = page.cells[:6], page.cells[6:]
    assert [cell["text"] for cell in sft[1:3]] == ["1.50 (1.00 to 2.00)", "-2.00 (-3.00 to -1.00)"]
    assert sft[1]["title"] == "seed 0: 1.00 \u00b1 0.50\nseed 1: 2.00 \u00b1 0.50"
    assert dpo[1]["title"] == "seed 0: 2.00 \u00b1 0.50\nseed 1: 5.00 \u00b1 0.50"
    assert (sft[0]["cx"], dpo[0]["cx"]) == ([12.0, 76.0], [76.0, 268.0])
    assert ("mean", "M44.00 3V23") in sft[0]["path"] and ("mean", "M172.00 3V23") in dpo[0]["path"]
    assert "seed 0, 1" in page.text and "a point for each seed" in page.text


# --- the curves ------------------------------------------------------------------------------------------------------------

def make_log():
    logps = {"policy_chosen": -10.0, "policy_rejected": -14.0, "ref_chosen": -11.0, "ref_rejected": -12.0}
    log = [{"seed": 0, "stage": "student-sft", "step": step, "loss": 8.0 / step} for step in (1, 2, 4)]
    log += [{"seed": 0, "stage": "kd", "step": step, "loss": 1.0, "val_kl": 2.0, "val_reward": None} for step in (1, 2)]
    for seed in (0, 1):
        log += [{"seed": seed, "stage": "dpo", "step": step, "loss": 0.5, "margin": float(step), **logps} for step in (1, 5, 10)]
        log[-1].update(val_kl=1.0, val_reward=0.5)
    return log


def test_curves(tmp_path):
    """Three kinds of loss; a line and a name for each stage; None is no point; val_ is logged at fewer steps."""
    figures = make_page(tmp_path, log=make_log()).figures
    assert [figure["text"].split()[0] for figure in figures] == [*3 * ["loss"], "margin", *report.LOGPS, "val_kl", "val_reward"]
    assert [[len(line) for line in figure["lines"]] for figure in figures] == [[3], [2], *6 * [[3]], [2, 1], [1]]
    assert [figure["names"] for figure in figures] == [["student-sft"], ["kd"], *6 * [["dpo"]], ["kd", "dpo"], ["dpo"]]


def test_curve_heights(tmp_path):
    """Loss 8, 4, 2 at steps 1, 2, 4: 50 pixels for a step from 40, 27 for 1 from 172 (loss 2) up to 10 (loss 8)."""
    figure = make_page(tmp_path, log=make_log()).figures[0]
    assert figure["lines"] == [[(90.0, 10.0), (140.0, 118.0), (240.0, 172.0)]]


def test_curves_are_means_over_seeds(tmp_path):
    """dpo's margin is 1, 5, 10 for seed 0 and 1, 9, 10 for seed 1: means 1 (pixel 172), 7, 10 (pixel 10), 18 pixels for 1."""
    log = [line for line in make_log() if "margin" in line]
    log[4]["margin"] = 9.0
    assert make_page(tmp_path, log=log).figures[1]["lines"] == [[(60.0, 172.0), (140.0, 64.0), (240.0, 10.0)]]


def test_log_probs_share_a_scale(tmp_path):
    """-10 is the highest (pixel 10), -14 the lowest (pixel 172) of all four; -11 and -12 lie 40.5 and 81 below the top."""
    heights = [{y for line in figure["lines"] for _, y in line} for figure in make_page(tmp_path, log=make_log()).figures[4:8]]
    assert heights == [{10.0}, {172.0}, {50.5}, {91.0}]


@pytest.mark.parametrize("low, high, expected", [(0, 60, [0, 20, 40, 60]), (0, 94, [0, 20, 40, 60, 80]),
                                                 (-1.2, 0.3, [-1, -0.5, 0]), (3, 3.1, [3, 3.05, 3.1])])
def test_ticks(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


def test_names_do_not_overlap():
    assert report.spread([5, 6, 38], 10, 40) == [5, 15, 38]
    assert report.spread([30, 39, 40], 10, 40) == [20, 30, 40]


# --- the page --------------------------------------------------------------------------------------------------------------

def test_settings(tmp_path):
    assert "alpha = 0.5, beta = 2 (the teacher's: 1), gamma = 1, seed 0, data: the toy task" in make_page(tmp_path).text


def test_nothing_on_the_network(tmp_path):
    page = make_page(tmp_path, log=make_log())
    assert not re.search(r"https?:|//|url\(|@import|\bsrc\b|\bhref\b|<link|<script", page.source)
    known = "html meta title style h1 h2 h3 h4 p b small span br div article svg path polyline circle g text table tr th td"
    assert {tag for tag, _ in page.tags} <= {*known.split(), "figure", "figcaption"}


def test_every_tag_is_closed(tmp_path):
    page = make_page(tmp_path, log=make_log())
    for tag in "span p div article svg g text table tr th td figure figcaption b small h1 h2 h3 h4".split():
        assert len(re.findall(rf"<{tag}[ >]", page.source)) == page.source.count(f"</{tag}>"), tag


def test_without_pairs_and_log(tmp_path):
    page = make_page(tmp_path, make_results(pairs=[]))
    assert "No pairs" in page.text and "The log is empty" in page.text and not page.tokens and not page.figures


def test_command(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(make_results()), encoding="utf-8")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_log()), encoding="utf-8")
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert len(Page((tmp_path / "report.html").read_text(encoding="utf-8")).figures) == 10


@pytest.mark.parametrize("results", [None, "{", "[]", "{}", json.dumps({"config": {}, "rows": [], "pairs": []})])
def test_bad_folder(tmp_path, capsys, results):
    if results is not None:
        (tmp_path / "results.json").write_text(results, encoding="utf-8")
        (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report.py: expected a folder with results.json") and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("argv", [[], ["a", "b"]])
def test_one_argument(capsys, argv):
    assert report.main(argv) == 2 and "expected a folder" in capsys.readouterr().err


def test_needs_no_library():
    source = open(report.__file__, encoding="utf-8").read()
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
