"""Hostile data: 1,800 seeded files, 50 of each kind, are refused in one line that names file and line, or read without a change.

    23 kinds of defect    1,150 files   one bad row among good ones of mixed layouts: refused at that row's own line
    13 kinds of oddity      650 files   every text comes back from its ids, or is counted as cut or left out

13 more go through the command line, as --data and as --score: exit code 2 and one line on stderr. One odd file is trained on.
"""

import json
import os
import random
import re
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

import data
import train
import use
from data import Pair, UserError
from options import parse_args
from test_train import SMALL, refused

EACH = 50
CONFIG = parse_args(["--data=FILE", "--vocab_size=290", "--block_size=256", "--val_pairs=2", "--test_pairs=2"])
BOM = b"\xef\xbb\xbf"

TEXTS = ("Why? ", "naïve café ", "日本語。", "🙂👩\u200d👩\u200d👧", "שלום \u202eabc\u202c ", "<|endoftext|>", "</s>", "\0", "\x1b[31m",
         "\x7f\x85", "\u2028\u2029", "\ufeff", "\u00a0 \u3000", "e\u0301\u0327", "\r\n", "\t", "   ", "\n\n\n", "aaaaaaaaaaaa",
         "--------", "\\n\\u0000", '"}, {"', "\U0010ffff\ufffe", "1234567890", "# ", "<script>")
BLANK = ("", " ", "\n\t \r\n", "\u00a0\u2003\u3000")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


# --- good rows -------------------------------------------------------------------------------------------------------------

def text(rng):
    """Odd characters around a word of its own, so that no two are the same."""
    parts = [*rng.choices(TEXTS, k=rng.randrange(5)), f"w{rng.random()}"]
    return "".join(rng.sample(parts, len(parts)))


def message(role, content):
    return {"role": role, "content": content}


def talk(rng):
    roles = rng.choice((["user"], ["system", "user"], ["user", "assistant", "user"]))
    return [message(role, text(rng)) for role in roles]


def spoken(turns):
    return "".join(f"\n\n{ROLES[turn['role']]}: {turn['content']}" for turn in turns)


def laid_out(layout, turns, good, bad):
    """One pair in one of the four layouts -> (the JSON object, the Pair that data.py should make of it)."""
    prompt, answers = spoken(turns) + "\n\nAssistant:", [[message("assistant", answer)] for answer in (good, bad)]
    record = ({"prompt": turns[-1]["content"], "chosen": good, "rejected": bad},
              {"prompt": turns, "chosen": answers[0], "rejected": answers[1]},
              {"chosen": turns + answers[0], "rejected": turns + answers[1]},
              {"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"})[layout]
    return record, Pair(turns[-1]["content"], good, bad) if layout == 0 else Pair(prompt, f" {good}", f" {bad}")


def row(rng, layouts=range(4)):
    return laid_out(rng.choice(layouts), talk(rng), text(rng), text(rng))


def dump(record, rng):
    return json.dumps(record, ensure_ascii="unread" in record or rng.random() < 0.5).encode("utf-8", "surrogatepass")


# --- defects: rng -> the bytes of a bad row --------------------------------------------------------------------------------

def broken(change, layouts=range(4)):
    """A row in one of the layouts whose JSON object `change` spoils."""
    def defect(rng):
        record, _ = row(rng, layouts)
        return dump(change(record, rng) or record, rng)
    return defect


def retold(good, bad):
    """A row of any layout with other responses, each a function of rng."""
    return lambda rng: dump(laid_out(rng.randrange(4), talk(rng), good(rng), bad(rng))[0], rng)


def inserted(*wrong):
    """A good row in ASCII with wrong bytes put in anywhere."""
    def defect(rng):
        line = json.dumps(row(rng)[0]).encode()
        at = rng.randrange(len(line) + 1)
        return line[:at] + rng.choice(wrong) + line[at:]
    return defect


def either(rng):
    return rng.choice(("chosen", "rejected"))


WRONG_VALUES = (3, -1.5, True, float("nan"), 10 ** 400, {}, {"role": "user"}, [None], [["x"]], [[[[]]]])
WRONG_MESSAGES = (message("tool", "x"), message(["user"], "x"), message("user", None), message("user", ["x"]), message("user", 3),
                  {"role": "user"}, {"content": "x"}, "a\nb", None, 7, [], {})
