"""The numbers of the table, and the report page, parsed again and compared with what it was drawn
from."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from data import Pair
from harness import psi, report, table
from harness.evaluate import HeldOut, fill
from harness.numbers import interval, t_quantile
from harness.table import Row

ATTACK = '</script></style>"\'><script>alert(2)</script><img src=x>\x1b[31m\x07\x9b\u202e\u2066\n'
TAGS = set("html meta title style h1 h2 h3 h4 p b small span div article svg path polyline circle "
           "g text table tr th td figure figcaption".split())
TOKENS = ["<b>", ' "', "&amp;", "\n", " ", "\ufffd", "<|endoftext|>"]


def make_side(tokens, psi, phi, **more):
    return {"tokens": tokens, "psi": psi, "phi": phi,
            "kinds": [*[""] * (len(tokens) - 1), "EOS"], **more}


def make_pair(chosen, rejected, value="implicit", terminal="value", seed=0, prompt="p"):
    return {"seed": seed, "prompt": prompt, "value": value, "terminal": terminal,
            "chosen": chosen, "rejected": rejected}


def make_row(method, reward, vs_dpo=None, seed=0, value=None, terminal=None, acc_vs_dpo=None):
    return Row(method, value, terminal, seed, {
        "pref_n": 20, "reward": reward, "reward_ci": None if reward is None else 0.5,
        "vs_dpo": vs_dpo, "vs_dpo_ci": None if vs_dpo is None else 0.25, "pref_acc": 0.75,
        "pref_acc_ci": 0.125, "acc_vs_dpo": acc_vs_dpo, "acc_vs_dpo_ci": 0.0625, "kl": 3.5,
        "length": 12.25})


ROWS = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0),
        make_row("tvkd", 4.0, 2.0, value="implicit", terminal="value")]
PAIR = make_pair(make_side(TOKENS, [1.0, -2.0, -0.5, 0.0, 0.0, 0.0, 3.5],
                           [0.0, 1.0, -1.0, -1.5, -1.5, -1.5, -1.5, 2.0], reward=2.0),
                 {**make_side(["a", "<|endoftext|>"], [0.5, -1.5], [0.0, 0.5, -1.0], reward=-1.5),
                  "kinds": ["wrong", "EOS"]})


class Page(HTMLParser):
    """The parts of a page that tests ask for: tokens, cells of tables, figures, points and rows."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.text, self.into = text, [], "", {}
        self.tokens, self.cells, self.figures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if attributes.get("class", "").startswith("token"):
            self.into = {"text": "", **attributes}
            self.tokens.append(self.into)
        elif "tabindex" in self.into and tag == "span":
            self.into |= {"word": attributes["class"], "tint": float(attributes["style"][4:])}
        elif tag in ("figure", "td"):
            self.into = {"text": "", "lines": [], "paths": [], "points": [], **attributes}
            (self.figures if tag == "figure" else self.cells).append(self.into)
        elif tag == "polyline":
            line = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
            self.into["lines"].append(line) if self.into else self.tokens[-1].update(line=line)
        elif tag == "circle":
            self.into["points"].append([float(attributes.get(key, "nan"))
                                        for key in ("cx", "cy", "fill-opacity")])
        elif tag == "path" and self.into:
            self.into["paths"].append(attributes["d"])

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag in ("figure", "td", "span"):
            self.into = {}

    def handle_data(self, data):
        self.text += data
        if self.into:
            self.into["text"] += data


def make_page(rows=ROWS, shown=((PAIR,),), log=(), **config):
    config = {"data": "", "alpha": 0.5, "beta": 2.0, "teacher_beta": 1.0, "gamma": 1.0, **config}
    return Page(report.page(SimpleNamespace(**config), list(rows), list(shown), list(log)))


@pytest.mark.parametrize("freedom, published", [
    (1, 12.706205), (2, 4.302653), (3, 3.182446), (7, 2.364624), (10, 2.228139), (30, 2.042272),
    (120, 1.979930), (499, 1.964729), (1000, 1.962339)])
