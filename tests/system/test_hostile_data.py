"""Hostile data: seeded files of odd text in several layouts and containers.

Every text comes back from its ids, or is counted as cut or left out. Files that are none go through
the command line, as --data and as --score; an odd one is trained on, scored and asked about.
"""

import gzip
import json
import random
import re
import signal
from collections import Counter
from dataclasses import replace

import pytest

import data
import train
from data import Pair
from harness import preferences
from harness.errors import printable
from harness.options import parse_args
from harness.preferences import ROLES, TEXTS, UNREADABLE, VALUES, load_pairs
from harness.texts import load_task
from small_run import SMALL
from test_preferences import GOOD, NO_FILE, NO_JSON, message

CONFIG = parse_args(["--data=FILE", "--vocab_size=290", "--block_size=256", "--val_pairs=2",
                     "--test_pairs=2"], ("bc", "kd", "dpo", "tvkd"))
BOM = b"\xef\xbb\xbf"

TEXT_PIECES = (
    "Why? ", "naïve café ", "日本語。", "🙂👩\u200d👩\u200d👧", "שלום \u202eabc\u202c ", "</s>",
    "<|endoftext|>", "\0", "\x1b[31m", "\x7f\x85", "\u2028\u2029", "\ufeff", "\u00a0 \u3000",
    "e\u0301\u0327", "\r\n", "\t", "   ", "\n\n\n", "aaaaaaaaaaaa", "--------", "\\n\\u0000",
    '"}, {"', "]", "\U0010ffff\ufffe", "1234567890", "# ", "<script>")


# --- good rows -----------------------------------------------------------------------------------

def text(rng):
    """Odd characters around a random word, so that no two texts are the same."""
    pieces = [*rng.choices(TEXT_PIECES, k=rng.randrange(5)), f"w{rng.random()}"]
    return "".join(rng.sample(pieces, len(pieces)))


def talk(rng):
    roles = rng.choice((["user"], ["system", "user"], ["user", "assistant", "user"]))
    return [message(role, text(rng)) for role in roles]


def laid_out(layout, turns, good, bad):
    """One pair in a layout -> (the JSON object, the Pair that it should become)."""
    last = turns[-1]["content"]
    if layout == "strings":
        return dict(zip(TEXTS, (last, good, bad))), Pair(last, good, bad)
    prompt = "".join(f"\n\n{ROLES[turn['role']]}: {turn['content']}" for turn in turns)
    prompt += "\n\nAssistant:"
    chosen, rejected = ([message("assistant", answer)] for answer in (good, bad))
    record = {"messages": (turns, chosen, rejected),
              "dialogues": (None, turns + chosen, turns + rejected),
              "transcripts": (prompt, f"{prompt} {good}", f"{prompt} {bad}")}[layout]
    return dict(zip(TEXTS, record)), Pair(prompt, f" {good}", f" {bad}")


def row(rng):
    layout = rng.choice(("strings", "messages", "dialogues", "transcripts"))
    return laid_out(layout, talk(rng), text(rng), text(rng))


def dump(record, rng):
    ascii_alone = "unread" in record or rng.random() < 0.5
    return json.dumps(record, ensure_ascii=ascii_alone).encode("utf-8", "surrogatepass")


def assembled(rows, rng):
    """Rows of bytes -> lines, with blank ones between, or an array; plain or gzip; with a BOM."""
    end = rng.choice((b"\n", b"\r\n"))
    array = b"[" + (b"," + end).join(rows) + b"]"
    whole = BOM + rng.choice(((end * 3).join(rows), array)) + rng.choice((b"", end * 3))
    return rng.choice((whole, gzip.compress(whole, 1)))


# --- oddities: rng -> good rows (a JSON object and its Pair) -------------------------------------

def rows_of(rng):
    return [row(rng) for _ in range(rng.randrange(8, 12))]


def odd_fields(record, pair, rng):
    """Values, and fields of other names before, between and behind, none of which is in the way."""
    values = rng.choice(((0, -0.0), (rng.gauss(0, 9), rng.gauss(0, 9)), (10 ** 29, -1e-320)))
    fields = {"unread": 10 ** 400, "": {"": [[[float("nan")]]]}, "\ud800": "\udfff", "Prompt": None,
              rng.choice(UNREADABLE): rng.choice((None, [])), **dict(zip(VALUES, values))}
    items = [*record.items(), *fields.items()]
    return dict(rng.sample(items, len(items))), pair._replace(values=tuple(map(float, values)))


def contradicted(rng):
    good, texts = rows_of(rng), [text(rng), text(rng)]
    return [*good, good[0], *(laid_out("strings", [message("user", "Hi")], *order)
                              for order in (texts, texts[::-1]))]


