"""What a run shows: the comparison table and psi per token in the terminal, and both with the training curves as one HTML page.

    python report.py out        results.json and log.jsonl of train.py in that folder -> report.html

The page is one file of HTML, CSS and SVG: no script, no library, no network.
"""

import json
import math
import statistics
import sys
from html import escape
from pathlib import Path

SUM = {     # what psi adds up to with gamma = 1, by the potential of the finished response (tvkd.shaping)
    "value": "sum of psi = V(s_end) - V(s_p): the teacher's value of the finished answer, less that of the prompt.",
    "hold": "sum of psi = V(s_end-1) - V(s_p): the finished answer keeps the value it had before its EOS, whose psi is 0.",
    "zero": "sum of psi = -V(s_p): the finished answer has potential 0. That depends on the prompt alone, so the two sums "
            "differ by 0 up to rounding, and the loss is DPO's."}
COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"), ("held-out accuracy", "pref_acc", ".3f"),
           ("KL to reference", "kl", ".2f"), ("tokens", "length", ".1f"))
LOGPS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
CURVES = (("loss", ("fine-tuning",), "-log p, nats per token"),              # quantity, the stages in its chart, what it is
          ("loss", ("distillation",), "bc: -log p, kd: KL; nats per token"),
          ("loss", ("preference",), "nats per pair; ln 2 = 0.69 at the start of DPO"),
          ("margin", ("preference",), "beta (log-ratio of chosen - of rejected)"),
          *((name, ("preference",), "log p of a response, nats; a shared scale") for name in LOGPS),
          ("val_kl", ("preference", "distillation"), "to the reference, nats per response"),
          ("val_reward", ("preference", "distillation"), "true reward on validation prompts"))
COLOURS = ("#2f81d6", "#c8741a", "#1f9d78", "#c2559a", "#8069d8", "#d9534a", "#84931c", "#8a8a8a")      # on light and on dark


# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom: few seeds want wider intervals than 1.96
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110)
# Backgrounds of a 256-colour terminal, from faint to full: the teacher values the answer more (blue) or less (orange)
MORE, LESS = (189, 153, 117, 75), (230, 223, 216, 208)


def label(row):
    """A row of the table by name: "dpo", "tvkd implicit/value"."""
    return row["method"] + (f" {row['value']}/{row['terminal']}" if row["value"] else "")


def interval(numbers):
    """Half-width of a 95% interval of the mean, by Student's t; None for a single number."""
    freedom = len(numbers) - 1
    if freedom < 1:
        return None
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.4 / freedom              # right to 0.01
    return t * statistics.stdev(numbers) / math.sqrt(len(numbers))


# ---------------------------------------------------------------------------------------------------------------------------
# In the terminal

def printable(text):
    """Text without control characters, which a terminal would obey: a half-trained model writes any byte."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def summary(rows, key):
    """Of one method: mean over its rows and 95% interval, over seeds where there are several; (None, None) where unknown."""
    known = [row[key] for row in rows if row[key] is not None]
    if not known:
        return None, None
    return statistics.fmean(known), interval(known) if len(rows) > 1 else rows[0].get(f"{key}_ci")


def table(rows):
    """The comparison table as text: one seed's intervals over prompts, or several seeds' intervals over seeds."""
    seeds, methods = sorted({row["seed"] for row in rows}), {}
    for row in rows:
        methods.setdefault(label(row), []).append(row)
    columns = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]     # no reward on real data
    lines = [f"{'model':<20}" + "".join(f"{title:>18}" for title, _, _ in columns)]
    for name, found in methods.items():
        cells = []
        for _, key, form in columns:
            mean, half = summary(found, key)
            margin = "" if half is None else f" \u00b1 {half:{form.strip('+')}}"
            cells.append("-" if mean is None else f"{mean:{form}}{margin}")
        lines.append(f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells))
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else f"held-out prompts or pairs, of the one run with seed {seeds[0]}"
    return "\n".join([*lines, f"\u00b1: 95% interval over {over}. Accuracy on n = {rows[0]['pref_n']} held-out pairs.",
                      "KL in nats per response, on the model's own samples; the teacher's reference is the teacher before DPO."])


def show_psi(pair, colour, width, most=60):
    """Print psi of each token of a pair, [+0.12] where the teacher's value gains; tokens tinted where the terminal can."""
    largest = max(abs(psi) for which in ("chosen", "rejected") for psi in pair[which]["psi"]) or 1.0
    for which in ("chosen", "rejected"):
        tokens, values = pair[which]["tokens"], pair[which]["psi"]
        print(f"\npsi per token, {pair['value']}/{pair['terminal']}, {which} (sum {sum(values):+.2f}):")
        lines, used = [[]], 0
        for token, psi in zip(tokens[:most], values):
            token, number, level = printable(token.strip()) or "\u2423", f"[{psi:+.2f}]", round(4 * abs(psi) / largest)
            if used + len(token + number) + 3 > width and lines[-1]:        # wrapped here, as the escape codes have no width
                lines.append([])
                used = 0
            used += len(token + number) + 1
            tint = f"\033[38;5;16;48;5;{(MORE if psi > 0 else LESS)[level - 1]}m{token}\033[0m" if colour and level else token
            lines[-1].append(tint + number)
        more = f" ... and {len(tokens) - most} more" if len(tokens) > most else ""
        print("\n".join("  " + " ".join(line) for line in lines) + more)


