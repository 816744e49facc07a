"""What the report shows of held-out pairs: psi token by token."""

import re

import data
from harness.tokenizers import text_of
from model import action_psi, both_responses, state_values

SHOWN = 6               # pairs of the page


def psi_of_pairs(kind, terminal, gamma, teacher, teacher_ref, beta, held_out):
    """The first held-out pairs under one kind of value -> a dict each. beta: the teacher's."""
    rows, shown = both_responses(held_out.pairs[:SHOWN]), []
    values = state_values(kind, teacher, teacher_ref, rows, beta, held_out.batch_size)
    psi = action_psi(values, rows, gamma, terminal)
    for i, text in enumerate(held_out.texts[:SHOWN]):
        pair = {"seed": held_out.seed, "value": kind, "terminal": terminal, "prompt": text.prompt}
        for name, j in (("chosen", i), ("rejected", i + len(rows) // 2)):
            response, first = getattr(text, name), len(rows[j].prompt) - 1          # s_p
            end = first + len(rows[j].response)                                     # s_end
            V = values[j][first:end + 1].tolist()
            last = {"zero": 0.0, "hold": V[-2], "value": V[-1]}[terminal]
            tokens = [text_of([token], held_out.tokenizer) for token in rows[j].response]
            pair[name] = {"tokens": tokens, "psi": psi[j][first:end].tolist(),
                          "phi": [*V[:-1], last], "kinds": [""] * (len(tokens) - 1) + ["EOS"]}
            if held_out.toy:
                pair[name] |= {"kinds": token_kinds(text.prompt, response, tokens),
                               "reward": data.reward(text.prompt, response)}
        shown.append(pair)
    return shown


def token_kinds(prompt, response, tokens):
    """A "right" or "wrong" fact or thing, "polite", "rude" or "" of each token; then "EOS"."""
    asked, marks, kinds = re.findall("[a-z]+", prompt.lower()), [""] * len(response), []
    kind_of = {word: "right" if word in asked else "wrong"
               for word in (*data.THINGS, *data.ALL_FACTS)}
    kind_of |= dict.fromkeys(data.POLITE_OPENINGS + data.POLITE_CLOSINGS, "polite")
    kind_of |= dict.fromkeys(data.RUDE_OPENINGS + data.RUDE_CLOSINGS, "rude")
    for found in re.finditer("|".join(map(re.escape, kind_of)), response):
        marks[slice(*found.span())] = [kind_of[found[0]]] * len(found[0])       # by character
    for token in tokens[:-1]:
        kinds.append(max(marks[:len(token)], default=""))       # any kind is greater than ""
        marks = marks[len(token):]
    return [*kinds, "EOS"]
