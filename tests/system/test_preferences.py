"""harness/preferences.py: every layout by hand, what is refused and how, files, splits by prompt;
and harness/tokenizers.py against the slow way to learn a vocabulary."""

import gzip
import itertools
import json
import re
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from data import Example, Pair, encode
from harness.errors import UserError
from harness import preferences
from harness.preferences import load_pairs, shown, split_pairs
from harness.tokenizers import PIECES, learn_tokenizer


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def share(role, value):
    return {"from": role, "value": value}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


USER = [message("user", "Why?")]
SO, NO = [message("assistant", "So.")], [message("assistant", "No.")]
TALK = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello"), *USER]
TALK_TEXT = "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
WHY, LONG = Pair("\n\nHuman: Why?\n\nAssistant:", " So.", " No."), Pair(TALK_TEXT, " So.", " No.")
KIND = Pair("\n\nSystem: Be kind.\n\nHuman: Why?\n\nAssistant:", " So.", " No.")
SHORT = Pair(HH, " So.", " No.")


def row(prompt, chosen=SO, rejected=NO, **fields):
    """A row of JSON; prompt None: the row has no such field."""
    fields = {"chosen": chosen, "rejected": rejected, **fields}
    return fields if prompt is None else {"prompt": prompt, **fields}


def alpaca(**fields):
    return {"instruction": "Why?", "chosen": "So.", "rejected": "No.", **fields}


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "strings": (row("2+2=", "4", "5", id=7), Pair("2+2=", "4", "5")),
    "strings are not compared": (row("Hi", "Hi you", "Hi there"), Pair("Hi", "Hi you", "Hi there")),
    "transcript and answers": (row(HH, " So.", " No."), SHORT),
    "messages": (row(TALK), LONG),
    "one message each": (row(USER[0], SO[0], NO[0]), WHY),
    "string and messages": (row("Why?"), WHY),
    "messages and strings": (row(USER, "So.", " No."), WHY),
    "whole dialogues": (row(None, TALK + SO, TALK + NO), LONG),
    "a whole dialogue and an answer": (row(TALK, TALK + SO, NO), LONG),
    "whole dialogues, empty prompt": (row([], USER + SO, USER + NO), WHY),
    "transcripts": ({"prompt": None, "chosen": HH + " So.", "rejected": HH + " No."}, SHORT),
    # The shared turns end at a turn, not at the last shared character.
    "transcripts that begin alike": (row(None, HH + " Paris is", HH + " Paris was"),
                                     Pair(HH, " Paris is", " Paris was")),
    # Binarised UltraFeedback: the prompt as a string, and again as a turn.
    "string beside dialogues": (row("Why?", USER + SO, USER + NO, prompt_id="1", score_chosen=8.5),
                                WHY),
    "first user turn beside dialogues": (row("Hi", TALK + SO, TALK + NO), LONG),
    "last user turn beside dialogues": (row("Why?", TALK + SO, TALK + NO), LONG),
    "string beside transcripts": (row("Hi", HH + " So.", HH + " No."), SHORT),
    "first messages repeated": (row(TALK[:2], TALK + SO, TALK + NO), LONG),
    "transcript repeated without its last label": (
        row(HH.removesuffix("\n\nAssistant:"), HH + " So.", HH + " No."), SHORT),
    "text parts": (row([message("user", parts("Wh", "y?"))], [message("assistant", parts("So."))]),
                   WHY),
    "text parts with empty fields": (
        row([message("user", [{"type": "text", "text": "Why?", "image": None, "url": ""}])]), WHY),
    "developer": (row([message("developer", "Be kind."), *TALK[1:]], TALK + SO, TALK + NO), LONG),
    "empty images and tools": (
        row(USER, [message("assistant", "So.", tool_calls=[])], images=None, tools=[]), WHY),
    "ShareGPT": ({"conversations": [share("system", "Be kind."), share("human", "Why?")],
                  "chosen": [share("gpt", "So.")], "rejected": share("gpt", "No.")}, KIND),
    "Alpaca": (alpaca(input=""), WHY),
    "Alpaca, its output is the chosen one": (
        {"instruction": "Why?", "output": "So.", "rejected": "No."}, WHY),
    "Alpaca, input": (alpaca(input="1+1", chosen=SO),
                      Pair("\n\nHuman: Why?\n\n1+1\n\nAssistant:", " So.", " No.")),
    "Orca": ({"system": "Be kind.", "question": "Why?", "chosen": "So.", "rejected": "No."}, KIND),
    "MedicalGPT": ({"system": "", "history": [], "question": "Why?", "response_chosen": "So.",
                    "response_rejected": "No."}, WHY),
    "OpenAI": ({"input": {"messages": TALK, "tools": []}, "preferred_output": SO,
                "non_preferred_output": NO}, LONG),
    # What stands before the prompt, in every layout.
    "system beside strings": (row("Why?", " So.", " No.", system="Be kind."), KIND),
    "system beside messages": (row(USER, system_prompt="Be kind."), KIND),
    "system beside dialogues": (row(None, USER + SO, USER + NO, system="Be kind."), KIND),
    "system beside itself": (row(None, TALK + SO, TALK + NO, system="Be kind."), LONG),
    "system beside itself in the prompt": (row(TALK, system="Be kind."), LONG),
    "system beside Alpaca": (alpaca(system="Be kind."), KIND),
    "history beside strings": (row("Why?", " So.", " No.", history=[["Hi", "Hello"]]), SHORT),
    "history beside messages": (row(USER, history=TALK[1:3], system="Be kind."), LONG),
    "history beside Alpaca": (alpaca(history=[["Hi", "Hello"]], system="Be kind."), LONG),
    "values": (row("a", "b", "c", chosen_value=1.5, rejected_value=-2),
               Pair("a", "b", "c", (1.5, -2.0))),
    "values null": (row("a", "b", "c", chosen_value=None, rejected_value=None),
                    Pair("a", "b", "c")),
}


