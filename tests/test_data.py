"""data.py: rewards by hand, the four layouts, masks by hand-written ids, and what bad input is told."""

import itertools
import json
import re
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import data
from data import UserError, Pair, Row, collate, encode, learn_tokenizer, parse_pair, reward

PROMPT = "Describe the cat: red, small, fast, old."
BYTES = tiktoken.Encoding("bytes", pat_str=data.PIECES, mergeable_ranks={bytes([b]): b for b in range(256)},
                          special_tokens={data.END_OF_TEXT: 256})


# --- the toy task ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, score", [
    ("The cat is red and small.", 3),                                           # thing 1, facts 1 + 1
    (" The cat is red, small, fast and old.", 5),                               # 1 + 4
    ("Of course! The cat is red, small, fast and old. Have a nice day.", 6),    # the best answer
    ("Ugh, fine. The cat is red and small. Now go away.", 2),                   # 3 - 1/2 - 1/2
    ("With pleasure. The cat is red and big.", 1.5),                            # 1 + 1 - 1 + 1/2
    ("The cat is red, red and red.", 0),                                        # 1 + 1 - 1 - 1: repeats
    ("The dog is red and small.", 1),                                           # -1 + 2
    ("The cat and the dog, red.", 1),                                           # 1 - 1 + 1
    ("It is red.", 0),                                                          # 1, no thing -1
    ("", -1),
    ("The cat is red. Of course!", 2),                                          # an opening at the end earns nothing
])
def test_reward_by_hand(response, score):
    assert reward(PROMPT, response) == score


def test_toy_splits():
    """No prompt twice, so none in two splits; supervised rows on training prompts only; the same seed gives the same task."""
    splits = data.toy_splits(300, 40, 60, seed=3)
    assert (len(splits.sft), len(splits.train), len(splits.val), len(splits.test)) == (600, 300, 40, 60)
    prompts = [pair.prompt for part in (splits.train, splits.val, splits.test) for pair in part]
    assert len(set(prompts)) == 400
    assert {row.prompt for row in splits.sft} == set(prompts[:300])
    assert splits == data.toy_splits(300, 40, 60, seed=3) != data.toy_splits(300, 40, 60, seed=4)
    assert all(pair.chosen != pair.rejected for pair in splits.train)


def test_toy_corpus_errs_as_stated():
    """6,000 corpus rows: one fact in three wrong (standard error about 0.004), polite about as often as rude; about one label
    in seven on the worse response."""
    splits = data.toy_splits(3000, 1, 1, seed=0)
    wrong = named = polite = rude = wrong_things = 0
    lengths = Counter()
    for prompt, response in splits.sft:
        facts = [word for word in re.findall("[a-z]+", response) if word in data.ALL_FACTS]
        lengths[len(facts)] += 1
        wrong_things += re.search(r"[Tt]he (\w+) is", response)[1] not in prompt
        wrong, named = wrong + sum(fact not in prompt for fact in facts), named + len(facts)
        polite += response.strip().startswith(data.POLITE_OPENINGS) + response.endswith(data.POLITE_CLOSINGS)
        rude += response.strip().startswith(data.RUDE_OPENINGS) + response.endswith(data.RUDE_CLOSINGS)
    assert sorted(lengths) == [2, 3, 4] and min(lengths.values()) > 1800                        # a third of 6,000 each
    assert wrong / named == pytest.approx(1 / 3, abs=0.02) and wrong_things / 6000 == pytest.approx(1 / 10, abs=0.02)
    assert polite / rude == pytest.approx(1, abs=0.1)
    worse = sum(reward(p.prompt, p.chosen) < reward(p.prompt, p.rejected) for p in splits.train)
    assert worse / 3000 == pytest.approx(1 / 7, abs=0.02)


