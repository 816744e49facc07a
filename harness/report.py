"""One HTML page of a run: held-out pairs token by token, a panel to move, the table, the curves.

    python -m harness.report out      results.json and log.jsonl of train.py -> out/report.html

The page is one file: HTML, CSS, SVG and, for the panel alone, panel.js. It loads nothing. Its
input may come from anybody: its shape is checked first, and all of its text is escaped.
"""

import base64
import hashlib
import json
import math
import os
import statistics
import sys
from html import escape
from pathlib import Path

from harness.table import COLUMNS, Row, by_label, known_columns, printable, summary

SUM = {     # what psi adds up to with gamma = 1, by the potential of the finished response
    "value": "sum of psi = V(s_end) - V(s_p): the teacher's value of the finished answer, "
             "less that of the prompt.",
    "hold": "sum of psi = V(s_end-1) - V(s_p): the finished answer keeps the value it had before "
            "its EOS, whose psi is 0.",
    "zero": "sum of psi = -V(s_p): the finished answer has potential 0. That depends on the prompt "
            "alone, so the two sums differ by 0 up to rounding, and the loss is DPO's."}
SIDES = ("chosen", "rejected")
KINDS = ("right", "wrong", "polite", "rude", "")      # of tokens on the toy task
LOGPS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
CURVES = (                                            # quantity, stages in its chart, what it is
    ("loss", ("fine-tuning",), "-log p, nats per token"),
    ("loss", ("distillation",), "bc: -log p, kd: KL; nats per token"),
    ("loss", ("preference",), "nats per pair; ln 2 = 0.69 at the start of DPO"),
    ("margin", ("preference",), "beta (log-ratio of chosen - of rejected)"),
    *((name, ("preference",), "log p of a response, nats; a shared scale") for name in LOGPS),
    ("val_kl", ("preference", "distillation"), "to the reference, nats per response"),
    ("val_reward", ("preference", "distillation"), "true reward on validation prompts"))
COLOURS = ("#2f81d6", "#c8741a", "#1f9d78", "#c2559a",          # readable on light and on dark
           "#8069d8", "#d9534a", "#84931c", "#8a8a8a")

# ------------------------------------------------------------------------------------------------
# What is read of results.json and log.jsonl. A key that ends in ? may be missing or null; the page
# then has less to show, and without scatter no panel. ["number"]: any number of numbers; a tuple:
# one of these.

LARGEST = 1e100                     # sums and differences of such numbers stay finite
RESPONSE = {"tokens": ["text"], "psi": ["number"],
            "values": ["number"],   # V(s_p) to V(s_end), one more than tokens
            "reward?": "number",    # the true reward of the response
            "kinds?": [KINDS]}      # of each token
RESULTS = {
    "config": {"alpha": "number", "beta": "number", "teacher_beta": "number", "gamma": "number",
               "data": "text"},
    "rows": [{"method": "text", "value?": "text", "terminal?": "text", "seed": "whole number",
              "pref_n": "whole number",
              **{f"{key}{end}": "number" for _, key, _ in COLUMNS for end in ("?", "_ci?")}}],
    "pairs": [{
        "seed": "whole number", "prompt": "text", "value": "text", "terminal": tuple(SUM),
        "chosen": RESPONSE, "rejected": RESPONSE}],
    "scatter?": [{                  # for each kind of value up to 200 pairs, first those above
        "seed": "whole number", "value": "text",
        "chosen": 4 * ["number"], "rejected": 4 * ["number"],   # numbers.landmarks of the values
        "margin": "number",         # beta (log-ratio of chosen - of rejected) of the student
                                    # trained with this seed and value
        "reward_gap?": "number"}]}  # true reward of chosen - of rejected
LINE = {"stage": "text", "step": "whole number", **{f"{key}?": "number" for key, _, _ in CURVES}}


def expect(holds, where, what, got):
    if not holds:
        raise ValueError(f"{where}: expected {what}, got {got!r:.60}")


