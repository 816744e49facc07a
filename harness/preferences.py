"""Preference files: JSONL, one pair a line, in any of the layouts of `parse_pair` -> Pairs of text.

No pair is skipped silently. A row that cannot be read as one pair is refused with
`file:line: expected ...`, and so is a row with images, tool calls or other content that no text
model would see. Fields of any other name (an id, a source, scores) are not read.
"""

import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data import Example, Pair, Splits
from harness.errors import printable, UserError

SECONDS = 3                 # between two lines of `progress`
TEXTS = ("prompt", "chosen", "rejected")
VALUES = ("chosen_value", "rejected_value")
LARGEST_VALUE = 1e30        # float32 ends at 3e38; a sum of two must fit as well
ROLES = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant"}
HUMAN, ANSWER = "\n\nHuman:", "\n\nAssistant:"
UNREADABLE = ("image", "images", "video", "videos", "audio", "audios",
              "tools", "tool_calls", "functions", "function_call")
LAYOUTS = ('"prompt", "chosen" and "rejected" as strings or as message lists, or "chosen" and '
           '"rejected" as whole dialogues: message lists or "\\n\\nHuman: ...\\n\\nAssistant: ..." '
           'transcripts that begin with the prompt')


def counted(items, what):
    """Yield the items; every SECONDS print how many there were and how fast they come."""
    start = printed = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - printed >= SECONDS:
            unit, printed = f"{type(item).__name__.lower()}s", now
            rate = count / (now - start)
            print(f"  {printable(what)}: {count:,} {unit}, {rate:,.0f} {unit}/s", flush=True)


def load_pairs(path, with_values=False):
    """Read a JSONL file of preferences -> list of Pairs of text, one for every line not blank.

    The file is read once, from start to end. Raises UserError for the first line that is not a
    pair in one of the layouts, or that has no values where with_values asks for them.
    """
    try:
        # Opening a pipe that nobody writes to would wait forever.
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: expected a readable JSONL file, "
                            "got a folder, a pipe or a device")
        with open(path, "rb") as file:          # as bytes, lines end at \n and nowhere else
            pairs = list(counted(_pairs(path, file, with_values), path))
    except OSError as error:
        raise UserError(f"{path}: expected a readable JSONL file, got: {error.strerror}") from None
    if not pairs:
        raise UserError(f"{path}: expected at least one preference pair, got an empty file")
    return pairs


def _pairs(path, file, with_values):
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf").rstrip()          # a byte-order mark is not text
        if line:
            pair = _parse_line(path, number, line)
            if with_values and pair.values is None:
                raise UserError(f'{path}:{number}: expected "{VALUES[0]}" and "{VALUES[1]}", which '
                                "--value=given reads, got a row without")
            yield pair


def _parse_line(path, number, line):
    try:
        return parse_pair(json.loads(line.decode("utf-8"), object_pairs_hook=_object))
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from None
    except (ValueError, RecursionError) as error:       # not UTF-8, not JSON, nested too deeply
        reason = re.sub("(?: at)?: line 1 column", " at column", str(error))
        raise UserError(f"{path}:{number}: expected one JSON object in UTF-8, "
                        f"got: {reason}") from None


def _object(items):
    names = Counter(name for name, _ in items)
    if len(names) < len(items):                         # json.loads would take the last of the two
        raise UserError("expected each field once in an object, "
                        f"got {names.most_common(1)[0][0]!r:.60} again")
    return dict(items)


