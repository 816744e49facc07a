"""Preference files -> Pairs of text: JSONL or one JSON array, also gzipped, in any of LAYOUTS.

No row is skipped silently: those that are not one pair, or hold what no text model would see, are
counted by kind and refused, unless --skip_bad=1. The names of fields that are not read are printed.
"""

import gzip
import io
import json
import os
import re
import time
import unicodedata
import zlib
from collections import Counter

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
LARGEST_VALUE = 1e30        # float32 ends at 3e38; a sum of two must fit as well
ROLES = {"system": "System", "developer": "System", "user": "Human", "human": "Human",
         "assistant": "Assistant", "gpt": "Assistant"}
SYSTEM, HUMAN, ANSWER = "\n\nSystem:", "\n\nHuman:", "\n\nAssistant:"
USER_TURN = r"\n\nHuman:|<\|im_start\|>user|<\|start_header_id\|>user|\[INST\]"
UNREADABLE = ("image", "images", "video", "videos", "audio", "audios", "tools", "tool_calls",
              "functions", "function_call", "reasoning_content", "thinking")
SAME = 'expected "chosen" and "rejected" to differ'
BOM, CHUNK = b"\xef\xbb\xbf", 2 ** 20       # characters of an array that are read at a time
SECONDS, SHOWN = 3, 200     # between two lines of progress; characters that are shown of a text


def counted(items, what, unit="pairs"):
    """Yield the items; every SECONDS print how many there were and how fast they come."""
    start = printed = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - printed >= SECONDS:
            printed, rate = now, count / (now - start)
            print(f"  {printable(what)}: {count:,} {unit}, {rate:,.0f} {unit}/s", flush=True)


def load_pairs(path, with_values=False, skip_bad=False):
    """Read a preference file, once and row by row -> list of Pairs of text. Prints what it read.

    Rows that are no pair in one of the layouts, or have no values where with_values asks for them,
    are printed by kind. UserError is raised for the first, unless skip_bad or all are of kind SAME.
    """
    name, number, pairs, bad, first = str(path), 0, [], {}, None
    try:
        # Opening a pipe that nobody writes to would wait forever.
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "a folder, a pipe or a device")
        with open(path, "rb") as file:
            for number, row in enumerate(counted(_rows(file), name, "rows"), 1):
                try:
                    if row:                             # else a blank line
                        record = _decode(row)
                        pairs.append(parse_pair(record, with_values))
                        first = first or record
                except UserError as error:
                    kind = str(error).partition(", got")[0]
                    bad.setdefault(kind, (str(error), []))[1].append(number)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        # of the file, of gzip, or of a JSON array
        reason = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
        place = f":{number + 1}" if number else ""
        raise UserError(f"{name}{place}: expected a readable file, got: {reason}") from None
    for error, rows in bad.values():
        some = ", ".join(map(str, rows[:3])) + ", ..." * (len(rows) > 3)
        print(f"  {printable(name)}: {len(rows)} rows ({some}) are no pair: {error}")
    fatal = [error for kind, error in bad.items() if kind != SAME]
    if fatal and not skip_bad:
        total = sum(len(rows) for _, rows in bad.values())
        raise UserError(f"{name}:{fatal[0][1][0]}: {fatal[0][0]}; {total} of {total + len(pairs)} "
                        "rows are no pair, --skip_bad=1 leaves them out")
    if not pairs:
        raise UserError(f"{name}: expected at least one preference pair, got none")
    print(f"{printable(name)}: {len(pairs)} pairs, the first as it was read:\n{shown(pairs[0])}")
    unread = first.keys() - {*_layout(first), *VALUES, *BEFORE}
    if unread:
        print(f"  fields that are not read: {printable(', '.join(sorted(unread))):.200}")
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


def _rows(file):
    """The texts of the rows of a file: the lines, or the values of a JSON array, read in chunks."""
    if file.peek(2).startswith(b"\x1f\x8b"):
        file = gzip.GzipFile(fileobj=file)
    head = file.peek(100).removeprefix(BOM).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("a pointer of Git LFS; `git lfs pull` fetches the file itself")
    if re.match(rb"\{\s*\n", head):
        raise ValueError("an object over several lines; `jq -c '.NAME[]' FILE > pairs.jsonl` makes "
                         "a line of each pair in its list NAME")
    if not head.startswith(b"["):
        for line in file:               # as bytes, lines end at \n and nowhere else
            yield line.removeprefix(BOM).rstrip()
        return
    file, at = io.TextIOWrapper(file, "utf-8-sig", newline=""), 1
    scan, gap, text = json.JSONDecoder().raw_decode, re.compile(r"\s*,?\s*"), file.read(CHUNK)
    text = text.lstrip()
    while not text.startswith("]", at := gap.match(text, at).end()):
        try:
            end = scan(text, at)[1]
        except (ValueError, RecursionError):        # bad, or it goes on in the next chunk
            more = file.read(max(CHUNK, len(text)))         # doubled, or it would be quadratic
            if not more:
                raise
            text, at = text[at:] + more, 0
        else:
            yield text[at:end]
            at = end
    if (text[at + 1:] + file.read(CHUNK)).strip():
        raise ValueError("more behind the array")