# ---------------------------------------------------------------------------------------------------------------------------
# The page

def scale(low, high, start, end):
    """The linear map that takes low to start and high to end."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def ticks(low, high, most=5):
    """Round numbers from low to high, `most` + 1 of them or fewer: ticks(0, 60) = [0, 20, 40, 60]."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---------------------------------------------------------------------------------------------------------------------------
# Pairs, token by token

def potentials(values, terminal):
    """Phi of the states s_p to s_end: the values, but for the last one as `terminal` has it."""
    return values[:-1] + [{"zero": 0.0, "hold": values[-2], "value": values[-1]}[terminal]]


def visible(token):
    """A token as it is, with a sign for what could not be seen. A space beside other characters stays: the tint shows it."""
    blank = "\u2423" if token.isspace() else " "
    return "".join({"\n": "\u21b5", "\t": "\u21e5", " ": blank}.get(c, c if c.isprintable() else "\ufffd") for c in token)


def token_span(token, psi, V, phi, y, zero, tint, is_eos):
    """One token, tinted, over its piece of the line, which is as wide as the text: so both wrap together.

    V, phi, y: value, potential and height of the line in pixels, each before and after the token; tint: from 0 to 1.
    """
    word = "more" if psi > 0 else "less" if psi < 0 else "same"
    title = (f"{token!r}{' (EOS)' if is_eos else ''}\npsi {psi:+.4f}: {'worth the same' if word == 'same' else 'worth ' + word}\n"
             f"V(s_t) {V[0]:.4f}, V(s_t+1) {V[1]:.4f}" + (f", but taken as {phi[1]:.4f}" if phi[1] != V[1] else ""))
    return (f'<span class="token{" eos" if is_eos else ""}" title="{escape(title)}">'
            f'<span class="{word}" style="--a:{0.75 * tint:.3f}">{escape(visible(token))}</span>'
            f'<svg viewBox="0 0 1 36" preserveAspectRatio="none"><path class="zero" d="M0 {zero:.2f}H1"/>'
            f'<polyline points="0,{y[0]:.2f} 1,{y[1]:.2f}"/></svg></span>' + ("<br>" if token.endswith("\n") else ""))


def response_html(which, response, terminal, largest, height):
    """largest: the |psi| of full colour; height: Phi - Phi(s_p) -> pixels. All pairs of one kind of value share them."""
    tokens, psi, V = response["tokens"], response["psi"], response["values"]
    phi = potentials(V, terminal)
    y = [height(x - phi[0]) for x in phi]
    spans = "".join(token_span(token, p, V[i:i + 2], phi[i:i + 2], y[i:i + 2], y[0], abs(p) / largest, i + 1 == len(tokens))
                    for i, (token, p) in enumerate(zip(tokens, psi)))
    return f"<div><h4>{which} <small>sum of psi {sum(psi):+.3f}</small></h4><p>{spans}</p></div>"


