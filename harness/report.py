"""One HTML page of a run: held-out pairs token by token, and the table.

It loads nothing and runs nothing. All texts may come from anybody, so all are escaped.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

from harness.errors import printable
from harness.numbers import cells, footnote

SIDES = ("chosen", "rejected")


def scale(low, high, start, end):
    """The linear map that takes low to start and high to end."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def response_html(name, side, largest, height):
    """Every token tinted (|psi| = largest in full), above its piece of the line (Phi -> height)."""
    spans, start = [], side["phi"][0]
    for token, psi, kind, (before, after) in zip(side["tokens"], side["psi"], side["kinds"],
                                                 pairwise(side["phi"])):
        title = f"{token!r} {kind}\npsi {psi:+.4f}\nPhi {before:.4f}, then {after:.4f}"
        spans.append(
            f'<span class="token {kind}" tabindex="0" title="{escape(title)}"><span '
            f'class="{"more" if psi > 0 else "less"}" style="--a:{0.75 * abs(psi) / largest:.3f}">'
            f'{escape(printable(token.replace(chr(10), chr(0x21b5))))}</span>'
            f'<svg viewBox="0 0 1 36" preserveAspectRatio="none">'
            f'<path d="M0 {height(0):.2f}H1"/><polyline points="0,'
            f'{height(before - start):.2f} 1,{height(after - start):.2f}"/></svg></span>')
    reward = f", true reward {side['reward']:+.1f}" if "reward" in side else ""
    return (f"<div><h4>{name} <small>sum of psi {sum(side['psi']):+.3f}{reward}</small></h4>"
            f"<p>{''.join(spans)}</p></div>")


def pairs_html(pairs):
    """The pairs under one kind of value: a legend, then chosen and rejected side by side."""
    sides = [pair[name] for pair in pairs for name in SIDES]
    largest = max(abs(psi) for side in sides for psi in side["psi"]) or 1.0
    moved = [phi - side["phi"][0] for side in sides for phi in side["phi"]]
    height = scale(min(moved), max(moved), 34, 2)   # 0, the start of every line, lies between them
    marks = "" if "reward" not in sides[0] else " Marked by the true reward: " + ", ".join(
        f'<span class="{kind}"><span>{kind}</span></span>'
        for kind in ("right", "wrong", "polite", "rude"))
    parts = [
        f"<h3>{escape(printable(pairs[0]['value']))}/{pairs[0]['terminal']}</h3>"
        f'<p>Full colour: psi = <span class="less" style="--a:.75">{-largest:.2f}</span> or <span '
        f'class="more" style="--a:.75">{largest:+.2f}</span>. Line: from {min(moved):.2f} to '
        f"{max(moved):+.2f}; dashes: 0.{marks}</p>"]
    for number, pair in enumerate(pairs, 1):
        difference = sum(pair["chosen"]["psi"]) - sum(pair["rejected"]["psi"])
        parts.append(
            f'<article><p class="prompt"><b>{number}.</b> {escape(pair["prompt"])}</p><div class='
            f'"sides">{"".join(response_html(x, pair[x], largest, height) for x in SIDES)}</div>'
            f'<p class="sum">sum of psi, chosen - rejected: <b>{difference:+.3f}</b></p></article>')
    return "".join(parts)


def page(config, rows, shown):
    """The page as text. rows: of the table; shown: what `psi_of_pairs` gave for each value."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    options = " ".join(f"--{name}={printable(x)}" for name, x in vars(config).items())
    shown = [pairs for pairs in shown if pairs[0]["seed"] == rows[0]["seed"]]   # of the first seed
    pairs = "".join(map(pairs_html, shown)) or "<p>None: no method read every state's value.</p>"
    table = "".join(f"<tr><td>{'</td><td>'.join(map(escape, line))}</td></tr>"
                    for line in cells(rows))
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; form-action 'none'; base-uri 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TVKD: what the teacher values</title><style>{css}</style>
<h1>TVKD: what the teacher values</h1>
<details><summary>The options of this run</summary>{escape(options)}</details>
<p>psi_t = gamma Phi(s_t+1) - Phi(s_t). Phi is V, the teacher's value of the text so far, except
perhaps in the last state. <span class="more" style="--a:.5">Blue</span>: after this token the
teacher values the answer more; <span class="less" style="--a:.5">orange</span>: less. The line
below is Phi, counted from the end of the prompt; with gamma = 1 its step across a token is that
token's psi. Of all this TVKD reads one number per pair, the difference of the two sums: its loss is
-log sigmoid(the student's margin - alpha times that difference). Hover over a token, or tap it.</p>
<h2>Held-out pairs of seed {rows[0]["seed"]}</h2>{pairs}
<h2>Comparison</h2><div class="wide"><table>{table}</table></div><p>{footnote(rows)}</p></html>
"""