def _decode(row):
    try:
        text = row.decode("utf-8") if isinstance(row, bytes) else row
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:       # not UTF-8, not JSON, nested too deeply
        reason = re.sub("(?: at)?: line 1 column", " at column", str(error))
        raise UserError(f"expected one JSON object in UTF-8, got: {reason}") from None


def _object(items):
    names = Counter(name for name, _ in items)
    if len(names) < len(items):                         # json.loads would take the last of the two
        raise ValueError(f"one with the field {names.most_common(1)[0][0]!r:.60} twice")
    return dict(items)


def parse_pair(record, with_values=False):
    """One JSON value -> Pair of text. Raises UserError with what was expected.

    Strings in "prompt", "chosen" and "rejected" are joined as they stand. Everything else becomes
    turns, "\\n\\nRole: content", and the prompt ends in "\\n\\nAssistant:", so the same content is
    the same Pair in every layout. Whole dialogues begin with the prompt: messages, or transcripts
    "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH). Beside them "prompt" may repeat turns.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    _check_readable("a row", record)
    names = _layout(record)
    prompt, *more = [record.get(name) for name in names[2:]] or [None]
    chosen, rejected = record[names[0]], record[names[1]]
    start = [turn for name in BEFORE
             for turn in _turns(name, record.get(name) or [], SYSTEM if name != "history" else "")]
    strings = all(isinstance(text, str) for text in (prompt, chosen, rejected))
    if names[2:] == ("prompt",) and strings and not start and HUMAN not in chosen + rejected:
        pair = Pair(prompt, chosen, rejected)
    else:
        if any(more):
            if not isinstance(prompt, str) or not isinstance(more[0], str):
                raise UserError(f'expected "{names[2]}" and "{names[3]}" as two strings')
            prompt = f"{prompt}\n\n{more[0]}"
        pair = _pair(start, _turns("prompt", prompt, HUMAN) if names[2:] else [],
                     _turns("chosen", chosen, ANSWER), _turns("rejected", rejected, ANSWER))
    for name, text in zip(TEXTS, pair):
        if not text.strip():
            raise UserError(f'expected text in "{name}", got an empty one')
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UserError(f'expected text in "{name}", got half of a surrogate pair')
        if name != "prompt" and (turn := re.search(USER_TURN, text)):
            raise UserError(f'expected no turn of the user in "{name}", got {turn[0]!r}')
    if pair.chosen == pair.rejected:
        raise UserError(f"{SAME}, got the same response twice")
    return pair._replace(values=_values(record, with_values))


def _layout(record):
    """The first of LAYOUTS whose fields a row has."""
    for names in LAYOUTS:
        found = [record.get(name) for name in names[:3]]
        if None not in found and found[2:] not in ([""], [[]]):
            return names
    raise UserError("expected a prompt and two responses in one of the layouts, got the fields "
                    f"{', '.join(record):.100}; `jq -c '{{prompt: .A, chosen: .B, rejected: .C}}' "
                    "FILE > pairs.jsonl` renames A, B and C")


def _turns(name, field, label=""):
    """Messages, a message, a transcript or, with a label, text -> turns "\\n\\nRole: content"."""
    if isinstance(field, str) and label:
        if HUMAN in field and label != SYSTEM:
            field = field.removesuffix(ANSWER) if label == HUMAN else field
            return [turn for turn in re.split(r"(?=\n\n(?:Human|Assistant):)", field) if turn]
        return [f"{label} {field.removeprefix(' ') if label == ANSWER else field}"]
    if isinstance(field, dict):
        _check_readable(f'"{name}"', field)
        field = field.get("messages", [field])
    if not isinstance(field, list):
        raise UserError(f'expected "{name}" as text or messages, got {type(field).__name__}')
    turns = []
    for message in field:
        if name == "history" and isinstance(message, list) and len(message) == 2:
            turns += _turns(name, [{"role": role, "content": content} for role, content
                                   in zip(("user", "assistant"), message)])
            continue
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content")
        if role not in list(ROLES):                     # a list: JSON may give what has no hash
            raise UserError(f'expected "{name}" as messages {{"role": {"|".join(ROLES)}, '
                            f'"content": "..."}}, got {message!r:.60}')
        _check_readable(f'a message of "{name}"', message)
        content = fields.get("value", content)
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            part = part if isinstance(part, dict) else {"part": part}
            others = [key for key in part if part[key] and key not in ("type", "text")]
            if others or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f'expected "content" in "{name}" as a string or as parts '
                                f'{{"type": "text", "text": "..."}} alone, got {part!r:.60}')
        turns.append(f"\n\n{ROLES[role]}: {''.join(part['text'] for part in parts)}")
    return turns


def _check_readable(where, fields):
    for name in UNREADABLE:
        if fields.get(name):                # null, [] and "" hold nothing
            raise UserError(f'expected text alone, no "{name}" in {where}')


def _pair(start, asked, good, bad):
    """Turns of system and history, of the prompt, of two responses or whole dialogues -> Pair."""
    if any(turns[0] in asked[:1] or turns[0].startswith((SYSTEM, HUMAN))
           for turns in (good, bad) if turns):
        # Compared turn by turn: a common prefix of characters would cut into the answers.
        if not set(asked) <= set(good[:-1]) & set(bad[:-1]):
            raise UserError('expected the dialogues in "chosen" and "rejected" to hold every turn '
                            'of "prompt", word for word')
    else:
        good, bad = asked + good, asked + bad
    if not good[:len(start)] == start == bad[:len(start)]:
        good, bad = start + good, start + bad
    *prompt, chosen = good or [""]
    *other, rejected = bad or [""]
    if prompt != other or not (chosen.startswith(ANSWER) and rejected.startswith(ANSWER)):
        # In an answer of several turns, the user's words would count as actions of the policy.
        raise UserError('expected "chosen" and "rejected" to share the prompt and to differ in one '
                        "last turn, the assistant's: the user's words must not be trained on")
    if not prompt or prompt[-1].startswith(ANSWER):
        got = "one whose last turn is the assistant's: join it as a string" if prompt else "none"
        raise UserError(f"expected a prompt that ends in the user's turn, got {got}")
    return Pair("".join([*prompt, ANSWER]), chosen[len(ANSWER):], rejected[len(ANSWER):])


def _values(record, needed):
    """The two values of a row -> a tuple of floats, or None in a row without."""
    values = [record.get(name) for name in VALUES]
    if values == [None, None] and not needed:
        return None
    for value in values:
        if type(value) not in (int, float) or not abs(value) < LARGEST_VALUE:   # NaN fails as well
            which = "which --value=given reads" if needed else "both or neither"
            raise UserError(f'expected "{VALUES[0]}" and "{VALUES[1]}", {which}, as finite numbers '
                            f"up to {LARGEST_VALUE:.0e}, got {value!r:.60}")
    return tuple(map(float, values))


def split_pairs(pairs, train, val, test, seed):
    """Pairs -> Splits by prompt, shuffled: no prompt is in two of them, however it is spelled.

    `test` and then `val` pairs, or a few more so that a prompt stays whole; then `train` pairs
    (0: all that are left). The Examples are the chosen responses of the training pairs.
    """
    by_prompt = {}
    for pair in pairs:      # in parts: a million combining marks at once take minutes
        words = re.findall(r"\S{1,1000}", pair.prompt)
        prompt = " ".join(unicodedata.normalize("NFKC", word).casefold() for word in words)
        by_prompt.setdefault(prompt, []).append(pair)
    prompts, parts = list(by_prompt), {"test": [], "val": [], "train": []}
    for i in np.random.default_rng(seed).permutation(len(prompts)):
        for part, size in (("test", test), ("val", val), ("train", len(pairs))):
            if len(parts[part]) < size:
                parts[part] += by_prompt[prompts[i]]
                break
    parts["train"] = parts["train"][:train or None]
    if len(parts["train"]) < (train or 1):
        raise UserError(f"--train_pairs + --val_pairs + --test_pairs: expected room for "
                        f"{train or 'at least 1'} + {val} + {test}, got {len(pairs)} pairs with "
                        f"{len(prompts)} different prompts, each of which stays on one side")
    return Splits([Example(pair.prompt, pair.chosen) for pair in parts["train"]], **parts)