def test_t_quantile(freedom, published):
    """So 1, 2, 3, 4, of variance 5/3, have 3.182446 sqrt(5/12); a single number has no interval."""
    assert t_quantile(freedom) == pytest.approx(published, abs=1e-6)
    assert interval([1, 2, 3, 4]) == pytest.approx(2.054260, abs=1e-6) and interval([1]) is None


def test_differences_from_dpo_by_hand():
    """Rewards 2, 3, 4 - 1, 2, 6 = 1, 1, -2 by prompt: mean 0, deviation sqrt(6 / 2) = sqrt(3), so
    t(2) sqrt(3) / sqrt(3) = 4.302653. Accuracy 1, 1, 1/2 - 1, 0, 1/2 = 0, 1, 0 by pair: mean 1/3,
    deviation sqrt(1/3), so t(2) / 3 = 1.434218. Without rewards there is no difference of them."""
    rows = [Row("dpo"), Row("kd")]
    measured = {"dpo": ([1.0, 2.0, 6.0], [1.0, 0.0, 0.5]), "kd": ([2.0, 3.0, 4.0], [1.0, 1.0, 0.5])}
    measured = {name: {"numbers": {"kl": 1.0}, "reward": torch.tensor(rewards),
                       "pref_acc": torch.tensor(accuracy)}
                for name, (rewards, accuracy) in measured.items()}
    fill(rows, measured)
    assert rows[0].numbers == {"kl": 1.0}
    assert rows[1].numbers == pytest.approx({"kl": 1.0, "vs_dpo": 0.0, "vs_dpo_ci": 4.302653,
                                             "acc_vs_dpo": 1 / 3, "acc_vs_dpo_ci": 1.434218})
    fill(rows, {name: {**of_row, "reward": None} for name, of_row in measured.items()})
    assert set(rows[1].numbers) == {"kl", "acc_vs_dpo", "acc_vs_dpo_ci"}


def test_table_by_hand():
    """Rewards 1 and 3 of two seeds: 2 +- 12.706 sqrt(2) / sqrt(2); one seed has its own interval.
    The accuracy is compared with DPO's where nobody knows a reward."""
    rows = [make_row("dpo", 1.0, acc_vs_dpo=0.5), make_row("dpo", 3.0, seed=1)]
    assert "2.00 \u00b1 12.71" in table.table(rows) and "over 2 seeds" in table.table(rows)
    one = table.table(rows[:1])
    assert "1.00 \u00b1 0.50" in one and "n = 20" in one and "+0.500" not in one
    rows = [make_row("dpo", None), make_row("kd", None, acc_vs_dpo=-0.25)]
    heads, dpo, kd, *_ = table.table(rows).splitlines()
    assert heads.split() == "model held-out accuracy minus DPO KL to reference tokens".split()
    assert dpo.split()[4] == "-" and "-0.250 \u00b1 0.062" in kd


def test_psi_in_the_terminal(capsys):
    """psi 2, -1, 0 of a largest 2: tint levels 4 (more), 2 (less), 0; white space gets a sign."""
    side = {"tokens": [" red", "\n", "x\x1b"], "psi": [2.0, -1.0, 0.0]}
    pair = {"value": "implicit", "terminal": "value", "chosen": side, "rejected": side}
    table.show_psi(pair, colour=False, width=80)
    expected = "chosen (sum +1.00):\n  red[+2.00] \u2423[-1.00] x\ufffd[+0.00]\n"
    assert expected in capsys.readouterr().out
    table.show_psi(pair, colour=False, width=14)                # too narrow for two in a line
    assert "\n  red[+2.00]\n  \u2423[-1.00]\n  x\ufffd[+0.00]\n" in capsys.readouterr().out
    table.show_psi(pair, colour=True, width=80, most=2)
    out = capsys.readouterr().out
    assert f"48;5;{table.MORE[3]}mred\033[0m[+2.00]" in out
    assert f"48;5;{table.LESS[1]}m\u2423" in out and out.count("... and 1 more") == 2


