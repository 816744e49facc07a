"""Tokenizers, always a tiktoken.Encoding: byte pairs learned from the training text, or by name.

The method does not care how text is split, so none of this is needed to follow it.
"""

import base64
import re
from collections import Counter
from pathlib import Path

import tiktoken

from harness.errors import UserError

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
    # [:1000]: merging within a piece takes time quadratic in its length
    pieces = [([bytes([b]) for b in piece[:1000].encode()], n)
              for piece, n in Counter(re.findall(PIECES, text)).items()]
    ranks, pairs = {bytes([b]): b for b in range(256)}, Counter()
    for parts, n in pieces:
        count_pairs(pairs, parts, n)
    while len(ranks) < vocab_size - 1 and any(pairs.values()):
        left, right = max(pairs, key=pairs.get)         # ties: the first one, so always the same
        ranks[left + right] = len(ranks)
        for parts, n in pieces:
            if left in parts:
                count_pairs(pairs, parts, -n)
                merge(parts, left, right)
                count_pairs(pairs, parts, n)
    return _encoding(ranks)


def count_pairs(pairs, parts, n):
    """Add n to the count of every pair of neighbours in parts."""
    for pair in zip(parts, parts[1:]):
        pairs[pair] += n


def merge(parts, left, right):
    """Join every `left` with a `right` behind it, in place, from left to right."""
    i = 0
    while i < len(parts) - 1:
        if parts[i] == left and parts[i + 1] == right:
            parts[i:i + 2] = [left + right]
        i += 1


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
        return _encoding({base64.b64decode(token): int(rank) for token, rank in lines})
    except ValueError:
        raise UserError(f"{path}: expected lines `base64 rank`, as a run wrote them") from None


def _encoding(ranks):
    return tiktoken.Encoding("learned", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})
