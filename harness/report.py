"""One HTML page of a run: held-out pairs token by token, the table, the curves.

The page is one file, HTML, CSS and SVG. It loads nothing and runs nothing. Prompts, responses,
names and options may come from anybody: all are escaped.
"""

import math
import statistics
from html import escape
from itertools import pairwise
from pathlib import Path

from harness.errors import printable
from harness.numbers import plus_minus
from harness.table import by_label, footnote, known_columns, mean_of

SIDES = ("chosen", "rejected")
SUM = {     # of psi with gamma = 1, by the potential of the finished answer
    "value": "V(s_end) - V(s_p): the teacher's value of the finished answer, less the prompt's.",
    "hold": "V(s_end-1) - V(s_p): EOS keeps the value of the text before it, and its psi is 0.",
    "zero": "-V(s_p), which is the same for both answers: the loss is DPO's."}
CHARTS = {                      # quantity -> what it is; losses in different units are kept apart
    "loss of fine-tuning": "-log p, nats per token",
    "loss of distillation": "bc: -log p, kd: KL; nats per token",
    "loss of preference learning": "mean over pairs; DPO's starts at ln 2 = 0.69",
    "margin": "beta (log-ratio of chosen - of rejected)",
    "log-ratio of chosen": "policy_chosen - ref_chosen, nats",
    "log-ratio of rejected": "policy_rejected - ref_rejected, nats",
    "val_kl": "to the reference, nats per response",
    "val_reward": "true reward on validation prompts"}
COLOURS = ("#2f81d6", "#c8741a", "#1f9d78", "#c2559a",          # readable on light and on dark
           "#8069d8", "#d9534a", "#84931c", "#8a8a8a")


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


def spread(heights, gap, lowest):
    """Sorted heights, moved at least `gap` apart, none below `lowest`.

    spread([5, 6, 38], 10, 40) = [5, 15, 38]
    """
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    last = len(heights) - 1
    return [min(height, lowest - gap * (last - i)) for i, height in enumerate(heights)]


def response_html(name, side, largest, height):
    """Every token tinted, above its piece of the line: both are equally wide, so both wrap.

    largest: the |psi| of full colour. height: Phi - Phi(s_p) -> pixels. All pairs share both.
    """
    spans, phi = [], side["phi"]
    tokens = zip(side["tokens"], side["psi"], side["kinds"], pairwise(phi))
    for token, psi, kind, (before, after) in tokens:
        title = (f"{token!r}{f' ({kind})' if kind else ''}\npsi {psi:+.4f}\n"
                 f"Phi(s_t) {before:.4f}, Phi(s_t+1) {after:.4f}")
        spans.append(
            f'<span class="token {kind.lower()}" tabindex="0" title="{escape(title)}"><span '
            f'class="{"more" if psi > 0 else "less"}" style="--a:{0.75 * abs(psi) / largest:.3f}">'
            f'{escape(printable(token.replace(chr(10), chr(0x21b5))))}</span>'
            f'<svg viewBox="0 0 1 36" preserveAspectRatio="none">'
            f'<path class="zero" d="M0 {height(0):.2f}H1"/><polyline points="0,'
            f'{height(before - phi[0]):.2f} 1,{height(after - phi[0]):.2f}"/></svg></span>')
    reward = f", true reward {side['reward']:+.1f}" if "reward" in side else ""
    return (f"<div><h4>{name} <small>sum of psi {sum(side['psi']):+.3f}{reward}</small></h4>"
            f"<p>{''.join(spans)}</p></div>")


def pairs_html(pairs):
    """The pairs under one kind of value: a legend, then chosen and rejected side by side."""
    sides, terminal = [pair[name] for pair in pairs for name in SIDES], pairs[0]["terminal"]
    largest = max(abs(psi) for side in sides for psi in side["psi"]) or 1.0
    moved = [phi - side["phi"][0] for side in sides for phi in side["phi"]]
    low, high = min(moved), max(moved)              # 0, the start of every line, lies between them
    marks = "" if "reward" not in sides[0] else " Marked by the true reward: " + ", ".join(
        f'<span class="{kind}"><span>{kind}</span></span>'
        for kind in ("right", "wrong", "polite", "rude"))
    parts = [
        f"<h3>{escape(printable(pairs[0]['value']))}/{terminal}</h3>"
        f"<p>With gamma = 1, the sum of psi is {SUM[terminal]}</p>"
        f'<p>Full colour: psi = <span class="less" style="--a:.75">{-largest:.2f}</span> or <span '
        f'class="more" style="--a:.75">{largest:+.2f}</span>. Line: from {low:.2f} to {high:+.2f}; '
        f"dashes: 0.{marks}</p>"]
    for number, pair in enumerate(pairs, 1):
        difference = sum(pair["chosen"]["psi"]) - sum(pair["rejected"]["psi"])
        responses = "".join(response_html(name, pair[name], largest, scale(low, high, 34, 2))
                            for name in SIDES)
        parts.append(
            f'<article><p class="prompt"><b>{number}.</b> {escape(pair["prompt"])}</p>'
            f'<div class="sides">{responses}</div><p class="sum">sum of psi, chosen - rejected: '
            f"<b>{difference:+.3f}</b></p></article>")
    return "".join(parts)