def check(value, shape, where):
    """Raise ValueError at the first place of value, read from JSON, that is not of this shape."""
    if isinstance(shape, dict):
        expect(isinstance(value, dict), where, "an object", value)
        for key, part in shape.items():
            item = value.get(key.rstrip("?"))
            if item is not None or not key.endswith("?"):
                check(item, part, f"{where}.{key.rstrip('?')}")
    elif isinstance(shape, list):
        expect(isinstance(value, list), where, "a list", value)
        expect(len(shape) in (1, len(value)), where, f"{len(shape)} of these", value)
        for i, item in enumerate(value):
            check(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, tuple):
        expect(value in shape, where, f"one of {shape}", value)
    elif shape == "text":
        expect(isinstance(value, str), where, "a text", value)
    else:
        known = (int,) if shape == "whole number" else (int, float)
        expect(type(value) in known and abs(value) <= LARGEST, where, f"a finite {shape}", value)


def check_results(results, log):
    """Raise ValueError where write_report could not draw these."""
    check(results, RESULTS, "results.json")
    config, rows = results["config"], results["rows"]
    expect(config["beta"] > 0, "results.json.config.beta", "a number above 0", config["beta"])
    expect(rows and known_columns([Row.from_flat(row) for row in rows]), "results.json.rows",
           "at least one row with a number", rows)
    for i, pair in enumerate(results["pairs"]):
        for name in SIDES:
            response, n = pair[name], len(pair[name]["tokens"])
            sizes = [len(response.get(key) or "") for key in ("psi", "values", "kinds")]
            expect(n and sizes[:2] == [n, n + 1] and sizes[2] in (0, n),
                   f"results.json.pairs[{i}].{name}",
                   "n tokens, n psi, n + 1 values and no kinds or n, n > 0", [n, *sizes])
    for i, line in enumerate(log, 1):
        check(line, LINE, f"log.jsonl:{i}")


# ------------------------------------------------------------------------------------------------
# Axes

def scale(low, high, start, end):
    """The linear map that takes low to start and high to end."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def extent(numbers):
    """Lowest and highest of the numbers; the highest raised where they are all the same."""
    low, high = min(numbers), max(numbers)
    size = max(1.0, abs(low), abs(high))
    return low, high if high - low > 1e-6 * size else low + size


def ticks(low, high, most=5):
    """Round numbers from low to high, at most `most` + 1: ticks(0, 60) = [0, 20, 40, 60]."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ------------------------------------------------------------------------------------------------
# Pairs, token by token

def potentials(values, terminal):
    """Phi of the states s_p to s_end: the values, except for the last one, set by `terminal`."""
    return values[:-1] + [{"zero": 0.0, "hold": values[-2], "value": values[-1]}[terminal]]


def heights(response, terminal, height):
    """Of the line below a response, in pixels. height: Phi - Phi(s_p) -> pixels."""
    phi = potentials(response["values"], terminal)
    return [height(x - phi[0]) for x in phi]


def visible(token):
    """The token with a sign for what could not be seen; the tint shows a space beside a word."""
    signs = {"\n": "\u21b5", "\t": "\u21e5", " ": "\u2423" if token.isspace() else " "}
    return "".join(signs.get(c) or printable(c) for c in token)


def token_span(token, psi, V, phi, y, zero, tint, note):
    """One tinted token above its piece of the line. Both are equally wide, so they wrap together.

    V, phi, y: value, potential and height of the line in pixels, before and after the token.
    tint: 0 to 1; note: "EOS", a kind of KINDS or "".
    """
    word = "more" if psi > 0 else "less" if psi < 0 else "same"
    title = (f"{token!r}{f' ({note})' if note else ''}\npsi {psi:+.4f}: worth "
             f"{'the same' if word == 'same' else word}\nV(s_t) {V[0]:.4f}, V(s_t+1) {V[1]:.4f}"
             + (f", but taken as {phi[1]:.4f}" if phi[1] != V[1] else ""))
    return (f'<span class="token {note.lower()}" tabindex="0" title="{escape(title)}">'
            f'<span class="{word}" style="--a:{0.75 * tint:.3f}">{escape(visible(token))}</span>'
            f'<svg viewBox="0 0 1 36" preserveAspectRatio="none">'
            f'<path class="zero" d="M0 {zero:.2f}H1"/>'
            f'<polyline points="0,{y[0]:.2f} 1,{y[1]:.2f}"/></svg></span>'
            + ("<br>" if token.endswith("\n") else ""))


