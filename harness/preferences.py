"""Preference files -> Pairs of text: JSONL or one JSON array, also gzipped, in any of LAYOUTS.

No row is skipped silently: those that are not one pair, or hold what no text model would see, are
counted by kind and refused, unless --skip_bad=1.
"""

import gzip
import io
import json
import re
import time
import unicodedata
import zlib

import numpy as np

from data import Example, Pair, Splits
from harness.errors import printable, UserError

LAYOUTS = (     # fields of the chosen and the rejected response, then of the prompt, joined
    ("chosen", "rejected", "prompt"),                                   # TRL, UltraFeedback
    ("chosen", "rejected", "conversations"),                            # ShareGPT
    ("chosen", "rejected", "instruction", "input"),                     # Alpaca
    ("output", "rejected", "instruction", "input"),
    ("chosen", "rejected", "question"),                                 # Orca
    ("response_chosen", "response_rejected", "question"),               # MedicalGPT
    ("chosen", "rejected", "input"),                                    # distilabel
    ("preferred_output", "non_preferred_output", "input"),              # OpenAI: input.messages
    ("chosen", "rejected"))                                             # whole dialogues, HH
TEXTS, VALUES = ("prompt", "chosen", "rejected"), ("chosen_value", "rejected_value")
BEFORE = ("system", "system_prompt", "history")         # what stands before the prompt's turns
ROLES = {"system": "System", "developer": "System", "user": "Human", "human": "Human",
         "assistant": "Assistant", "gpt": "Assistant"}
SYSTEM, HUMAN, ANSWER = "\n\nSystem:", "\n\nHuman:", "\n\nAssistant:"
USER_TURN = r"\n\nHuman:|<\|im_start\|>user|<\|start_header_id\|>user|\[INST\]"
UNREADABLE = ("image", "images", "image_url", "video", "videos", "audio", "audios", "tools",
              "tool_calls", "functions", "function_call", "reasoning_content", "thinking")
NO_JSON = "expected one JSON object a line, or one array of them (see docs/own-data.md)"
SAME = 'expected "chosen" and "rejected" to differ'     # if not, the row is left out in any case
SECONDS, SHOWN = 3, 200     # between two lines of progress; characters that are shown of a text


def counted(items, what, unit="pairs"):
    """Yield the items; every SECONDS print how many there were and how fast they come."""
    start = printed = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        if (now := time.perf_counter()) - printed >= SECONDS:
            printed, rate = now, count / (now - start)
            print(f"  {what}: {count:,} {unit}, {rate:,.0f} {unit}/s", flush=True)


def load_pairs(path, with_values=False, skip_bad=False):
    """Read a preference file, once and row by row -> list of Pairs of text. Prints what it read.

    Rows that are no pair, with_values if asked, are printed by kind and refused, unless skip_bad.
    """
    name, pairs, first, bad = printable(path), [], None, {}
    try:
        for number, row in enumerate(counted(_rows(path), name, "rows"), 1):
            try:
                if row:                                 # else a blank line
                    record = json.loads(row, object_pairs_hook=_object)
                    pairs.append(parse_pair(record, with_values))
                    first = first or record
            except (ValueError, RecursionError) as error:
                reason = f"{error}" if isinstance(error, UserError) else f"{NO_JSON}, got: {error}"
                bad.setdefault(reason.partition(", got")[0], (reason, []))[1].append(number)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error      # of the file, gzip, or an array
        raise UserError(f"{name}: expected a readable file, got: {reason}") from None
    for reason, rows in bad.values():
        print(f"  {name}: {len(rows)} rows, first {rows[:3]}, are no pair: {printable(reason)}")
    fatal = [f"{name}:{rows[0]}: {reason}" for kind, (reason, rows) in bad.items() if kind != SAME]
    if fatal and not skip_bad:
        raise UserError(f"{fatal[0]}; --skip_bad=1 leaves out all rows that are no pair")
    if not pairs:
        raise UserError(f"{name}: expected at least one preference pair, got none")
    unread = ", ".join(sorted(first.keys() - {*_layout(first), *VALUES, *BEFORE})) or "none"
    print(f"{name}: {len(pairs)} pairs; fields that are not read: {printable(unread):.200}; "
          f"the first pair as it was read:\n{shown(pairs[0])}")
    glued = sum(not (pair.prompt[-1].isspace() or pair.chosen[0].isspace()) for pair in pairs)
    if 2 * glued > len(pairs):
        print(f"  hint: {glued} prompts meet their response without a space or newline between")
    return pairs