def test_layouts(tmp_path):
    """All in one file. Written as strings with its values, as in scores.jsonl, every Pair reads
    back as itself."""
    pairs = [pair for _, pair in LAYOUTS.values()]
    again = [row(*pair[:3], **dict(zip(("chosen_value", "rejected_value"), pair.values or ())))
             for pair in pairs]
    for records in ([record for record, _ in LAYOUTS.values()], again):
        (tmp_path / "pairs").write_text("\n".join(map(json.dumps, records)))
        read = dict(zip(LAYOUTS, load_pairs(tmp_path / "pairs"), strict=True))
        assert read == dict(zip(LAYOUTS, pairs))
        assert all(type(value) is float for value in read["values"].values)
    with pytest.raises(UserError, match=r"which --value=given reads, .*, got \[None, None\]"):
        load_pairs(tmp_path / "pairs", with_values=True)


# --- what is refused -----------------------------------------------------------------------------

TOO_LONG = [*SO, message("user", "And?"), message("assistant", "Well.")]
IMAGE = {"type": "picture", "url": "data:"}
SHAPE = 'expected "chosen" and "rejected" as one turn of the assistant each, after the same prompt'
LAYOUT = "expected the fields of one of the layouts, got "
ESCAPES = "a\nb\x1b[31m\a\x9b\u202e"
TURN, ALONE = "expected no turn of the user in", "expected text alone and every field once, not "