def table_html(rows):
    """Drawn on one axis: the true reward or, where nobody knows it, the held-out accuracy."""
    columns, groups = known_columns(rows), by_label(rows)
    title, key, _ = columns[0]
    means = {name: mean_of(group, key) for name, group in groups.items()}
    ends = [mean + sign * (half or 0) for mean, half in means.values() for sign in (-1, 1)]
    low, high = extent([*ends, *(row.numbers[key] for row in rows)])
    x, lines = scale(low, high, 12, 268), []
    axis = "".join(f'<text class="middle" x="{x(t):.2f}" y="17">{t:g}</text>'
                   for t in ticks(low, high))
    dpo = f'<path class="zero" d="M{x(means["dpo"][0]):.2f} 0V26"/>' if "dpo" in means else ""
    for (name, group), (mean, half) in zip(groups.items(), means.values()):
        seeds = "".join(f'<circle class="seed" cx="{x(row.numbers[key]):.2f}" cy="13" r="3"/>'
                        for row in group)
        cells = "".join(f"<td>{plus_minus(*mean_of(group, key), form)}</td>"
                        for _, key, form in columns)
        lines.append(
            f'<tr><th>{escape(printable(name))}</th><td><svg viewBox="0 0 280 26">{dpo}{seeds}'
            f'<path d="M{x(mean - (half or 0)):.2f} 13H{x(mean + (half or 0)):.2f}"/>'
            f'<circle cx="{x(mean):.2f}" cy="13" r="4"/></svg></td>{cells}</tr>')
    heads = "".join(f"<th>{name}</th>" for name, _, _ in columns)
    return (f'<div class="wide"><table><tr><th>model</th><th><svg viewBox="0 0 280 22">{axis}</svg>'
            f'</th>{heads}</tr>{"".join(lines)}</table></div><p>Drawn: {title} and its interval; '
            f"dashes: DPO; small points: seeds. {footnote(rows)}</p>")


def chart(key, curves, colour):
    """One quantity by step. curves: stage -> {step: value}, a line each, named at its end."""
    first, last = extent([0, *(step for curve in curves.values() for step in curve)])
    low, high = extent([value for curve in curves.values() for value in curve.values()])
    x, y = scale(first, last, 40, 240), scale(low, high, 172, 10)
    parts = [f'<path class="grid" d="M40 {y(t):.2f}H240"/>'
             f'<text class="right" x="35" y="{y(t) + 4:.2f}">{t:g}</text>'
             for t in ticks(low, high)]
    parts += [f'<text class="middle" x="{x(t):.2f}" y="190">{t:g}</text>'
              for t in ticks(first, last)]
    ends = {stage: max(curve.items()) for stage, curve in curves.items()}       # step, value
    names = sorted(ends, key=lambda stage: -ends[stage][1])
    for name, height in zip(names, spread([y(ends[name][1]) for name in names], 13, 172)):
        points = " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in curves[name].items())
        tip = f"{x(ends[name][0]):.2f} {y(ends[name][1]):.2f}"
        parts.append(f'<g style="color:{colour[name]}"><polyline points="{points}"/>'
                     f'<path class="zero" d="M{tip}L246 {height:.2f}"/>'
                     f'<text x="249" y="{height + 4:.2f}">{escape(printable(name))}</text></g>')
    return (f"<figure><figcaption><b>{key}</b> <small>{CHARTS[key]}</small></figcaption>"
            f'<svg viewBox="0 0 360 196" role="img" aria-label="{key} by step">{"".join(parts)}'
            "</svg></figure>")


def curves_html(log):
    """log: the lines of log.jsonl. A curve is the mean over seeds."""
    found = {}                                      # quantity -> stage -> step -> numbers of seeds
    for line in log:
        group = ("preference learning" if "margin" in line else
                 "fine-tuning" if line["stage"].endswith("-sft") else "distillation")
        numbers = {**line, f"loss of {group}": line["loss"]}
        if "ref_chosen" in line:
            numbers |= {f"log-ratio of {name}": line[f"policy_{name}"] - line[f"ref_{name}"]
                        for name in SIDES}
        for key in CHARTS:
            if numbers.get(key) is not None:
                curve = found.setdefault(key, {}).setdefault(line["stage"], {})
                curve.setdefault(line["step"], []).append(numbers[key])
    stages = list(dict.fromkeys(line["stage"] for line in log))
    colour = {stage: COLOURS[i % len(COLOURS)] for i, stage in enumerate(stages)}
    means = {key: {stage: {step: statistics.fmean(seeds) for step, seeds in curve.items()}
                   for stage, curve in curves.items()} for key, curves in found.items()}
    return "".join(chart(key, means[key], colour) for key in CHARTS if key in means)


def page(config, rows, shown, log):
    """The page as text. rows: of the table; shown: what `psi_of_pairs` gave for each TVKD row.

    It shows the pairs of the first seed; results.json has those of all seeds.
    """
    kinds = {}                                      # value -> the pairs of its first row
    for pairs in shown:
        kinds.setdefault(pairs[0]["value"], pairs)
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    settings = (f"alpha = {config.alpha:g}, beta = {config.beta:g} (the teacher's: "
                f"{config.teacher_beta:g}), gamma = {config.gamma:g}, seed {seeds}, "
                f"data: {config.data or 'the toy task'}")
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    pairs = (f"Seed {rows[0].seed}. Hover over a token, or tap it, for its numbers." if kinds else
             "No pairs: no method of this run read the teacher's value of every state.")
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; form-action 'none'; base-uri 'none'; style-src 'unsafe-inline'">
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
<h2>Held-out pairs</h2><p>{pairs}</p>{"".join(map(pairs_html, kinds.values()))}
<h2>Comparison</h2>{table_html(rows)}
<h2>Training curves</h2><p>By step, each on its batch, val_ on validation prompts; with several
seeds their mean.</p><div class="charts">{curves_html(log)}</div></html>
"""