def response_html(name, response, terminal, largest, height):
    """largest: the |psi| of full colour; height: as `heights` takes it. All pairs share both."""
    V, n = response["values"], len(response["tokens"])
    phi, y = potentials(V, terminal), heights(response, terminal, height)
    notes = list(response.get("kinds") or [""] * n)
    notes[-1] = notes[-1] or "EOS"
    spans = "".join(token_span(token, psi, V[i:i + 2], phi[i:i + 2], y[i:i + 2], y[0],
                               abs(psi) / largest, notes[i])
                    for i, (token, psi) in enumerate(zip(response["tokens"], response["psi"])))
    reward = response.get("reward")
    reward = "" if reward is None else f", true reward {reward:+.1f}"
    return (f"<div><h4>{name} <small>sum of psi {sum(response['psi']):+.3f}{reward}</small></h4>"
            f"<p>{spans}</p></div>")


def kind_html(pairs, value, terminal, gamma):
    """All pairs under one kind of value: a legend, then chosen and rejected side by side."""
    responses = [pair[name] for pair in pairs for name in SIDES]
    largest = max(abs(psi) for response in responses for psi in response["psi"]) or 1.0
    moved = [x for response in responses for x in heights(response, terminal, float)]
    low, high = min(moved), max(moved)              # 0, the start of every line, lies between them
    height = scale(low, high, 34, 2)
    bias = "" if gamma == 1 else (
        f" That is for gamma = 1: with gamma = {gamma:g} the sum also keeps -(1 - gamma) times "
        "every value on the way, a bias on length where the values have one sign, and psi is not "
        "the step of the line.")
    marks = "" if not any(response.get("kinds") for response in responses) else (
        ' Marked by the true reward: <span class="right"><span>right</span></span>, '
        '<span class="wrong"><span>wrong</span></span>, <span class="polite"><span>polite</span>'
        '</span>, <span class="rude"><span>rude</span></span>.')
    parts = [f"<h3>{escape(printable(value))}/{terminal}</h3><p>{SUM[terminal]}{bias}</p>"
             f'<p>psi: less <b>{-largest:.2f}</b> <span class="bar"></span> <b>{largest:+.2f}</b> '
             f"more. Line: from <b>{low:.2f}</b> to <b>{high:+.2f}</b>; dashes: 0.{marks}</p>"]
    for number, pair in enumerate(pairs, 1):
        sides = "".join(response_html(name, pair[name], terminal, largest, height)
                        for name in SIDES)
        y = [at for name in SIDES for at in heights(pair[name], terminal, height)]
        difference = sum(pair["chosen"]["psi"]) - sum(pair["rejected"]["psi"])
        parts.append(
            f'<article><p class="prompt"><b>{number}.</b> {escape(pair["prompt"])}</p>'
            f'<div class="sides" style="--above:{2 - min(y):.2f}px;--below:{max(y) - 34:.2f}px">'
            f'{sides}</div><p class="sum">sum of psi, chosen - rejected: '
            f"<b>{difference:+.3f}</b></p></article>")
    return "".join(parts)


def by_kind(pairs):
    """(value, terminal) -> the pairs of the first seed; results.json has those of the others."""
    kinds = {}
    for pair in pairs:
        if pair["seed"] == pairs[0]["seed"]:
            kinds.setdefault((pair["value"], pair["terminal"]), []).append(pair)
    return kinds


def pairs_html(pairs, gamma):
    if not pairs:
        return "<p>No pairs: tvkd was not among the methods.</p>"
    return (f"<p>Seed {pairs[0]['seed']}. Hover over a token, or tap it, for its numbers.</p>"
            + "".join(kind_html(group, *kind, gamma) for kind, group in by_kind(pairs).items()))


# ------------------------------------------------------------------------------------------------
# The panel

def panel_data(results):
    """What panel.js reads: value -> the held-out pairs; the first of them are shown below."""
    data, keys = {}, ("chosen", "rejected", "margin", "reward_gap")
    for (value, terminal), shown in by_kind(results["pairs"]).items():
        pairs = [{key: point.get(key) for key in keys} for point in results.get("scatter") or []
                 if (point["seed"], point["value"]) == (shown[0]["seed"], value)]
        if pairs:
            data[value] = {"terminal": terminal, "shown": min(len(shown), len(pairs)),
                           "pairs": pairs}
    return data


def select(title, name, options):
    options = "".join(f'<option value="{escape(str(option))}">{escape(printable(str(option)))}'
                      "</option>" for option in options)
    return f'<label>{title} <select name="{name}">{options}</select></label>'


