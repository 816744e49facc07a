"""Text -> pairs -> token batch and mask: the toy task, preference files, the tokenizer, right-padded batches.

A text item is a Row (prompt, response) for supervised fine-tuning or a Pair (prompt, chosen, rejected) for preferences; `encode`
turns either into the same tuple of token ids, and `collate` turns rows of ids into a batch:

    tokens (B, T+1) ids, right-padded    e.g. [[5, 6, 7, 0], [5, 0, 0, 0]]: prompts 5 6 and 5, responses 7 EOS and EOS, EOS = 0
    mask   (B, T)   bool, of actions          [[0, 1, 1],    [1, 0, 0]]     action t is tokens[t+1]

Prompt and response are tokenised apart and joined as ids, so that no merge crosses the border between them. EOS is appended as
an id, once, and is scored. Left out: data larger than memory (a pair of 2 kB takes about 13 kB), chat templates of models.
"""

import base64
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

END_OF_TEXT = "<|endoftext|>"       # the name of the EOS id; the same characters in a text are ordinary characters
SECONDS = 3                         # between two lines of `progress`


class UserError(ValueError):
    """What the user's data or options got wrong, in one line that names the file, line or option and what was expected."""


class Row(NamedTuple):
    prompt: str | list[int]
    response: str | list[int]


class Pair(NamedTuple):
    prompt: str | list[int]
    chosen: str | list[int]
    rejected: str | list[int]


class Splits(NamedTuple):
    sft: list           # Rows, on the training prompts only
    train: list         # Pairs
    val: list           # Pairs, to choose settings by
    test: list          # Pairs, for the tables; no prompt is in two of train, val and test


# ---------------------------------------------------------------------------------------------------------------------------
# The toy task. A prompt names a thing and four facts; the answer should repeat two to four of them, all right, and be polite.

THINGS = ("cat", "dog", "horse", "bird", "car", "boat", "house", "chair", "lamp", "clock", "bridge", "tree")
FACTS = (("red", "black", "white", "green", "brown", "blue"), ("small", "tiny", "little", "big", "large", "huge"),
         ("fast", "quick", "swift", "slow", "sluggish", "lazy"), ("old", "ancient", "aged", "young", "new", "modern"))
ALL_FACTS = {fact for group in FACTS for fact in group}
POLITE_OPENINGS, RUDE_OPENINGS = ("Of course!", "With pleasure."), ("Ugh, fine.", "What a dull question.")
POLITE_CLOSINGS, RUDE_CLOSINGS = ("I hope that helps.", "Have a nice day."), ("Now go away.", "Do not ask again.")
WRONG_FACT, WRONG_THING, OPENING, CLOSING = 1 / 3, 1 / 10, 1 / 2, 1 / 2      # how the corpus errs, and how often it chats


def reward(prompt, response):
    """The true reward of a response, in closed form. Two strings -> float.

    +1 for each fact of the prompt, -1 for a wrong or repeated one; +1 for the right thing, -1 for a wrong, missing or further
    one; +1/2 for a polite and -1/2 for a rude opening, and the same for the closing. The best answer earns 6.

    Example: reward("Describe the cat: red, small, fast, old.", "Of course! The cat is red and big.") is 1 + 1 - 1 + 1/2 = 1.5
    """
    asked, words, text = re.findall("[a-z]+", prompt.lower()), re.findall("[a-z]+", response.lower()), response.strip()
    score, named = 0.0, set()
    for word in words:
        if word in ALL_FACTS or word in THINGS:
            score += 1 if word in asked and word not in named else -1
            named.add(word)
    if not named.intersection(THINGS):
        score -= 1
    score += 0.5 * (text.startswith(POLITE_OPENINGS) + text.endswith(POLITE_CLOSINGS))
    return score - 0.5 * (text.startswith(RUDE_OPENINGS) + text.endswith(RUDE_CLOSINGS))


def toy_response(thing, facts, rng):
    """A response of the corpus: each fact wrong about one time in three, rude about as often as polite. Starts with a space."""
    groups = rng.permutation(len(FACTS))[:rng.integers(2, 5)]                   # two to four facts, in any order
    named = [_other(FACTS[g], facts[g], rng) if rng.random() < WRONG_FACT else facts[g] for g in groups]
    thing = _other(THINGS, thing, rng) if rng.random() < WRONG_THING else thing
    sentences = [f"The {thing} is {', '.join(named[:-1])} and {named[-1]}."]
    if rng.random() < OPENING:
        sentences.insert(0, str(rng.choice(POLITE_OPENINGS + RUDE_OPENINGS)))
    if rng.random() < CLOSING:
        sentences.append(str(rng.choice(POLITE_CLOSINGS + RUDE_CLOSINGS)))
    return " " + " ".join(sentences)


