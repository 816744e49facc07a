"""The figures of the documents as SVG, from the records. Bars are 95% intervals over seeds."""

import math
import statistics
from html import escape

from evidence.records import (HEADINGS, built, grouped, known, mean, name_of, plain_name,
                              point)
from harness.report import scale

COLOURS = ("#2f81d6", "#c8741a", "#1f9d78", "#c2559a",
           "#8069d8", "#d9534a", "#84931c", "#8a8a8a")
STYLE = """<style>svg { background: #fff; color: #222; font: 11px sans-serif }
text { fill: currentColor } circle { fill: currentColor }
path { stroke: currentColor; fill: none; stroke-width: 1.5 }
.grid { stroke: #ddd; stroke-width: 1 }
.right { text-anchor: end } .middle { text-anchor: middle }
.title { font-weight: bold; font-size: 12px }</style>"""


def ticks(low, high, most=5):
    """Round numbers from low to high, at most `most` + 1: ticks(0, 60) = [0, 20, 40, 60]."""
    step = 10 ** math.floor(math.log10(((high - low) or 1) / most))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(points, title, margin=190):
    """SVG of {(line, panel): (mean, half-width or None)}: a line each, a panel beside the other.

    margin: pixels for the names of the lines.
    """
    lines, panels = (list(dict.fromkeys(names)) for names in zip(*points))
    low = min(0, *(mean - (half or 0) for mean, half in points.values()))
    high = max(0, *(mean + (half or 0) for mean, half in points.values()))
    parts, bottom = [], 50 + 18 * len(lines)
    for j, name in enumerate(lines):
        parts.append(f'<text class="right" x="{margin}" y="{58 + 18 * j}">{escape(name)}</text>')
    for i, panel in enumerate(panels):
        left = margin + 12 + 152 * i
        x = scale(low, high, left, left + 122)
        parts.append(f'<text x="{left}" y="36">{escape(panel)}</text>'
                     f'<path d="M{x(0):.1f} 44V{bottom}"/>')
        parts += [f'<path class="grid" d="M{x(t):.1f} 44V{bottom}"/><text class="middle" '
                  f'x="{x(t):.1f}" y="{bottom + 14}">{t:g}</text>' for t in ticks(low, high, 4)]
        for j, name in enumerate(lines):
            mean, half = points[name, panel]
            bar = f'<path d="M{x(mean - half):.1f} {54 + 18 * j}H{x(mean + half):.1f}"/>' \
                if half else ""
            parts.append(f'<g style="color:{COLOURS[j % len(COLOURS)]}">{bar}'
                         f'<circle cx="{x(mean):.1f}" cy="{54 + 18 * j}" r="3"/></g>')
    width, height = margin + 16 + 152 * len(panels), bottom + 24
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}">\n{STYLE}\n'
            f'<text class="title" x="8" y="16">{escape(title)}</text>\n{chr(10).join(parts)}\n'
            '</svg>\n')


def knowledge(record):
    groups = grouped(record["rows"], lambda row: (name_of(row), HEADINGS[row["teacher"]]))
    return forest({place: mean(rows, "vs_dpo") for place, rows in groups.items()
                   if known(rows, "vs_dpo")},
                  "True reward minus DPO, by what the teacher was taught")


def parameters(layers, width):
    """Of a model of the toy task: 12 C^2 and some a block, and the embeddings (453 tokens +- 1)."""
    return layers * (12 * width + 13) * width + (453 + 64 + 2) * width


def sizes(record):
    """A line for each pair of sizes, by the ratio of their parameters; a panel a method."""
    points, rewards = {}, {}
    for (name, *sizes), rows in grouped(record["rows"], lambda row: (plain_name(row), *point(
            row, ("student_width", "student_layers", "teacher_width")))).items():
        width, layers, teacher = sizes
        if name == "teacher":
            rewards[teacher] = statistics.fmean(known(rows, "reward"))
        elif known(rows, "vs_dpo"):
            ratio = parameters(2, teacher) / parameters(layers, width)
            points[ratio, width, layers, teacher, name] = mean(rows, "vs_dpo")
    lines = {(f"{ratio:.1f}: student {width} wide, {layers} layers; teacher {teacher} wide, "
              f"reward {rewards[teacher]:.2f}", name): points[ratio, width, layers, teacher, name]
             for ratio, width, layers, teacher, name in sorted(points)}
    return forest(lines, "True reward minus DPO, by parameters of the teacher over the student's",
                  380)


def figures(records):
    """File name -> SVG, of the records there are."""
    return {name: built(name, draw, records[name])
            for name, draw in (("knowledge", knowledge), ("sizes", sizes)) if name in records}