def slider(name, low, high, value):
    return (f'<label>{name} <input type="range" name="{name}" min="{low:g}" max="{high:g}" '
            f'step="any" value="{value!r}"> <output></output></label>')


def panel_html(results):
    """The panel as a form that panel.js fills and shows; without JavaScript it stays hidden."""
    config, data = results["config"], panel_data(results)
    if not data:
        return ""
    alpha, beta, gamma = config["alpha"], config["beta"], config["gamma"]
    sliders = (slider("alpha", min(0, alpha), max(4, 2 * alpha), alpha)
               + slider("beta", 0, max(4, 2 * beta), beta)
               + slider("gamma", min(0, gamma), max(1, gamma), gamma))
    most = max(kind["shown"] for kind in data.values())
    selects = (select("teacher's value", "value", data) + select("terminal", "terminal", SUM)
               + select("pair", "pair", range(1, most + 1)))
    groups = '<th colspan="3">TVKD</th><th colspan="3">DPO</th><th colspan="2">sum of psi</th>'
    heads = "".join(f"<th>{name}</th>" for name in (
        "", "weight", *2 * ("margin", "loss", "weight"), "chosen", "rejected"))
    captions = [
        "Dots: held-out pairs, those of the table among them. Across: alpha times (sum of psi of "
        "chosen - of rejected). Up: DPO's margin. The stronger the colour, the larger TVKD's "
        "weight: on the dashes it is 1/2, below them more. Ring: the selected pair."]
    if all(pair["reward_gap"] is not None for kind in data.values() for pair in kind["pairs"]):
        captions.append("Across: sum of psi of chosen - of rejected. Up: true reward of chosen - "
                        "of rejected.")
    figures = "".join(f'<figure class="picture"><svg viewBox="0 0 300 220" role="img"></svg>'
                      f"<figcaption>{text}</figcaption></figure>" for text in captions)
    run = json.dumps({"beta": beta, "values": data}, allow_nan=False)
    return (
        f'<form id="panel" hidden data-run="{escape(run)}"><h2>Move it</h2><p>The pairs below, '
        "under other settings. Nothing is trained again: the log-ratios stay those of the student "
        "trained with this teacher's value. Weight: how hard a pair pushes, sigmoid(-margin); of "
        "its bar the filling is TVKD's, the frame DPO's. Set terminal to zero and gamma to 1: "
        "TVKD is DPO, for every alpha. The address holds the settings, so a link can be sent.</p>"
        f'<div class="fields"><div>{sliders}</div><div>{selects}</div></div>'
        f'<p id="worked"></p><div class="wide"><table><thead><tr><th></th><th></th>{groups}'
        f'</tr><tr>{heads}</tr></thead><tbody></tbody></table></div><div class="charts">{figures}'
        "</div></form>")


# ------------------------------------------------------------------------------------------------
# The table

def cell(rows, key, form):
    """One method's number: with its 95% interval, or over several seeds as mean and range."""
    texts, plain = {}, form.strip("+")
    for row in rows:
        if row.numbers.get(key) is not None:
            half = row.numbers.get(f"{key}_ci")
            texts[row.seed] = f"{row.numbers[key]:{form}}" + (
                "" if half is None else f" \u00b1 {half:{plain}}")
    if len(texts) < 2:
        return f"<td>{''.join(texts.values()) or '-'}</td>"
    title = "\n".join(f"seed {seed}: {text}" for seed, text in texts.items())
    known = [row.numbers[key] for row in rows if row.numbers.get(key) is not None]
    return (f'<td tabindex="0" title="{title}">{statistics.fmean(known):{form}} '
            f"<small>({min(known):{form}} to {max(known):{form}})</small></td>")


def ends(rows, key):
    """From where to where each row of a method is drawn: its interval, or a point among seeds."""
    half = rows[0].numbers.get(f"{key}_ci") if len(rows) == 1 else None
    return [(row.numbers[key] - (half or 0.0), row.numbers[key] + (half or 0.0)) for row in rows]


def dots(rows, key, x):
    """One method drawn: a point and its interval, or a point per seed and a bar at their mean."""
    at = [x(low) for low, _ in ends(rows, key)]
    if len(rows) > 1:
        return (f'<path class="mean" d="M{statistics.fmean(at):.2f} 3V23"/>'
                + "".join(f'<circle class="seed" cx="{cx:.2f}" cy="13" r="3"/>' for cx in at))
    (low, high), = ends(rows, key)
    return (f'<path class="ci" d="M{x(low):.2f} 13H{x(high):.2f}"/>'
            f'<circle cx="{x((low + high) / 2):.2f}" cy="13" r="4"/>')


