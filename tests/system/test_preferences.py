"""harness/preferences.py: every layout by hand, what is refused and how, splitting by prompt."""

import itertools
import json
import os
import re
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

import data
from data import Example, Pair, encode
from harness.errors import UserError
from harness import preferences
from harness.preferences import load_pairs, parse_pair, split_pairs
from harness.tokenizers import learn_tokenizer


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


USER = [message("user", "Why?")]
SO, NO = [message("assistant", "So.")], [message("assistant", "No.")]
TALK = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello"), *USER]
TALK_TEXT = "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
WHY = Pair("\n\nHuman: Why?\n\nAssistant:", " So.", " No.")


def row(prompt, chosen=SO, rejected=NO, **fields):
    """A row of JSON; prompt None: the row has no such field."""
    fields = {"chosen": chosen, "rejected": rejected, **fields}
    return fields if prompt is None else {"prompt": prompt, **fields}


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "strings": (row("2+2=", "4", "5", id=7), Pair("2+2=", "4", "5")),
    "strings are not compared": (row("Hi", "Hi you", "Hi there"), Pair("Hi", "Hi you", "Hi there")),
    "messages": (row(TALK), Pair(TALK_TEXT, " So.", " No.")),
    "whole dialogues": (row(None, TALK + SO, TALK + NO), Pair(TALK_TEXT, " So.", " No.")),
    "whole dialogues, empty prompt": (row([], USER + SO, USER + NO), WHY),
    "transcripts": (row(None, HH + " So.", HH + " No."), Pair(HH, " So.", " No.")),
    "transcripts, prompt null": ({"prompt": None, "chosen": HH + " So.", "rejected": HH + " No."},
                                 Pair(HH, " So.", " No.")),
    # The shared turns end at a turn, not at the last shared character.
    "transcripts that begin alike": (row(None, HH + " Paris is", HH + " Paris was"),
                                     Pair(HH, " Paris is", " Paris was")),
    # Binarised UltraFeedback: the prompt as a string, and again as the first turn.
    "string beside dialogues": (row("Why?", USER + SO, USER + NO, prompt_id="1", score_chosen=8.5),
                                WHY),
    "string beside longer dialogues": (row("Hi", TALK[1:] + SO, TALK[1:] + NO),
                                       Pair(HH, " So.", " No.")),
    "messages repeated": (row(TALK, TALK + SO, TALK + NO), Pair(TALK_TEXT, " So.", " No.")),
    "first messages repeated": (row(TALK[:2], TALK + SO, TALK + NO),
                                Pair(TALK_TEXT, " So.", " No.")),
    "transcript repeated": (row(HH, HH + " So.", HH + " No."), Pair(HH, " So.", " No.")),
    "transcript repeated without its last label": (
        row(HH.removesuffix("\n\nAssistant:"), HH + " So.", HH + " No."), Pair(HH, " So.", " No.")),
    "text parts": (row([message("user", parts("Wh", "y?"))], [message("assistant", parts("So."))]),
                   WHY),
    "text parts with empty fields": (
        row([message("user", [{"type": "text", "text": "Why?", "image": None, "url": ""}])]), WHY),
    "string beside text parts": (
        row("Why?", [message("user", parts("Why?")), *SO], USER + NO), WHY),
    "developer": (row([message("developer", "Be kind."), *TALK[1:]]),
                  Pair(TALK_TEXT, " So.", " No.")),
    "developer repeated as system": (
        row([message("developer", "Be kind."), *TALK[1:]], TALK + SO, TALK + NO),
        Pair(TALK_TEXT, " So.", " No.")),
    "empty images and tools": (
        row(USER, [message("assistant", "So.", tool_calls=[])], images=None, tools=[]), WHY),
    "values": (row("a", "b", "c", chosen_value=1.5, rejected_value=-2),
               Pair("a", "b", "c", (1.5, -2.0))),
    "values beside messages": (row(USER, chosen_value=0, rejected_value=1e-9),
                               WHY._replace(values=(0.0, 1e-9))),
    "values null": (row("a", "b", "c", chosen_value=None, rejected_value=None),
                    Pair("a", "b", "c")),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind):
    """Written as strings with its values, as in scores.jsonl, every Pair reads back as itself."""
    record, pair = LAYOUTS[kind]
    assert parse_pair(record) == pair
    values = dict(zip(("chosen_value", "rejected_value"), pair.values or (None, None)))
    assert parse_pair(row(*pair[:3], **values)) == pair