def _other(words, word, rng):
    return str(rng.choice([other for other in words if other != word]))


def toy_splits(train, val, test, seed):
    """The toy task: Splits with `train`, `val` and `test` pairs, one to a prompt, and two corpus rows to a training prompt.

    A pair is two different corpus responses to one prompt, labelled by Bradley-Terry on the reward: the better one is chosen
    with probability sigmoid(difference), so about one label in seven is wrong. Everything follows from the seed.
    """
    sizes = (len(THINGS), *map(len, FACTS))
    if train + val + test > np.prod(sizes):
        raise UserError(f"--train_pairs + --val_pairs + --test_pairs: expected at most {np.prod(sizes)} toy prompts, "
                        f"got {train + val + test}")
    rng = np.random.default_rng(seed)
    sft, pairs = [], []
    for choice in rng.choice(np.prod(sizes), train + val + test, replace=False):        # distinct prompts
        thing, *facts = (words[i] for words, i in zip((THINGS, *FACTS), np.unravel_index(choice, sizes)))
        prompt = f"Describe the {thing}: {', '.join(facts)}."
        if len(pairs) < train:
            sft += [Row(prompt, toy_response(thing, facts, rng)) for _ in range(2)]
        first = second = toy_response(thing, facts, rng)
        while second == first:
            second = toy_response(thing, facts, rng)
        first_wins = rng.random() < 1 / (1 + np.exp(reward(prompt, second) - reward(prompt, first)))
        pairs.append(Pair(prompt, first, second) if first_wins else Pair(prompt, second, first))
    return Splits(sft, pairs[:train], pairs[train:train + val], pairs[train + val:])


# ---------------------------------------------------------------------------------------------------------------------------
# Preference files: JSONL, a pair a line, in any of the layouts of `parse_pair`.

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ANSWER = "\n\nAssistant:"
LAYOUTS = ('"prompt", "chosen" and "rejected" as strings or as message lists, or "chosen" and "rejected" alone as message lists '
           'or as "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts that begin with the prompt')