def table_html(rows):
    """Drawn on one axis: the true reward or, where nobody knows it, the held-out accuracy."""
    columns, several = known_columns(rows), len({row.seed for row in rows}) > 1
    title, key, _ = columns[0]
    drawn = by_label([row for row in rows if row.numbers.get(key) is not None])
    low, high = extent([end for group in drawn.values() for both in ends(group, key)
                        for end in both])
    x = scale(low, high, 12, 268)
    axis = "".join(f'<text class="middle" x="{x(t):.2f}" y="17">{t:g}</text>'
                   for t in ticks(low, high))
    dpo = "" if "dpo" not in drawn else (
        f'<path class="zero" d="M{x(summary(drawn["dpo"], key)[0]):.2f} 0V26"/>')
    lines = "".join(
        f'<tr><th>{escape(printable(name))}</th><td><svg viewBox="0 0 280 26">{dpo}'
        f'{dots(drawn[name], key, x) if name in drawn else ""}</svg></td>'
        f"{''.join(cell(group, key, form) for _, key, form in columns)}</tr>"
        for name, group in by_label(rows).items())
    how = ("the mean and its 95% interval over held-out prompts or pairs, of the one run; another "
           "seed may differ by more")
    if several:
        how = ("a point for each seed and a bar at their mean; in brackets the lowest and highest "
               "seed; hover or tap for each seed's own")
    return (f'<div class="wide"><table><tr><th>model</th>'
            f'<th><svg viewBox="0 0 280 22">{axis}</svg></th>'
            f'{"".join(f"<th>{name}</th>" for name, _, _ in columns)}</tr>{lines}</table></div>'
            f"<p>Drawn: {title}, {how}. "
            f"{'Dashes: DPO; minus DPO is paired by prompt. ' if dpo else ''}Accuracy on n = "
            f"{rows[0].numbers['pref_n']} held-out pairs. KL in nats per response, on the model's "
            "own samples.</p>")


# ------------------------------------------------------------------------------------------------
# The curves

def spread(heights, gap, lowest):
    """Sorted heights, moved at least `gap` apart, none below `lowest`.

    spread([5, 6, 38], 10, 40) = [5, 15, 38]
    """
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    last = len(heights) - 1
    return [min(height, lowest - gap * (last - i)) for i, height in enumerate(heights)]


def chart(key, note, curves, colour, low, high):
    """One quantity by step. curves: stage -> {step: value}, a line each, named at its end."""
    first, last = extent([0, *(step for curve in curves.values() for step in curve)])
    x, y = scale(first, last, 40, 240), scale(low, high, 172, 10)
    parts = [f'<path class="grid" d="M40 {y(t):.2f}H240"/>'
             f'<text class="right" x="35" y="{y(t) + 4:.2f}">{t:g}</text>'
             for t in ticks(low, high)]
    parts += [f'<text class="middle" x="{x(t):.2f}" y="190">{t:g}</text>'
              for t in ticks(first, last)]
    tips = {}
    for stage, curve in curves.items():
        at = [(x(step), y(value)) for step, value in curve.items()]
        tips[stage] = at[-1]
        points = " ".join(f"{a:.2f},{b:.2f}" for a, b in at)
        parts.append(f'<g style="color:{colour[stage]}"><circle cx="{at[-1][0]:.2f}" '
                     f'cy="{at[-1][1]:.2f}" r="2"/><polyline points="{points}"/></g>')
    names = sorted(tips, key=lambda stage: tips[stage][1])
    for name, height in zip(names, spread([tips[name][1] for name in names], 13, 172)):
        parts.append(
            f'<g style="color:{colour[name]}"><path class="zero" '
            f'd="M{tips[name][0]:.2f} {tips[name][1]:.2f}L246 {height:.2f}"/>'
            f'<text x="249" y="{height + 4:.2f}">{escape(printable(name))}</text></g>')
    return (f'<figure><figcaption><b>{key}</b> <small>{note}</small></figcaption>'
            f'<svg viewBox="0 0 360 196" role="img" aria-label="{key} by step">{"".join(parts)}'
            "</svg></figure>")