def kind_html(pairs, value, terminal, gamma):
    """All pairs of one kind of value: a legend, then chosen and rejected side by side."""
    responses = [pair[which] for pair in pairs for which in ("chosen", "rejected")]
    largest = max(abs(psi) for response in responses for psi in response["psi"]) or 1.0
    moved = [phi - response["values"][0] for response in responses for phi in potentials(response["values"], terminal)]
    low, high = min(moved), max(moved)                                      # 0, the start of every line, lies between
    bias = "" if gamma == 1 else (f" That is for gamma = 1: with gamma = {gamma:g} the sum also keeps -(1 - gamma) times every "
                                  "value on the way, mostly a bias on length, and psi is not the step of the line.")
    parts = [f"<h3>{escape(value)}/{escape(terminal)}</h3><p>{SUM[terminal]}{bias}</p>"
             f'<p>psi: less <b>{-largest:.2f}</b> <span class="bar"></span> <b>{largest:+.2f}</b> more. '
             f"Line: from <b>{low:.2f}</b> to <b>{high:+.2f}</b>; dashes: 0.</p>"]
    for number, pair in enumerate(pairs, 1):
        sides = "".join(response_html(which, pair[which], terminal, largest, scale(low, high, 34, 2))
                        for which in ("chosen", "rejected"))
        difference = sum(pair["chosen"]["psi"]) - sum(pair["rejected"]["psi"])
        parts.append(f'<article><p class="prompt"><b>{number}.</b> {escape(pair["prompt"])}</p>'
                     f'<div class="sides">{sides}</div>'
                     f'<p class="sum">sum of psi, chosen - rejected: <b>{difference:+.3f}</b></p></article>')
    return "".join(parts)


def pairs_html(pairs, gamma):
    if not pairs:
        return "<p>No pairs: tvkd was not among the methods.</p>"
    kinds = {}
    for pair in pairs:
        if pair["seed"] == pairs[0]["seed"]:                                # the others are in results.json
            kinds.setdefault((pair["value"], pair["terminal"]), []).append(pair)
    return (f"<p>Seed {pairs[0]['seed']}. Hover over a token for its numbers.</p>"
            + "".join(kind_html(found, *kind, gamma) for kind, found in kinds.items()))


# ---------------------------------------------------------------------------------------------------------------------------
# The table. Several seeds: every seed's own number, their mean and their range, and no interval.
def cell(rows, key, form):
    """The number of one method with its 95% interval; or the mean and range of several seeds, each seed's own on hover."""
    known = {row["seed"]: row[key] for row in rows if row[key] is not None}
    if not known:
        return "<td>-</td>"
    interval = {row["seed"]: f" \u00b1 {row[f'{key}_ci']:{form.strip('+')}}" for row in rows if row.get(f"{key}_ci") is not None}
    shown = [f"{value:{form}}{interval.get(seed, '')}" for seed, value in known.items()]
    if len(known) == 1:
        return f"<td>{shown[0]}</td>"
    title = "\n".join(f"seed {seed}: {text}" for seed, text in zip(known, shown))
    low, mean, high = min(known.values()), sum(known.values()) / len(known), max(known.values())
    return f'<td title="{title}">{mean:{form}} <small>({low:{form}} to {high:{form}})</small></td>'


def dots(rows, key, x):
    """One method drawn: a point and its 95% interval; or a point for each of several seeds and a bar at their mean."""
    at = [x(row[key]) for row in rows]
    if len(rows) > 1:
        return (f'<path class="mean" d="M{sum(at) / len(at):.2f} 3V23"/>'
                + "".join(f'<circle class="seed" cx="{cx:.2f}" cy="13" r="3"/>' for cx in at))
    ends = [x(rows[0][key] + sign * (rows[0].get(f"{key}_ci") or 0.0)) for sign in (-1, 1)]
    return f'<path class="ci" d="M{ends[0]:.2f} 13H{ends[1]:.2f}"/><circle cx="{at[0]:.2f}" cy="13" r="4"/>'


