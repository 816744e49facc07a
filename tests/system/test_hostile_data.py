"""Hostile data: seeded files of odd text in every layout and container.

Every defect of test_preferences.py, and lines that are no JSON, among good rows: refused at its
place, left out by skip_bad. Oddities: every text comes back from its ids, or is counted as cut or
left out. 13 files go through the command line, as --data and as --score; one is trained on and
scored.
"""

import gzip
import json
import os
import random
import re
import signal
from collections import Counter
from dataclasses import replace

import pytest

import data
import train
from data import Pair
from harness.errors import UserError
from harness import preferences
from harness.options import parse_args
from harness.preferences import TEXTS, UNREADABLE, VALUES, load_pairs
from harness.texts import load_task
from small_run import SMALL
from test_preferences import BAD_RECORDS, GOOD, NO_FILE, message

REPEATS = 25
CONFIG = parse_args(["--data=FILE", "--vocab_size=290", "--block_size=256", "--val_pairs=2",
                     "--test_pairs=2"], ("bc", "kd", "dpo", "tvkd"))
BOM = b"\xef\xbb\xbf"

TEXT_PIECES = (
    "Why? ", "naïve café ", "日本語。", "🙂👩\u200d👩\u200d👧", "שלום \u202eabc\u202c ", "</s>",
    "<|endoftext|>", "\0", "\x1b[31m", "\x7f\x85", "\u2028\u2029", "\ufeff", "\u00a0 \u3000",
    "e\u0301\u0327", "\r\n", "\t", "   ", "\n\n\n", "aaaaaaaaaaaa", "--------", "\\n\\u0000",
    '"}, {"', "]", "\U0010ffff\ufffe", "1234567890", "# ", "<script>")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


# --- good rows -----------------------------------------------------------------------------------

def text(rng):
    """Odd characters around a random word, so that no two texts are the same."""
    pieces = [*rng.choices(TEXT_PIECES, k=rng.randrange(5)), f"w{rng.random()}"]
    return "".join(rng.sample(pieces, len(pieces)))


def talk(rng):
    roles = rng.choice((["user"], ["system", "user"], ["user", "assistant", "user"]))
    return [message(role, text(rng)) for role in roles]


def transcript(turns):
    return "".join(f"\n\n{ROLES[turn['role']]}: {turn['content']}" for turn in turns)


def in_parts(turn):
    """The same message, in the newest way to write it."""
    content, role = turn["content"], turn["role"].replace("system", "developer")
    texts = content[:3], content[3:]
    return message(role, [{"type": "text", "text": part, "image": None} for part in texts])


def laid_out(layout, turns, good, bad):
    """One pair in one of LAYOUTS -> (the JSON object, the Pair that it should become)."""
    last = turns[-1]["content"]
    if layout == "strings":
        return {"prompt": last, "chosen": good, "rejected": bad}, Pair(last, good, bad)
    prompt = transcript(turns) + "\n\nAssistant:"
    chosen, rejected = ([message("assistant", answer)] for answer in (good, bad))
    said = [turn["content"] for turn in turns if turn["role"] != "system"]
    records = {
        "messages": (turns, chosen, rejected),
        "parts": [list(map(in_parts, messages)) for messages in (turns, chosen, rejected)],
        "dialogues": (None, turns + chosen, turns + rejected),
        "repeated": (turns, turns + chosen, turns + rejected),
        "first turn": (said[0], turns + chosen, turns + rejected),
        "transcripts": (None, f"{prompt} {good}", f"{prompt} {bad}"),
        "transcript repeated": (prompt, f"{prompt} {good}", f"{prompt} {bad}"),
        "ShareGPT": {"conversations": [{"from": turn["role"], "value": turn["content"]}
                                       for turn in turns],
                     "chosen": {"from": "gpt", "value": good},
                     "rejected": [{"from": "gpt", "value": bad}]},
        "Alpaca": {"instruction": last, "input": "", "output": f" {good}", "rejected": f" {bad}",
                   "system": turns[0]["content"] if turns[0]["role"] == "system" else None,
                   "history": [said[:-1]] if said[1:] else []},
        "OpenAI": {"input": {"messages": turns}, "preferred_output": chosen,
                   "non_preferred_output": rejected}}
    record = records[layout]
    record = record if isinstance(record, dict) else dict(zip(TEXTS, record))
    return record, Pair(prompt, f" {good}", f" {bad}")