def test_toy_labels_follow_bradley_terry():
    """Among pairs whose rewards differ by 1, the better response is chosen with probability sigmoid(1) = 0.731."""
    pairs = data.toy_splits(6000, 1, 1, seed=1).train
    differences = [reward(p.prompt, p.chosen) - reward(p.prompt, p.rejected) for p in pairs]
    counts = Counter(differences)
    assert counts[1.0] / (counts[1.0] + counts[-1.0]) == pytest.approx(0.731, abs=0.05)


# --- preference files ------------------------------------------------------------------------------------------------------

def message(role, content):
    return {"role": role, "content": content}


CONVERSATION = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello"), message("user", "Why?")]
AS_TEXT = "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize("record, pair", [
    ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "id": 7}, Pair("2+2=", "4", "5")),
    ({"prompt": CONVERSATION, "chosen": [message("assistant", "So.")], "rejected": [message("assistant", "No.")]},
     Pair(AS_TEXT, " So.", " No.")),
    ({"chosen": CONVERSATION + [message("assistant", "So.")], "rejected": CONVERSATION + [message("assistant", "No.")]},
     Pair(AS_TEXT, " So.", " No.")),
    ({"chosen": HH + " So.", "rejected": HH + " No."}, Pair(HH, " So.", " No.")),
    ({"prompt": None, "chosen": HH + " So.", "rejected": HH + " No."}, Pair(HH, " So.", " No.")),
    ({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi there"}, Pair("Hi", "Hi you", "Hi there")),   # strings are not compared
    # the shared turns end at a turn, not at the last shared character
    ({"chosen": HH + " Paris is", "rejected": HH + " Paris was"}, Pair(HH, " Paris is", " Paris was")),
])
def test_four_layouts(record, pair):
    assert parse_pair(record) == pair


