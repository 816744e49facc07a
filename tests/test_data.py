"""data.py: rewards, merges and masks by hand. Files: tests/system/test_preferences.py."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import data
from data import Example, Pair, collate, encode, reward, reward_parts
from harness import tokenizers
from harness.errors import UserError, printable
from harness.options import Config
from harness.texts import load_task
from harness.tokenizers import learn_tokenizer

PROMPT = "Describe the cat: red, small, fast, old."
BYTES = tiktoken.Encoding("bytes", pat_str=tokenizers.PIECES,
                          mergeable_ranks={bytes([b]): b for b in range(256)},
                          special_tokens={tokenizers.END_OF_TEXT: 256})


# --- the toy task --------------------------------------------------------------------------------

@pytest.mark.parametrize("response, facts, manners", [
    ("The cat is red and small.", 3, 0),                            # thing 1, facts 1 + 1
    ("Of course! The cat is red, small, fast and old. Have a nice day.", 5, 1),     # the best: 6
    ("With pleasure. The cat is red and big.", 1, 0.5),             # 1 + 1 - 1
    ("The cat is red, red and red.", 0, 0),                         # 1 + 1 - 1 - 1: repeats
    ("The dog is red and small.", 1, 0),                            # -1 + 2
    ("The cat and the dog, red.", 1, 0),                            # 1 - 1 + 1: a further thing
    ("It is red.", 0, 0),                                           # 1, and no thing: -1
    ("", -1, 0), ("Of course! Now go away.", -1, 0),                # + 1/2 - 1/2
    ("Ugh, fine. The cat is red.", 2, -0.5), ("What a dull question. The cat is red.", 2, -0.5),
    ("The cat is red. I hope that helps.", 2, 0.5), ("The cat is red. Do not ask again.", 2, -0.5),
    ("The cat is red. Of course!", 2, 0), ("Now go away. The cat is red.", 2, 0),   # wrong end
])
def test_reward_by_hand(response, facts, manners):
    assert reward_parts(PROMPT, response) == (facts, manners)
    assert reward(PROMPT, response) == facts + manners


def manners_of(prompt, response):
    return reward_parts(prompt, response)[1]


def test_toy_splits():
    """No prompt twice, so none in two splits; Examples on training prompts only; seeded."""
    splits = data.toy_splits(300, 40, 60, seed=3)
    assert [len(split) for split in splits] == [600, 300, 40, 60]
    pairs = splits.train + splits.val + splits.test
    prompts = [pair.prompt for pair in pairs]
    assert len(set(prompts)) == 400
    assert {example.prompt for example in splits.sft} == set(prompts[:300])
    assert all(pair.chosen != pair.rejected and pair.values is None for pair in pairs)
    assert splits == data.toy_splits(300, 40, 60, seed=3) != data.toy_splits(300, 40, 60, seed=4)
    with pytest.raises(UserError, match="--test_pairs: expected at most 15552 toy prompts, got 15"):
        load_task(Config(train_pairs=15552, val_pairs=1, test_pairs=1), seed=0)


def test_the_draws_of_a_seed_never_move():
    """Recorded results belong to a seed, so a seed must go on to mean these texts."""
    assert data.toy_splits(2, 1, 1, seed=0).test == [Pair(
        "Describe the chair: green, huge, fast, new.",
        " With pleasure. The chair is fast and huge.",
        " The chair is green, new, huge and swift. Do not ask again.")]


def test_toy_corpus_errs_as_stated():
    """6,000 Examples: one fact in three is wrong (standard error about 0.004) and one thing in ten;
    as often polite as rude. 3,000 pairs: about one label in seven is on the worse response."""
    splits, lengths = data.toy_splits(3000, 1, 1, seed=0), Counter()
    wrong_facts = wrong_things = manners = 0
    for prompt, response in splits.sft:
        facts = [word for word in re.findall("[a-z]+", response) if word in data.ALL_FACTS]
        lengths[len(facts)] += 1
        wrong_facts += sum(fact not in prompt for fact in facts)
        wrong_things += re.search(r"[Tt]he (\w+) is", response)[1] not in prompt
        manners += manners_of(prompt, response)
    assert sorted(lengths) == [2, 3, 4] and min(lengths.values()) > 1800    # 2,000 of each expected
    assert wrong_facts / sum(n * lengths[n] for n in lengths) == pytest.approx(1 / 3, abs=0.02)
    assert wrong_things / 6000 == pytest.approx(1 / 10, abs=0.02)
    assert manners / 6000 == pytest.approx(0, abs=0.03)
    worse = sum(reward(p.prompt, p.chosen) < reward(p.prompt, p.rejected) for p in splits.train)
    assert worse / 3000 == pytest.approx(1 / 7, abs=0.02)


def share_of_better(pairs, score):
    """Among pairs whose scores differ by 1: how often the better response is the chosen one."""
    counts = Counter(score(p.prompt, p.chosen) - score(p.prompt, p.rejected) for p in pairs)
    return counts[1.0] / (counts[1.0] + counts[-1.0])


def test_toy_labels_follow_bradley_terry():
    """Where scores differ by 1, the better is chosen in sigmoid(1) = 0.731 of the pairs. Another
    reward labels the same texts in the same order, with noise of its own: labelled by the same
    reward again, pairs of equal rewards, which are coin tosses, agree half of the time."""
    full, polite, again = (data.toy_splits(2000, 30, 30, 1, judge)
                           for judge in (None, manners_of, reward))
    assert share_of_better(full.train, reward) == pytest.approx(0.731, abs=0.04)
    assert share_of_better(polite.train, manners_of) == pytest.approx(0.731, abs=0.04)
    assert polite.sft == full.sft
    for part, other in zip(full[1:], polite[1:]):
        assert part != other and [(p.prompt, {*p[1:3]}) for p in part] == [
            (p.prompt, {*p[1:3]}) for p in other]
    agree = [pair == other for pair, other in zip(full.train, again.train)
             if reward(pair.prompt, pair.chosen) == reward(pair.prompt, pair.rejected)]
    assert len(agree) > 100 and sum(agree) / len(agree) == pytest.approx(0.5, abs=0.1)


# --- the tokenizer -------------------------------------------------------------------------------

def test_learned_merges_by_hand():
    """"aaab aaab ab" has the pieces "aaab", " aaab" and " ab".
    aa stands there 2 + 2 = 4 times, ab 1 + 1 + 1 = 3 times, " a" twice: aa becomes id 256.
    Joined from left to right, aaab is now aa a b, so ab still stands there 3 times: id 257.
    Now aaab is aa ab, and aa ab stands there twice: id 258. EOS is 259, and 260 ids are full."""
    tokenizer = learn_tokenizer([Example("aaab aaab ab", "")], 260)
    learned = [tokenizer.decode_single_token_bytes(i) for i in (256, 257, 258)]
    assert learned == [b"aa", b"ab", b"aaab"]
    assert tokenizer.eot_token == 259 and tokenizer.n_vocab == 260
    assert tokenizer.encode_ordinary("aaab") == [258]


def test_learned_vocabulary_is_a_bijection_and_stops_where_the_text_does():
    """Pairs in a run of one letter overlap; still every id has its own bytes."""
    text = "a" * 9 + " " + "a" * 7 + " " + "a" * 5
    tokenizer = learn_tokenizer([Example(text, " x")], 2000)
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token)]
    assert len(set(tokens)) == tokenizer.n_vocab - 1 < 300
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_smallest_vocabulary():
    """256 bytes and EOS: "hi" stays two bytes; one id more, and it is one token. The values of a
    Pair are not text, so nothing else is learned."""
    pair = Pair("hi", "hi", "hi", (1.5, 2.5))
    assert learn_tokenizer([pair], 257).encode_ordinary("hi") == [104, 105]
    learned = learn_tokenizer([pair], 300)
    assert learned.encode_ordinary("hi") == [256] and learned.n_vocab == 258
    with pytest.raises(UserError, match="--vocab_size: expected at least 257"):
        learn_tokenizer([pair], 256)


def test_a_long_piece_teaches_its_first_1000_characters():
    """Time is quadratic in a piece. x stands behind the first 1,000 letters, so nothing with x is
    learned; text beyond the first 300,000 characters is not read, so nothing with y is."""
    text = "ab" * 500 + "x" * 10_000 + " ab" * 100_000 + " yyyy" * 10
    tokenizer = learn_tokenizer([Example(text, "y")], 290)
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(256, tokenizer.eot_token)]
    assert {b"ab", b" ab"} <= {*tokens} and not any(b"x" in x or b"y" in x for x in tokens)


def test_text_is_encoded_in_parts():
    """tiktoken panics on a million spaces, so no part is longer than PART; the ids are the text."""
    parts = []
    recorder = SimpleNamespace(encode_ordinary=lambda part: parts.append(part) or [], eot_token=0)
    encode([Example(" " * 250_000 + "x", "y")], recorder, 64)
    assert [len(part) for part in parts] == [100_000, 100_000, 50_001, 1]
    assert "".join(parts) == " " * 250_000 + "xy"


def test_round_trip_of_any_text_and_of_the_vocabulary(tmp_path):
    tokenizer = learn_tokenizer(data.toy_splits(50, 1, 1, seed=0).train, 400)
    (tmp_path / "t").write_text(tokenizers.tokenizer_text(tokenizer), encoding="ascii")
    loaded = tokenizers.load_tokenizer(tmp_path / "t")
    assert (loaded.n_vocab, loaded.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    for text in ("héllo_wörld  12 日本\x00\n\n \t🙂‿", "שלום", "  ", "’tis",
                 f"a {tokenizers.END_OF_TEXT} b", " The cat is red."):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
        assert loaded.encode_ordinary(text) == tokenizer.encode_ordinary(text)


def test_text_of_ids_without_text():
    """é is c3 a9; a byte of it alone, and an id that no token has, are U+FFFD each."""
    tokenizer = tiktoken.Encoding("gappy", pat_str=tokenizers.PIECES, special_tokens={"<end>": 300},
                                  mergeable_ranks={bytes([b]): b for b in range(256)})
    assert tokenizers.text_of([0xc3, 0xa9, 257, 0xc3, 300, 2**31], tokenizer) == (
        "é\ufffd\ufffd<end>\ufffd")


def test_named_tokenizer_errors(tmp_path, monkeypatch):
    """An unknown name lists the known ones; a download that fails (tests have no network) names
    TIKTOKEN_CACHE_DIR, and so does one of another hash; a vocabulary of a plugin may lack EOS."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="--tokenizer: expected one of .*gpt2.*; got gpt3: "):
        tokenizers.named_tokenizer("gpt3")
    with pytest.raises(UserError, match="network into TIKTOKEN_CACHE_DIR, .*; got gpt2: "):
        tokenizers.named_tokenizer("gpt2")
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: b"<html>Please log in</html>")
    with pytest.raises(UserError, match="got gpt2: ValueError.*Hash mismatch"):
        tokenizers.named_tokenizer("gpt2")
    bare = {"name": "bare", "pat_str": ".", "special_tokens": {},
            "mergeable_ranks": {bytes([b]): b for b in range(256)}}
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "bare", lambda: bare)
    with pytest.raises(UserError, match="with <.endoftext.>, .*; got bare: KeyError"):
        tokenizers.named_tokenizer("bare")