BAD_RECORDS = [
    ([1, 2], "expected a JSON object, got list"),
    ({"question": "a", "response_j": "b", "response_k": "c"}, LAYOUT + "question, response_j"),
    (row("a", " \n", "c"), """expected text in UTF-8 in "chosen", got ' \\n'"""),
    (row("a", "\ud800", "c"), """expected text in UTF-8 in "chosen", got '\\ud800'"""),
    (row(" \n", "b", "c"), 'expected text in UTF-8 in "prompt", got'),
    (row(None, HH, HH + " No."), 'expected text in UTF-8 in "chosen", got \'\''),
    (row("a", "b", "b"), 'expected "chosen" and "rejected" to differ'),
    (row(None, USER + SO, USER + SO), 'expected "chosen" and "rejected" to differ'),
    # the prompt is in one of the two, is another one, or there is none
    *((row(*texts), SHAPE) for texts in (
        (None, "b", "c"), ("", "b", "c"), ({}, SO, NO), (None, HH + " So.", " No."),
        (None, TALK + SO, NO), ("\n\nHuman: Hi", "\n\nHuman: Hi you\n\nAssistant: So.",
                                "\n\nHuman: Hi you\n\nAssistant: No."),
        ("Why? ", USER + SO, USER + NO), ("Why?", USER + SO, [message("user", "How?"), *NO]),
        ("Be kind.", TALK + SO, TALK + NO), (None, [], []), (USER, [], []), (USER + SO, [], []),
        # answers of several turns: the user's words would be trained on
        (USER, TOO_LONG, NO), (USER, TOO_LONG, [*NO, *TOO_LONG[1:]]),
        (HH, " So.\n\nHuman: And?\n\nAssistant: Well.", " No."), ("Why?", "So.\n\nHuman: A", "No."),
        (None, [*USER, message("user", "b")], USER + NO),
        (None, USER + SO, [*USER, message("user", "c")]),
        # a turn that is begun, in every layout
        (USER + SO,), (None, USER + SO + NO, USER + SO + SO),
        (None, HH + " So.\n\nAssistant: b", HH + " So.\n\nAssistant: c"))),
    (row(USER, [message("assistant", "So.\n\nHuman: And?")]), TURN + r""" "chosen", got '\n\nHu"""),
    (row("Why?", "No.", "So.<|im_start|>user\nAnd?"), TURN + """ "rejected", got '<|im_start|>u"""),
    # messages
    *((row([wrong]), 'expected "prompt" as text or as messages of text alone from system|')
      for wrong in (message(["user"], "a"), 3, message("user", None), message("user", [IMAGE]),
                    message("user", [{"text": "a"}]), message("user", [{"type": "text"}]),
                    {"role": "user"}, share("chosen_gpt", "b"))),
    (row(TALK, [message("tool", "x")]), 'expected "chosen" as text or as messages'),
    (row(TALK, SO, 3), 'expected "rejected" as text or as messages'),
    (row(USER, history=[["a", "b", "c"]]), 'expected "history" as text or as messages'),
    (row("a", [message("assistant", [])], NO), 'expected text in UTF-8 in "chosen"'),
    # what no text model would see, wherever it stands
    (row("a", "b", "c", images=["cat.png"]), ALONE + "'images'"),
    ({"input": {"messages": USER, "tools": [1]}, "preferred_output": SO,
      "non_preferred_output": NO}, ALONE + "'tools'"),
    (row(USER, [message("assistant", None, tool_calls=[{"id": 1}])]), ALONE + "'tool_calls'"),
    (row(USER, [message("assistant", "x", reasoning_content="y")]), ALONE + "'reasoning_content'"),
    (row([message("user", [{**parts("a")[0], "audio": "b"}])]), ALONE + "'audio'"),
    # escapes stay in the row
    (row([message(ESCAPES, "x")]), 'expected "prompt" as text or as messages'),
    ({ESCAPES: 1}, LAYOUT + "a\ufffdb\ufffd[31m\ufffd\ufffd\ufffd; `jq"),
    # both values or neither, numbers, finite in float32; to Python, true is a number
    *((row("a", "b", "c", chosen_value=chosen, rejected_value=rejected),
       'expected "chosen_value" and "rejected_value", which --value=given reads, as finite num')
      for wrong in (None, float("nan"), -float("inf"), True, "1.0", [1.0], {}, 10 ** 400, -1e30)
      for chosen, rejected in ((1.0, wrong), (wrong, 1.0))),
]
NO_LINES = (b"prompt,chosen,rejected", b"{'prompt': 1}", b"\xef\xbb\xbf{}", b'{"a": "\x01"}',
            b'{"a": 1} {"a": 2}', b'{"a": 1%b}' % (b"0" * 5000), b'{"a": ' + b"[" * 99_999)
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
NO_JSON, NO_FILE = "expected one JSON object a line, or", ": expected a readable file, got: "