@pytest.mark.parametrize("terminal, last, total", [("value", 9.0, -1.0), ("hold", 12.0, 2.0),
                                                   ("zero", 0.0, -10.0)])
def test_psi_of_pairs_by_hand(monkeypatch, terminal, last, total):
    """V = 7, 10, 12, 9 of prompt 1 2, response 3 EOS: s_p has 10, and psi = 12 - 10 and Phi(s_end)
    - 12, with Phi(s_end) 9, 12 or 0. V = 7, 10, 4 of the other response, EOS alone."""
    monkeypatch.setattr(psi, "state_values", lambda *args: [
        torch.tensor(V) for V in ([7.0, 10.0, 12.0, 9.0], [7.0, 10.0, 4.0])
        if args[:3] == ("new", "teacher", "teacher_ref") and args[4] == 2.0])
    monkeypatch.setattr(psi, "text_of", lambda ids, tokenizer: tokenizer[ids[0]])
    held_out = HeldOut([Pair([1, 2], [3, 0], [0])], [Pair("the cat: red", " red", "")],
                       {3: " red", 0: "<EOS>"}, True, 1, 8, 4, seed=5)
    shown, = psi.psi_of_pairs("new", terminal, 1.0, "teacher", "teacher_ref", 2.0, held_out)
    chosen, rejected = shown.pop("chosen"), shown.pop("rejected")
    assert shown == {"seed": 5, "value": "new", "terminal": terminal, "prompt": "the cat: red"}
    assert chosen == {"tokens": [" red", "<EOS>"], "kinds": ["right", "EOS"], "reward": 0.0,
                      "phi": [10.0, 12.0, last], "psi": [2.0, last - 12.0]}   # red - no thing = 0
    assert sum(chosen["psi"]) == total and rejected["tokens"] == ["<EOS>"]
    assert rejected["phi"][0] == 10.0


def test_token_kinds_by_hand():
    tokens = [" Of", " course!", " The", " cat", " is", " red", " and", " bi", "g", ".", " Now go",
              " away.", "<EOS>"]
    assert psi.token_kinds("the cat: red", "".join(tokens[:-1]), tokens) == [
        *2 * ["polite"], "", "right", "", "right", *4 * [""], *2 * ["rude"], ""]


def test_every_token_has_its_numbers():
    """In the hover text, which a tap shows too. Tint: the largest |psi|, 3.5, gets 0.75 of the
    colour, so psi = -2 gets 0.75 * 2 / 3.5 = 0.429. The line: Phi - Phi(s_p) goes from -1.5
    (pixel 34) to 2 (pixel 2), so 0 -> 34 - 32 * 1.5 / 3.5 = 20.29, 1 -> 11.14, -1 -> 29.43."""
    page = make_page()
    titles = [f"{token!r}{kind and f' ({kind})'}\npsi {psi:+.4f}\n"
              f"Phi(s_t) {before:.4f}, Phi(s_t+1) {after:.4f}"
              for side in (PAIR["chosen"], PAIR["rejected"]) for token, kind, psi, before, after in
              zip(side["tokens"], side["kinds"], side["psi"], side["phi"], side["phi"][1:])]
    assert [token["title"] for token in page.tokens] == titles
    assert all(token["tabindex"] == "0" for token in page.tokens)
    assert "[tabindex]:focus::after { content: attr(title)" in page.source
    assert [token["class"] for token in page.tokens[5:8]] == ["token ", "token eos", "token wrong"]
    assert [(token["word"], token["tint"]) for token in page.tokens if token["tint"]] == [
        ("more", 0.214), ("less", 0.429), ("less", 0.107), ("more", 0.75), ("more", 0.107),
        ("less", 0.321)]
    heights = [20.29, 11.14, 29.43, 34.0, 34.0, 34.0, 34.0, 2.0]
    assert [token["line"] for token in page.tokens[:7]] == [
        [(0.0, a), (1.0, b)] for a, b in zip(heights, heights[1:])]
    assert page.tokens[7]["line"] == [(0.0, 20.29), (1.0, 15.71)]
    assert page.source.count('d="M0 20.29H1"') == 9
    assert "Full colour: psi = -3.50 or +3.50. Line: from -1.50 to +2.00" in page.text
    assert "chosen sum of psi +2.000, true reward +2.0" in page.text
    assert "rejected sum of psi -1.000, true reward -1.5" in page.text
    assert "chosen - rejected: +3.000" in page.text and "Marked by the true reward" in page.text


