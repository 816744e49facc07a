"""The figures of the documents as SVG, from the records. Bars are 95% intervals over seeds."""

import math
from html import escape

from evidence.cells import COMPARED, TEACHERS, as_row
from evidence.records import built, grouped, mean, name_of, plain_name, point
from harness.report import COLOURS, scale, spread, ticks

DPO, TVKD, SOFT, KD = (name_of(as_row(cell)) for cell in COMPARED)
LINES = (DPO, TVKD, KD, SOFT, "dpo, teacher's labels")
SWEEPS = {      # the figure's title, what is swept, its x axis, whether that is logarithmic
    "pairs": ("Pairs the student sees", "student_pairs", "student's pairs (the teacher's: 3,000)",
              True),
    "noise": ("Label noise", "dose", "share of the student's labels flipped", False)}
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


def panel(lines, x_title, y_title, x_log=False, marks=(), joined=True):
    """Parts of an SVG, 480 wide and 276 high.

    lines: name -> [(x, y, half-width of an interval or None)]; marks: texts at the points.
    """
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
    few = sorted(set(xs)) if len(set(xs)) < 8 else ticks(min(xs), max(xs))
    parts += [f'<text class="middle" x="{x(forward(t)):.1f}" y="246">{t:g}</text>' for t in few]
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
    return parts


def sweep(record, name):
    """Mean true reward at each value; the interval is that of the paired difference from DPO."""
    title, option, x_title, x_log = SWEEPS[name]
    groups = grouped(record["rows"], lambda row: (plain_name(row), *point(row, (option,))))
    lines = {}
    for (method, x), rows in groups.items():
        lines.setdefault(method, []).append(
            (x, mean(rows, "reward")[0], mean(rows, "vs_dpo")[1]))
    lines = {method: sorted(line) for method, line in lines.items()}
    return svg(480, 276, title, panel(lines, x_title, BARS, x_log))


def frontier(record):
    """Lines of (KL, reward), a point for each beta that all methods have."""
    groups = grouped(record["rows"], lambda row: (plain_name(row), *point(row, ("beta",))))
    betas = sorted({beta for name, beta in groups if name == DPO})
    lines = {name: [(mean(groups[name, beta], "kl")[0],
                     mean(groups[name, beta], "reward")[0], None) for beta in betas]
             for name in (DPO, TVKD, SOFT)}
    return svg(480, 276, "Reward and distance from the reference", panel(
        lines, "KL to the reference, nats per response", "true reward; beside each point its beta",
        marks=[f"{beta:g}" for beta in betas]))


def forest(record):
    """Difference from DPO: a line a method, a panel a teacher."""
    groups = grouped([row for row in record["rows"] if name_of(row) != DPO],
                     lambda row: (name_of(row), row["teacher"]))
    names = list(dict.fromkeys(name for name, _ in groups))
    points = {key: mean(rows, "vs_dpo") for key, rows in groups.items()}
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


def parameters(layers, width):
    """Of a model of the toy task, roughly: 12 C^2 a block, and its embedding."""
    return 12 * layers * width ** 2 + (453 + 64) * width


def sizes(record):
    """Difference from DPO: by the ratio of parameters, and by the teacher's reward, a point a seed.
    """
    by_ratio, by_reward, teachers = {}, {}, {}
    for row in record["rows"]:
        width, layers, teacher = point(row, ("student_width", "student_layers", "teacher_width"))
        if row["method"] == "teacher":
            teachers[row["seed"], teacher] = row["reward"]
        elif row["vs_dpo"] is not None:
            ratio = parameters(2, teacher) / parameters(layers, width)
            by_ratio.setdefault((plain_name(row), round(ratio, 1)), []).append(row)
            by_reward.setdefault(plain_name(row), []).append(
                (teachers[row["seed"], teacher], row["vs_dpo"], None))
    lines = {}
    for (name, ratio), rows in sorted(by_ratio.items()):
        lines.setdefault(name, []).append((ratio, *mean(rows, "vs_dpo")))
    left = panel(lines, "parameters of the teacher over the student's",
                 "true reward minus DPO; bars: 95% intervals", x_log=True, joined=False)
    right = panel({name: sorted(points) for name, points in by_reward.items()},
                  "true reward of the teacher", "true reward minus DPO; a point a seed and size",
                  joined=False)
    return svg(960, 276, "Sizes of teacher and student",
               [*left, '<g transform="translate(480 0)">', *right, "</g>"])


FIGURES = {"frontier": (frontier,), "knowledge": (forest,), "sizes": (sizes,),
           **{name: (sweep, name) for name in SWEEPS}}


def figures(records):
    """File name -> SVG, of the records there are."""
    return {name: built(name, draw, records[name], *args)
            for name, (draw, *args) in FIGURES.items() if name in records}
