"""The comparison table and psi per token, as text for the terminal."""

from harness.errors import printable
from harness.numbers import plus_minus, summary

COLUMNS = (("true reward", "reward", ".2f"), ("minus DPO", "vs_dpo", "+.2f"),   # title, key, format
           ("held-out accuracy", "pref_acc", ".3f"), ("minus DPO", "acc_vs_dpo", "+.3f"),
           ("KL to reference", "kl", ".2f"), ("tokens", "length", ".1f"))
TINTS = {4: 75, 3: 117, 2: 153, 1: 189, -1: 230, -2: 223, -3: 216, -4: 208}     # blue, orange


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


def show_psi(pair, colour, width, most=60):
    """Print psi behind each token of a pair, red[+0.12], in lines of at most `width` characters.
    colour: tint the tokens, for a terminal of 256 colours. most: tokens printed of each
    response."""
    largest = max(abs(psi) for name in ("chosen", "rejected") for psi in pair[name]["psi"]) or 1.0
    for name in ("chosen", "rejected"):
        tokens, values, column = pair[name]["tokens"], pair[name]["psi"], width
        print(f"\npsi per token, {pair['value']}/{pair['terminal']}, {name} "
              f"(sum {sum(values):+.2f}):", end="")
        for token, psi in zip(tokens[:most], values):
            word, number = printable(token.strip()) or "\u2423", f"[{psi:+.2f}]"
            column += len(word + number) + 1
            if column > width:
                print("\n ", end="")
                column = len(word + number) + 2
            level = round(4 * psi / largest)
            if colour and level:
                word = f"\033[38;5;16;48;5;{TINTS[level]}m{word}\033[0m"
            print(f" {word}{number}", end="")
        print(f" ... and {len(tokens) - most} more" if len(tokens) > most else "")