@pytest.mark.parametrize("record, expected", [*BAD_RECORDS, *((x, NO_JSON) for x in NO_LINES)])
def test_bad_records(tmp_path, capsys, record, expected):
    """Refused where it stands, and left out by skip_bad; equal answers are left out without."""
    path = tmp_path / "pairs"
    path.write_bytes(GOOD + (record if isinstance(record, bytes) else json.dumps(record).encode()))
    if "to differ" in expected:
        assert load_pairs(path) == [Pair("a", "b", "c")]
    else:
        with pytest.raises(UserError) as error:
            load_pairs(path)
        assert str(error.value).startswith(f"{path}:2: {expected}")
        assert str(error.value).isprintable() and len(str(error.value)) < len(str(path)) + 450
    assert load_pairs(path, skip_bad=True) == [Pair("a", "b", "c")]
    assert f"  {path}: 1 rows, first [2], are no pair: {expected}" in capsys.readouterr().out


# --- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, expected", [
    (GOOD + b"\n" + GOOD + b'{"prompt": \n', f":4: {NO_JSON}"),
    (b"\xff\xfe" + GOOD, f":1: {NO_JSON}"),
    (GOOD.replace(b"b", b"\xff"), """:1: expected text in UTF-8 in "chosen", got '\\udcff'"""),
    (b"[" + GOOD + b"," + GOOD.replace(b"a", b"\xff") + b"]", ":2: expected text in UTF-8 in"),
    (GOOD[:-2] + b', "chosen": "d"}\n', ":1: expected text alone and every field"),
    (b"[" + GOOD + b", " + GOOD[:-2] + b', "chosen": "d"}]', ":2: expected text alone and"),
    (GOOD[:-2] + b', "chosen_value": 1e999, "rejected_value": 1}\n', ':1: expected "chosen_value"'),
    (b"[" + GOOD + b"," + GOOD[:9], NO_FILE + "Expecting ':' delimiter: line 2 column 11"),
    (b"[" + GOOD + b"]" + GOOD, NO_FILE + "Expecting value: line 2 column 1"),
    (gzip.compress(GOOD * 9)[:-9], NO_FILE + "Compressed file ended"),
    (gzip.compress(GOOD)[:12] + GOOD, NO_FILE + "Error -3 while decompressing"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", NO_FILE + "a pointer of Git"),
    (b'{\r\n  "data": [\r\n', f":1: {NO_JSON}"),
    (b"\xef\xbb\xbf\r\n \n", ": expected at least one preference pair"),
    (b"[ ]", ": expected at least one preference pair"),
    (None, NO_FILE + "No such file or directory")])
def test_load_pairs_names_file_and_place(tmp_path, content, expected):
    """The line, or in an array the row."""
    path = tmp_path / "pairs"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}{expected}") and len(str(error.value)) < 600
    assert str(error.value).isprintable()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_containers(tmp_path, mark):
    """Three odd pairs as lines (LF, CRLF, blank ones, CR inside) and as arrays (one line, many),
    plain and gzipped, with and without a byte-order mark. U+2028, U+0085 and a form feed end a line
    for str.splitlines; in JSON they are text."""
    pairs = [Pair("a\u2028b", "c\x85d", 'e\x0cf], {"'), Pair("é", "b", "c\\"), Pair("a", "🙂", "c")]
    rows = [row(*pair[:3]) for pair in pairs]
    lines = [json.dumps(record, ensure_ascii=False, separators=(",\r", ":")) for record in rows]
    for text in ("\n".join(lines), "\r\n\n  \r\n".join(lines) + "\r\n", json.dumps(rows) + "\n",
                 json.dumps(rows, indent=2, ensure_ascii=False).replace("\n", "\r\n")):
        for content in (mark + text.encode(), gzip.compress(mark + text.encode())):
            (tmp_path / "pairs").write_bytes(content)
            assert load_pairs(tmp_path / "pairs") == pairs