def shown(pair):
    """A pair as the models read it, in two lines; names in brackets are its borders."""
    prompt = "..." * (len(pair.prompt) > SHOWN) + pair.prompt[-SHOWN:]
    lines = [f"  [prompt]{prompt}[{name}]{text[:SHOWN]}{'...' * (len(text) > SHOWN)}[EOS]"
             for name, text in zip(TEXTS[1:], pair[1:3])]
    return "\n".join(printable(line.replace("\n", "\\n")) for line in lines)


def _rows(path):
    """The text of each row of a file: its lines, or the values of its JSON array, read whole."""
    with open(path, "rb") as file:
        file = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(b"\x1f\x8b") else file
        head = file.peek(100).decode("utf-8-sig", "replace").lstrip()
        if head.startswith("version https://git-lfs"):
            raise ValueError("a pointer of Git LFS; `git lfs pull` fetches the file itself")
        # Lines end at \n and nowhere else; bytes that are no UTF-8 become lone surrogates.
        file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
        if not head.startswith("["):
            yield from map(str.rstrip, file)
            return
        text, gap = file.read().strip(), re.compile(r"\s*,?\s*")
    at = gap.match(text, 1).end()
    while text[at:at + 2] != "]":                       # its last character
        end = json.JSONDecoder().raw_decode(text, at)[1]
        yield text[at:end]
        at = gap.match(text, end).end()


def _object(items):
    """A JSON object of which nothing is lost: no field stands twice, none is unreadable as text."""
    fields = {}
    for name, value in items:
        if name in fields or name in UNREADABLE and value:      # null, [] and "" hold nothing
            raise UserError(f"expected text alone and every field once, not {name!r:.60}")
        fields[name] = value
    return fields


