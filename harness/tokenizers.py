"""Tokenizers, always a tiktoken.Encoding: byte pairs learned from the training text, or by name.

The method does not care how text is split, so none of this is needed to follow it.
"""

import base64
import heapq
import re
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

from harness.errors import UserError
from harness.preferences import counted

END_OF_TEXT = "<|endoftext|>"       # the name of the EOS id; in a text these characters stay text
# Letters, digits or other signs, with the space before them, or a run of spaces. No token reaches
# from one of these pieces into the next.
PIECES = r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
LEARNED_FROM = 300_000      # characters of training text; more would hardly change the vocabulary


def learn_tokenizer(items, vocab_size):
    """Learn byte-pair merges from text items -> tiktoken.Encoding of at most `vocab_size` ids.

    Starts from the 256 bytes and joins the most frequent pair of neighbours until the vocabulary
    is full, EOS included, or every piece is one token.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab_size: expected at least 257 (bytes and EOS), got {vocab_size}")
    text = "\n".join(part for item in items for part in item[:3])[:LEARNED_FROM]
    single = [bytes([b]) for b in range(256)]
    # [:1000]: merging within a piece takes time quadratic in its length
    pieces = [([single[b] for b in piece[:1000].encode()], n)
              for piece, n in Counter(re.findall(PIECES, text)).items()]
    pairs, places = Counter(), defaultdict(set)     # how often each stands, and in which pieces
    for i, (parts, n) in enumerate(pieces):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n
            places[pair].add(i)
    ranks, order, queue, changed = {b: i for i, b in enumerate(single)}, {}, [], list(pairs)
    for _ in counted(range(vocab_size - 257), "vocabulary", "merges"):
        for pair in changed:            # of two that are equally frequent, the one met first wins
            heapq.heappush(queue, (-pairs[pair], order.setdefault(pair, len(order)), pair))
        while queue and -queue[0][0] != pairs[queue[0][2]]:     # an older count of that pair
            heapq.heappop(queue)
        if not queue or not queue[0][0]:
            break
        best = heapq.heappop(queue)[2]
        ranks[b"".join(best)], changed = len(ranks), {}
        for i in sorted(places.pop(best)):
            parts, n = pieces[i]
            merged, where = merge(parts, *best)
            pieces[i] = merged, n
            gone = {at + k + d for k, at in enumerate(where) for d in (-1, 0, 1)}
            come = {at + d for at in where for d in (-1, 0)}
            for sequence, starts, change in ((parts, gone, -n), (merged, come, n)):
                for pair in (tuple(sequence[at:at + 2]) for at in sorted(starts)):
                    if len(pair) == 2:
                        pairs[pair] += change
                        places[pair].add(i)
                        changed[pair] = True
    return _encoding(ranks)


def merge(parts, left, right):
    """Join every `left` with a `right` behind it, from left to right -> (new parts, where)."""
    merged, where = [], []
    for part in parts:
        if part == right and merged and merged[-1] == left:
            merged[-1] = left + right
            where.append(len(merged) - 1)
        else:
            merged.append(part)
    return merged, where


def named_tokenizer(name):
    """An encoding that tiktoken knows by name, such as "gpt2"; downloaded at first use."""
    try:
        tokenizer = tiktoken.get_encoding(name)
        tokenizer.eot_token             # KeyError: a plugin's vocabulary need not have one
        return tokenizer
    except (KeyError, OSError, ValueError) as error:    # ValueError: another hash than tiktoken's
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer: expected one of {known}, with {END_OF_TEXT}, fetched once "
                        f"from an open network into TIKTOKEN_CACHE_DIR, or no --tokenizer; got "
                        f"{name:.60}: {error!r:.150}") from None


def text_of(ids, tokenizer):
    """Ids -> text, U+FFFD for ids without one: cl100k_base leaves out 16 below its largest."""
    parts = []
    for token in ids:
        try:
            parts.append(tokenizer.decode_single_token_bytes(token))
        except KeyError:
            parts.append("\ufffd".encode())
    return b"".join(parts).decode(errors="replace")


def tokenizer_text(tokenizer):
    """A vocabulary in tiktoken's own text format: a line `base64(bytes) rank` for each token."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                   for token, rank in tokenizer._mergeable_ranks.items())


def load_tokenizer(path):
    """Read a file of `tokenizer_text` -> tiktoken.Encoding."""
    # Not tiktoken.load.load_tiktoken_bpe: it caches by path and would miss a rewritten file.
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(lines))):       # tiktoken panics at doubles
            raise ValueError
        return _encoding(ranks)
    except ValueError:
        raise UserError(f"{path}: expected lines `base64 rank`, as a run wrote them") from None


def _encoding(ranks):
    return tiktoken.Encoding("learned", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})