def test_bad_rows_are_counted_by_kind(tmp_path, capsys):
    """Rows 1, 2, 4, 6 have an empty answer, 5 no JSON, 8 another role: three kinds, the first three
    lines of each. skip_bad leaves them out; without it the first is named. Row 9, of a fourth kind,
    prefers nothing."""
    rows = ["", "", "b", "", None, "", "b", [message("tool", "x")], "c"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join("{\n" if chosen is None else json.dumps(row("a", chosen, "c")) + "\n"
                            for chosen in rows), encoding="utf-8")
    empty = """expected text in UTF-8 in "chosen", got ''"""
    table = (f"  {path}: 4 rows, first [1, 2, 4], are no pair: {empty}\n"
             f"  {path}: 1 rows, first [5], are no pair: expected one JSON object")
    with pytest.raises(UserError) as error:
        load_pairs(path)
    assert capsys.readouterr().out.startswith(table)
    assert str(error.value) == (f"{path}:1: {empty}; --skip_bad=1 leaves out all rows that are no "
                                "pair")
    assert load_pairs(path, skip_bad=True) == [Pair("a", "b", "c")] * 2
    printed = capsys.readouterr().out
    assert printed.startswith(table) and "1 rows, first [8], are no pair: expected " in printed


def test_the_first_pair_is_shown(tmp_path, capsys):
    """Its borders are seen, long texts are cut where no border is, and no escape gets through.
    A hint comes where more than half of the prompts meet their response without a space."""
    path, long = tmp_path / "pairs.jsonl", Pair("x" * 300 + "\n?", "a\x1b" + "b" * 300, "c")
    assert shown(long) == (f"  [prompt]...{'x' * 198}\\n?[chosen]a\ufffd{'b' * 198}...[EOS]\n"
                           f"  [prompt]...{'x' * 198}\\n?[rejected]c[EOS]")
    for chosen, spaced, hint in (("b", 1, True), ("b", 2, False), (" b", 0, False)):
        rows = [row("a?", chosen, "c", id=1, context="d"), row("a?\n", "b", "c")]
        path.write_text("\n".join(map(json.dumps, rows[:1] * 2 + rows[1:] * spaced)))
        load_pairs(path)
        printed = capsys.readouterr().out
        assert f"  [prompt]a?[chosen]{chosen}[EOS]\n  [prompt]a?[rejected]c[EOS]\n" in printed
        assert "pairs; fields that are not read: context, id; the first pair as it" in printed
        assert ("  hint: 2 prompts meet their response without a space" in printed) == hint