ODDITIES = {
    "mixed layouts": rows_of,
    "repeated and contradicted": contradicted,
    "odd fields": lambda rng: [odd_fields(*good, rng) for good in rows_of(rng)],
    "long prompt": lambda rng: rows_of(rng) + [
        laid_out("messages", [message("user", text(rng) * 90)], text(rng), text(rng))],
    "long response": lambda rng: rows_of(rng) * 2 + [
        laid_out("messages", talk(rng), text(rng) * 90, text(rng))],
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ODDITIES)
def test_oddity_changes_no_text(kind, seed, tmp_path, capsys):
    """The Pairs are what was put in. Decoded, the ids are too: every response, and the end of every
    prompt, which is cut only where it fills the context; a pair is left out where a response does.
    """
    rng = random.Random(f"{kind} {seed}")
    good, path = ODDITIES[kind](rng), tmp_path / "pairs"
    pairs, size = [pair for _, pair in good], CONFIG.block_size
    path.write_bytes(assembled([dump(record, rng) for record, _ in good], rng))
    assert load_pairs(path) == pairs
    task = load_task(replace(CONFIG, data=str(path)), 0, pairs)
    decode, once = task.tokenizer.decode_bytes, {pair[:3] for pair in pairs}
    against = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
    assert (f"{len(pairs)} pairs; 0 left out by --train_pairs; kept: {len(pairs) - len(once)} that "
            f"repeat another, {against} that another") in capsys.readouterr().out
    for item, ids in zip(sum(task.texts, []), sum(task.ids, []), strict=True):
        for words, tokens in zip(item[1:3], ids[1:3]):
            assert decode(tokens[:-1]) == words.encode() and tokens[-1] == task.tokenizer.eot_token
        prompt, full = item.prompt.encode(), len(ids[0]) + max(map(len, ids[1:3])) == size
        assert prompt.endswith(decode(ids[0])) and (full or prompt == decode(ids[0]))
        assert item[3:] == ids[3:]
    left_out = Counter(pairs) - Counter(sum(task.texts[1:], []))
    for ids in data.encode(list(left_out), task.tokenizer, 10 ** 8)[1]:
        assert max(map(len, ids[1:3])) >= size


# --- the command line ----------------------------------------------------------------------------

REFUSED = {
    "a folder": (lambda path: path.mkdir(), f"{NO_FILE}Is a directory"),
    "10 MB of brackets": (GOOD + b"[" * 10 ** 7, f":2: {NO_JSON}"),
    "brackets alone": (b"[" * 10 ** 7, f"{NO_FILE}maximum recursion depth"),
    "10 MB of fields": (GOOD + b'{"prompt": "a"' + b', "a": 1, "b": 2' * 650_000 + b"}",
                        ":2: expected text alone and every field once, not 'a'"),
}


def late(*_):
    raise TimeoutError("no answer after 10 s")


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs alarms of POSIX")
@pytest.mark.parametrize("option", ["data", "score"])
@pytest.mark.parametrize("kind", REFUSED)
def test_command_line_refuses(option, kind, tmp_path, capsys):
    """Exit code 2 and one line that begins with the path. --score reads its file before it looks
    for a run."""
    path, (content, expected) = tmp_path / "pairs", REFUSED[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        code = train.main([f"--{option}={path}", f"--out={tmp_path / 'out'}"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1 and len(line) < 400
    assert line.startswith(f"train.py: {path}{expected}") and not (tmp_path / "out").exists()


def test_odd_file_is_trained_on_and_scored(tmp_path, capsys, monkeypatch):
    """40 odd rows in all layouts and a bad one, trained on and scored to the end, with progress
    where it takes long: the prompts stand in scores.jsonl as they were given, and no escape on the
    screen."""
    rng = random.Random(0)
    good, path, out = [row(rng) for _ in range(40)], tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(BOM + b"\r\n".join(dump(record, rng) for record, _ in good) + b"\r\n{")
    run = [*SMALL, f"--data={path}", f"--out={out}", "--methods=tvkd", "--value=implicit"]
    assert train.main([*run, "--block_size=300", "--skip_bad=1"]) == 0
    monkeypatch.setattr(preferences, "SECONDS", 0)
    assert train.main([f"--score={path}", f"--out={out}", "--device=cpu", "--skip_bad=1"]) == 0
    printed = capsys.readouterr().out
    assert re.search("40 pairs[;,] .*0 left out because", printed)
    assert f"  {path}: 41 rows, " in printed and "  tokenised: 40 pairs, " in printed
    assert printed.replace("\n", "").isprintable()
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [pair.prompt for _, pair in good]
