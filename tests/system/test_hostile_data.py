"""Hostile data: 1,050 seeded files, 25 of every kind.

    28 kinds of defect      700 files   one bad row among good ones of mixed layouts: refused in one
                                        line that names the file and that row's own line
    14 kinds of oddity      350 files   every text comes back from its ids, or is counted as cut or
                                        left out

13 more go through the command line, as --data and as --score: exit code 2 and one line on stderr.
One odd file is trained on and scored.
"""

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
from harness.preferences import LARGEST_VALUE, TEXTS, UNREADABLE, VALUES, load_pairs
from harness.texts import load_task
from small_run import SMALL

REPEATS = 25
CONFIG = parse_args(["--data=FILE", "--vocab_size=290", "--block_size=256", "--val_pairs=2",
                     "--test_pairs=2"], ("bc", "kd", "dpo", "tvkd"))
BOM = b"\xef\xbb\xbf"

TEXT_PIECES = (
    "Why? ", "naïve café ", "日本語。", "🙂👩\u200d👩\u200d👧", "שלום \u202eabc\u202c ", "</s>",
    "<|endoftext|>", "\0", "\x1b[31m", "\x7f\x85", "\u2028\u2029", "\ufeff", "\u00a0 \u3000",
    "e\u0301\u0327", "\r\n", "\t", "   ", "\n\n\n", "aaaaaaaaaaaa", "--------", "\\n\\u0000",
    '"}, {"', "\U0010ffff\ufffe", "1234567890", "# ", "<script>")
BLANK = ("", " ", "\n\t \r\n", "\u00a0\u2003\u3000")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


# --- good rows -----------------------------------------------------------------------------------

def text(rng):
    """Odd characters around a random word, so that no two texts are the same."""
    pieces = [*rng.choices(TEXT_PIECES, k=rng.randrange(5)), f"w{rng.random()}"]
    return "".join(rng.sample(pieces, len(pieces)))


def message(role, content):
    return {"role": role, "content": content}


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


LAYOUTS = range(8)
(STRINGS, MESSAGES, DIALOGUES, TRANSCRIPTS, FIRST_TURN, REPEATED, TRANSCRIPT_REPEATED,
 PARTS) = LAYOUTS
REPEATING = (FIRST_TURN, REPEATED, TRANSCRIPT_REPEATED)     # the prompt stands in the row twice


def laid_out(layout, turns, good, bad):
    """One pair in one layout -> (the JSON object, the Pair that it should become)."""
    if layout == STRINGS:
        prompt = turns[-1]["content"]
        return {"prompt": prompt, "chosen": good, "rejected": bad}, Pair(prompt, good, bad)
    if layout == FIRST_TURN and turns[0]["role"] == "system":
        turns = turns[1:]
    prompt = transcript(turns) + "\n\nAssistant:"
    chosen, rejected = ([message("assistant", answer)] for answer in (good, bad))
    if layout in (DIALOGUES, FIRST_TURN, REPEATED):
        chosen, rejected = turns + chosen, turns + rejected
    if layout in (TRANSCRIPTS, TRANSCRIPT_REPEATED):
        chosen, rejected = f"{prompt} {good}", f"{prompt} {bad}"
    record = {"chosen": chosen, "rejected": rejected}
    if layout in (MESSAGES, REPEATED):
        record["prompt"] = turns
    if layout == FIRST_TURN:
        record["prompt"] = turns[0]["content"]
    if layout == TRANSCRIPT_REPEATED:
        record["prompt"] = prompt
    if layout == PARTS:
        messages = {"prompt": turns, **record}
        record = {name: list(map(in_parts, messages[name])) for name in TEXTS}
    return record, Pair(prompt, f" {good}", f" {bad}")


def row(rng, layouts=LAYOUTS):
    return laid_out(rng.choice(layouts), talk(rng), text(rng), text(rng))


def dump(record, rng):
    ascii_alone = "unread" in record or rng.random() < 0.5
    return json.dumps(record, ensure_ascii=ascii_alone).encode("utf-8", "surrogatepass")


# --- defects: rng -> the bytes of a bad row ------------------------------------------------------

def broken(change, layouts=LAYOUTS):
    """A row in one of the layouts whose JSON object `change` spoils."""
    def defect(rng):
        record, _ = row(rng, layouts)
        return dump(change(record, rng) or record, rng)
    return defect