def load_pairs(path):
    """Read a JSONL file of preferences -> list of Pairs of text, a pair for every line that is not blank.

    Raises UserError with `file:line: what was expected` for the first line that is not a pair in one of the four layouts.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():                    # opened, a pipe nobody writes to waits for ever
            raise UserError(f"{path}: expected a readable JSONL file, got a folder, a pipe or a device")
        with open(path, "rb") as file:                                          # bytes: a line ends at \n and nowhere else
            lines = (line.removeprefix(b"\xef\xbb\xbf").rstrip() for line in file)      # a byte-order mark is not text
            pairs = list(progress((_parse_line(path, i, line) for i, line in enumerate(lines, 1) if line), path))
    except OSError as error:
        raise UserError(f"{path}: expected a readable JSONL file, got: {error.strerror}") from None
    if not pairs:
        raise UserError(f"{path}: expected at least one preference pair, got an empty file")
    return pairs


def _parse_line(path, number, line):
    try:
        return parse_pair(json.loads(line.decode("utf-8"), object_pairs_hook=_record))
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from None
    except (ValueError, RecursionError) as error:           # not UTF-8, not JSON, nested too deeply
        reason = re.sub("(?: at)?: line 1 column", " at column", str(error))
        raise UserError(f"{path}:{number}: expected one JSON object in UTF-8, got: {reason}") from None


def _record(items):
    names = [name for name, _ in items]
    if len(set(names)) < len(names):                        # json.loads would keep the last of two
        raise UserError(f"expected a field once in an object, got {Counter(names).most_common(1)[0][0]!r:.60} again")
    return dict(items)


def progress(items, what):
    """Yield the items; every SECONDS a line tells how many there were and how fast."""
    start = shown = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown >= SECONDS:
            unit, shown = f"{type(item).__name__.lower()}s", now
            print(f"  {what}: {count:,} {unit}, {count / (now - start):,.0f} {unit}/s", flush=True)


def parse_pair(record):
    """One JSON value -> Pair of text. Raises UserError saying what was expected.

    1. {"prompt": "...", "chosen": "...", "rejected": "..."}        joined as they are: no space or newline is put in between
    2. the same three as lists of {"role": "user", "content": "..."} messages
    3. "chosen" and "rejected" as such lists, both beginning with the prompt
    4. "chosen" and "rejected" as transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (as in Anthropic's HH), whose shared turns
       are the prompt
    Layouts 2 to 4 come out alike: every turn as "\\n\\nRole: content", the prompt ending in "\\n\\nAssistant:".
    """
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    fields = [record.get(name) for name in Pair._fields]
    prompt, chosen, rejected = fields
    for name, field in zip(Pair._fields, fields):
        # A prompt may be missing where the responses begin with it, as in transcripts.
        if field is None and (name != "prompt" or isinstance(chosen, str) and "\n\nHuman:" not in f"{chosen}{rejected}"):
            raise UserError(f'expected a field "{name}"; a pair is {LAYOUTS}')
    if isinstance(prompt, (str, list)) and prompt and all(_begins_with(response, prompt) for response in (chosen, rejected)):
        raise UserError('expected the prompt once: in "prompt", or at the start of "chosen" and "rejected"')
    if all(isinstance(field, str) for field in fields):
        pair = Pair(*fields)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        pair = _split_turns(*(re.split(r"(?=\n\n(?:Human|Assistant):)", text) for text in (chosen, rejected)))
    elif isinstance(chosen, list) and isinstance(rejected, list) and (prompt is None or isinstance(prompt, list)):
        turns = _turns("prompt", prompt or [])
        pair = _split_turns(turns + _turns("chosen", chosen), turns + _turns("rejected", rejected))
    else:
        types = ", ".join(f"{name} as {type(field).__name__}" for name, field in zip(Pair._fields, fields))
        raise UserError(f"expected {LAYOUTS}; got {types}")
    for name, text in zip(Pair._fields, pair):
        if not text.strip():
            raise UserError(f'expected text in "{name}", got an empty one')
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UserError(f'expected text in "{name}", got half of a surrogate pair')
    if pair.chosen == pair.rejected:
        raise UserError('expected "chosen" and "rejected" to differ, got the same response twice')
    return pair


def _begins_with(response, prompt):
    """Whether a response repeats its prompt: a conversation its first turns, a transcript its first characters."""
    if isinstance(prompt, str):
        return "\n\nHuman:" in prompt and isinstance(response, str) and response.startswith(prompt)
    return isinstance(response, list) and response[:len(prompt)] == prompt


def _turns(name, messages):
    for message in messages:
        known = isinstance(message, dict) and message.get("role") in list(ROLES)          # a list: a role may not be hashable
        if not (known and isinstance(message.get("content"), str)):
            raise UserError(f'expected "{name}" as messages {{"role": {"|".join(ROLES)}, "content": "..."}}, '
                            f"got {message!r:.60}")
    return [f"\n\n{ROLES[message['role']]}: {message['content']}" for message in messages]


def _split_turns(chosen, rejected):
    """Two conversations as turns -> Pair. Compared turn by turn: a common prefix of characters would cut into the answers."""
    *prompt, answer = chosen or [""]
    *rejected_prompt, rejected_answer = rejected or [""]
    answered = answer.startswith(ANSWER) and rejected_answer.startswith(ANSWER)
    if not "".join(prompt) or prompt != rejected_prompt or not answered:
        raise UserError('expected "chosen" and "rejected" to share the prompt and to differ in one last turn, '
                        "the assistant's answer")
    return Pair("".join(prompt) + ANSWER, answer.removeprefix(ANSWER), rejected_answer.removeprefix(ANSWER))


def split_pairs(pairs, train, val, test, seed):
    """Splits by prompt: shuffled, `test` pairs (a few more rather than divide a prompt), then `val`, then `train` (0: the rest).

    Supervised rows are the chosen responses of the training pairs.
    """
    if len(pairs) < (train or 1) + val + test:
        raise UserError(f"--train_pairs + --val_pairs + --test_pairs: expected at most the {len(pairs)} pairs of the file, "
                        f"got {train or 'at least 1'} + {val} + {test}; try smaller --val_pairs and --test_pairs")
    by_prompt = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    prompts = list(by_prompt)
    parts = {"train": [], "val": [], "test": []}
    for i in np.random.default_rng(seed).permutation(len(prompts)):
        part = "test" if len(parts["test"]) < test else "val" if len(parts["val"]) < val else "train"
        parts[part] += by_prompt[prompts[i]]
    parts["train"] = parts["train"][:train or None]
    if not parts["train"]:
        raise UserError(f"--val_pairs + --test_pairs: expected some prompts of the file left to train on, got {val} + {test}")
    return Splits([Row(pair.prompt, pair.chosen) for pair in parts["train"]], **parts)


# ---------------------------------------------------------------------------------------------------------------------------
# The tokenizer is always a tiktoken.Encoding.

# Letters, digits, other signs, each with the space before it, or a run of spaces: no token reaches across two of them.
PIECES = r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
LEARNED_FROM = 300_000              # characters of training text; more would hardly change the vocabulary
PART = 100_000                      # characters encoded at once: where a million are spaces, tiktoken ends in a panic


def learn_tokenizer(items, vocab_size):
    """Learn byte-pair merges from Rows or Pairs of text -> tiktoken.Encoding of at most `vocab_size` ids, EOS included.

    Starts from the 256 bytes and joins the most frequent pair of neighbours until the vocabulary is full or every piece is one
    token. (The trainer in tiktoken._educational does the same, but ends in an error where a small text has no pair left.)
    """
    if vocab_size < 257:
        raise UserError(f"--vocab_size: expected at least 257 (256 bytes and EOS), got {vocab_size}")
    text = "\n".join(part for item in items for part in item)[:LEARNED_FROM]
    # [:1000]: merging within a piece takes time quadratic in its length.
    pieces = [([bytes([b]) for b in piece[:1000].encode()], n) for piece, n in Counter(re.findall(PIECES, text)).items()]
    ranks, pairs = {bytes([b]): b for b in range(256)}, Counter()

    def count(parts, n):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n

    for parts, n in pieces:
        count(parts, n)
    while len(ranks) < vocab_size - 1 and any(pairs.values()):
        left, right = max(pairs, key=pairs.get)                 # the first of equals: deterministic
        ranks.setdefault(left + right, len(ranks))              # two merges can spell the same bytes; the first one counts
        for parts, n in pieces:
            if left in parts:
                count(parts, -n)
                i = 0
                while i < len(parts) - 1:
                    if parts[i] == left and parts[i + 1] == right:
                        parts[i:i + 2] = [left + right]
                    i += 1
                count(parts, n)
    return _encoding(ranks)


def named_tokenizer(name, option="tokenizer"):
    """An encoding that tiktoken knows by name, such as "gpt2"; downloaded at first use. Raises UserError where that fails."""
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        raise UserError(f"--{option}: expected one of {', '.join(tiktoken.list_encoding_names())}, got {name}") from None
    except OSError as error:
        raise UserError(f"--{option}: {name} could not be downloaded ({type(error).__name__}); fetch it once where there is a "
                        f"network, and set TIKTOKEN_CACHE_DIR to the folder that holds it, or leave --{option} out") from None


def tokenizer_text(tokenizer):
    """A vocabulary in tiktoken's own text format: a line `base64(bytes) rank` for each token."""
    tokens = (tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token))
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def load_tokenizer(path):
    """Read a file of `tokenizer_text` -> tiktoken.Encoding."""
    # Not tiktoken.load.load_tiktoken_bpe: it caches by path, so a rewritten file would come back stale.
    lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
    return _encoding({base64.b64decode(token): int(rank) for token, rank in lines})


