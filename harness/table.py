"""The comparison table and psi per token, as text for the terminal. Standard library only."""

import statistics
from dataclasses import dataclass, field

from harness.numbers import interval

COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"),   # title, key, format
           ("held-out accuracy", "pref_acc", ".3f"), ("KL to reference", "kl", ".2f"),
           ("tokens", "length", ".1f"))
# Backgrounds of a 256-colour terminal, faint to full: this token raises the teacher's value (blue)
# or lowers it (orange).
MORE, LESS = (189, 153, 117, 75), (230, 223, 216, 208)


@dataclass
class Row:
    """One row of the table: a method, measured on one seed.

    value, terminal: which teacher value a tvkd row used and what its last state got, else None.
    numbers: reward, pref_acc, kl, ... by name; None where unknown, "_ci" after a name its interval.
    """
    method: str
    value: str | None = None
    terminal: str | None = None
    seed: int = 0
    numbers: dict = field(default_factory=dict)

    @property
    def label(self):
        """The row's name in the table: "dpo", "tvkd implicit/value"."""
        return f"{self.method} {self.value}/{self.terminal}" if self.value else self.method

    @classmethod
    def of(cls, label, seed):
        """The row with this label, still without numbers."""
        method, _, kind = label.partition(" ")
        value, _, terminal = kind.partition("/")
        return cls(method, value or None, terminal or None, seed)

    def flat(self):
        """One flat dict, as it stands in results.json."""
        return {"method": self.method, "value": self.value, "terminal": self.terminal,
                "seed": self.seed, **self.numbers}

    @classmethod
    def from_flat(cls, flat):
        """What `flat` gave -> Row."""
        numbers = dict(flat)
        names = [numbers.pop(name, None) for name in ("method", "value", "terminal", "seed")]
        return cls(*names, numbers)


def printable(text):
    """printable again, since this file needs only the standard library."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


# ------------------------------------------------------------------------------------------------
# The comparison table

def summary(rows, key):
    """Mean and 95% interval of one method's rows; (None, None) where the number is unknown.

    The interval is over seeds where there are several, else the row's own, over prompts or pairs.
    """
    known = [row.numbers[key] for row in rows if row.numbers.get(key) is not None]
    if not known:
        return None, None
    half = interval(known) if len(rows) > 1 else rows[0].numbers.get(f"{key}_ci")
    return statistics.fmean(known), half


def by_label(rows):
    """label -> the rows with that label, one per seed, in the order of the table."""
    methods = {}
    for row in rows:
        methods.setdefault(row.label, []).append(row)
    return methods


def known_columns(rows):
    """The columns with at least one number: real preferences have no true reward."""
    return [column for column in COLUMNS
            if any(row.numbers.get(column[1]) is not None for row in rows)]


def table(rows):
    """The comparison table as text."""
    seeds, columns = sorted({row.seed for row in rows}), known_columns(rows)
    lines = [f"{'model':<20}" + "".join(f"{title:>18}" for title, _, _ in columns)]
    for label, of_method in by_label(rows).items():
        cells = []
        for _, key, form in columns:
            mean, half = summary(of_method, key)
            margin = "" if half is None else f" \u00b1 {half:{form.strip('+')}}"
            cells.append("-" if mean is None else f"{mean:{form}}{margin}")
        lines.append(f"{printable(label):<20}" + "".join(f"{cell:>18}" for cell in cells))
    over = (f"{len(seeds)} seeds" if len(seeds) > 1 else
            f"held-out prompts or pairs, of the one run with seed {seeds[0]}")
    return "\n".join([
        *lines, f"\u00b1: 95% interval over {over}. "
        f"Accuracy on n = {rows[0].numbers['pref_n']} held-out pairs.",
        "KL in nats per response, on the model's own samples; "
        "the teacher's reference is the teacher before DPO."])


# ------------------------------------------------------------------------------------------------
# psi per token

def show_psi(pair, colour, width, most=60):
    """Print psi of each token of a pair as [+0.12], tokens tinted where the terminal has colours.

    width: of the terminal, in characters; most: tokens printed of each response.
    """
    largest = max(abs(psi) for name in ("chosen", "rejected") for psi in pair[name]["psi"]) or 1.0
    for name in ("chosen", "rejected"):
        tokens, values = pair[name]["tokens"], pair[name]["psi"]
        print(f"\npsi per token, {pair['value']}/{pair['terminal']}, {name} "
              f"(sum {sum(values):+.2f}):")
        lines, used = [[]], 0
        for token, psi in zip(tokens[:most], values):
            word, number = printable(token.strip()) or "\u2423", f"[{psi:+.2f}]"
            # Wrapped here, not by the terminal: the escape codes of a tint have no width.
            if used + len(word + number) + 3 > width and lines[-1]:
                lines.append([])
                used = 0
            used += len(word + number) + 1
            level = round(4 * abs(psi) / largest)
            if colour and level:
                word = f"\033[38;5;16;48;5;{(MORE if psi > 0 else LESS)[level - 1]}m{word}\033[0m"
            lines[-1].append(word + number)
        more = f" ... and {len(tokens) - most} more" if len(tokens) > most else ""
        print("\n".join("  " + " ".join(line) for line in lines) + more)