def mean_curves(log, key, stages):
    """stage -> {step: mean of key over the seeds}, of the lines of the log that have it."""
    curves = {}
    for line in log:
        if line["stage"] in stages and line.get(key) is not None:
            curve = curves.setdefault(line["stage"], {})
            curve.setdefault(line["step"], []).append(line[key])
    return {stage: {step: statistics.fmean(seeds) for step, seeds in curve.items()}
            for stage, curve in curves.items()}


def curves_html(log):
    logged = {}                                     # stage -> the quantities it logs
    for line in log:
        logged.setdefault(line["stage"], set()).update(line)
    group = {stage: "preference" if "margin" in keys else
             "distillation" if "val_kl" in keys else "fine-tuning"
             for stage, keys in logged.items()}
    colour = {stage: COLOURS[i % len(COLOURS)] for i, stage in enumerate(logged)}
    charts = []
    for key, groups, note in CURVES:
        curves = mean_curves(log, key, [stage for stage in logged if group[stage] in groups])
        if curves:
            names = LOGPS if key in LOGPS else (key,)       # the log-probs share one axis
            drawn = [curve for name in names for curve in mean_curves(log, name, curves).values()]
            heights = extent([value for curve in drawn for value in curve.values()])
            charts.append(chart(key, note, curves, colour, *heights))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>The log is empty.</p>"


# ------------------------------------------------------------------------------------------------
# The page

def write_report(results, log, path):
    """results.json as a dict and log.jsonl as a list of dicts -> the page at `path`.

    The file appears as a whole or not at all. RESULTS and LINE, above, say what is read; where
    something else stands there, ValueError names the place. OSError names the file.
    """
    check_results(results, log)
    config, rows = results["config"], [Row.from_flat(flat) for flat in results["rows"]]
    seeds = sorted({row.seed for row in rows})
    settings = (f"alpha = {config['alpha']:g}, beta = {config['beta']:g} (the teacher's: "
                f"{config['teacher_beta']:g}), gamma = {config['gamma']:g}, seed "
                f"{', '.join(map(str, seeds))}, data: {config['data'] or 'the toy task'}")
    panel = panel_html(results)                             # empty without pairs
    css, script = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                   for name in ("report.css", "panel.js"))
    # The browser runs this script and no other, whatever the text of a pair contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; form-action 'none'; base-uri 'none'; style-src 'unsafe-inline';
script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TVKD: what the teacher values</title><style>{css}</style>
<h1>TVKD: what the teacher values</h1>
<p>A run with {escape(printable(settings))}. Held-out pairs stand below token by token:
psi_t = gamma Phi(s_t+1) - Phi(s_t), where the potential Phi is V, the teacher's value of the text
so far, except perhaps in the last state. <span class="more" style="--a:.5">Blue</span>: after this
token the teacher values the answer more; <span class="less" style="--a:.5">orange</span>: less. The
line below the text is Phi, counted from the end of the prompt; with gamma = 1 its step across a
token is that token's psi. Of all this TVKD reads one number per pair, the difference of the two
sums: its loss is -log sigmoid(the student's margin - alpha times that difference).</p>
{panel}<h2>Held-out pairs</h2>{pairs_html(results["pairs"], config["gamma"])}
<h2>Comparison</h2>{table_html(rows)}
<h2>Training curves</h2><p>By step, each on its batch, val_ on validation prompts; with several
seeds their mean.</p>
{curves_html(log)}{f"<script>{script}</script>" if panel else ""}</html>
"""
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(page.encode("utf-8", "replace"))   # a prompt may hold half a character
        part.replace(path)
    except OSError as error:                                # "no space left" comes without a name
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        expect(len(argv) == 1, "arguments", "one folder", argv)
        out = Path(argv[0])
        for name in ("results.json", "log.jsonl"):      # opening a pipe would wait for ever
            expect((out / name).is_file(), name, "a file", "none or a folder, a pipe or a device")
        results, log = ((out / name).read_text(encoding="utf-8")
                        for name in ("results.json", "log.jsonl"))
        results, log = json.loads(results), [json.loads(line) for line in log.splitlines()]
        write_report(results, log, out / "report.html")
        print(printable(str(out / "report.html")), flush=True)
    except BrokenPipeError:                             # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, RecursionError) as error:
        print(printable("harness.report: expected a folder with results.json and log.jsonl of "
                        f"train.py, got {' '.join(argv) or 'none'}: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