def answered(good, bad):
    """A row of any layout with these answers, each a function of rng."""
    return lambda rng: dump(laid_out(rng.choice(LAYOUTS), talk(rng), good(rng), bad(rng))[0], rng)


def inserted(*wrong):
    """A good row in ASCII with wrong bytes put in anywhere."""
    def defect(rng):
        line = json.dumps(row(rng)[0]).encode()
        at = rng.randrange(len(line) + 1)
        return line[:at] + rng.choice(wrong) + line[at:]
    return defect


def either(rng):
    return rng.choice(("chosen", "rejected"))


def unreadable(record, rng):
    """What no text model reads: in the row, in a message, as a part of a message or of a part."""
    name, something = rng.choice(UNREADABLE), rng.choice(("x", [1], {"a": 1}, 1))
    last = record[either(rng)][-1]
    where = rng.randrange(4)
    if where == 0:
        record[name] = something
    elif where == 1:
        last[name] = something
    elif where == 2:
        last["content"].insert(rng.randrange(3), {"type": name, name: something})
    else:
        last["content"][rng.randrange(2)][name] = something


def bad_values(record, rng):
    """One missing, null, not a number, or none that float32 can hold."""
    values = [rng.uniform(-9, 9), rng.choice(WRONG_NUMBERS)]
    record.update(zip(rng.sample(VALUES, rng.choice((1, 2, 2, 2))), values))


def one_without_prompt(record, rng):
    """Of two answers that begin with the prompt, one loses it."""
    name = either(rng)
    record[name] = record[name][-1:] if isinstance(record[name], list) else " " + text(rng)


def longer(record, rng):
    """An answer of three turns; the user's words in it are not the model's."""
    record[either(rng)] += [message("user", text(rng)), message("assistant", text(rng))]


WRONG_TYPES = (3, -1.5, True, float("nan"), 10 ** 400, {}, {"role": "user"}, [None], [["x"]],
               [[[[]]]])
WRONG_NUMBERS = (None, True, False, float("nan"), float("inf"), 10 ** 400, 2 * LARGEST_VALUE,
                 "1.0", "", [], [1.0], {}, "\x1b[31m")
WRONG_MESSAGES = (
    message("tool", "x"), message(["user"], "x"), message("user", None), message("user", ["x"]),
    message("user", 3), message("user", {"type": "text", "text": "x"}), {"role": "user"},
    {"content": "x"}, "a\nb", None, 7, [], {}, message("user", [{"type": "text"}]),
    message("user", [{"type": ["text"], "text": "x"}]), message("user", [[]]),
    message("user", [{"type": "text", "text": 3}]))
NOT_JSON = (b"prompt,chosen,rejected", b"<html>", b"{}}", b"{'prompt': 1}", b"\x89PNG\r",
            BOM * 3 + b"{}")
NOT_OBJECTS = (b"[1]", b"null", b"3", b'"text"', b"true", b"-Infinity", b"[]", b"{}", b'["a"]')
AGAIN = (b', "chosen": "again"}', b', "id": 1, "id": 1}', b', "meta": {"a": 1, "b": 2, "a": 3}}')


def nested(rng):
    depth = rng.randrange(999)
    return b'{"prompt": "a", "chosen": %b%b, "rejected": ""}' % (b"[" * depth, b"]" * depth)


def many_digits(rng):
    zeros = b"0" * rng.randrange(4300, 9999)
    return b'{"prompt": "a", "chosen": "b", "rejected": 1%b}' % zeros


def truncated(rng):
    line = dump(row(rng)[0], rng)
    return line[:rng.randrange(1, len(line))]


