"""Tables and figures of README "Results", from the records that evidence.py leaves in results/. Nothing is trained.

    python figures.py           write what stands between the README's marks <!-- NAME --> and <!-- /NAME --> anew, and docs/*.svg

Every mean is over seeds, every ± a 95% interval of that mean over seeds (Student's t). "Minus DPO" is paired: the difference,
seed by seed, to DPO from the same student, on the same pairs and prompts (for KD on fewer pairs: to DPO on all of them).
"""

import argparse
import io
import json
import math
import re
import statistics
import sys
from contextlib import redirect_stdout
from html import escape
from pathlib import Path

from report import COLOURS, interval, scale, show_psi, spread, summary, ticks

ROOT = Path(__file__).parent
CONTROLS = {"shuffled": "psi of other pairs", "plus": "plus sign", "beta": "beta / 2", "relabel": "teacher's labels",
            "soft": "teacher's soft labels", "vocabulary": "another vocabulary"}
NAMES = {"value": "tvkd implicit/value", "hold": "tvkd logits/hold", "zero": "tvkd implicit/zero"}
LINES = ("dpo", "tvkd implicit/value", "kd", "dpo, teacher's soft labels", "sft", "kd, fewer pairs", "kd, fewer probabilities")
COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"), ("accuracy, labels", "pref_acc", ".3f"),
           ("minus DPO", "acc_vs_dpo", "+.3f"),
           ("accuracy, truth", "true_acc", ".3f"), ("KL", "kl", ".2f"), ("tokens", "length", ".1f"))


def name_of(row):
    """A row of a record by name, as the tables have it."""
    name = NAMES[row["terminal"]] if row["method"] == "tvkd" else row["method"]
    special = CONTROLS.get(row["control"], "")
    if row["control"] == "top":
        special = f"top {row['dose']:g}"
    elif row["control"] == "gauge":
        special = f"c(s_t) = {row['dose']:+g} t"
    elif row["method"] == "kd" and "student_pairs" in row["options"]:
        n = row["options"]["student_pairs"]
        special = f"on {n} pair{'s' * (n > 1)}"
    return f"{name}, {special}" if special else name


def identity(row):
    """Which cell a row is of, the same in every record that has it."""
    names = ("method", "value", "terminal", "control", "dose", "options", "split")
    return json.dumps([row[name] for name in names], sort_keys=True)


def grouped(rows, of=name_of):
    """Rows of all seeds -> {name: rows}, in the order of the record."""
    groups = {}
    for row in rows:
        groups.setdefault(of(row), []).append(row)
    return groups


def cell(rows, key, form):
    """Mean over seeds and its interval, "2.36 ± 0.46"; "-" where unknown."""
    mean, half = summary(rows, key)
    return "-" if mean is None else f"{mean:{form}}" + ("" if half is None else f" ± {half:{form.strip('+')}}")


def markdown(header, rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] + ["---:"] * (len(header) - 1), *rows))


# ---------------------------------------------------------------------------------------------------------------------------
# Which settings

def without_setting(row):
    """What a row trains, whatever its steps and learning rate."""
    options = {name: value for name, value in row["options"].items() if name not in ("steps", "lr")}
    return json.dumps([row["method"], row["terminal"], row["control"], options], sort_keys=True)


def choices(record):
    """The record of `tune` -> {without_setting: {(steps, learning rate): mean validation reward}}."""
    scores = {}
    for row in record["rows"]:
        setting = tuple(row["options"].get(name, record["options"][name]) for name in ("steps", "lr"))
        scores.setdefault(without_setting(row), {}).setdefault(setting, []).append(row["reward"])
    return {kind: {setting: statistics.fmean(x) for setting, x in found.items()} for kind, found in scores.items()}


def settings(record):
    """A line a method, a column a setting of the grid; the chosen one in bold."""
    found, names = choices(record), {without_setting(row): name_of(row) for row in record["rows"]}
    grid = list(next(iter(found.values())))
    lines = [[names[kind], *(f"**{scores[s]:.2f}**" if s == max(scores, key=scores.get) else f"{scores[s]:.2f}" for s in grid)]
             for kind, scores in found.items()]
    return markdown(["steps, learning rate", *(f"{steps}, {lr:g}" for steps, lr in grid)], lines)


# ---------------------------------------------------------------------------------------------------------------------------
# Tables