def parse_pair(record, with_values=False):
    """One JSON value -> Pair of text. Raises UserError with what was expected.

    Strings in "prompt", "chosen" and "rejected" are joined as they stand. Everything else becomes
    turns, "\\n\\nRole: content", and the prompt ends in "\\n\\nAssistant:", so the same content is
    the same Pair in every layout. Beside whole dialogues, "prompt" may repeat some of their turns.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    names = _layout(record)
    chosen, rejected, *asked = [record[x] for x in names if x in names[:2] or record.get(x)]
    start = [turn for name in BEFORE for turn in _turns(name, record.get(name) or [], SYSTEM)]
    strings = [isinstance(text, str) for text in (*asked, chosen, rejected)]
    if names[2:] == ("prompt",) and all(strings) and not start and HUMAN not in chosen + rejected:
        pair = Pair(*asked, chosen, rejected)
    else:
        asked = ["\n\n".join(asked)] if asked and all(strings[:-2]) else asked
        pair = _pair(start, [turn for text in asked for turn in _turns("prompt", text, HUMAN)],
                     _turns("chosen", chosen, ANSWER), _turns("rejected", rejected, ANSWER))
    for name, text in zip(TEXTS, pair):
        if wrong := re.search("[\ud800-\udfff]|\\A\\s*\\Z", text):
            raise UserError(f'expected text in UTF-8 in "{name}", got {wrong[0]!r:.60}')
        if name != "prompt" and (wrong := re.search(USER_TURN, text)):
            raise UserError(f'expected no turn of the user in "{name}", got {wrong[0]!r}')
    if pair.chosen == pair.rejected:
        raise UserError(f"{SAME}, got the same response twice")
    values = [record.get(name) for name in VALUES]
    if with_values or values != [None, None]:
        # float32 ends at 3e38, and a sum of two must fit as well.
        if not all(type(value) in (int, float) and abs(value) < 1e30 for value in values):
            raise UserError(f'expected "{VALUES[0]}" and "{VALUES[1]}", which --value=given reads, '
                            f"as finite numbers up to 1e30, got {values!r:.60}")
        pair = pair._replace(values=tuple(map(float, values)))
    return pair


def _layout(record):
    """The first of LAYOUTS whose fields a row has."""
    for names in LAYOUTS:
        if None not in map(record.get, names[:2]) and all(map(record.get, names[2:3])):
            return names
    raise UserError(f"expected the fields of one of the layouts, got {', '.join(record):.100}; "
                    "`jq -c '{prompt: .A, chosen: .B, rejected: .C}' FILE > NEW` renames A, B, C")


def _turns(name, field, label):
    """Text, a transcript, a message, or a list of these -> turns "\\n\\nRole: content"."""
    if isinstance(field, str):
        if HUMAN in field:
            field = field.removesuffix(ANSWER) if label == HUMAN else field
            return [turn for turn in re.split(r"(?=\n\n(?:Human|Assistant):)", field) if turn]
        return [f"{label} {field.removeprefix(' ') if label == ANSWER else field}"]
    field, turns = field.get("messages", field) if isinstance(field, dict) else field, []
    for message in field if isinstance(field, list) else [field]:
        if name == "history" and isinstance(message, list) and len(message) == 2:
            turns += _turns(name, message[0], HUMAN) + _turns(name, message[1], ANSWER)
            continue
        fields = message if isinstance(message, dict) else {}
        role = ROLES.get(str(fields.get("role", fields.get("from"))))
        content = fields.get("content", fields.get("value"))
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
                 for part in (content if isinstance(content, list) else [content])]
        if not role or not all(isinstance(part, str) for part in parts):
            raise UserError(f'expected "{name}" as text or as messages of text alone from '
                            f"{'|'.join(ROLES)}, got {message!r:.100}")
        turns.append(f"\n\n{role}: {''.join(parts)}")
    return turns


def _pair(start, asked, good, bad):
    """Turns of system and history, of the prompt, of two responses or whole dialogues -> Pair."""
    dialogues = [turns if len(turns) > 1 else asked + turns for turns in (good, bad)]
    good, bad = (turns if turns[:len(start)] == start else start + turns for turns in dialogues)
    # Compared turn by turn: a common prefix of characters would cut into the answers. In an answer
    # of several turns, the user's words would count as actions of the policy.
    prompt, whose = good[:-1], [turn.startswith(ANSWER) for turn in good[-2:] + bad[-1:]]
    if prompt != bad[:-1] or not set(asked) <= set(prompt) or whose != [False, True, True]:
        raise UserError('expected "chosen" and "rejected" as one turn of the assistant each, after '
                        "the same prompt, which ends in the user's turn and holds every turn of "
                        '"prompt" word for word; a begun answer needs three strings')
    return Pair("".join([*prompt, ANSWER]), good[-1][len(ANSWER):], bad[-1][len(ANSWER):])


def split_pairs(pairs, train, val, test, seed):
    """Pairs -> Splits, shuffled: no prompt is in two of them, however it is spelled.

    `test`, `val` pairs, or a few more so that a prompt stays whole; then `train` (0: all left).
    """
    by_prompt = {}
    for pair in pairs:      # longer words as they are: a million combining marks would take minutes
        words = (unicodedata.normalize("NFKC", word).casefold() if len(word) < 20_000 else word
                 for word in pair.prompt.split())
        by_prompt.setdefault(" ".join(" ".join(words).split()), []).append(pair)
    prompts, tests, vals, rest = list(by_prompt), [], [], []
    for i in np.random.default_rng(seed).permutation(len(prompts)):
        part = tests if len(tests) < test else vals if len(vals) < val else rest
        part += by_prompt[prompts[i]]
    rest = rest[:train or None]
    if len(rest) < (train or 1):
        raise UserError("--train_pairs + --val_pairs + --test_pairs: expected room for "
                        f"{train or 'at least 1'} + {val} + {test}, got {len(pairs)} pairs with "
                        f"{len(prompts)} different prompts, each of which stays on one side")
    return Splits([Example(pair.prompt, pair.chosen) for pair in rest], rest, vals, tests)