def table_html(rows):
    """Drawn on one axis: the true reward, or where nobody knows it (real preferences) the held-out accuracy."""
    methods, several = {}, len({row["seed"] for row in rows}) > 1
    for row in rows:
        methods.setdefault(label(row), []).append(row)
    columns = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]
    title, key, _ = columns[0]
    ends = [row[key] + sign * (0 if several else row.get(f"{key}_ci") or 0) for row in rows for sign in (-1, 1)]
    low, high = min(ends), max(max(ends), min(ends) + 0.1)
    x = scale(low, high, 12, 268)
    axis = "".join(f'<text class="middle" x="{x(t):.2f}" y="17">{t:g}</text>' for t in ticks(low, high))
    dpo = [x(row[key]) for row in methods.get("dpo", [])]
    guide = f'<path class="zero" d="M{sum(dpo) / len(dpo):.2f} 0V26"/>' if dpo else ""
    lines = "".join(f'<tr><th>{escape(name)}</th><td><svg viewBox="0 0 280 26">{guide}{dots(found, key, x)}</svg></td>'
                    f"{''.join(cell(found, name, form) for _, name, form in columns)}</tr>" for name, found in methods.items())
    how = "the mean and its 95% interval over held-out prompts or pairs, of the one run; another seed may differ by more"
    if several:
        how = "a point for each seed and a bar at their mean; in brackets the lowest and highest seed; hover for each seed's own"
    return (f'<div class="wide"><table><tr><th>model</th><th><svg viewBox="0 0 280 22">{axis}</svg></th>'
            f'{"".join(f"<th>{name}</th>" for name, _, _ in columns)}</tr>{lines}</table></div><p>Drawn: {title}, {how}. '
            f"{'Dashes: DPO; minus DPO is paired by prompt. ' if dpo else ''}Accuracy on n = {rows[0]['pref_n']} held-out pairs. "
            "KL in nats per response, on the model's own samples.</p>")


# ---------------------------------------------------------------------------------------------------------------------------
# The curves

def spread(heights, gap, lowest):
    """Sorted heights, moved at least `gap` apart, none below `lowest`: spread([5, 6, 38], 10, 40) = [5, 15, 38]."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    return [min(height, lowest - gap * (len(heights) - 1 - i)) for i, height in enumerate(heights)]


def chart(key, note, curves, colour, low, high):
    """One quantity by step. curves: stage -> {step: value}, a line each, with the stage's name at its end."""
    last, high = max(step for curve in curves.values() for step in curve), high if high > low else low + 1
    x, y = scale(0, last, 40, 240), scale(low, high, 172, 10)
    parts = [f'<path class="grid" d="M40 {y(t):.2f}H240"/><text class="right" x="35" y="{y(t) + 4:.2f}">{t:g}</text>'
             for t in ticks(low, high)]
    parts += [f'<text class="middle" x="{x(t):.2f}" y="190">{t:g}</text>' for t in ticks(0, last)]
    ends = {}
    for stage, curve in curves.items():
        at = [(x(step), y(value)) for step, value in curve.items()]
        ends[stage] = at[-1]
        parts.append(f'<g style="color:{colour[stage]}"><circle cx="{at[-1][0]:.2f}" cy="{at[-1][1]:.2f}" r="2"/>'
                     f'<polyline points="{" ".join(f"{a:.2f},{b:.2f}" for a, b in at)}"/></g>')
    names = sorted(ends, key=lambda stage: ends[stage][1])
    for name, height in zip(names, spread([ends[name][1] for name in names], 13, 172)):
        parts.append(f'<g style="color:{colour[name]}">'
                     f'<path class="zero" d="M{ends[name][0]:.2f} {ends[name][1]:.2f}L246 {height:.2f}"/>'
                     f'<text x="249" y="{height + 4:.2f}">{escape(name)}</text></g>')
    return (f'<figure><figcaption><b>{key}</b> <small>{note}</small></figcaption>'
            f'<svg viewBox="0 0 360 196" role="img" aria-label="{key} by step">{"".join(parts)}</svg></figure>')


def mean_curves(log, key, stages):
    """stage -> {step: the mean of key over the seeds}, of the lines of the log that have it."""
    curves = {}
    for line in log:
        if line["stage"] in stages and line.get(key) is not None:
            curves.setdefault(line["stage"], {}).setdefault(line["step"], []).append(line[key])
    return {stage: {step: sum(seeds) / len(seeds) for step, seeds in curve.items()} for stage, curve in curves.items()}


def curves_html(log):
    logged = {}                                                             # stage -> the quantities it logs
    for line in log:
        logged.setdefault(line["stage"], set()).update(line)
    group = {stage: "preference" if "margin" in keys else "distillation" if "val_kl" in keys else "fine-tuning"
             for stage, keys in logged.items()}
    colour, charts = {stage: COLOURS[i % len(COLOURS)] for i, stage in enumerate(logged)}, []
    for key, groups, note in CURVES:
        curves = mean_curves(log, key, [stage for stage in logged if group[stage] in groups])
        if curves:
            drawn = [mean_curves(log, name, logged) for name in LOGPS] if key in LOGPS else [curves]
            values = [value for some in drawn for curve in some.values() for value in curve.values()]
            charts.append(chart(key, note, curves, colour, min(values), max(values)))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>The log is empty.</p>"


# ---------------------------------------------------------------------------------------------------------------------------
# The page