def comparison(record):
    """A line a setting, over all seeds."""
    lines, of_name = [], grouped(record["rows"])
    truth_known = any(row["reward"] is not None for row in record["rows"])
    columns = [column for column in COLUMNS if column[1] not in (
        ("acc_vs_dpo",) if truth_known else ("reward", "vs_dpo", "true_acc"))]
    for name, rows in of_name.items():
        bytes_ = statistics.fmean(row["bytes"] for row in rows)
        stored = "-" if name == "teacher" else f"{bytes_:,.0f}" if bytes_ >= 10 else f"{bytes_:.2g}"
        lines.append([name, *(cell(rows, key, form) for _, key, form in columns), stored])
    return markdown(["model", *(title for title, _, _ in columns), "bytes"], lines)


def twice(record, again):
    """Differences to DPO of the record and of the same experiment made again by later code, settings chosen anew."""
    first, second = ({name: cell(rows, "vs_dpo", "+.2f") for name, rows in grouped(record["rows"]).items()}
                     for record in (record, again))
    return markdown(["model", "minus DPO", "again"], [[name, first[name], second[name]] for name in first if first[name] != "-"])


def values(record):
    """Correlation and agreement with the true reward, on the student's and on held-out pairs."""
    lines = []
    for (kind, split), rows in grouped(record["rows"], lambda row: (row["value"], row["split"])).items():
        where = "the student's pairs" if split == "train" else "held-out pairs"
        lines.append([f"{kind}, {where}", str(rows[0]["n"]), cell(rows, "correlation", "+.2f"), cell(rows, "agrees", ".3f")])
    return markdown(["value", "pairs a seed", "correlation", "same sign"], lines)


def words(record):
    """Mean psi of words by kind, on held-out pairs."""
    kinds = (("right", "a right fact or thing", "+1"), ("wrong", "a wrong fact or thing", "-1"),
             ("polite", "a polite sentence", "+0.5"), ("rude", "a rude sentence", "-0.5"))
    found = grouped([row for row in record["rows"] if row["split"] == "test"], lambda row: row["value"])
    lines = []
    for kind, title, worth in kinds:
        means = [[row["words"][kind]["psi"] for row in rows] for rows in found.values()]
        lines.append([title, worth, *(f"{statistics.fmean(x):+.2f} ± {interval(x):.2f}" for x in means)])
    return markdown(["after", "true reward", *(f"psi, {kind}" for kind in found)], lines)


def three_pairs(record):
    """psi of every token of three held-out pairs of seed 0, as the terminal shows it."""
    text = io.StringIO()
    with redirect_stdout(text):
        for row in record["rows"]:
            for pair in row.get("pairs", ()):
                if row["value"] == "implicit":
                    print(f"\n{pair['prompt']}", end="")
                show_psi(pair, colour=False, width=118)
    return f"```\n{text.getvalue().strip()}\n```"


def sweep_table(record, title, x_of, keys):
    """A line a value of what is swept; of each model that was trained at all of them the columns `keys`."""
    of_column, at = {key: (heading, form) for heading, key, form in COLUMNS}, grouped(record["rows"], x_of)
    names = [name for name, rows in grouped(record["rows"], plain_name).items() if len({x_of(row) for row in rows}) > 1]
    columns = [(name, key) for name in names for key in keys if (name, key) != ("dpo", "vs_dpo")]
    lines = []
    for x in sorted(at):
        by_name = grouped([row for row in at[x] if plain_name(row) in names], plain_name)
        lines.append([f"{x:g}", *(cell(by_name[name], key, of_column[key][1]) for name, key in columns)])
    return markdown([title, *(f"{name}, {of_column[key][0]}" for name, key in columns)], lines)


# ---------------------------------------------------------------------------------------------------------------------------
# Figures

def plain_name(row):
    """The name of a line in a figure, whatever is swept along it."""
    return name_of({**row, "control": row["control"] if row["control"] in CONTROLS else "", "options": {}})


