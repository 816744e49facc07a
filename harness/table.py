"""The comparison table and psi per token, as text for the terminal."""

from dataclasses import dataclass, field

from harness.errors import printable
from harness.numbers import plus_minus, summary

COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"),   # title, key, format
           ("held-out accuracy", "pref_acc", ".3f"), ("minus DPO", "acc_vs_dpo", "+.3f"),
           ("KL to reference", "kl", ".2f"), ("tokens", "length", ".1f"))
MORE, LESS = (189, 153, 117, 75), (230, 223, 216, 208)     # of 256 colours: blue, orange


@dataclass
class Row:
    """One row of the table: a method, measured on one seed."""
    method: str
    value: str | None = None        # the teacher's value that a tvkd row used
    terminal: str | None = None     # and the potential of its last state
    seed: int = 0
    numbers: dict = field(default_factory=dict)     # by name; with "_ci" behind it the interval

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
        names = ("method", "value", "terminal", "seed")
        return cls(*map(flat.get, names), {k: x for k, x in flat.items() if k not in names})


def mean_of(rows, key):
    """Mean and 95% interval of one method's rows: over seeds, or one seed's own, over prompts."""
    if len(rows) == 1:
        return rows[0].numbers.get(key), rows[0].numbers.get(f"{key}_ci")
    return summary([row.numbers.get(key) for row in rows])


def by_label(rows):
    """label -> the rows with that label, one per seed, in the order of the table."""
    methods = {}
    for row in rows:
        methods.setdefault(row.label, []).append(row)
    return methods


def known_columns(rows):
    """The columns that a row has a number for. Where the true reward is known, DPO's is enough."""
    known = {key for row in rows for key, x in row.numbers.items() if x is not None}
    known -= {"acc_vs_dpo"} if "reward" in known else set()
    return [column for column in COLUMNS if column[1] in known]


def footnote(rows):
    """What the numbers of the table are."""
    seeds = sorted({row.seed for row in rows})
    over = (f"{len(seeds)} seeds" if len(seeds) > 1 else
            f"held-out prompts or pairs, of the one run with seed {seeds[0]}")
    return (f"\u00b1: 95% interval by Student's t over {over}. Accuracy on n = "
            f"{rows[0].numbers['pref_n']} held-out pairs.\nKL in nats per response, on the model's "
            "own samples; the teacher's reference is the teacher before DPO.")


def table(rows):
    """The comparison table as text."""
    columns = known_columns(rows)
    lines = [f"{'model':<20}" + "".join(f"{title:>18}" for title, _, _ in columns)]
    for label, of_method in by_label(rows).items():
        cells = [plus_minus(*mean_of(of_method, key), form) for _, key, form in columns]
        lines.append(f"{printable(label):<20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join([*lines, footnote(rows)])


def show_psi(pair, colour, width, most=60):
    """Print psi behind each token of a pair, red[+0.12], in lines of at most `width` characters.

    colour: tint the tokens, for a terminal of 256 colours. most: tokens printed of each response.
    """
    largest = max(abs(psi) for name in ("chosen", "rejected") for psi in pair[name]["psi"]) or 1.0
    for name in ("chosen", "rejected"):
        tokens, values = pair[name]["tokens"], pair[name]["psi"]
        print(f"\npsi per token, {pair['value']}/{pair['terminal']}, {name} "
              f"(sum {sum(values):+.2f}):")
        line, room = " ", width - 1
        for token, psi in zip(tokens[:most], values):
            word, number = printable(token.strip()) or "\u2423", f"[{psi:+.2f}]"
            if len(word + number) + 1 > room and line.strip():
                print(line)
                line, room = " ", width - 1
            room -= len(word + number) + 1              # the escape codes of a tint have no width
            level = round(4 * abs(psi) / largest)
            if colour and level:
                word = f"\033[38;5;16;48;5;{(MORE if psi > 0 else LESS)[level - 1]}m{word}\033[0m"
            line += f" {word}{number}"
        print(line + (f" ... and {len(tokens) - most} more" if len(tokens) > most else ""))
