"""The figures of docs/results.md as SVG, from the records. Bars are 95% intervals over seeds."""

import math
from html import escape

from evidence.cells import TEACHERS
from evidence.records import SWEEPS, built, grouped, name_of, option_of, plain_name, summary
from harness.report import COLOURS, scale, spread, ticks

LINES = ("dpo", "tvkd implicit/value", "kd", "dpo, teacher's soft labels", "sft", "kd, fewer pairs",
         "kd, fewer probabilities", "dpo, teacher's labels")
TITLES = {      # the figure's title, its x axis, whether that is logarithmic
    "alpha": ("Weight of the teacher's value", "alpha", False),
    "pairs": ("Pairs the student sees", "student's pairs (the teacher's: 3,000)", True),
    "noise": ("Label noise", "share of the student's labels turned round", False)}
BARS = "true reward; bars: 95% interval of the difference from DPO"
PANELS = {"full": "the teacher knows all", "facts": "facts alone", "manners": "manners alone",
          "contrary": "facts, bad manners"}
STYLE = """<style>svg { background: #fff; color: #222; font: 11px sans-serif }
text { fill: currentColor } circle { fill: currentColor }
path, polyline { stroke: currentColor; fill: none; stroke-width: 1.5 }
.grid { stroke: #ddd; stroke-width: 1 } .lead { stroke-dasharray: 2 3; stroke-width: 1 }
.right { text-anchor: end } .middle { text-anchor: middle } .small { font-size: 9px }
.title { font-weight: bold; font-size: 12px }</style>"""


def svg(width, height, title, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}">\n{STYLE}\n'
            f'<text class="title" x="8" y="16">{escape(title)}</text>\n{chr(10).join(parts)}\n'
            '</svg>\n')


def figure(lines, title, x_title, y_title, x_log=False, marks=(), joined=True):
    """SVG. lines: name -> [(x, y, half-width of an interval or None)]; marks: texts at points."""
    points = [point for line in lines.values() for point in line]
    xs = [x for x, _, _ in points]
    low = min(y - (half or 0) for _, y, half in points)
    high = max(y + (half or 0) for _, y, half in points)
    forward = math.log if x_log else float
    x, y = scale(forward(min(xs)), forward(max(xs)), 48, 330), scale(low, high, 226, 46)
    parts = [f'<text x="8" y="30">{escape(y_title)}</text>'
             f'<text class="middle" x="189" y="266">{escape(x_title)}</text>']
    parts += [f'<path class="grid" d="M48 {y(t):.1f}H330"/>'
              f'<text class="right" x="42" y="{y(t) + 4:.1f}">{t:g}</text>'
              for t in ticks(low, high)]
    parts += [f'<text class="middle" x="{x(forward(t)):.1f}" y="246">{t:g}</text>'
              for t in x_ticks(xs, x_log)]
    ends = {}
    for name, line in lines.items():
        colour = COLOURS[LINES.index(name)]
        places = [(x(forward(a)), y(b), half) for a, b, half in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)
        drawn = f'<polyline points="{path}"/>' if joined else ""
        drawn += "".join(f'<path d="M{a:.1f} {b - y(0) + y(half):.1f}V{b + y(0) - y(half):.1f}"/>'
                         for a, b, half in places if half)
        drawn += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b, _ in places)
        drawn += "".join(f'<text class="small" x="{a + 5:.1f}" y="{b + 12:.1f}">{escape(mark)}'
                         '</text>' for (a, b, _), mark in zip(places, marks))
        parts.append(f'<g style="color:{colour}">{drawn}</g>')
        ends[name] = colour, *max(places)[:2]
    names = sorted(ends, key=lambda name: ends[name][2])
    for name, height in zip(names, spread([ends[name][2] for name in names], 14, 226)):
        colour, a, b = ends[name]
        parts.append(f'<g style="color:{colour}"><path class="lead" d="M{a + 4:.1f} {b:.1f}L338 '
                     f'{height:.1f}"/><text x="341" y="{height + 4:.1f}">{escape(name)}</text></g>')
    return svg(480, 276, title, parts)


def x_ticks(xs, x_log):
    """The values themselves where they are few, else round numbers, or powers of ten."""
    if len(set(xs)) < 8:
        return sorted(set(xs))
    if not x_log:
        return ticks(min(xs), max(xs))
    return [10.0 ** k for k in range(math.ceil(math.log10(min(xs))),
                                     math.floor(math.log10(max(xs))) + 1)]


def swept(record, option):
    """name -> [(x, mean true reward, interval of the paired difference from DPO at the same x)]."""
    groups = grouped(record["rows"], lambda row: (plain_name(row), option_of(row, option, record)))
    lines = {}
    for (name, x), rows in groups.items():
        point = x, summary(rows, "reward")[0], summary(rows, "vs_dpo")[1]
        lines.setdefault(name, []).append(point)
    return level({name: sorted(line) for name, line in lines.items()})


