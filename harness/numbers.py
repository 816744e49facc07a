"""Numbers as text: means and their 95% intervals, the comparison table, psi per token."""

import math
import statistics
from textwrap import fill

import numpy as np

from harness.errors import printable

COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"),   # title, key, format
           ("held-out accuracy", "pref_acc", ".3f"), ("minus DPO", "acc_vs_dpo", "+.3f"),
           ("KL to reference", "kl", ".2f"), ("tokens", "length", ".1f"))


def t_quantile(freedom):
    """97.5% quantile of Student's t = sqrt(freedom) tan(angle), right to 1e-6 up to freedom = 1000.
    The density of the angle, cos(angle)^(freedom - 1), is summed in trapezoids, cut at 95%."""
    angles = np.linspace(0, math.pi / 2, 50_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.cumsum(density[1:] + density[:-1])
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * area[-1], area, angles[1:]))


def interval(numbers):
    """Half-width of a 95% interval of the mean, by Student's t; None for a single number."""
    n = len(numbers)
    return t_quantile(n - 1) * statistics.stdev(numbers) / math.sqrt(n) if n > 1 else None


def summary(numbers):
    """Numbers, None for an unknown one -> the mean of the known ones and its interval, or None."""
    known = [x for x in numbers if x is not None]
    return (statistics.fmean(known), interval(known)) if known else (None, None)


def plus_minus(mean, half, form):
    """"2.36 ± 0.46", "2.36" where the interval is unknown, "-" where the mean is."""
    margin = "" if half is None else f" \u00b1 {half:{form.strip('+')}}"
    return "-" if mean is None else f"{mean:{form}}{margin}"


def cells(rows):
    """The table as text, cell by cell: the titles, then a line for each method: its mean and 95%
    interval over seeds, or of one seed over prompts."""
    known = {key for row in rows for key, x in row.items() if x is not None}
    known -= {"acc_vs_dpo"} if "reward" in known else set()     # one difference from DPO is enough
    columns, lines = [column for column in COLUMNS if column[1] in known], []
    for label in dict.fromkeys(row["label"] for row in rows):
        group, line = [row for row in rows if row["label"] == label], [printable(label)]
        for _, key, form in columns:
            mean, half = (summary([row[key] for row in group]) if len(group) > 1 else
                          (group[0][key], group[0].get(f"{key}_ci")))
            line.append(plus_minus(mean, half, form))
        lines.append(line)
    return [["model", *(title for title, _, _ in columns)], *lines]


def footnote(rows):
    """What the numbers of the table are."""
    seeds = sorted({row["seed"] for row in rows})
    over = (f"{len(seeds)} seeds" if len(seeds) > 1 else
            f"held-out prompts or pairs, of the one run with seed {seeds[0]}")
    return (f"\u00b1: 95% interval by Student's t over {over}. Accuracy on n = "
            f"{rows[0]['pref_n']} held-out pairs.\nKL in nats per response, on the model's "
            "own samples; the teacher's reference is the teacher before DPO.")


def table(rows):
    """The comparison table as text."""
    lines = [f"{label:<20}" + "".join(f"{cell:>18}" for cell in rest)
             for label, *rest in cells(rows)]
    return "\n".join([*lines, footnote(rows)])


def show_psi(pair, width, most=60):
    """Print psi behind each token of a pair, red[+0.12], in lines of at most `width` characters.
    most: tokens printed of each response."""
    for name in ("chosen", "rejected"):
        tokens, values = pair[name]["tokens"], pair[name]["psi"]
        print(f"\npsi per token, {pair['value']}/{pair['terminal']}, {name} "
              f"(sum {sum(values):+.2f}):")
        words = [f"{printable(token.strip()) or chr(0x2423)}[{psi:+.2f}]"
                 for token, psi in zip(tokens[:most], values)]
        words += [f"... and {len(tokens) - most} more"] * (len(tokens) > most)
        print(fill(" ".join(words), width, initial_indent="  ", subsequent_indent="  ",
                   break_long_words=False, break_on_hyphens=False))
