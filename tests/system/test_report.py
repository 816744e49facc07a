"""The numbers of the table, and the report page, parsed again and compared with what it was drawn
from."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from data import Pair
from harness import evaluate, numbers, report
from harness.evaluate import HeldOut, rows_of
from harness.numbers import interval, t_quantile

ATTACK = '</script></style>"\'><script>alert(2)</script><img src=x>\x1b[31m\x07\x9b\u202e\u2066\n'
TAGS = set("html meta title style h1 h2 h3 h4 p b small span div article svg path polyline "
           "table tr td details summary".split())
TOKENS = ["<b>", ' "', "&amp;", "\n", " ", "\ufffd", "<|endoftext|>"]


def make_side(tokens, psi, phi, **more):
    return {"tokens": tokens, "psi": psi, "phi": phi,
            "kinds": [*[""] * (len(tokens) - 1), "EOS"], **more}


def make_row(label, reward, vs_dpo=None, seed=0, acc_vs_dpo=None):
    return {
        "label": label, "seed": seed, "pref_n": 20, "reward": reward,
        "reward_ci": None if reward is None else 0.5,
        "vs_dpo": vs_dpo, "vs_dpo_ci": None if vs_dpo is None else 0.25, "pref_acc": 0.75,
        "pref_acc_ci": 0.125, "acc_vs_dpo": acc_vs_dpo, "acc_vs_dpo_ci": 0.0625, "kl": 3.5,
        "length": 12.25}


ROWS = [make_row("sft", 1.0, -1.0), make_row("dpo", 2.0), make_row("tvkd implicit/value", 4.0, 2.0)]
PAIR = {"seed": 0, "prompt": "p", "value": "implicit", "terminal": "value",
        "chosen": make_side(TOKENS, [1.0, -2.0, -0.5, 0.0, 0.0, 0.0, 3.5],
                            [3.0, 4.0, 2.0, 1.5, 1.5, 1.5, 1.5, 5.0], reward=2.0),
        "rejected": {**make_side(["a", "<|endoftext|>"], [0.5, -1.5], [0.0, 0.5, -1.0],
                                 reward=-1.5), "kinds": ["wrong", "EOS"]}}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.text, self.into = text, set(), "", {}
        self.tokens, self.table = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if attributes.get("class", "").startswith("token"):
            self.into = {"text": "", **attributes}
            self.tokens.append(self.into)
        elif "tabindex" in self.into and tag == "span":
            self.into |= {"word": attributes["class"], "tint": float(attributes["style"][4:])}
        elif tag == "tr":
            self.table.append([])
        elif tag == "polyline":
            line = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
            self.tokens[-1].update(line=line)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag == "span":
            self.into = {}

    def handle_data(self, data):
        self.text += data
        if self.lasttag == "td":
            self.table[-1].append(data)
        if self.into:
            self.into["text"] += data


def make_page(rows=ROWS, shown=((PAIR,),), **config):
    return Page(report.page(SimpleNamespace(**config), list(rows), list(shown)))


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
    measured = {"dpo": ([1.0, 2.0, 6.0], [1.0, 0.0, 0.5]), "kd": ([2.0, 3.0, 4.0], [1.0, 1.0, 0.5])}
    measured = {name: ({"kl": 1.0}, {"reward": torch.tensor(rewards),
                                     "pref_acc": torch.tensor(accuracy)})
                for name, (rewards, accuracy) in measured.items()}
    differences = {"vs_dpo": 0.0, "vs_dpo_ci": 4.302653, "acc_vs_dpo": 1 / 3,
                   "acc_vs_dpo_ci": 1.434218}
    dpo, kd = rows_of(measured, 3)
    assert dpo["kl"] == 1.0 and {*map(dpo.get, differences)} == {None} and kd["seed"] == 3
    assert {name: kd[name] for name in differences} == pytest.approx(differences)
    for _, each in measured.values():
        del each["reward"]
    _, kd = rows_of(measured, 3)
    assert kd["vs_dpo"] is None and kd["acc_vs_dpo"] == pytest.approx(1 / 3)


def test_table_by_hand():
    """Rewards 1 and 3 of two seeds: 2 +- 12.706 sqrt(2) / sqrt(2); one seed has its own interval.
    The accuracy is compared with DPO's where nobody knows a reward."""
    rows = [make_row("dpo", 1.0, acc_vs_dpo=0.5), make_row("dpo", 3.0, seed=1)]
    assert "2.00 \u00b1 12.71" in numbers.table(rows) and "over 2 seeds" in numbers.table(rows)
    one = numbers.table(rows[:1])
    assert "1.00 \u00b1 0.50" in one and "n = 20" in one and "+0.500" not in one
    rows = [make_row("dpo", None), make_row("kd", None, acc_vs_dpo=-0.25)]
    heads, dpo, kd, *_ = numbers.table(rows).splitlines()
    assert heads.split() == "model held-out accuracy minus DPO KL to reference tokens".split()
    assert dpo.split()[4] == "-" and "-0.250 \u00b1 0.062" in kd


def test_psi_in_the_terminal(capsys):
    """White space gets a sign, an escape a mark; lines of 21 characters, then of one token."""
    side = {"tokens": [" red", "\n", "x\x1b"], "psi": [2.0, -1.0, 0.0]}
    pair = {"value": "implicit", "terminal": "value", "chosen": side, "rejected": side}
    numbers.show_psi(pair, width=21)
    expected = "chosen (sum +1.00):\n  red[+2.00] \u2423[-1.00]\n  x\ufffd[+0.00]\n"
    assert expected in capsys.readouterr().out
    numbers.show_psi(pair, width=80, most=2)
    assert capsys.readouterr().out.count("  red[+2.00] \u2423[-1.00] ... and 1 more\n") == 2