def test_values_are_floats():
    """-2 of the row is -2.0 of the Pair."""
    pair = parse_pair(row("a", "b", "c", chosen_value=1, rejected_value=-2))
    assert [type(value) for value in pair.values] == [float, float]


# --- what is refused -----------------------------------------------------------------------------

TOO_LONG = [*SO, message("user", "And?"), message("assistant", "Well.")]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
SHARE = "to share the prompt and to differ in one last turn"
BEGIN = 'to begin with the turns of "prompt"'

BAD_RECORDS = [
    ([1, 2], "expected a JSON object, got list"),
    ({"prompt": "a", "chosen": "b"}, 'expected a field "rejected"'),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, 'expected a field "prompt"'),
    (row(None, "b", "c"), 'expected a field "prompt"'),                     # no prompt anywhere
    (row("a", 3, "c"), "got prompt as str, chosen as int, rejected as str"),
    (row("a", SO, "c"), "got prompt as str, chosen as list, rejected as str"),
    (row(USER, "b", "c"), "got prompt as list, chosen as str, rejected as str"),
    (row("a", " \n", "c"), 'expected text in "chosen", got an empty one'),
    (row("", "b", "c"), 'expected text in "prompt"'),
    (row(None, HH, HH + " No."), 'expected text in "chosen", got an empty one'),
    (row("a", "b", "b"), "got the same response twice"),
    (row(None, USER + SO, USER + SO), "got the same response twice"),
    (row("a", "\ud800", "b"), "half of a surrogate pair"),
    # the prompt is in one of the two, or is another one
    (row(None, HH + " So.", " No."), SHARE),
    (row(None, TALK + SO, NO), SHARE),
    (row(TALK, TALK + SO, NO), SHARE),
    (row(HH, HH + " So.", " No."), BEGIN),
    (row("\n\nHuman: Hi", "\n\nHuman: Hi you\n\nAssistant: So.",
         "\n\nHuman: Hi you\n\nAssistant: No."), BEGIN),
    (row("Why? ", USER + SO, USER + NO), BEGIN),
    (row("Why?", USER + SO, [message("user", "How?"), *NO]), BEGIN),
    (row("Why?", SO, NO), BEGIN),
    (row("Be kind.", TALK + SO, TALK + NO), BEGIN),                         # a system turn
    # answers of several turns: the user's words would be trained on
    (row(USER, TOO_LONG, NO), SHARE),
    (row(USER, TOO_LONG, [*NO, message("user", "And?"), message("assistant", "Well.")]), SHARE),
    (row(None, HH + " So.\n\nHuman: And?\n\nAssistant: Well.", HH + " No."), SHARE),
    (row(None, [], []), SHARE),
    (row(None, [*USER, message("user", "b")], [*USER, message("user", "c")]),
     "the assistant's answer"),
    # messages
    (row([message(["user"], "a")]), 'expected "prompt" as messages'),
    (row(["a\nb"]), r"got 'a\nb'"),
    (row(TALK, [message("tool", "x")]), 'expected "chosen" as messages'),
    (row(USER, [message("assistant", None)]), 'expected "content" in "chosen" as a string or'),
    (row(USER, [{"role": "assistant"}]), 'expected "content" in "chosen" as a string or'),
    (row(USER, [message("assistant", [])]), 'expected text in "chosen"'),
    # anything but text
    (row("a", "b", "c", images=["cat.png"]), 'expected text alone, got "images" in a row'),
    (row(USER, tools=[{"name": "search"}]), 'expected text alone, got "tools" in a row'),
    (row(USER, [message("assistant", "x", tool_calls=[{"id": 1}])]),
     'expected text alone, got "tool_calls" in a message of "chosen"'),
    (row(USER, [message("assistant", None, tool_calls=[{"id": 1}])]), 'got "tool_calls" in a me'),
    (row([message("user", [*parts("a"), IMAGE])]), "alone, got 'image_url'"),
    (row([message("user", [{"type": "image"}])]), "alone, got {'type': 'image'}"),
    (row([message("user", [{"type": "text", "text": "a", "audio": "b"}])]), "alone, got 'audio'"),
    (row([message("user", [{"type": "text"}])]), "alone, got {'type': 'text'}"),
    (row([message("user", [{"text": "a"}])]), "alone, got {'text': 'a'}"),
    (row([message("user", ["a"])]), "alone, got 'a'"),
]