def test_hostile_texts_come_out_as_text():
    pair = {**PAIR, "prompt": ATTACK, "value": "<i>"}
    page = make_page([make_row(f"<b>{ATTACK}", 1.0)], [[pair]], data=f"<b>&{ATTACK}",
                     log=[{"stage": ATTACK, "step": 1, "loss": 1.0}])
    assert [token["text"] for token in page.tokens[:7]] == [*TOKENS[:3], "\u21b5", *TOKENS[4:]]
    assert ATTACK in page.text and "data: <b>&</script>" in page.text and "<i>/value" in page.text
    assert "<script" not in page.source and {tag for tag, _ in page.tags} <= TAGS


def test_which_pairs_are_shown():
    """Those of the first seed, once for each value, with the sum that its terminal gives."""
    other = make_pair(make_side(["b"], [1.0], [0.0, 1.0]), make_side(["c"], [1.0], [0.0, 1.0]),
                      "largest logit", "hold")
    page = make_page(shown=[[PAIR], [other], [{**PAIR, "prompt": "a second row"}]])
    assert len(page.tokens) == 9 + 2 and "a second row" not in page.text
    assert f"implicit/valueWith gamma = 1, the sum of psi is {report.SUM['value']}" in page.text
    assert f"largest logit/holdWith gamma = 1, the sum of psi is {report.SUM['hold']}" in page.text
    assert page.text.count("Marked by the true reward") == 1        # unknown for the other one
    page = make_page(shown=[])
    assert "No pairs: no method of this run read the teacher's value of every state" in page.text
    assert not page.tokens


def test_every_row_is_drawn_on_one_axis():
    """From 1 - 0.5 (pixel 12) to 4 + 0.5 (pixel 268), 64 pixels for 1: points at 44, 108 and 236,
    and 32 pixels to both sides."""
    cells = make_page().cells
    rest = ["0.750 \u00b1 0.125", "3.50", "12.2"]
    assert [cell["text"] for cell in cells] == [
        "", "1.00 \u00b1 0.50", "-1.00 \u00b1 0.25", *rest, "", "2.00 \u00b1 0.50", "-", *rest,
        "", "4.00 \u00b1 0.50", "+2.00 \u00b1 0.25", *rest]
    assert [{x for x, _, _ in cell["points"]} for cell in cells[::6]] == [{44.0}, {108.0}, {236.0}]
    assert [cell["paths"] for cell in cells[::6]] == [["M108.00 0V26", ends] for ends in (
        "M12.00 13H76.00", "M76.00 13H140.00", "M204.00 13H268.00")]