DEFECTS = {
    "truncated": truncated,
    "two objects in a line": lambda rng: rng.choice((b"", b" ", b",", b"\r")).join(
        dump(row(rng)[0], rng) for _ in range(2)),
    "an object over several lines": lambda rng: json.dumps(
        row(rng)[0], indent=rng.randrange(5)).encode(),
    "not JSON": lambda rng: rng.choice(
        (*NOT_JSON, rng.randbytes(50).replace(b"\n", b"") + b"\xff.")),
    "not an object": lambda rng: rng.choice(NOT_OBJECTS),
    "UTF-16": lambda rng: json.dumps(row(rng)[0]).encode(
        rng.choice(("utf-16", "utf-16-le", "utf-32"))),
    "invalid UTF-8": inserted(b"\xff", b"\x80", b"\xc0\xaf", b"\xe2\x82", b"\xed\xa0\x80",
                              b"\xf5\x80\x80\x80"),
    "raw NUL or control character": inserted(b"\0", b"\x01", b"\x1b", b"\x1f"),
    "half of a surrogate pair": answered(
        lambda rng: rng.choice(("\ud83d", "\udc00")) + text(rng), text),
    "missing field": broken(lambda record, rng: record.pop(either(rng)) and None),
    "null": broken(lambda record, rng: record.update({either(rng): None})),
    "wrong type": broken(
        lambda record, rng: record.update({rng.choice(TEXTS): rng.choice(WRONG_TYPES)})),
    "nested lists": nested,
    "unclosed brackets": lambda rng: (rng.choice((b"[", b'{"a":', b'{"prompt": ['))
                                      * rng.randrange(1, 200_000)),
    "number of many digits": many_digits,
    "empty response": answered(lambda rng: rng.choice(BLANK), text),
    "empty prompt": broken(lambda record, rng: {**record, "prompt": rng.choice(BLANK)},
                           [STRINGS, FIRST_TURN]),
    "same response twice": answered(lambda rng: "Yes.", lambda rng: "Yes."),
    "prompt in one response": broken(one_without_prompt, REPEATING),
    "two different prompts": broken(
        lambda record, rng: record.update(chosen=row(rng, [DIALOGUES])[0]["chosen"]),
        [DIALOGUES, TRANSCRIPTS, *REPEATING]),
    "prompt not word for word": broken(
        lambda record, rng: record.update(prompt=record["prompt"] + rng.choice((" ", ".", "\n"))),
        [FIRST_TURN]),
    "two layouts in a row": broken(
        lambda record, rng: record.update({either(rng): [message("assistant", text(rng))]}),
        [STRINGS]),
    "bad message": broken(
        lambda record, rng: record[rng.choice(TEXTS)].append(rng.choice(WRONG_MESSAGES)),
        [MESSAGES]),
    "answer of several turns": broken(longer, [MESSAGES, DIALOGUES, FIRST_TURN, REPEATED]),
    "not text": broken(unreadable, [PARTS]),
    "bad values": broken(bad_values),
    "one value": broken(lambda record, rng: record.update({rng.choice(VALUES): rng.random()})),
    "field given twice": lambda rng: dump(row(rng)[0], rng)[:-1] + rng.choice(AGAIN),
}


def assembled(rows, rng, end=None):
    """Rows of bytes with blank lines between -> (the file, the line number of every row)."""
    end, lines, numbers = end or rng.choice((b"\n", b"\r\n")), [], []
    for content in rows:
        lines += rng.choices((b"", b" ", b"\t"), k=rng.choice((0, 0, 0, 2)))
        lines.append(content)
        numbers.append(len(lines))
    return rng.choice((b"", BOM)) + end.join(lines) + rng.choice((b"", end, end * 3)), numbers


@pytest.mark.parametrize("kind", DEFECTS)
def test_defect_is_refused_at_its_line(kind, tmp_path):
    """A defect between 0 to 3 good rows on either side: one line that begins with the file and the
    line to blame."""
    for seed in range(REPEATS):
        rng = random.Random(f"{kind} {seed}")
        before = [dump(row(rng)[0], rng) for _ in range(rng.randrange(4))]
        after = [dump(row(rng)[0], rng) for _ in range(rng.randrange(4))]
        content, numbers = assembled([*before, DEFECTS[kind](rng), *after], rng)
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_pairs(path)
        line = str(error.value)
        assert line.startswith(f"{path}:{numbers[len(before)]}: expected "), (seed, line)
        assert line.isprintable() and len(line) < len(str(path)) + 400, (seed, line)


# --- oddities: rng -> good rows (a JSON object and its Pair) -------------------------------------

def rows(rng):
    return [row(rng) for _ in range(rng.randrange(8, 12))]