@pytest.mark.parametrize("terminal, last", [("value", 9.0), ("hold", 12.0), ("zero", 0.0)])
def test_psi_of_pairs_by_hand(monkeypatch, terminal, last):
    """V = 7, 10, 12, 9 of prompt 1 2, response 3 EOS: s_p has 10, and psi = 12 - 10 and Phi(s_end)
    - 12, with Phi(s_end) 9, 12 or 0. V = 7, 10, 4 of the other response, EOS alone."""
    monkeypatch.setattr(evaluate, "state_values", lambda *args: [
        torch.tensor(V) for V in ([7.0, 10.0, 12.0, 9.0], [7.0, 10.0, 4.0])
        if args[:3] == ("new", "teacher", "teacher_ref") and args[4] == 2.0])
    monkeypatch.setattr(evaluate, "text_of", lambda ids, tokenizer: tokenizer[ids[0]])
    held_out = HeldOut([Pair([1, 2], [3, 0], [0])], [Pair("the cat: red", " red", "")],
                       {3: " red", 0: "<EOS>"}, True, 1, 8, 4, seed=5)
    shown, = evaluate.psi_of_pairs("new", terminal, 1.0, "teacher", "teacher_ref", 2.0, held_out)
    chosen, rejected = shown.pop("chosen"), shown.pop("rejected")
    assert shown == {"seed": 5, "value": "new", "terminal": terminal, "prompt": "the cat: red"}
    assert chosen == {"tokens": [" red", "<EOS>"], "kinds": ["right", "EOS"], "reward": 0.0,
                      "phi": [10.0, 12.0, last], "psi": [2.0, last - 12.0]}   # red - no thing = 0
    assert rejected["tokens"] == ["<EOS>"] and rejected["phi"][0] == 10.0


def test_token_kinds_by_hand():
    tokens = [" Of", " course!", " The", " cat", " is", " red", " and", " bi", "g", ".", " Now go",
              " away.", "<EOS>"]
    assert evaluate.token_kinds("the cat: red", "".join(tokens[:-1]), tokens) == [
        *2 * ["polite"], "", "right", "", "right", "", *2 * ["wrong"], "", *2 * ["rude"], "EOS"]


def test_every_token_has_its_numbers():
    """In the hover text, which a tap shows too. Tint: the largest |psi|, 3.5, gets 0.75 of the
    colour, so psi = -2 gets 0.75 * 2 / 3.5 = 0.429. The line: Phi - Phi(s_p) goes from -1.5
    (pixel 34) to 2 (pixel 2), so 0 -> 34 - 32 * 1.5 / 3.5 = 20.29, 1 -> 11.14, -1 -> 29.43."""
    page = make_page()
    titles = [f"{token!r} {kind}\npsi {psi:+.4f}\nPhi {before:.4f}, then {after:.4f}"
              for side in (PAIR["chosen"], PAIR["rejected"]) for token, kind, psi, before, after in
              zip(side["tokens"], side["kinds"], side["psi"], side["phi"], side["phi"][1:])]
    assert [token["title"] for token in page.tokens] == titles
    assert all(token["tabindex"] == "0" for token in page.tokens)
    assert "[tabindex]:focus::after { content: attr(title)" in page.source
    assert [token["class"] for token in page.tokens[5:8]] == ["token ", "token EOS", "token wrong"]
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
    page = make_page([make_row(f"<b>{ATTACK}", 1.0)], [[pair]], data=f"<b>&{ATTACK}")
    assert [token["text"] for token in page.tokens[:7]] == [*TOKENS[:3], "\u21b5", *TOKENS[4:]]
    assert ATTACK in page.text and "--data=<b>&</script>" in page.text and "<i>/value" in page.text
    assert "<script" not in page.source and page.tags <= TAGS


def test_which_pairs_are_shown():
    """Those of the first seed, under each value."""
    side = make_side(["b"], [1.0], [0.0, 1.0])
    other = {**PAIR, "value": "largest logit", "terminal": "hold", "chosen": side, "rejected": side}
    page = make_page(shown=[[PAIR], [other], [{**PAIR, "prompt": "of another seed", "seed": 1}]])
    assert len(page.tokens) == 9 + 2 and "another seed" not in page.text
    assert "implicit/value" in page.text and "largest logit/hold" in page.text
    assert page.text.count("Marked by the true reward") == 1        # unknown for the other one
    page = make_page(shown=[])
    assert "None: no method read every state's value" in page.text and not page.tokens


def test_the_table_of_the_page():
    """That of the terminal, cell by cell, intervals and footnote too."""
    page, rest = make_page(), ["0.750 \u00b1 0.125", "3.50", "12.2"]
    assert page.table == [
        ["model", "true reward", "minus DPO", "held-out accuracy", "KL to reference", "tokens"],
        ["sft", "1.00 \u00b1 0.50", "-1.00 \u00b1 0.25", *rest],
        ["dpo", "2.00 \u00b1 0.50", "-", *rest],
        ["tvkd implicit/value", "4.00 \u00b1 0.50", "+2.00 \u00b1 0.25", *rest]]
    assert numbers.footnote(ROWS) in page.text


def test_nothing_on_the_network_and_every_tag_closed():
    page = make_page()
    source, policies = re.subn(r"<meta http-equiv[^>]*default-src 'none'[^>]*>", "", page.source)
    assert policies == 1 and "script" not in page.source
    assert not re.search(r"https?:|//|url\(|@import|\bsrc\b|\bhref\b|<link", source)
    assert page.tags <= TAGS
    for tag in TAGS - {"html", "meta", "path", "polyline"}:
        assert len(re.findall(rf"<{tag}[ >]", source)) == source.count(f"</{tag}>"), tag