@pytest.mark.parametrize("record, expected", BAD_RECORDS)
def test_bad_records(record, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_pair(record)


@pytest.mark.parametrize("values", [
    {"chosen_value": 1.0}, {"rejected_value": 1.0}, {"chosen_value": 1.0, "rejected_value": None},
    *({"chosen_value": 1.0, "rejected_value": wrong} for wrong in
      (float("nan"), float("inf"), -float("inf"), True, False, "1.0", [1.0], {}, 10 ** 400, -1e30)),
])
def test_bad_values(values):
    """Both or neither, numbers, finite in float32. To Python, true is a number; here it is not."""
    with pytest.raises(UserError, match='expected "chosen_value" and "rejected_value" as finite'):
        parse_pair(row("a", "b", "c", **values))
    if "chosen_value" in values and "rejected_value" in values:         # the other way round
        swapped = dict(zip(values, reversed(values.values())))
        with pytest.raises(UserError, match="both or neither, got chosen_value"):
            parse_pair(row("a", "b", "c", **swapped))


# --- files ---------------------------------------------------------------------------------------

GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
NO_JSON = ": expected one JSON object in UTF-8, got: "


@pytest.mark.parametrize("content, expected", [
    (GOOD + b"\n" + GOOD + b'{"prompt": \n', f":4{NO_JSON}Expecting value"),
    (b"\xff\xfe" + GOOD, f":1{NO_JSON}'utf-8' codec"),
    (GOOD + b"[" * 100_000 + b"\n", ":2: expected one JSON object"),
    (GOOD + b'{"prompt": "a", "chosen": "b"}\n', ':2: expected a field "rejected"'),
    (b'{"a": \r\n' + GOOD, f":1{NO_JSON}Expecting value at column 6"),
    (b'{"a": "\t"}', f":1{NO_JSON}Invalid control character at column 8"),
    (GOOD[:-2] + b', "chosen": "d"}\n',
     ":1: expected each field once in an object, got 'chosen' again"),
    (GOOD + GOOD[:-2] + b', "chosen_value": NaN, "rejected_value": 1}\n',
     ':2: expected "chosen_value" and "rejected_value" as finite numbers'),
    (GOOD[:-2] + b', "chosen_value": 1%b, "rejected_value": 1}\n' % (b"0" * 400),
     ':1: expected "chosen_value" and "rejected_value" as finite numbers'),
    (GOOD[:-2] + b', "chosen_value": 1e999, "rejected_value": 1}\n',
     ':1: expected "chosen_value" and "rejected_value" as finite numbers'),
    (b"", ": expected at least one preference pair"),
    (None, ": expected a readable JSONL file, got: No such file or directory"),
])
def test_load_pairs_names_file_and_line(tmp_path, content, expected):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}{expected}") and len(str(error.value)) < 600
    assert str(error.value).isprintable()


def test_load_pairs_reads_windows_files(tmp_path):
    """Byte-order mark, CRLF, a blank line, an accent: two pairs, text unchanged."""
    path = tmp_path / "pairs.jsonl"
    accent = json.dumps(row("é", "b", "c"), ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + b"\n" + accent).replace(b"\n", b"\r\n"))
    assert load_pairs(path) == [Pair("a", "b", "c"), Pair("é", "b", "c")]


def test_load_pairs_splits_at_line_feeds_alone(tmp_path):
    """U+2028, U+0085 and a form feed end a line for str.splitlines; in JSON they are text."""
    path, odd = tmp_path / "pairs.jsonl", Pair("a\u2028b", "c\x85d", "e\x0cf")
    line = json.dumps(row(*odd[:3]), ensure_ascii=False).encode()
    path.write_bytes(line + b"\r\n" + line + b"\n{")
    with pytest.raises(UserError, match=re.escape(f"{path}:3: ")):
        load_pairs(path)
    path.write_bytes(line + b"\r\n" + line)
    assert load_pairs(path) == [odd, odd]


def test_load_pairs_reads_a_file_once(tmp_path, monkeypatch):
    path, opened = tmp_path / "pairs.jsonl", []
    path.write_bytes(GOOD)
    monkeypatch.setattr("harness.preferences.open",
                        lambda *args: opened.append(args) or open(*args), raising=False)
    assert len(load_pairs(path)) == 1 and opened == [(path, "rb")]


ESCAPES = "a\nb\x1b[31m\a\x9b\u202e"