def swapped(record, pair):
    record = {**record, "chosen": record["rejected"], "rejected": record["chosen"]}
    return record, Pair(pair.prompt, pair.rejected, pair.chosen)


def shuffled(items, rng):
    return rng.sample(items, len(items))


def unread(record, rng):
    """Fields of other names, before, between and behind: none is read, none is in the way."""
    fields = {"unread": 10 ** 400, "": {"": [[[float("nan")]]]}, "\ud800": "\udfff",
              "Prompt": None, "chosen ": text(rng), rng.choice(UNREADABLE): rng.choice((None, []))}
    return dict(shuffled([*record.items(), *fields.items()], rng))


def valued(record, pair, rng):
    values = rng.choice(((0, -0.0), (rng.gauss(0, 9), rng.gauss(0, 9)), (10 ** 29, -1e-320)))
    return {**record, **dict(zip(VALUES, values))}, pair._replace(values=tuple(map(float, values)))


def repeated(rng):
    good = rows(rng)
    return shuffled(good + good[:3], rng)


def contradicted(rng):
    good = rows(rng)
    return shuffled(good + [swapped(*again) for again in good[:3]], rng)


def any_layout(rng, turns, good, bad):
    return laid_out(rng.choice(LAYOUTS), turns, good, bad)


ODDITIES = {
    "mixed layouts": rows,
    "byte-order mark": rows,
    "CRLF": rows,
    "every row twice": lambda rng: rows(rng) * 2,
    "a few rows repeated": repeated,
    "a few rows contradicted": contradicted,
    "fields nobody reads": lambda rng: [(unread(record, rng), pair) for record, pair in rows(rng)],
    "values": lambda rng: [valued(*good, rng) for good in rows(rng)],
    "long prompt": lambda rng: rows(rng) + [
        any_layout(rng, [message("user", text(rng) * 90)], text(rng), text(rng))],
    "long response": lambda rng: rows(rng) + [
        any_layout(rng, talk(rng), text(rng) * 90, text(rng))],
    "one prompt for all": lambda rng: [
        laid_out(MESSAGES, [message("user", "x")], text(rng), text(rng)) for _ in range(9)],
    "one row only": lambda rng: [row(rng)],
    "no row": lambda rng: [],
    "one character": lambda rng: [
        laid_out(STRINGS, [message("user", chr(rng.randrange(33, 0xd800)))], *"ab")
        for _ in range(9)],
}
REFUSED_AS = {      # files that no split can work with
    "no row": "{path}:",
    "one row only": "--train_pairs + --val_pairs + --test_pairs:",
    "one prompt for all": "--val_pairs + --test_pairs:",
    "long response": "--block_size:",       # where its split has no other pair
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
            assert prompt.endswith(back) and (prompt == back or full)
            assert item[3:] == encoded[3:]
        pattern = rf"  {name}: (\d+) of (\d+) \w+; (\d+) with .*?, (\d+) dropped"
        fitting, given, counted, dropped = map(int, re.search(pattern, printed).groups())
        assert (fitting, counted, dropped) == (len(ids), n_cut, given - len(ids))
        if name != "sft":
            total.update({"pairs": given, "dropped": dropped})
    texts = [pair for part in task.texts[1:] for pair in part]
    left_out = Counter(pairs) - Counter(texts)
    assert total["pairs"] == len(pairs) and not Counter(texts) - Counter(pairs)
    assert left_out.total() == total["dropped"]
    for encoded in data.encode(list(left_out), task.tokenizer, 10 ** 8)[1]:
        assert max(map(len, encoded[1:3])) >= size
    return printed


@pytest.mark.parametrize("kind", ODDITIES)
def test_oddity_changes_no_text(kind, tmp_path, capsys):
    """The Pairs are what was put in, in order; decoded, the ids are too; only sizes that cannot
    work are refused, by option."""
    done = 0
    for seed in range(REPEATS):
        rng = random.Random(f"{kind} {seed}")
        good = ODDITIES[kind](rng)
        end = b"\r\n" if kind == "CRLF" else None
        content, _ = assembled([dump(record, rng) for record, _ in good], rng, end)
        path, pairs = tmp_path / f"{seed}.jsonl", [pair for _, pair in good]
        if kind == "byte-order mark":
            content = BOM + content.removeprefix(BOM)
        path.write_bytes(content)
        try:
            assert load_pairs(path) == pairs
            printed = prepared(path, pairs, capsys)
            done += 1
        except UserError as error:
            assert str(error).startswith(REFUSED_AS[kind].format(path=path))
            assert ": expected " in str(error) and str(error).isprintable()
            continue
        once = {pair[:3] for pair in pairs}
        again = len(pairs) - len(once)
        against = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        counts = (f"{len(pairs)} pairs; 0 left out by --train_pairs; kept: {again} that repeat "
                  f"another, {against} that another")
        assert (counts in printed) == (again + against > 0) == ("repeat" in printed)
    never = kind in ("no row", "one row only", "one prompt for all")
    assert done == 0 if never else done >= REPEATS / 2


# --- the command line ----------------------------------------------------------------------------

NO_FILE = ": expected a readable JSONL file, got"
NO_JSON, NO_PAIR = ": expected one JSON object", ": expected at least one"
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
REFUSED = {
    "nothing": (None, f"{NO_FILE}: No such file or directory"),
    "a folder": (lambda path: path.mkdir(), f"{NO_FILE} a folder, a pipe or a device"),
    "a pipe": (lambda path: os.mkfifo(path), f"{NO_FILE} a folder, a pipe or a device"),
    "a device": (lambda path: path.symlink_to(os.devnull),
                 f"{NO_FILE} a folder, a pipe or a device"),
    "no permission": (GOOD, f"{NO_FILE}: Permission denied"),
    "no byte": (b"", NO_PAIR),
    "blank lines": (b"\r\n \n\n", NO_PAIR),
    "a byte-order mark": (BOM, NO_PAIR),
    "NULs": (b"\0" * 4096, f":1{NO_JSON}"),
    "two bytes a character": ("[]".encode("utf-16"), f":1{NO_JSON}"),
    "10 MB of brackets": (GOOD + b"[" * 10 ** 7, f":2{NO_JSON}"),
    "10 MB cut short": (GOOD + b'{"prompt": "' + b"a" * 10 ** 7, f":2{NO_JSON}"),
    "10 MB of fields": (GOOD + b'{"prompt": "a"' + b', "a": 1, "b": 2' * 650_000 + b"}",
                        ":2: expected each field once"),
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


@pytest.mark.slow
def test_long_runs_of_one_character(tmp_path, capsys):
    """Prompts of 2 MB of one letter and of a million spaces or line feeds, where tiktoken alone
    panics: cut and counted. A million spaces in a response: dropped and counted."""
    prompts = ("a" * 2 * 10 ** 6, " " * 10 ** 6 + "?", "\n" * 10 ** 6 + "?", *"defghijkl")
    pairs = [*(Pair(prompt, "b", "c") for prompt in prompts), Pair("m", " " * 10 ** 6 + "x", "c")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(dict(zip(TEXTS, pair))) + "\n" for pair in pairs),
                    encoding="utf-8")
    assert load_pairs(path) == pairs
    printed = prepared(path, pairs, capsys)
    for count, what in ((3, "with the prompt cut"), (1, "dropped")):
        numbers = re.findall(rf"(?:train|val|test): .*?(\d+) {what}", printed)
        assert sum(map(int, numbers)) == count


def test_odd_file_is_trained_on_and_scored(tmp_path, capsys, monkeypatch):
    """40 odd rows in all layouts, trained on and scored to the end, with progress where it takes
    long: the prompts stand in scores.jsonl as they were given, and no escape on the screen."""
    rng = random.Random(0)
    good, path, out = [row(rng) for _ in range(40)], tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(BOM + b"\r\n".join(dump(record, rng) for record, _ in good))
    run = [*SMALL, f"--data={path}", f"--out={out}", "--methods=tvkd", "--value=implicit"]
    assert train.main([*run, "--block_size=300"]) == 0
    monkeypatch.setattr(preferences, "SECONDS", 0)
    assert train.main([f"--score={path}", f"--out={out}", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "40 pairs; 0 with the prompt cut from the left, 0 left out because" in printed
    assert f"  {path}: 40 pairs, " in printed and "  tokenised: 40 pairs, " in printed
    assert printed.replace("\n", "").isprintable()
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [pair.prompt for _, pair in good]