def parse_pair(record):
    """One JSON value -> Pair of text. Raises UserError with what was expected.

    1. {"prompt": "...", "chosen": "...", "rejected": "..."}    joined as they are, nothing between
    2. the same three as lists of messages {"role": "user", "content": "..."}
    3. "chosen" and "rejected" as such lists of a whole dialogue, which begin with the prompt
    4. "chosen" and "rejected" as transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." that begin with
       the prompt (Anthropic's HH)

    Beside 3 and 4 the prompt may stand in "prompt" as well, word for word; beside 3 also as the
    string of the first user turn (binarised UltraFeedback). Strings of layout 1 are never compared:
    an answer may begin like its prompt. Layouts 2 to 4 give equal Pairs: every turn becomes
    "\\n\\nRole: content", and the prompt ends in "\\n\\nAssistant:".

    "chosen_value" and "rejected_value": what a teacher thinks of the two, both or neither.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    _check_readable("a row", record)
    prompt, chosen, rejected = (record.get(name) for name in TEXTS)
    _check_fields(prompt, chosen, rejected)
    match prompt, chosen, rejected:
        case str(), str(), str() if not _repeats(prompt, chosen, rejected):
            pair = Pair(prompt, chosen, rejected)
        case None | str(), str(), str():
            start = _transcript((prompt or "").removesuffix(ANSWER))
            pair = _split(start, _transcript(chosen), _transcript(rejected))
        case str(), list(), list():
            start = [f"{HUMAN} {prompt}"]
            pair = _split(start, _turns("chosen", chosen), _turns("rejected", rejected))
        case None | list(), list(), list():
            start, good = _turns("prompt", prompt or []), _turns("chosen", chosen)
            bad = _turns("rejected", rejected)
            if not good[:len(start)] == start == bad[:len(start)]:
                good, bad = start + good, start + bad
            pair = _split(start, good, bad)
        case _:
            fields = zip(TEXTS, (prompt, chosen, rejected))
            types = ", ".join(f"{name} as {type(field).__name__}" for name, field in fields)
            raise UserError(f"expected {LAYOUTS}; got {types}")
    _check_texts(pair)
    return pair._replace(values=_values(record))


def _check_readable(where, fields):
    for name in UNREADABLE:
        if fields.get(name):                # null, [] and "" hold nothing
            raise UserError(f'expected text alone, got "{name}" in {where}')


def _check_fields(prompt, chosen, rejected):
    """All three are there, except for a prompt that transcripts or dialogues begin with."""
    whole = not isinstance(chosen, str) or HUMAN in f"{chosen}{rejected}"
    for name, field in zip(TEXTS, (prompt, chosen, rejected)):
        if field is None and (name != "prompt" or not whole):
            raise UserError(f'expected a field "{name}"; a pair is {LAYOUTS}')


def _check_texts(pair):
    for name, text in zip(TEXTS, pair):
        if not text.strip():
            raise UserError(f'expected text in "{name}", got an empty one')
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UserError(f'expected text in "{name}", got half of a surrogate pair')
    if pair.chosen == pair.rejected:
        raise UserError('expected "chosen" and "rejected" to differ, got the same response twice')


def _values(record):
    """The two values of a row -> a tuple of floats, or None in a row without."""
    values = [record.get(name) for name in VALUES]
    if values == [None, None]:
        return None
    for name, value in zip(VALUES, values):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not -LARGEST_VALUE < value < LARGEST_VALUE:        # NaN fails as well
            raise UserError(f'expected "{VALUES[0]}" and "{VALUES[1]}" as finite numbers up to '
                            f'{LARGEST_VALUE:.0e}, both or neither, got {name} {value!r:.60}')
    return tuple(map(float, values))


def _repeats(prompt, chosen, rejected):
    """Whether a transcript stands in the field "prompt" and at the start of a response again."""
    return HUMAN in prompt and (chosen.startswith(prompt) or rejected.startswith(prompt))


def _transcript(text):
    return [turn for turn in re.split(r"(?=\n\n(?:Human|Assistant):)", text) if turn]


def _turns(name, messages):
    """A list of messages -> its turns, each "\\n\\nRole: content"."""
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in list(ROLES):                     # a list: JSON may give what has no hash
            raise UserError(f'expected "{name}" as messages {{"role": {"|".join(ROLES)}, '
                            f'"content": "..."}}, got {message!r:.60}')
        _check_readable(f'a message of "{name}"', message)
        turns.append(f"\n\n{ROLES[role]}: {_content(name, message)}")
    return turns


def _content(name, message):
    """The content of a message as one string: it may come as a list of text parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f'expected "content" in "{name}" as a string or a list of text parts, '
                        f'got {message!r:.60}')
    texts = []
    for part in content:
        fields = part if isinstance(part, dict) else {}
        others = [key for key in fields if key not in ("type", "text") and fields[key]]
        if fields.get("type") != "text" or not isinstance(fields.get("text"), str) or others:
            raise UserError(f'expected the parts of "content" in "{name}" as '
                            f'{{"type": "text", "text": "..."}} alone, '
                            f'got {others[0] if others else part!r:.60}')
        texts.append(fields["text"])
    return "".join(texts)


def _split(start, chosen, rejected):
    """Turns of "prompt" and of two whole conversations, which begin with them -> Pair.

    Compared turn by turn: a common prefix of characters would cut into the answers.
    """
    if not chosen[:len(start)] == start == rejected[:len(start)]:
        raise UserError('expected "chosen" and "rejected" to begin with the turns of "prompt", '
                        "word for word")
    *prompt, answer = chosen or [""]
    *rejected_prompt, rejected_answer = rejected or [""]
    answered = answer.startswith(ANSWER) and rejected_answer.startswith(ANSWER)
    if not prompt or prompt != rejected_prompt or not answered:
        # In an answer of several turns, the user's words would count as actions of the policy.
        raise UserError('expected "chosen" and "rejected" to share the prompt and to differ in one '
                        "last turn, the assistant's answer: in several turns the user's words "
                        "would be trained on, too")
    return Pair("".join(prompt) + ANSWER, answer.removeprefix(ANSWER),
                rejected_answer.removeprefix(ANSWER))


def split_pairs(pairs, train, val, test, seed):
    """Pairs -> Splits by prompt, shuffled: no prompt is in two of them.

    `test` and then `val` pairs, or a few more so that a prompt stays whole; then `train` pairs
    (0: all that are left). The Examples are the chosen responses of the training pairs.
    """
    if len(pairs) < (train or 1) + val + test:
        raise UserError(f"--train_pairs + --val_pairs + --test_pairs: expected at most the "
                        f"{len(pairs)} pairs of the file, got {train or 'at least 1'} + {val} + "
                        f"{test}; try smaller --val_pairs and --test_pairs")
    by_prompt = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    prompts = list(by_prompt)
    parts = {"train": [], "val": [], "test": []}
    for i in np.random.default_rng(seed).permutation(len(prompts)):
        if len(parts["test"]) < test:
            part = "test"
        elif len(parts["val"]) < val:
            part = "val"
        else:
            part = "train"
        parts[part] += by_prompt[prompts[i]]
    parts["train"] = parts["train"][:train or None]
    if not parts["train"]:
        raise UserError("--val_pairs + --test_pairs: expected to leave some prompts of the file to "
                        f"train on, got {val} + {test}")
    return Splits([Example(pair.prompt, pair.chosen) for pair in parts["train"]], **parts)