def figure(lines, title, x_title, y_title, x_log=False, marks=()):
    """SVG. lines: name -> [(x, y, half-width of an interval or None)]; marks: a text beside each point of the lines so named."""
    points = [point for line in lines.values() for point in line]
    xs = [x for x, _, _ in points]
    low = min(y - (half or 0) for _, y, half in points)
    high = max(y + (half or 0) for _, y, half in points)
    forward = math.log if x_log else float
    x, y = scale(forward(min(xs)), forward(max(xs)), 48, 330), scale(low, high, 226, 46)
    parts = [f'<path class="grid" d="M48 {y(t):.1f}H330"/><text class="right" x="42" y="{y(t) + 4:.1f}">{t:g}</text>'
             for t in ticks(low, high)]
    at = sorted(set(xs)) if len(set(xs)) < 8 else ticks(min(xs), max(xs))
    if x_log and len(set(xs)) >= 8:
        at = [10.0 ** k for k in range(math.ceil(math.log10(min(xs))), math.floor(math.log10(max(xs))) + 1)]
    parts += [f'<text class="middle" x="{x(forward(t)):.1f}" y="246">{t:g}</text>' for t in at]
    ends = {}
    for name, line in lines.items():
        colour = COLOURS[LINES.index(name)]
        places = [(x(forward(a)), y(b), half) for a, b, half in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)
        bars = "".join(f'<path d="M{a:.1f} {b - y(0) + y(half):.1f}V{b + y(0) - y(half):.1f}"/>' for a, b, half in places if half)
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b, _ in places)
        texts = "".join(f'<text class="small" x="{a + 5:.1f}" y="{b + 12:.1f}">{escape(mark)}</text>'
                        for (a, b, _), mark in zip(places, marks))
        parts.append(f'<g style="color:{colour}"><polyline points="{path}"/>{bars}{dots}{texts}</g>')
        ends[name] = colour, *max(places)[:2]
    names = sorted(ends, key=lambda name: ends[name][2])
    for name, height in zip(names, spread([ends[name][2] for name in names], 14, 226)):
        colour, a, b = ends[name]
        parts.append(f'<g style="color:{colour}"><path class="lead" d="M{a + 4:.1f} {b:.1f}L338 {height:.1f}"/>'
                     f'<text x="341" y="{height + 4:.1f}">{escape(name)}</text></g>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 276" role="img" aria-label="{escape(title)}">
<style>svg {{ background: #fff; color: #222; font: 11px sans-serif }} text {{ fill: currentColor }}
path, polyline {{ stroke: currentColor; fill: none; stroke-width: 1.5 }} circle {{ fill: currentColor }}
.grid {{ stroke: #ddd; stroke-width: 1 }} .lead {{ stroke-dasharray: 2 3; stroke-width: 1 }} .right {{ text-anchor: end }}
.middle {{ text-anchor: middle }} .small {{ font-size: 9px }} .title {{ font-weight: bold; font-size: 12px }}</style>
<text class="title" x="8" y="16">{escape(title)}</text><text x="8" y="30">{escape(y_title)}</text>
<text class="middle" x="189" y="266">{escape(x_title)}</text>
{chr(10).join(parts)}
</svg>
"""


SWEEPS = {      # what is swept, the figure's title, its x axis, whether that is logarithmic
    "alpha": ("alpha", "Weight of the teacher's value", "alpha", False),
    "pairs": ("student_pairs", "Pairs the student sees", "student's pairs (the teacher's: 3,000)", True),
    "width": ("student_width", "Size of the student", "channels of the student (the teacher's: 96)", True),
    "noise": ("dose", "Label noise", "share of the student's labels turned round", False),
    "frontier": ("beta", "Reward and distance from the reference", "KL to the reference, nats per response", False),
    "length": ("steps", "Length of training", "steps", True)}
BARS = "true reward; bars: 95% interval of the difference to DPO"


def option_of(name, record):
    """-> what gives a row's value of an option, or its dose."""
    return lambda row: row["dose"] if name == "dose" else row["options"].get(name, record["options"][name])


def lines_of(record, x_of):
    """Lines of a figure: name -> [(x, mean true reward, interval of the paired difference to DPO at the same x)]."""
    lines = {}
    for (name, x), rows in grouped(record["rows"], lambda row: (plain_name(row), x_of(row))).items():
        lines.setdefault(name, []).append((x, summary(rows, "reward")[0], summary(rows, "vs_dpo")[1]))
    return {name: sorted(line) for name, line in lines.items()}


def level(lines):
    """The same lines, with DPO, where it is a single point, as a level line through all the others."""
    xs = [x for name, line in lines.items() if name != "dpo" for x, _, _ in line]
    dpo = lines["dpo"] if len(lines["dpo"]) > 1 else [(x, lines["dpo"][0][1], None) for x in (min(xs), max(xs))]
    return {**lines, "dpo": dpo}


def frontier(record):
    """Lines of (KL, reward), a point a beta."""
    lines = {}
    for (name, _), rows in grouped(record["rows"], lambda row: (plain_name(row), option_of("beta", record)(row))).items():
        lines.setdefault(name, []).append((summary(rows, "kl")[0], summary(rows, "reward")[0], None))
    return lines


def stored(record):
    """Lines of (bytes, reward): KD on fewer pairs, KD from fewer probabilities, and single points."""
    lines = {}
    for name, rows in grouped(record["rows"]).items():
        if rows[0]["method"] == "kd":
            name = "kd, fewer probabilities" if rows[0]["control"] else "kd, fewer pairs"
        point = (summary(rows, "bytes")[0], summary(rows, "reward")[0], summary(rows, "vs_dpo")[1])
        lines.setdefault(name, []).append(point)
    return level({name: sorted(line) for name, line in lines.items()})


def figures(records):
    """File name -> SVG."""
    found = {}
    for name, (option, title, x_title, x_log) in SWEEPS.items():
        if name in records and name != "frontier":
            found[name] = figure(level(lines_of(records[name], option_of(option, records[name]))), title, x_title, BARS, x_log)
    if "frontier" in records:
        betas = sorted({option_of("beta", records["frontier"])(row) for row in records["frontier"]["rows"]})
        found["frontier"] = figure(frontier(records["frontier"]), *SWEEPS["frontier"][1:3],
                                   "true reward; beside each point its beta", marks=[f"{beta:g}" for beta in betas])
    if "bytes" in records:
        found["bytes"] = figure(stored(records["bytes"]), "What is stored of the teacher", "bytes per response token", BARS, True)
    return found


# ---------------------------------------------------------------------------------------------------------------------------
# The README

def tables(records):
    """Mark of the README -> the text that stands there."""
    found = {name: comparison(records[name]) for name in ("main", "bytes", "gauge", "real") if name in records}
    if "again" in records:
        found["again"] = twice(records["main"], records["again"])
    if "tune" in records:
        found["tune"] = settings(records["tune"])
    if "values" in records:
        found |= {"values": values(records["values"]), "words": words(records["values"]), "psi": three_pairs(records["values"])}
    for name, (option, _, x_title, _) in SWEEPS.items():
        if name in records:
            keys = ("reward", "vs_dpo") + (("kl",) if name in ("alpha", "frontier", "length") else ())
            x_title = "beta" if name == "frontier" else x_title
            found[name] = sweep_table(records[name], x_title, option_of(option, records[name]), keys)
    return found


def cost(records):
    """What the records took to make, and on what. A cell that several experiments share was trained, and counts, once."""
    made = sorted({f"{m['machine']}, Python {m['python']}, torch {m['torch']}" for m in (r["made"] for r in records.values())})
    seconds, parts = {}, []
    for name, record in ((name, record) for name, record in records.items() if name != "again"):
        new = {(row["seed"], identity(row)): row["seconds"] for row in record["rows"]}
        parts.append(f"{name} {sum(x for cell, x in new.items() if cell not in seconds) / 60:.0f}")
        seconds |= new
    return (f"{len(seconds)} cells took {sum(seconds.values()) / 60:.0f} minutes of one thread, two side by side "
            f"({', '.join(parts)}; what an earlier one has counts there): {'; '.join(made)}.")


def load(results):
    """Name -> record, of every record in the folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}


def filled(text, found):
    """The README with what stands between each pair of marks made new. Raises ValueError for a mark that nothing is found for."""
    def new(match):
        if match[1] not in found:
            raise ValueError(f"README.md: expected a record in results/ for the mark {match[1]}, got {', '.join(found)}")
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- /{match[1]} -->"
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", new, text, flags=re.DOTALL)


def main(argv=None, root=ROOT):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    try:
        records, readme = load(root / "results"), root / "README.md"
        text = filled(readme.read_text(encoding="utf-8"), {**tables(records), "cost": cost(records)})
        drawn = figures(records)
        readme.write_text(text, encoding="utf-8")
        for name, svg in drawn.items():
            (root / "docs" / f"{name}.svg").write_text(svg, encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