# --- encode, collate, epochs ---------------------------------------------------------------------

def test_encode_by_hand():
    """Bytes are ids; EOS = 256. The longer response takes 2 + EOS = 3 ids. In 6 the prompt "abc"
    fits beside it; in 5 its left end is cut, once for both responses; in 3 nothing of it is left,
    and the pair is left out. Values are carried along."""
    pair, short = Pair("abc", "xy", "z"), Pair("a", "x", "y", (1.5, -2.0))
    swapped = Pair("abc", "z", "xy")
    whole = Pair([97, 98, 99], [120, 121, 256], [122, 256])
    assert encode([pair], BYTES, 6) == ([pair], [whole], 0)
    assert encode([pair], BYTES, 5) == ([pair], [whole._replace(prompt=[98, 99])], 1)
    assert encode([swapped], BYTES, 5)[1] == [Pair([98, 99], [122, 256], [120, 121, 256])]
    assert encode([pair, short], BYTES, 3) == (
        [short], [Pair([97], [120, 256], [121, 256], (1.5, -2.0))], 0)


def test_end_of_text_in_data_is_text():
    """EOS stands once, at the end, however often its name is written in the text."""
    text = f"b{tokenizers.END_OF_TEXT}"
    _, [ids], _ = encode([Example(text, text)], BYTES, 64)
    assert bytes(ids.prompt).decode() == text and ids.response == [*ids.prompt, 256]