def _encoding(ranks):
    return tiktoken.Encoding("learned", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


# ---------------------------------------------------------------------------------------------------------------------------
# Text -> ids -> batch

def encode(items, tokenizer, block_size):
    """Rows or Pairs of text -> (those kept, the same of ids with EOS, how many prompts were cut).

    The prompt is cut from the left, once for all responses of an item, so that the longest fits in block_size tokens. An item
    with a response that leaves no room for a prompt is not kept: cut, it would have no EOS and no terminal state.
    """
    kept, encoded, cut, same = [], [], 0, {}     # same: of equal ids one int stands in all rows; 8 bytes a token, not 40
    for item in progress(items, "tokenised"):
        # encode_ordinary: "<|endoftext|>" written in a text stays text and never becomes EOS.
        prompt, *responses = ([same.setdefault(token, token) for start in range(0, len(text), PART)
                               for token in tokenizer.encode_ordinary(text[start:start + PART])] for text in item)
        responses = [response + [tokenizer.eot_token] for response in responses]
        room = block_size - max(map(len, responses))
        if room > 0:
            cut += len(prompt) > room
            kept.append(item)
            encoded.append(type(item)(prompt[-room:], *responses))
    return kept, encoded, cut


def collate(rows):
    """Rows (prompt ids, response ids with EOS) -> tokens (B, T+1), mask (B, T), as in the example at the top of this file.

    The mask comes from lengths, never from ids: EOS may well be the padding id.
    """
    ends = [len(prompt) + len(response) for prompt, response in rows]
    tokens = torch.zeros(len(rows), max(ends), dtype=torch.long)                    # (B, T+1), any id pads
    mask = torch.zeros(len(rows), max(ends) - 1, dtype=torch.bool)                  # (B, T)
    for i, (prompt, response) in enumerate(rows):
        tokens[i, :ends[i]] = torch.tensor(prompt + response)
        mask[i, len(prompt) - 1:ends[i] - 1] = True         # action t is tokens[t+1]: the first response token is action p-1
    return tokens, mask


def epochs(n, batch_size, generator):
    """Endless batches of indices below n: each index once an epoch, in a new order; the last batch of one may be smaller."""
    while True:
        yield from torch.randperm(n, generator=generator).split(batch_size)