def level(lines):
    """The same lines; a DPO of one point becomes a level line through all the others."""
    if len(lines["dpo"]) > 1:
        return lines
    xs = [x for name, line in lines.items() if name != "dpo" for x, _, _ in line]
    return {**lines, "dpo": [(x, lines["dpo"][0][1], None) for x in (min(xs), max(xs))]}


def frontier(record):
    """Lines of (KL, reward), a point for each beta in rising order of KL."""
    groups = grouped(record["rows"], lambda row: (plain_name(row), option_of(row, "beta", record)))
    lines = {}
    for (name, beta), rows in sorted(groups.items(), key=lambda item: item[0][1]):
        point = summary(rows, "kl")[0], summary(rows, "reward")[0], None
        lines.setdefault(name, []).append(point)
    return lines


def stored(record):
    """Lines of (bytes, reward): KD on fewer pairs, from fewer probabilities, and single points."""
    lines = {}
    for name, rows in grouped(record["rows"]).items():
        if rows[0]["method"] == "kd":
            name = "kd, fewer probabilities" if rows[0]["control"] else "kd, fewer pairs"
        point = (summary(rows, "bytes")[0], summary(rows, "reward")[0], summary(rows, "vs_dpo")[1])
        lines.setdefault(name, []).append(point)
    return level({name: sorted(line) for name, line in lines.items()})


def gains(record):
    """Points of (reward of the teacher, difference from DPO), one a seed."""
    groups = grouped(record["rows"])
    teachers = {row["seed"]: row["reward"] for row in groups["teacher"]}
    return {name: sorted((teachers[row["seed"]], row["vs_dpo"], None) for row in groups[name])
            for name in ("tvkd implicit/value", "kd", "dpo, teacher's soft labels")}


def forest(record):
    """Difference from DPO: a line a method, a panel a teacher."""
    groups = grouped([row for row in record["rows"] if row["method"] != "dpo" or row["control"]],
                     lambda row: (name_of(row), row["teacher"]))
    names = list(dict.fromkeys(name for name, _ in groups))
    points = {key: summary(rows, "vs_dpo") for key, rows in groups.items()}
    low = min(0, *(mean - (half or 0) for mean, half in points.values()))
    high = max(0, *(mean + (half or 0) for mean, half in points.values()))
    parts, bottom = [], 50 + 18 * len(names)
    for j, name in enumerate(names):
        parts.append(f'<text class="right" x="190" y="{58 + 18 * j}">{escape(name)}</text>')
    for i, teacher in enumerate(TEACHERS):
        left = 202 + 152 * i
        x = scale(low, high, left, left + 122)
        parts.append(f'<text x="{left}" y="36">{PANELS[teacher]}</text>'
                     f'<path d="M{x(0):.1f} 44V{bottom}"/>')
        parts += [f'<path class="grid" d="M{x(t):.1f} 44V{bottom}"/><text class="middle" '
                  f'x="{x(t):.1f}" y="{bottom + 14}">{t:g}</text>' for t in ticks(low, high, 4)]
        for j, name in enumerate(names):
            mean, half = points[name, teacher]
            bar = f'<path d="M{x(mean - half):.1f} {54 + 18 * j}H{x(mean + half):.1f}"/>' \
                if half else ""
            parts.append(f'<g style="color:{COLOURS[j % len(COLOURS)]}">{bar}'
                         f'<circle cx="{x(mean):.1f}" cy="{54 + 18 * j}" r="3"/></g>')
    return svg(814, bottom + 24, "True reward minus DPO, by what the teacher was taught", parts)


def sweep_figure(record, name):
    title, x_title, x_log = TITLES[name]
    return figure(swept(record, SWEEPS[name]), title, x_title, BARS, x_log)


def frontier_figure(record):
    soft = "dpo, teacher's soft labels"
    betas = sorted({option_of(row, "beta", record) for row in record["rows"]
                    if plain_name(row) != soft})
    lines = frontier(record)
    lines[soft] = lines[soft][-len(betas):]     # the betas of the others, so that marks fit
    return figure(lines, "Reward and distance from the reference",
                  "KL to the reference, nats per response",
                  "true reward; beside each point its beta", marks=[f"{beta:g}" for beta in betas])


def bytes_figure(record):
    return figure(stored(record), "What is stored of the teacher", "bytes per response token",
                  BARS, True)


def gains_figure(record):
    return figure(gains(record), "Weak and strong teachers", "true reward of the teacher",
                  "true reward minus DPO; a point a seed", joined=False)


FIGURES = {"frontier": ("frontier", frontier_figure), "bytes": ("bytes", bytes_figure),
           "gains": ("main", gains_figure), "knowledge": ("knowledge", forest)}


def figures(records):
    """File name -> SVG, of the records there are."""
    drawn = {name: built(name, sweep_figure, records[name], name)
             for name in TITLES if name in records}
    return drawn | {file: built(name, draw, records[name])
                    for file, (name, draw) in FIGURES.items() if name in records}