def test_no_merge_crosses_the_border():
    """" 46" is one token of this vocabulary, yet "A: " + "46" keeps the ids of the prompt alone."""
    tokenizer = learn_tokenizer([Example("A: 46 A: 46 A: 46", " 46")], 300)
    assert len(tokenizer.encode_ordinary(" 46")) == 1
    _, [ids], _ = encode([Example("A: ", "46")], tokenizer, 64)
    assert ids.prompt == tokenizer.encode_ordinary("A: ")
    assert tokenizer.decode(ids.response[:-1]) == "46"


def test_collate_by_hand():
    """EOS = 0 is the padding id too. Masks come from lengths: EOS is scored, padding is not."""
    rows = [Example([5, 6], [7, 0]), Example([5], [0]), Example([5, 6, 7], [8, 9, 0])]
    tokens, mask = collate(rows)
    assert tokens.tolist() == [[5, 6, 7, 0, 0, 0], [5, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0]]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0],     # actions 1, 2 = tokens 2, 3: 7 and EOS
                                   [1, 0, 0, 0, 0],     # action 0 = token 1: EOS
                                   [0, 0, 1, 1, 1]]     # actions 2, 3, 4 = tokens 3, 4, 5


def test_epochs():
    """7 indices in batches of 3: every epoch is a permutation in batches of 3, 3, 1, and a new one;
    seeded."""
    orders = [data.shuffled_batches(7, 3, torch.Generator().manual_seed(0)) for _ in range(2)]
    batches, again = ([next(order).tolist() for _ in range(6)] for order in orders)
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1] and batches == again
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(7)) and first != second


def test_nothing_reaches_the_terminal_but_text():
    """Line feed, bell, ESC, C1 (0x9b alone starts a colour), right-to-left override, half of a
    surrogate pair: one sign each, in texts and in every error."""
    for character in "\n\r\t\0\a\b\x1b\x7f\x85\x9b\u2028\u202e\u2066\ud800\ufeff":
        assert printable(f"é {character}[31m日本") == "é \ufffd[31m日本"
        assert str(UserError(f"a{character}.jsonl:1: expected")) == "a\ufffd.jsonl:1: expected"