def test_escapes_of_a_file_name_stay_in_the_file_name(tmp_path, monkeypatch, capsys):
    """Five characters that a terminal obeys: five signs in the error and in progress."""
    folder = tmp_path / ESCAPES
    folder.mkdir()
    (folder / "bad.jsonl").write_bytes(GOOD + b"{")
    with pytest.raises(UserError) as error:
        load_pairs(folder / "bad.jsonl")
    name = f"{tmp_path}/a\ufffdb\ufffd[31m\ufffd\ufffd\ufffd".replace("/", os.sep)
    assert str(error.value).startswith(f"{name}{os.sep}bad.jsonl:2: expected one JSON object")
    assert str(error.value).isprintable()
    monkeypatch.setattr(preferences, "SECONDS", 0)
    (folder / "good.jsonl").write_bytes(GOOD)
    load_pairs(folder / "good.jsonl")
    printed = capsys.readouterr().out
    assert printed.startswith(f"  {name}{os.sep}good.jsonl: 1 pairs, ")
    assert printed[:-1].isprintable()


@pytest.mark.parametrize("record", [
    row([ESCAPES]), row([message(ESCAPES, "x")]), row([message("user", [{"type": ESCAPES}])]),
    row([message("user", [{"type": "text", "text": "a", ESCAPES: 1}])]),
    row("a", "b", "c", chosen_value=ESCAPES),
])
def test_escapes_of_a_row_stay_in_the_row(record):
    with pytest.raises(UserError) as error:
        parse_pair(record)
    assert str(error.value).isprintable() and "a\\nb" in str(error.value)


@pytest.mark.slow
def test_memory_of_a_long_file(tmp_path):
    """4,000 pairs of about 960 bytes and 700 ids: the text takes 1.1 times its bytes and never
    twice; an id takes 8 bytes, since equal ids are one int (an int for each: 40)."""
    path, generator = tmp_path / "pairs.jsonl", torch.Generator().manual_seed(0)
    words = torch.randint(100, 1000, (4000, 3, 40), generator=generator).tolist()
    texts = [[" ".join(f"word{i}" for i in part) for part in pair] for pair in words]
    path.write_text("".join(json.dumps(row(*pair)) + "\n" for pair in texts), encoding="utf-8")
    tokenizer = learn_tokenizer([Example(" ".join(map(str, range(100, 1000))), "word")], 700)
    tracemalloc.start()
    pairs = load_pairs(path)
    text, peak = tracemalloc.get_traced_memory()
    ids = encode(pairs, tokenizer, 2000)[1]
    both, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs == [Pair(*pair) for pair in texts] and peak < 1.5 * path.stat().st_size
    count = sum(len(part) for pair in ids for part in pair[:3])
    assert 8 < (both - text) / count < 9 and count > 4000 * 500


def test_progress(tmp_path, monkeypatch, capsys):
    """A clock that goes on by a second at every look, 3 seconds between two lines: of 7 pairs the
    third and the sixth print one. While the clock stands still, nothing is printed."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * 7)
    examples = [Example("a", "b")] * 7
    tokenizer = learn_tokenizer(examples, 257)
    monkeypatch.setattr(preferences, "time", SimpleNamespace(perf_counter=lambda: 2.5))
    encode(preferences.counted(examples, "tokenised"), tokenizer, 64)
    assert len(load_pairs(path)) == 7 and capsys.readouterr().out == ""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(preferences, "time", clock)
    assert len(load_pairs(path)) == 7
    assert capsys.readouterr().out == (f"  {path}: 3 pairs, 1 pairs/s\n"
                                       f"  {path}: 6 pairs, 1 pairs/s\n")
    assert len(encode(preferences.counted(examples, "tokenised"), tokenizer, 64)[1]) == 7
    assert capsys.readouterr().out == ("  tokenised: 3 examples, 1 examples/s\n"
                                       "  tokenised: 6 examples, 1 examples/s\n")


# --- splits --------------------------------------------------------------------------------------

def test_split_pairs_by_prompt():
    """20 pairs on 10 prompts: 4 test and 2 validation pairs, whole prompts only, the rest to train;
    the chosen responses for fine-tuning."""
    pairs = [Pair(f"p{i % 10}", f"c{i}", f"r{i}", (float(i), 0.0)) for i in range(20)]
    splits = split_pairs(pairs, 0, 2, 4, seed=0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (14, 2, 4)
    assert sorted(splits.train + splits.val + splits.test) == sorted(pairs)
    train, val, test = ({pair.prompt for pair in part} for part in splits[1:])
    assert not train & val and not train & test and not val & test
    assert splits.sft == [Example(pair.prompt, pair.chosen) for pair in splits.train]
    assert splits != split_pairs(pairs, 0, 2, 4, seed=1)
    assert len(split_pairs(pairs, 5, 2, 4, seed=0).train) == 5
    for sizes in ((0, 10, 10), (15, 2, 4), (0, 1, 19)):
        with pytest.raises(UserError, match="expected"):
            split_pairs(pairs, *sizes, seed=0)