CSS = """
:root { color-scheme: light dark; --fg: #111; --bg: #fdfdfc; --soft: #666; --rule: #ddd; --more: 40,120,220; --less: 235,130,20 }
@media (prefers-color-scheme: dark) {
  :root { --fg: #eee; --bg: #17181a; --soft: #aaa; --rule: #3a3c40; --more: 70,140,250; --less: 225,120,20 } }
body { font: 15px/1.5 sans-serif; color: var(--fg); background: var(--bg); max-width: 75em; margin: auto; padding: 1em }
h2 { margin: 2em 0 .3em; border-top: 1px solid var(--rule); padding-top: .8em } h3 { margin: 1.4em 0 0 } h4, figure { margin: 0 }
p { margin: .4em 0; max-width: 75em } small, .sum { color: var(--soft); font-weight: normal }
td small { font-size: 12px } article { margin: 1.2em 0 }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9em; overflow: auto }
.sides, .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); gap: .4em 2em }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22em), 1fr)) } figure svg { width: 100%; max-width: 480px }
.token { display: inline-block; max-width: 100%; vertical-align: top; margin-bottom: 6px }
.token > span { display: block; white-space: break-spaces; overflow-wrap: anywhere; box-shadow: inset -1px 0 var(--rule) }
.token svg { display: block; width: 100%; height: 36px; overflow: visible } svg * { vector-effect: non-scaling-stroke }
.token.eos > span { outline: 1px dashed var(--soft); outline-offset: -1px; font-size: 11px; line-height: 22.5px }
.more { background: rgba(var(--more), var(--a)) } .less { background: rgba(var(--less), var(--a)) }
.bar { display: inline-block; width: 9em; height: 1em; vertical-align: middle; border: 1px solid var(--rule);
  background: linear-gradient(to right, rgba(var(--less), .75), transparent, rgba(var(--more), .75)) }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: 0 .5em; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--bg) }
td svg, th svg { display: block; width: 240px } text { font-size: 11px; fill: currentColor; font-weight: normal }
path, polyline { stroke: currentColor; fill: none; stroke-width: 1.6; stroke-linejoin: round } circle { fill: currentColor }
.zero { stroke-dasharray: 2 3; stroke-width: 1; opacity: .6 } .grid { stroke: var(--rule); stroke-width: 1 }
.mean { stroke-width: 3 } .seed { fill: rgb(var(--more)) } .middle { text-anchor: middle } .right { text-anchor: end }
"""


def write_report(results, log, path):
    """results.json as a dict and log.jsonl as a list of dicts -> the page at `path`, there as a whole or not at all."""
    config, seeds = results["config"], sorted({row["seed"] for row in results["rows"]})
    settings = (f"alpha = {config['alpha']:g}, beta = {config['beta']:g} (the teacher's: {config['teacher_beta']:g}), "
                f"gamma = {config['gamma']:g}, seed {', '.join(map(str, seeds))}, data: {config['data'] or 'the toy task'}")
    page = f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TVKD: what the teacher values</title><style>{CSS}</style><h1>TVKD: what the teacher values</h1>
<p>A run with {escape(settings)}. First, held-out pairs token by token: psi_t = gamma V(s_t+1) - V(s_t), where V is the teacher's
value of the text so far. <span class="more" style="--a:.5">Blue</span>: after this token the teacher values the answer more;
<span class="less" style="--a:.5">orange</span>: less. The line below the text is V, counted from its value at the end of the
prompt; with gamma = 1 its step across a token is that token's psi. Of all this TVKD reads one number per pair, the difference of
the two sums: its loss is -log sigmoid(the student's margin - alpha times that difference). Then the comparison and curves.</p>
<h2>Held-out pairs</h2>{pairs_html(results["pairs"], config["gamma"])}
<h2>Comparison</h2>{table_html(results["rows"])}
<h2>Training curves</h2><p>By step, each on its batch, val_ on validation prompts; with several seeds their mean.</p>
{curves_html(log)}</html>
"""
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    part.write_bytes(page.encode("utf-8", "replace"))                       # "replace": a prompt may hold half a surrogate pair
    part.replace(path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        out, = map(Path, argv)
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        write_report(results, log, out / "report.html")
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = " ".join(argv) or "none"
        print(f"report.py: expected a folder with results.json and log.jsonl of train.py, got {got}: {error!r}", file=sys.stderr)
        return 2
    print(out / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
