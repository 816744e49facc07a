"""What the report shows of held-out pairs: psi token by token."""

import re

import data
from harness.tokenizers import text_of
from model import action_psi, both_responses, state_values

SHOWN = 6               # pairs of the page


def psi_of_pairs(kind, terminal, gamma, teacher, teacher_ref, beta, held_out):
    """The first held-out pairs under one kind of value -> a dict each, token by token.

    beta: the teacher's.
    """
    pairs, rows = held_out.pairs[:SHOWN], both_responses(held_out.pairs[:SHOWN])
    values = state_values(kind, teacher, teacher_ref, rows, beta, held_out.batch_size)
    psi, shown = action_psi(values, rows, gamma, terminal), []
    for i, text in enumerate(held_out.texts[:SHOWN]):
        shown.append({"seed": held_out.seed, "value": kind, "terminal": terminal,
                      "prompt": text.prompt})
        for name, j in (("chosen", i), ("rejected", i + len(pairs))):
            first = len(rows[j].prompt) - 1                             # s_p
            end = first + len(rows[j].response)                         # s_end
            V, response = values[j][first:end + 1].tolist(), getattr(text, name)
            tokens = [text_of([token], held_out.tokenizer) for token in rows[j].response]
            kinds = [""] * len(tokens)
            if held_out.toy:
                kinds = token_kinds(text.prompt, response, tokens)
            last = {"zero": 0.0, "hold": V[-2], "value": V[-1]}[terminal]
            shown[i][name] = {"tokens": tokens, "psi": psi[j][first:end].tolist(),
                              "phi": [*V[:-1], last], "kinds": [*kinds[:-1], "EOS"]}
            if held_out.toy:
                shown[i][name]["reward"] = data.reward(text.prompt, response)
    return shown


def token_kinds(prompt, response, tokens):
    """Each token of a toy response: a "right" or "wrong" fact or thing, "polite", "rude" or "".

    tokens: the response as text, token by token, EOS last.
    """
    asked, at, kinds = re.findall("[a-z]+", prompt.lower()), 0, []
    spans = [(kind, response.find(sentence), len(sentence)) for kind, sentences in (
        ("polite", data.POLITE_OPENINGS + data.POLITE_CLOSINGS),
        ("rude", data.RUDE_OPENINGS + data.RUDE_CLOSINGS)) for sentence in sentences]
    for token in tokens[:-1]:
        middle, word = at + len(token) / 2, token.strip().lower()
        at += len(token)
        manners = [kind for kind, start, size in spans if 0 <= start <= middle <= start + size]
        fact = ("right" if word in asked else "wrong") \
            if word in data.ALL_FACTS or word in data.THINGS else ""
        kinds.append(manners[0] if manners else fact)
    return [*kinds, ""]