def test_escapes_of_a_file_name_stay_in_the_file_name(tmp_path, monkeypatch, capsys):
    """Five characters that a terminal obeys: five signs in the error and in what is printed."""
    (tmp_path / ESCAPES).mkdir()
    path, signs = tmp_path / ESCAPES / "pairs.jsonl", "a\ufffdb\ufffd[31m\ufffd\ufffd\ufffd"
    path.write_bytes(GOOD + b"{")
    monkeypatch.setattr(preferences, "SECONDS", 0)
    with pytest.raises(UserError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{tmp_path / signs / 'pairs.jsonl'}:2: {NO_JSON}")
    printed = capsys.readouterr().out
    assert printed.startswith(f"  {tmp_path / signs / 'pairs.jsonl'}: 1 rows, ")
    assert printed.replace("\n", "").isprintable()


@pytest.mark.slow
def test_memory_of_a_long_file(tmp_path):
    """4,000 pairs of about 960 bytes and 700 ids: the text of lines takes 1.1 times its bytes and
    never twice; an id takes 8 bytes, since equal ids are one int."""
    path, generator = tmp_path / "pairs", torch.Generator().manual_seed(0)
    words = torch.randint(100, 1000, (4000, 3, 40), generator=generator).tolist()
    texts = [[" ".join(f"word{i}" for i in part) for part in pair] for pair in words]
    path.write_text("\n".join(json.dumps(row(*pair)) for pair in texts))
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
    """A clock that goes on by a second at every look, 3 seconds between two lines: of 7 rows, and
    of 7 merges, the third and the sixth print one. While the clock stands still, none does."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * 7)
    monkeypatch.setattr(preferences, "time", SimpleNamespace(perf_counter=lambda: 2.5))
    load_pairs(path)
    assert " rows, " not in capsys.readouterr().out
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(preferences, "time", clock)
    load_pairs(path)
    assert capsys.readouterr().out.startswith(f"  {path}: 3 rows, 1 rows/s\n"
                                              f"  {path}: 6 rows, 1 rows/s\n{path}: 7 pairs")
    learn_tokenizer([Example("abcdefgh", "ijkl")], 264)
    assert capsys.readouterr().out == ("  vocabulary: 3 merges, 1 merges/s\n"
                                       "  vocabulary: 6 merges, 1 merges/s\n")


# --- splits and the vocabulary -------------------------------------------------------------------

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
        with pytest.raises(UserError, match="got 20 pairs with 10 different prompts, each of"):
            split_pairs(pairs, *sizes, seed=0)
    with pytest.raises(UserError, match="got 12 pairs with 1 different prompts, each of which"):
        split_pairs([Pair("Write a poem.", f"{i}", "no") for i in range(12)], 0, 2, 2, seed=0)


def test_a_prompt_stays_on_one_side_however_it_is_spelled():
    """Five spellings of one prompt, in NFC and NFD, full width, another case, other white space:
    held out together."""
    same = ["Café?", "Cafe\u0301?", "Ｃａｆé？", " CAFÉ?\n", "\u3000café? "]
    pairs = [Pair(prompt, "b", "c") for prompt in [*same, "Tea?", "Milk?"]]
    for seed in range(5):
        splits = split_pairs(pairs, 0, 1, 1, seed)
        assert sorted(sum(pair.prompt in same for pair in part) for part in splits[1:]) == [0, 0, 5]


def test_learned_vocabulary_is_that_of_the_slow_way():
    """Count every pair of neighbours anew, join the most frequent one (of two, the one met first in
    the course of learning), again and again: the same tokens in the same order."""
    text = " ".join(f"{a}{b * 3}ab{a}" for a, b in itertools.product("aabbc日é", "abcd"))
    pieces = [[bytes([b]) for b in piece.encode()] for piece in re.findall(PIECES, text + "\n")]
    met, expected, counts = {}, [], True
    while counts:
        counts = Counter(pair for tokens in pieces for pair in zip(tokens, tokens[1:]))
        for pair in counts:
            met.setdefault(pair, len(met))
        best = min(counts, key=lambda pair: (-counts[pair], met[pair]), default=())
        expected += [b"".join(best)] * len(counts and [1])
        for tokens in pieces:
            for i in range(len(tokens) - 1):
                if tuple(tokens[i:i + 2]) == best:
                    tokens[i:i + 2] = [b"".join(best)]
    tokenizer = learn_tokenizer([Example(text, "")], 10_000)
    assert tokenizer.n_vocab == 257 + len(expected) and len(expected) > 60
    assert [tokenizer.decode_single_token_bytes(256 + i)
            for i in range(len(expected))] == expected