def test_several_seeds_and_real_preferences():
    """dpo 2 and 5: mean 3.5 +- 12.706205 * 1.5 = 19.06, from -15.56 to 22.56: 256 / 38.12 = 6.716
    pixels for 1, so the seeds at 12 + 17.56 * 6.716 = 129.93 and 150.07, the mean at 140. Without
    rewards the accuracy is drawn, from 0.75 - 0.125 (pixel 12) to 0.875 (pixel 268)."""
    page = make_page([make_row("dpo", 2.0), make_row("dpo", 5.0, seed=1)])
    assert page.cells[1]["text"] == "3.50 \u00b1 19.06" and "seed 0, 1" in page.text
    assert [x for x, _, _ in page.cells[0]["points"]] == [129.93, 150.07, 140.0]
    assert "M12.00 13H268.00" in page.cells[0]["paths"] and "over 2 seeds" in page.text
    page = make_page([make_row("dpo", None), make_row("kd", None, acc_vs_dpo=0.5)])
    assert [cell["text"] for cell in page.cells[5:]] == [
        "", "0.750 \u00b1 0.125", "+0.500 \u00b1 0.062", "3.50", "12.2"]
    assert "Drawn: held-out accuracy" in page.text and page.cells[2]["text"] == "-"
    assert page.cells[0]["points"][0][0] == 140.0 and "M12.00 13H268.00" in page.cells[0]["paths"]


def make_log():
    """Two seeds of dpo, whose margin is 1, 5, 10 and 1, 9, 10."""
    log = [{"stage": "student-sft", "step": step, "loss": 8.0 / step} for step in (1, 2, 4)]
    log += [{"stage": "kd", "step": step, "loss": 1.0, "val_kl": 2.0, "val_reward": None}
            for step in (1, 2)]
    log += [{"stage": "dpo", "step": step, "loss": 0.5, "margin": margin, "policy_chosen": -step,
             "ref_chosen": {1: -1, 5: -3, 10: -2}[step], "policy_rejected": -4.0,
             "ref_rejected": -3.0}
            for step, margin in ((1, 1.0), (5, 5.0), (10, 10.0), (1, 1.0), (5, 9.0), (10, 10.0))]
    log[-1].update(val_kl=1.0, val_reward=0.5)
    return log


def test_curves():
    """A chart for each kind of loss, a named line for each stage; None is no point. Loss 8, 4, 2 at
    steps 1, 2, 4: 50 pixels a step from 40, 27 for 1 from 172 up. Margins are means of seeds, 1, 7,
    10: 18 pixels for 1. The log-ratio of chosen is -1 + 1 = 0, -2 and -8: 20.25 for 1."""
    figures = make_page(shown=[], log=make_log()).figures
    assert [figure["text"].startswith(name) for figure, name in zip(figures, report.CHARTS)] == \
        [True] * len(report.CHARTS)
    assert [[len(line) for line in figure["lines"]] for figure in figures] == [
        [3], [2], *4 * [[3]], [2, 1], [1]]
    assert [figures[i]["lines"][0] for i in (0, 3, 4)] == [
        [(90.0, 10.0), (140.0, 118.0), (240.0, 172.0)],
        [(60.0, 172.0), (140.0, 64.0), (240.0, 10.0)],
        [(60.0, 10.0), (140.0, 50.5), (240.0, 172.0)]]
    assert all(name in figures[6]["text"] for name in ("kd", "dpo"))
    assert "DPO's starts at ln 2" in figures[2]["text"]


@pytest.mark.parametrize("low, high, expected", [
    (0, 60, [0, 20, 40, 60]), (0, 94, [0, 20, 40, 60, 80]), (-1.2, 0.3, [-1, -0.5, 0])])
def test_ticks_and_names_that_do_not_overlap(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)
    assert report.spread([5, 6, 38], 10, 40) == [5, 15, 38]
    assert report.spread([30, 39, 40], 10, 40) == [20, 30, 40]


def test_nothing_on_the_network_and_every_tag_closed():
    page = make_page(log=make_log())
    assert "alpha = 0.5, beta = 2 (the teacher's: 1), gamma = 1, seed 0, data: the toy task" \
        in page.text
    source, policies = re.subn(r"<meta http-equiv[^>]*default-src 'none'[^>]*>", "", page.source)
    assert policies == 1 and "script" not in page.source
    assert not re.search(r"https?:|//|url\(|@import|\bsrc\b|\bhref\b|<link", source)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag in TAGS - {"html", "meta", "path", "polyline", "circle"}:
        assert len(re.findall(rf"<{tag}[ >]", source)) == source.count(f"</{tag}>"), tag
