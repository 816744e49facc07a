"""What the report shows of held-out pairs: psi token by token, and what the panel needs."""

import math
import re

import data
from harness.evaluate import held_out_margins
from harness.tokenizers import text_of
from model import action_psi, both_responses, state_values

SHOWN, PLOTTED = 6, 200         # pairs of the page: token by token, and as points of its plots


def psi_of_pairs(kind, terminal, gamma, teacher, teacher_ref, teacher_beta, student, student_ref,
                 beta, held_out):
    """Up to PLOTTED held-out pairs under one kind of value, the first SHOWN with their tokens.

    margin: of the student trained with this value, beta * (log-ratio of chosen - of rejected).
    """
    pairs, texts = held_out.pairs[:PLOTTED], held_out.texts[:PLOTTED]
    rows = both_responses(pairs)                                        # all chosen, all rejected
    values = state_values(kind, teacher, teacher_ref, rows, teacher_beta, held_out.batch_size)
    psi = action_psi(values, rows, gamma, terminal)
    margins = held_out_margins(student, student_ref, beta, held_out).tolist()
    shown = []
    for i, (text, margin) in enumerate(zip(texts, margins)):
        shown.append({"seed": held_out.seed, "value": kind, "terminal": terminal,
                      "margin": margin, "prompt": text.prompt})
        for name, j in (("chosen", i), ("rejected", i + len(pairs))):
            first = len(rows[j].prompt) - 1                             # s_p
            end = first + len(rows[j].response)                         # s_end
            V, response = values[j][first:end + 1].tolist(), getattr(text, name)
            # With gamma and Phi(s_end) of any terminal these four give the sum of psi:
            # gamma Phi(s_end) - V(s_p) - (1 - gamma) * the sum between.
            side = {"landmarks": [V[0], math.fsum(V[1:-1]), V[-2], V[-1]]}
            shown[i][name] = side
            if held_out.toy:
                side["reward"] = data.reward(text.prompt, response)
            if i < SHOWN:
                tokens = [text_of([token], held_out.tokenizer) for token in rows[j].response]
                kinds = [""] * len(tokens)
                if held_out.toy:
                    kinds = token_kinds(text.prompt, response, tokens)
                last = {"zero": 0.0, "hold": V[-2], "value": V[-1]}[terminal]
                side |= {"tokens": tokens, "psi": psi[j][first:end].tolist(),
                         "phi": [*V[:-1], last], "kinds": [*kinds[:-1], "EOS"]}
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