LAYOUTS = ("strings", "messages", "parts", "dialogues", "repeated", "first turn", "transcripts",
           "transcript repeated", "ShareGPT", "Alpaca", "OpenAI")


def row(rng, layouts=LAYOUTS):
    return laid_out(rng.choice(layouts), talk(rng), text(rng), text(rng))


def dump(record, rng):
    ascii_alone = "unread" in record or rng.random() < 0.5
    return json.dumps(record, ensure_ascii=ascii_alone).encode("utf-8", "surrogatepass")


def assembled(rows, rng, array):
    """Rows of bytes -> (the file, the number of each row): an array, or lines with blank ones
    between; plain or gzipped, with or without a byte-order mark."""
    end, lines, numbers = rng.choice((b"\n", b"\r\n")), [], []
    for content in rows:
        lines += [] if array else rng.choices((b"", b" ", b"\t"), k=rng.choice((0, 0, 0, 2)))
        lines.append(content)
        numbers.append(len(lines))
    whole = b"[" + (b"," + end).join(lines) + b"]" if array else end.join(lines)
    whole = rng.choice((b"", BOM)) + whole + rng.choice((b"", end, end * 3))
    return rng.choice((whole, gzip.compress(whole, 1))), numbers


# --- defects -------------------------------------------------------------------------------------

NO_LINES = (b"prompt,chosen,rejected", b"{'prompt': 1}", b"\x89PNG\r", BOM * 3 + b"{}", b"\xff",
            b'{"a": 1} {"a": 2}', b'{"a": "\x01"}', b'{"a": "\xed\xa0\x80"}',
            b'{"a": 1%b}' % (b"0" * 5000), b'{"a": {"c": 1, "c": 2}}', b'{"a": ' + b"[" * 99_999)


@pytest.mark.parametrize("bad", [*(record for record, _ in BAD_RECORDS), *NO_LINES])
def test_defect_is_refused_at_its_place(bad, tmp_path):
    """A defect between good rows of all layouts: one line that begins with the file and the place
    to blame; skip_bad reads the others. What is no JSON stands in a line, never in an array."""
    for seed in range(6):
        rng = random.Random(f"{bad!r:.99} {seed}")
        good = [row(rng) for _ in range(rng.randrange(1, 7))]
        rows, at = [dump(record, rng) for record, _ in good], rng.randrange(1, len(good) + 1)
        rows.insert(at, bad if isinstance(bad, bytes) else json.dumps(bad).encode())
        content, numbers = assembled(rows, rng, not isinstance(bad, bytes) and rng.random() < 0.5)
        path = tmp_path / f"{seed}"
        path.write_bytes(content)
        assert load_pairs(path, skip_bad=True) == [pair for _, pair in good]
        if not isinstance(bad, dict) or bad.get("chosen") != bad.get("rejected"):
            with pytest.raises(UserError) as error:
                load_pairs(path)
            line = str(error.value)
            assert line.startswith(f"{path}:{numbers[at]}: expected "), (seed, line)
            assert line.isprintable() and len(line) < len(str(path)) + 450, (seed, line)


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
    "long response": lambda rng: rows_of(rng) + [
        laid_out("messages", talk(rng), text(rng) * 90, text(rng))],
    "one character": lambda rng: [
        laid_out("strings", [message("user", chr(rng.randrange(33, 0xd800)))], *"ab")
        for _ in range(9)],
}


