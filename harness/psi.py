"""What the report shows of psi: pairs token by token, and landmarks of many."""

import re

import data
from harness.evaluate import held_out_margins
from harness.numbers import landmarks
from model import action_psi, both_responses, state_values

SHOWN, SCATTER = 6, 200         # held-out pairs on the report page: token by token, and as points


def psi_of_pairs(kind, terminal, gamma, teacher, teacher_ref, teacher_beta, student, student_ref,
                 beta, held_out):
    """What the report shows of one TVKD row -> {"pairs": token by token, "scatter": landmarks}.

    The layout is harness.report.RESULTS. kind, terminal, gamma: of psi; student: trained with it.
    """
    pairs, texts = held_out.pairs[:SCATTER], held_out.texts[:SCATTER]
    rows, batch_size = both_responses(pairs), held_out.batch_size
    values = state_values(kind, teacher, teacher_ref, rows, teacher_beta, batch_size)
    margins = held_out_margins(student, student_ref, beta, held_out)[:SCATTER].tolist()
    psi = action_psi(values, rows, gamma, terminal)
    shown, scatter = [], []
    for i, (text, margin) in enumerate(zip(texts, margins)):
        entry = {"seed": held_out.seed, "value": kind, "margin": margin}
        scatter.append(dict(entry))
        if i < SHOWN:
            shown.append({**entry, "prompt": text.prompt, "terminal": terminal})
        for name, j in (("chosen", i), ("rejected", i + len(pairs))):
            first = len(rows[j].prompt) - 1                             # s_p
            end = first + len(rows[j].response)                         # s_end
            states = values[j][first:end + 1].tolist()
            scatter[i][name] = landmarks(states)
            if i < SHOWN:
                tokens = [held_out.tokenizer.decode([token]) for token in rows[j].response]
                shown[i][name] = {"tokens": tokens, "psi": psi[j][first:end].tolist(),
                                  "values": states}
                if held_out.toy:
                    response = getattr(text, name)
                    shown[i][name]["reward"] = data.reward(text.prompt, response)
                    shown[i][name]["kinds"] = token_kinds(text.prompt, response, tokens)
        if held_out.toy:
            scatter[i]["reward_gap"] = (data.reward(text.prompt, text.chosen)
                                        - data.reward(text.prompt, text.rejected))
    return {"pairs": shown, "scatter": scatter}


def token_kinds(prompt, response, tokens):
    """Of each token of a toy response: "right" or "wrong" fact or thing, "polite", "rude", or "".

    tokens: the response as text, token by token, EOS last.
    """
    asked, at, kinds = re.findall("[a-z]+", prompt.lower()), 0, []
    sentences = [(kind, response.find(sentence), sentence) for kind, group in (
        ("polite", data.POLITE_OPENINGS + data.POLITE_CLOSINGS),
        ("rude", data.RUDE_OPENINGS + data.RUDE_CLOSINGS)) for sentence in group]
    for token in tokens[:-1]:
        middle, word = at + len(token) / 2, token.strip().lower()
        at += len(token)
        manners = [kind for kind, start, sentence in sentences
                   if start >= 0 and start <= middle <= start + len(sentence)]
        fact = word in data.ALL_FACTS or word in data.THINGS
        kinds.append(manners[0] if manners else
                     ("right" if word in asked else "wrong") if fact else "")
    return [*kinds, ""]