AGAIN = (b', "chosen": "again"}', b', "id": 1, "id": 1}', b', "meta": {"a": 1, "b": 2, "a": 3}}')
DEFECTS = {
    "truncated": lambda rng: (line := dump(row(rng)[0], rng))[:rng.randrange(1, len(line))],
    "two objects in a line": lambda rng: rng.choice((b"", b" ", b",", b"\r")).join(dump(row(rng)[0], rng) for _ in range(2)),
    "an object over several lines": lambda rng: json.dumps(row(rng)[0], indent=rng.randrange(5)).encode(),
    "not JSON": lambda rng: rng.choice((b"prompt,chosen,rejected", b"<html>", b"{}}", b"{'prompt': 1}", b"\x89PNG\r",
                                        BOM * 3 + b"{}", rng.randbytes(50).replace(b"\n", b"") + b"\xff.")),
    "not an object": lambda rng: rng.choice((b"[1]", b"null", b"3", b'"text"', b"true", b"-Infinity", b"[]", b"{}", b'["a"]')),
    "UTF-16": lambda rng: json.dumps(row(rng)[0]).encode(rng.choice(("utf-16", "utf-16-le", "utf-32"))),
    "invalid UTF-8": inserted(b"\xff", b"\x80", b"\xc0\xaf", b"\xe2\x82", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"),
    "raw NUL or control character": inserted(b"\0", b"\x01", b"\x1b", b"\x1f"),
    "half of a surrogate pair": retold(lambda rng: rng.choice(("\ud83d", "\udc00")) + text(rng), text),
    "missing field": broken(lambda record, rng: record.pop(either(rng)) and None),
    "null": broken(lambda record, rng: record.update({either(rng): None})),
    "wrong type": broken(lambda record, rng: {**record, rng.choice(Pair._fields): rng.choice(WRONG_VALUES)}),
    "nested lists": lambda rng: b'{"prompt": "a", "chosen": %b%b, "rejected": ""}' % (b"[" * (n := rng.randrange(999)), b"]" * n),
    "unclosed brackets": lambda rng: rng.choice((b"[", b'{"a":', b'{"prompt": [')) * rng.randrange(1, 200_000),
    "number of many digits": lambda rng: b'{"prompt": "a", "chosen": "b", "rejected": 1%b}' % (b"0" * rng.randrange(4300, 9999)),
    "empty response": retold(lambda rng: rng.choice(BLANK), text),
    "empty prompt": broken(lambda record, rng: {**record, "prompt": rng.choice(BLANK)}, [0]),
    "same response twice": retold(lambda rng: "Yes.", lambda rng: "Yes."),
    "prompt given twice": broken(lambda record, rng: {**record, "prompt": record["chosen"][:-1]}, [2]),
    "two different prompts": broken(lambda record, rng: {**record, "chosen": row(rng, [2])[0]["chosen"]}, [2, 3]),
    "two layouts in a row": broken(lambda record, rng: {**record, (field := either(rng)): row(rng, [1])[0][field]}, [0]),
    "bad message": broken(lambda record, rng: record[rng.choice(Pair._fields)].append(rng.choice(WRONG_MESSAGES)), [1]),
    "field given twice": lambda rng: dump(row(rng)[0], rng)[:-1] + rng.choice(AGAIN),
}


def assembled(rows, rng, end=None):
    """Rows of bytes with blank lines between -> (the file, the line number of each row)."""
    end, lines, numbers = end or rng.choice((b"\n", b"\r\n")), [], []
    for content in rows:
        lines += rng.choices((b"", b" ", b"\t"), k=rng.choice((0, 0, 0, 2)))
        lines.append(content)
        numbers.append(len(lines))
    return rng.choice((b"", BOM)) + end.join(lines) + rng.choice((b"", end, end * 3)), numbers


@pytest.mark.parametrize("kind", DEFECTS)
def test_defect_is_refused_at_its_line(kind, tmp_path):
    """One defect between 0 to 3 good rows on either side: a single line that begins with the file and the line to blame."""
    for seed in range(EACH):
        rng = random.Random(f"{kind} {seed}")
        before, after = ([dump(row(rng)[0], rng) for _ in range(rng.randrange(4))] for _ in range(2))
        content, numbers = assembled([*before, DEFECTS[kind](rng), *after], rng)
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            data.load_pairs(path)
        message = str(error.value)
        assert message.startswith(f"{path}:{numbers[len(before)]}: expected "), (seed, message)
        assert message.isprintable() and len(message) < len(str(path)) + 400, (seed, message)


# --- oddities: rng -> good rows (each an object and its Pair) --------------------------------------------------------------

def rows(rng):
    return [row(rng) for _ in range(rng.randrange(8, 12))]


def swapped(record, pair):
    return {**record, "chosen": record["rejected"], "rejected": record["chosen"]}, Pair(pair.prompt, pair.rejected, pair.chosen)


def shuffled(items, rng):
    return rng.sample(items, len(items))


def unread(record, rng):
    fields = {"unread": 10 ** 400, "": {"": [[[float("nan")]]]}, "\ud800": "\udfff", "Prompt": None, "chosen ": text(rng)}
    return dict(shuffled([*record.items(), *fields.items()], rng))


ODDITIES = {
    "mixed layouts": rows,
    "byte-order mark": rows,
    "CRLF": rows,
    "every row twice": lambda rng: rows(rng) * 2,
    "some rows repeated": lambda rng: shuffled((good := rows(rng)) + good[:3], rng),
    "some rows contradicted": lambda rng: shuffled((good := rows(rng)) + [swapped(*again) for again in good[:3]], rng),
    "fields nobody reads": lambda rng: [(unread(record, rng), pair) for record, pair in rows(rng)],
    "long prompt": lambda rng: rows(rng) + [laid_out(rng.randrange(4), [message("user", text(rng) * 90)], text(rng), text(rng))],
    "long response": lambda rng: rows(rng) + [laid_out(rng.randrange(4), talk(rng), text(rng) * 90, text(rng))],
    "one prompt for all": lambda rng: [laid_out(1, [message("user", "x")], text(rng), text(rng)) for _ in range(9)],
    "one row only": lambda rng: [row(rng)],
    "no row": lambda rng: [],
    "one character": lambda rng: [laid_out(0, [message("user", chr(rng.randrange(33, 0xd800)))], *"ab") for _ in range(9)],
}


def prepared(path, pairs, capsys):
    """Puts the file through train.prepare: every text comes back from its ids, or is counted -> what was printed."""
    setup = train.prepare(replace(CONFIG, data=str(path)), 0, torch.device("cpu"))
    shown, size, eos = capsys.readouterr().out, CONFIG.block_size, setup.tokenizer.eot_token
    total = Counter()
    for name, texts, ids in zip(data.Splits._fields, setup.texts, setup.ids):
        cut = 0
        for item, row in zip(texts, ids, strict=True):
            for words, tokens in zip(item[1:], row[1:]):
                assert tokens[-1] == eos and setup.tokenizer.decode_bytes(tokens[:-1]) == words.encode()
            prompt, back = item.prompt.encode(), setup.tokenizer.decode_bytes(row.prompt)
            cut += prompt != back
            assert prompt.endswith(back) and (prompt == back or len(row.prompt) + max(map(len, row[1:])) == size)
        counts = re.search(rf"  {name}: (\d+) of (\d+) \w+; (\d+) with .*?, (\d+) dropped", shown).groups()
        kept, given, counted, dropped = map(int, counts)
        assert (kept, counted, dropped) == (len(ids), cut, given - len(ids))
        if name != "sft":
            total.update({"pairs": given, "dropped": dropped})
    texts = [pair for part in setup.texts[1:] for pair in part]
    gone = Counter(pairs) - Counter(texts)
    assert total["pairs"] == len(pairs) and not Counter(texts) - Counter(pairs) and gone.total() == total["dropped"]
    for row in data.encode(list(gone), setup.tokenizer, 10 ** 8)[1]:
        assert max(map(len, row[1:])) >= size
    return shown


@pytest.mark.parametrize("kind", ODDITIES)
def test_oddity_changes_no_text(kind, tmp_path, capsys):
    """The Pairs are what was put in, in order; decoded, the ids are too; only sizes that cannot work are refused, by option."""
    done = 0
    for seed in range(EACH):
        rng = random.Random(f"{kind} {seed}")
        good = ODDITIES[kind](rng)
        content, _ = assembled([dump(record, rng) for record, _ in good], rng, b"\r\n" if kind == "CRLF" else None)
        path, pairs = tmp_path / f"{seed}.jsonl", [pair for _, pair in good]
        path.write_bytes(BOM + content.removeprefix(BOM) if kind == "byte-order mark" else content)
        try:
            assert data.load_pairs(path) == pairs
            shown = prepared(path, pairs, capsys)
            done += 1
        except UserError as error:
            expected = {"no row": f"{path}:", "one row only": "--train_pairs + --val_pairs + --test_pairs:",
                        "one prompt for all": "--val_pairs + --test_pairs:", "long response": "--block_size:"}[kind]
            assert str(error).startswith(expected) and ": expected " in str(error) and "\n" not in str(error)
            continue
        again = len(pairs) - len(set(pairs))
        against = sum(Pair(pair.prompt, pair.rejected, pair.chosen) in pairs for pair in set(pairs))
        counts = f"{len(pairs)} pairs; 0 left out by --train_pairs; kept: {again} that repeat another, {against} that another"
        assert (counts in shown) == (again + against > 0) == ("repeat" in shown)
    assert done == 0 if kind in ("no row", "one row only", "one prompt for all") else done >= EACH / 2


# --- the command line ------------------------------------------------------------------------------------------------------

NO_FILE, NO_JSON, NO_PAIR = (f": expected {what}" for what in ("a readable JSONL file, got", "one JSON object", "at least one"))
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
REFUSED = {
    "nothing": (None, f"{NO_FILE}: No such file or directory"),
    "a folder": (lambda path: path.mkdir(), f"{NO_FILE} a folder, a pipe or a device"),
    "a pipe": (lambda path: os.mkfifo(path), f"{NO_FILE} a folder, a pipe or a device"),
    "a device": (lambda path: path.symlink_to(os.devnull), f"{NO_FILE} a folder, a pipe or a device"),
    "no permission": (GOOD, f"{NO_FILE}: Permission denied"),
    "no byte": (b"", NO_PAIR),
    "blank lines": (b"\r\n \n\n", NO_PAIR),
    "a byte-order mark": (BOM, NO_PAIR),
    "NULs": (b"\0" * 4096, f":1{NO_JSON}"),
    "two bytes a character": ("[]".encode("utf-16"), f":1{NO_JSON}"),
    "10 MB of brackets": (GOOD + b"[" * 10 ** 7, f":2{NO_JSON}"),
    "10 MB cut short": (GOOD + b'{"prompt": "' + b"a" * 10 ** 7, f":2{NO_JSON}"),
    "10 MB of fields": (GOOD + b'{"prompt": "a"' + b', "a": 1, "b": 2' * 650_000 + b"}", ":2: expected a field once"),
}


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="pipes, links and alarms as POSIX has them")
@pytest.mark.parametrize("option", ["data", "score"])
@pytest.mark.parametrize("kind", REFUSED)
def test_command_line_refuses(option, kind, tmp_path, capsys, monkeypatch):
    """Exit code 2 and one line that begins with the path, within seconds: reading a pipe nobody writes to would never end."""
    path, (content, said) = tmp_path / "pairs", REFUSED[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)
    monkeypatch.setattr(use, "load_run", lambda *_: (None, {}, {}))           # --score reads its file before it needs the run

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    def late(*_):
        raise TimeoutError("no answer after 10 s")
    if kind == "no permission":                                                 # permission bits do not stop root
        monkeypatch.setattr(data, "open", denied, raising=False)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        shown = refused(capsys, f"--{option}={path}", f"--out={tmp_path / 'out'}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert shown.startswith(f"train.py: {path}{said}") and len(shown) < 400 and not (tmp_path / "out").exists()


def test_long_runs_of_one_character(tmp_path, capsys):
    """Prompts of 10 MB of one letter and of a million spaces or line ends, where tiktoken alone ends in a panic: cut and counted;
    a million spaces in a response: dropped and counted."""
    pairs = [Pair(run, "b", "c") for run in ("a" * 10 ** 7, " " * 10 ** 6 + "?", "\n" * 10 ** 6 + "?", *"defghijkl")]
    pairs.append(Pair("m", " " * 10 ** 6 + "x", "c"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs), encoding="utf-8")
    shown = prepared(path, pairs, capsys)
    for count, what in ((3, "with the prompt cut"), (1, "dropped")):
        assert sum(map(int, re.findall(rf"(?:train|val|test): .*?(\d+) {what}", shown))) == count


def test_odd_file_is_trained_on_and_scored(tmp_path, capsys, monkeypatch):
    """40 odd rows in all four layouts, trained on and scored to the end, with progress if it took long: the prompts stand in
    scores.jsonl as they were given."""
    rng = random.Random(0)
    good, path, out = [row(rng) for _ in range(40)], tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(BOM + b"\r\n".join(dump(record, rng) for record, _ in good))
    assert train.main([*SMALL, f"--data={path}", f"--out={out}", "--methods=tvkd", "--value=implicit", "--block_size=300"]) == 0
    monkeypatch.setattr(data, "SECONDS", 0)
    assert train.main([f"--score={path}", f"--out={out}", "--device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "40 pairs; 0 with the prompt cut from the left, 0 with a response that does not fit" in shown
    assert f"  {path}: 40 pairs, " in shown and "  tokenised: 40 pairs, " in shown
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [score["prompt"] for score in scores] == [pair.prompt for _, pair in good]