def prepared(path, pairs, capsys):
    """Pairs to ids: every text comes back from its ids, or is counted -> what was printed."""
    task = load_task(replace(CONFIG, data=str(path)), 0, pairs)
    printed, size, eos = capsys.readouterr().out, CONFIG.block_size, task.tokenizer.eot_token
    total = Counter()
    for name, texts, ids in zip(data.Splits._fields, task.texts, task.ids):
        n_cut = 0
        for item, encoded in zip(texts, ids, strict=True):
            for words, tokens in zip(item[1:3], encoded[1:3]):
                assert tokens[-1] == eos
                assert task.tokenizer.decode_bytes(tokens[:-1]) == words.encode()
            prompt, back = item.prompt.encode(), task.tokenizer.decode_bytes(encoded.prompt)
            n_cut += prompt != back
            full = len(encoded.prompt) + max(map(len, encoded[1:3])) == size
            assert prompt.endswith(back) and (prompt == back or full) and item[3:] == encoded[3:]
        pattern = rf"  {name}: (\d+) of (\d+) \w+; (\d+) with .*?, (\d+) dropped"
        fitting, given, counted, dropped = map(int, re.search(pattern, printed).groups())
        assert (fitting, counted, dropped) == (len(ids), n_cut, given - len(ids))
        total.update({"pairs": given, "dropped": dropped} if name != "sft" else {})
    texts = [pair for part in task.texts[1:] for pair in part]
    left_out = Counter(pairs) - Counter(texts)
    assert total["pairs"] == len(pairs) and not Counter(texts) - Counter(pairs)
    assert left_out.total() == total["dropped"]
    for encoded in data.encode(list(left_out), task.tokenizer, 10 ** 8)[1]:
        assert max(map(len, encoded[1:3])) >= size
    return printed


@pytest.mark.parametrize("kind", ODDITIES)
def test_oddity_changes_no_text(kind, tmp_path, capsys):
    """The Pairs are what was put in, in order; decoded, the ids are too; only a split whose every
    response is too long is refused, by option."""
    done = 0
    for seed in range(REPEATS):
        rng = random.Random(f"{kind} {seed}")
        good = ODDITIES[kind](rng)
        array = rng.random() < 0.5
        path, pairs = tmp_path / f"{seed}", [pair for _, pair in good]
        path.write_bytes(assembled([dump(record, rng) for record, _ in good], rng, array)[0])
        assert load_pairs(path) == pairs
        try:
            printed = prepared(path, pairs, capsys)
            done += 1
        except UserError as error:
            assert kind == "long response" and str(error).startswith("--block_size: expected ")
            continue
        once = {pair[:3] for pair in pairs}
        again = len(pairs) - len(once)
        against = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        counts = (f"{len(pairs)} pairs; 0 left out by --train_pairs; kept: {again} that repeat "
                  f"another, {against} that another")
        assert (counts in printed) == (again + against > 0) == ("repeat" in printed)
    assert done >= REPEATS / 2


# --- the command line ----------------------------------------------------------------------------

NO_JSON = ": expected one JSON object"
REFUSED = {
    "nothing": (None, f"{NO_FILE}No such file or directory"),
    "a folder": (lambda path: path.mkdir(), f"{NO_FILE}a folder, a pipe or a device"),
    "a pipe": (lambda path: os.mkfifo(path), f"{NO_FILE}a folder, a pipe or a device"),
    "a device": (lambda path: path.symlink_to(os.devnull), f"{NO_FILE}a folder, a pipe"),
    "a loop of links": (lambda path: path.symlink_to(path), f"{NO_FILE}Too many levels"),
    "no permission": (GOOD, f"{NO_FILE}Permission denied"),
    "blank lines": (BOM + b"\r\n \n\n", ": expected at least one"),
    "NULs": (b"\0" * 4096, f":1{NO_JSON}"),
    "10 MB of brackets": (GOOD + b"[" * 10 ** 7, f":2{NO_JSON}"),
    "an array of 10 MB of brackets": (b"[" * 10 ** 7, f"{NO_FILE}maximum recursion depth"),
    "10 MB cut short": (GOOD + b'{"prompt": "' + b"a" * 10 ** 7, f":2{NO_JSON}"),
    "10 MB of fields": (GOOD + b'{"prompt": "a"' + b', "a": 1, "b": 2' * 650_000 + b"}",
                        f":2{NO_JSON} in UTF-8, got: one with the field"),
}


def denied(*_):
    raise PermissionError(13, "Permission denied")


def late(*_):
    raise TimeoutError("no answer after 10 s")


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs pipes, links and alarms of POSIX")
@pytest.mark.parametrize("option", ["data", "score"])
@pytest.mark.parametrize("kind", REFUSED)
def test_command_line_refuses(option, kind, tmp_path, capsys, monkeypatch):
    """Exit code 2 and one line that begins with the path; reading a pipe that nobody writes to
    would never end. --score reads its file before it looks for a run."""
    path, (content, expected) = tmp_path / "pairs", REFUSED[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)
    if kind == "no permission":                         # permission bits do not stop root
        monkeypatch.setattr("harness.preferences.open", denied, raising=False)
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