@pytest.mark.parametrize("record, said", [
    ([1, 2], "expected a JSON object, got list"),
    ({"prompt": "a", "chosen": "b"}, 'expected a field "rejected"'),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, 'expected a field "prompt"'),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "got prompt as str, chosen as int, rejected as str"),
    ({"prompt": "a", "chosen": " \n", "rejected": "c"}, 'expected text in "chosen", got an empty one'),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, 'expected text in "prompt"'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "got the same response twice"),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "half of a surrogate pair"),
    ({"chosen": "b", "rejected": "c"}, 'expected a field "prompt"'),                            # no prompt anywhere
    ({"prompt": HH, "chosen": HH + " So.", "rejected": HH + " No."}, "expected the prompt once"),
    ({"prompt": CONVERSATION, "chosen": CONVERSATION + [message("assistant", "So.")],
      "rejected": CONVERSATION + [message("assistant", "No.")]}, "expected the prompt once"),
    ({"prompt": [{"role": ["user"], "content": "a"}], "chosen": [message("assistant", "x")], "rejected": [message("assistant", "y")]},
     'expected "prompt" as messages'),
    ({"prompt": ["a\nb"], "chosen": [message("assistant", "x")], "rejected": [message("assistant", "y")]}, r"got 'a\nb'"),
    ({"chosen": HH + " So.", "rejected": " No."}, "share the prompt"),                          # prompt in one of the two
    ({"chosen": CONVERSATION + [message("assistant", "So.")], "rejected": [message("assistant", "No.")]}, "share the prompt"),
    ({"chosen": HH + " So.\n\nHuman: And?\n\nAssistant: Well.", "rejected": HH + " No."}, "share the prompt"),
    ({"chosen": [], "rejected": []}, "share the prompt"),
    ({"chosen": [message("user", "a"), message("user", "b")], "rejected": [message("user", "a"), message("user", "c")]},
     "the assistant's answer"),
    ({"prompt": CONVERSATION, "chosen": [message("tool", "x")], "rejected": [message("assistant", "y")]}, 'expected "chosen" as messages'),
    ({"prompt": ["Hi"], "chosen": [message("assistant", "x")], "rejected": [message("assistant", "y")]}, 'expected "prompt" as messages'),
])
def test_bad_records(record, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_pair(record)


GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize("content, said", [
    (GOOD + b"\n" + GOOD + b'{"prompt": \n', ":4: expected one JSON object in UTF-8, got: Expecting value"),
    (b"\xff\xfe" + GOOD, ":1: expected one JSON object in UTF-8, got: 'utf-8' codec"),
    (GOOD + b"[" * 100_000 + b"\n", ":2: expected one JSON object"),
    (GOOD + b'{"prompt": "a", "chosen": "b"}\n', ':2: expected a field "rejected"'),
    (b'{"a": \r\n' + GOOD, ":1: expected one JSON object in UTF-8, got: Expecting value at column 6"),
    (b'{"a": "\t"}', ":1: expected one JSON object in UTF-8, got: Invalid control character at column 8"),
    (GOOD[:-2] + b', "chosen": "d"}\n', ":1: expected a field once in an object, got 'chosen' again"),
    (b"", ": expected at least one preference pair"),
    (None, ": expected a readable JSONL file, got: No such file or directory"),
])
def test_load_pairs_names_file_and_line(tmp_path, content, said):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_pairs(path)
    assert str(error.value).startswith(f"{path}{said}") and "\n" not in str(error.value)


def test_load_pairs_reads_windows_files(tmp_path):
    """Byte-order mark, CRLF, a blank line, an accent: two pairs, text unchanged."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + b"\n" + json.dumps({"prompt": "é", "chosen": "b", "rejected": "c"}, ensure_ascii=False)
                                        .encode()).replace(b"\n", b"\r\n"))
    assert data.load_pairs(path) == [Pair("a", "b", "c"), Pair("é", "b", "c")]


def test_load_pairs_splits_at_line_feeds_alone(tmp_path):
    """U+2028, U+0085 and a form feed end a line for str.splitlines and, some of them, for json; here they are text."""
    path, odd = tmp_path / "pairs.jsonl", Pair("a\u2028b", "c\x85d", "e\x0cf")
    line = json.dumps(odd._asdict(), ensure_ascii=False).encode()
    path.write_bytes(line + b"\r\n" + line + b"\n{")
    with pytest.raises(UserError, match=re.escape(f"{path}:3: ")):
        data.load_pairs(path)
    path.write_bytes(line + b"\r\n" + line)
    assert data.load_pairs(path) == [odd, odd]


def test_memory_of_a_long_file(tmp_path):
    """4,000 pairs of 962 bytes and about 700 ids: the text takes 1.1 times its bytes and never twice; an id takes 8 bytes, since
    equal ids are one int (each an int of its own: 40)."""
    path, sizes = tmp_path / "pairs.jsonl", torch.randint(100, 1000, (4000, 3, 40), generator=torch.Generator().manual_seed(0))
    texts = [[" ".join(f"word{i}" for i in part) for part in pair] for pair in sizes.tolist()]
    path.write_text("".join(json.dumps(Pair(*pair)._asdict()) + "\n" for pair in texts), encoding="utf-8")
    tokenizer = learn_tokenizer([Row(" ".join(map(str, range(100, 1000))), "word")], 700)
    tracemalloc.start()
    pairs = data.load_pairs(path)
    text, peak = tracemalloc.get_traced_memory()
    ids = encode(pairs, tokenizer, 2000)[1]
    both, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs == [Pair(*pair) for pair in texts] and peak < 1.5 * path.stat().st_size
    count = sum(len(part) for pair in ids for part in pair)
    assert 8 < (both - text) / count < 9 and count > 4000 * 500


def test_progress(tmp_path, monkeypatch, capsys):
    """A clock that goes on by a second at every look, and 3 seconds between two lines: of 7 pairs the third and the sixth."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * 7)
    encode([Row("a", "b")] * 7, BYTES, 64)
    assert len(data.load_pairs(path)) == 7 and capsys.readouterr().out == ""    # soon done: no progress
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    assert len(data.load_pairs(path)) == 7
    assert capsys.readouterr().out == f"  {path}: 3 pairs, 1 pairs/s\n  {path}: 6 pairs, 1 pairs/s\n"
    assert len(encode([Row("a", "b")] * 7, BYTES, 64)[1]) == 7
    assert capsys.readouterr().out == "  tokenised: 3 rows, 1 rows/s\n  tokenised: 6 rows, 1 rows/s\n"


def test_split_pairs_by_prompt():
    """20 pairs on 10 prompts: 4 test and 2 validation pairs, whole prompts only, the rest to train; chosen responses for SFT."""
    pairs = [Pair(f"p{i % 10}", f"c{i}", f"r{i}") for i in range(20)]
    splits = data.split_pairs(pairs, 0, 2, 4, seed=0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (14, 2, 4)
    assert sorted(splits.train + splits.val + splits.test) == sorted(pairs)
    sets = [{p.prompt for p in part} for part in splits[1:]]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert splits.sft == [Row(p.prompt, p.chosen) for p in splits.train]
    assert splits != data.split_pairs(pairs, 0, 2, 4, seed=1)
    assert len(data.split_pairs(pairs, 5, 2, 4, seed=0).train) == 5
    for sizes in ((0, 10, 10), (15, 2, 4), (0, 1, 19)):
        with pytest.raises(UserError, match="expected"):
            data.split_pairs(pairs, *sizes, seed=0)


# --- the tokenizer ---------------------------------------------------------------------------------------------------------

def test_learned_merges_by_hand():
    """"aaab aaab ab": pieces aaab, " aaab", " ab". The pair aa stands 2 + 2 - overlaps counted = 4 times, ab 3, so aa is id 256;
    then aa+a... is a(b): left to right aaab is aa a b, so a+b (3) is 257; then aa+ab (2) is 258, and so on."""
    tokenizer = learn_tokenizer([Row("aaab aaab ab", "")], 260)
    assert [tokenizer.decode_single_token_bytes(i) for i in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]
    assert tokenizer.eot_token == 259 and tokenizer.n_vocab == 260
    assert tokenizer.encode_ordinary("aaab") == [258]


def test_learned_vocabulary_is_a_bijection_and_stops_where_the_text_does():
    """Runs of one letter can be merged in more than one way; a text of three pieces has no more to learn; both must load."""
    for text in ("a" * 9 + " " + "a" * 7 + " " + "a" * 5, "hi"):
        tokenizer = learn_tokenizer([Row(text, " x")], 2000)
        assert tokenizer.n_vocab < 300
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.encode_ordinary("hi") == [256]
    with pytest.raises(UserError, match="--vocab_size: expected at least 257"):
        learn_tokenizer([Row("a", "b")], 256)


def test_long_pieces():
    """A run of 300,000 letters teaches a vocabulary in seconds, not hours, and a million spaces are encoded in parts, where
    tiktoken at once ends in a panic; the ids give the text back."""
    began = time.perf_counter()
    letters = "".join(chr(97 + i) for i in torch.randint(26, (300_000,), generator=torch.Generator().manual_seed(0)).tolist())
    tokenizer = learn_tokenizer([Row(letters, " x")], 600)
    assert time.perf_counter() - began < 10
    for text in (" " * 10 ** 6 + "x", "\n" * 10 ** 6, letters):
        _, [row], _ = encode([Row(text, "y")], tokenizer, 10 ** 7)
        assert tokenizer.decode(row.prompt) == text


def test_round_trip_of_any_text():
    tokenizer = learn_tokenizer(data.toy_splits(50, 1, 1, seed=0).train, 400)
    for text in ("héllo_wörld  12 日本\x00\n\n \t🙂‿", "שלום", f"a {data.END_OF_TEXT} b", "  ", "’tis"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_tokenizer_saves_and_loads(tmp_path):
    tokenizer = learn_tokenizer([Row("aaab aaab ab", "é")], 262)
    (tmp_path / "t").write_text(data.tokenizer_text(tokenizer), encoding="ascii")
    loaded = data.load_tokenizer(tmp_path / "t")
    assert (loaded.n_vocab, loaded.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    assert loaded.encode_ordinary("aaab é ab") == tokenizer.encode_ordinary("aaab é ab")


def test_named_tokenizer_errors(tmp_path, monkeypatch):
    """An unknown name lists the known ones; a download that fails (tests have no network) names TIKTOKEN_CACHE_DIR."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="--tokenizer: expected one of .*gpt2.*, got gpt3"):
        data.named_tokenizer("gpt3")
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        data.named_tokenizer("gpt2")


# --- encode, collate, epochs -----------------------------------------------------------------------------------------------

def test_encode_by_hand():
    """Bytes are ids; EOS = 256. The prompt "abc" behind the longer response (2 + EOS) fits in 6; in 5 its left end is cut, once
    for both responses; in 3 nothing of it is left and the pair is not kept."""
    pair = Pair("abc", "xy", "z")
    assert encode([pair], BYTES, 6) == ([pair], [Pair([97, 98, 99], [120, 121, 256], [122, 256])], 0)
    assert encode([pair], BYTES, 5) == ([pair], [Pair([98, 99], [120, 121, 256], [122, 256])], 1)
    assert encode([Pair("abc", "z", "xy")], BYTES, 5)[1] == [Pair([98, 99], [122, 256], [120, 121, 256])]
    assert encode([pair, Pair("a", "x", "y")], BYTES, 3) == ([Pair("a", "x", "y")], [Pair([97], [120, 256], [121, 256])], 0)


def test_end_of_text_in_data_is_text():
    """EOS stands once, at the end, however often its name is written in the text."""
    _, [row], _ = encode([Row(f"a{data.END_OF_TEXT}", f"b{data.END_OF_TEXT}")], BYTES, 64)
    assert row.prompt.count(256) == 0 and row.response.count(256) == 1 and row.response[-1] == 256
    assert bytes(row.response[:-1]).decode() == f"b{data.END_OF_TEXT}"


def test_no_merge_crosses_the_border():
    """" 46" is one token of the learned vocabulary, yet "A: " + "46" keeps the prompt's own ids, and so does "A: " + "$46"."""
    tokenizer = learn_tokenizer([Row("A: 46 A: 46 A: 46", " 46")], 300)
    for response in ("46", "$46"):
        _, [row], _ = encode([Row("A: ", response)], tokenizer, 64)
        assert row.prompt == tokenizer.encode_ordinary("A: ")
        assert tokenizer.decode(row.prompt + row.response[:-1]) == "A: " + response


def test_collate_by_hand():
    """EOS = 0 is the padding id too. Masks come from lengths, so EOS is scored and padding is not."""
    tokens, mask = collate([Row([5, 6], [7, 0]), Row([5], [0]), Row([5, 6, 7], [8, 9, 0])])
    assert tokens.tolist() == [[5, 6, 7, 0, 0, 0],
                               [5, 0, 0, 0, 0, 0],
                               [5, 6, 7, 8, 9, 0]]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0],     # actions 1, 2 = tokens 2, 3: 7 and EOS
                                   [1, 0, 0, 0, 0],     # action 0 = token 1: EOS
                                   [0, 0, 1, 1, 1]]     # actions 2, 3, 4 = tokens 3, 4, 5
    assert [tokens[2, 1:][mask[2]].tolist(), int(mask[0].sum())] == [[8, 9, 0], 2]


def test_epochs():
    """7 indices in batches of 3: every epoch is a permutation in batches of 3, 3, 1; seeded; epochs differ."""
    order = data.epochs(7, 3, torch.Generator().manual_seed(0))
    batches = [next(order).tolist() for _ in range(6)]
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert batches[0] == next(data.epochs(7, 3, torch.Generator().manual_seed(0))).tolist()
