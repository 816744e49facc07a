"""Text -> pairs -> token ids -> padded batch: the toy task, encode and collate.

A text item is an Example (prompt, response) for supervised fine-tuning or a Pair (prompt, chosen,
rejected) for preferences. `encode` turns the strings of an item into lists of token ids; `collate`
turns rows (prompt ids, response ids) into one batch:

    tokens (B, T+1) ids, right-padded    [[5, 6, 7, 0],    prompt 5 6, response 7 EOS; EOS = 0
                                          [5, 0, 0, 0]]    prompt 5,   response EOS, then padding
    mask   (B, T)   bool, of actions     [[0, 1, 1],       action t is the choice of tokens[t+1]
                                          [1, 0, 0]]

Prompt and response are tokenised separately and joined as ids, so no merge crosses the border
between them. EOS is appended once, as an id, and it is scored: to stop is an action too.
Left out: tokenizers (harness/tokenizers.py), preference files (harness/preferences.py).
"""

import re
from typing import NamedTuple

import numpy as np
import torch


class Example(NamedTuple):
    prompt: str | list[int]
    response: str | list[int]


class Pair(NamedTuple):
    prompt: str | list[int]
    chosen: str | list[int]
    rejected: str | list[int]
    values: tuple[float, float] | None = None   # the teacher's, of chosen and rejected, from a file


class Splits(NamedTuple):
    sft: list           # Examples, on the training prompts only
    train: list         # Pairs
    val: list           # Pairs, for choosing settings
    test: list          # Pairs, for the tables; train, val and test share no prompt


# --- the toy task --------------------------------------------------------------------------------
# A prompt names a thing and its facts. A good answer names up to four facts, all right, politely.

THINGS = ("cat", "dog", "horse", "bird", "car", "boat",
          "house", "chair", "lamp", "clock", "bridge", "tree")
FACTS = (("red", "black", "white", "green", "brown", "blue"),
         ("small", "tiny", "little", "big", "large", "huge"),
         ("fast", "quick", "swift", "slow", "sluggish", "lazy"),
         ("old", "ancient", "aged", "young", "new", "modern"))
ALL_FACTS = {fact for group in FACTS for fact in group}
POLITE_OPENINGS = ("Of course!", "With pleasure.")
RUDE_OPENINGS = ("Ugh, fine.", "What a dull question.")
POLITE_CLOSINGS = ("I hope that helps.", "Have a nice day.")
RUDE_CLOSINGS = ("Now go away.", "Do not ask again.")
WRONG_FACT, WRONG_THING, OPENING, CLOSING = 1 / 3, 1 / 10, 1 / 2, 1 / 2     # rates in the corpus


def reward_parts(prompt, response):
    """The two parts of the reward, in closed form: two strings -> (facts, manners).

    facts: +1 for each fact of the prompt, -1 for a wrong or repeated one; +1 for the right thing,
    -1 for a wrong, missing or further one. manners: +1/2 for a polite and -1/2 for a rude opening,
    and the same for the closing.
    """
    asked, text = re.findall("[a-z]+", prompt.lower()), response.strip()
    facts, named = 0.0, set()
    for word in re.findall("[a-z]+", response.lower()):
        if word in ALL_FACTS or word in THINGS:
            facts += 1 if word in asked and word not in named else -1
            named.add(word)
    if not named.intersection(THINGS):
        facts -= 1
    polite = text.startswith(POLITE_OPENINGS) + text.endswith(POLITE_CLOSINGS)
    rude = text.startswith(RUDE_OPENINGS) + text.endswith(RUDE_CLOSINGS)
    return facts, 0.5 * (polite - rude)


def reward(prompt, response):
    """The true reward of a response: facts + manners. The best answer earns 6.

    reward("Describe the cat: red, small, fast, old.", "Of course! The cat is red and big.")
    -> 1 (cat) + 1 (red) - 1 (big) + 1/2 (polite) = 1.5
    """
    return sum(reward_parts(prompt, response))


def toy_response(thing, facts, rng):
    """A response of the corpus, with errors and manners at the rates above. Starts with a space."""
    groups = rng.permutation(len(FACTS))[:rng.integers(2, 5)]       # two to four facts, any order
    named = [one_of(FACTS[g], rng, but=facts[g]) if rng.random() < WRONG_FACT else facts[g]
             for g in groups]
    thing = one_of(THINGS, rng, but=thing) if rng.random() < WRONG_THING else thing
    sentences = [f"The {thing} is {', '.join(named[:-1])} and {named[-1]}."]
    if rng.random() < OPENING:
        sentences.insert(0, one_of(POLITE_OPENINGS + RUDE_OPENINGS, rng))
    if rng.random() < CLOSING:
        sentences.append(one_of(POLITE_CLOSINGS + RUDE_CLOSINGS, rng))
    return " " + " ".join(sentences)


def one_of(words, rng, but=None):
    words = [word for word in words if word != but]
    return words[rng.integers(len(words))]      # rng.choice would make an array first: slow


def toy_splits(train, val, test, seed, label_reward=None):
    """The toy task -> Splits: one pair for each prompt, two Examples for each training prompt.

    A pair is two different corpus responses, labelled by Bradley-Terry: the one with the higher
    reward is chosen with probability sigmoid(difference), so about one label in seven is wrong.
    label_reward, a function like `reward`, labels all pairs in its place, and changes no text.
    """
    sizes = (len(THINGS), *map(len, FACTS))
    rng, label_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    sft, pairs = [], []
    for i in rng.choice(np.prod(sizes), train + val + test, replace=False):      # distinct prompts
        choices = zip((THINGS, *FACTS), np.unravel_index(i, sizes))
        thing, *facts = (words[choice] for words, choice in choices)
        prompt = f"Describe the {thing}: {', '.join(facts)}."
        if len(pairs) < train:
            sft += [Example(prompt, toy_response(thing, facts, rng)) for _ in range(2)]
        first = second = toy_response(thing, facts, rng)
        while second == first:
            second = toy_response(thing, facts, rng)
        # A judge of its own draws from a generator of its own: no draw of the texts moves.
        uniform, own, judge = rng.random(), label_rng.random(), label_reward or reward
        gap = judge(prompt, second) - judge(prompt, first)
        first_wins = (own if label_reward else uniform) < 1 / (1 + np.exp(gap))
        pairs.append(Pair(prompt, first, second) if first_wins else Pair(prompt, second, first))
    return Splits(sft, pairs[:train], pairs[train:train + val], pairs[train + val:])


# --- text -> ids -> batch ------------------------------------------------------------------------

PART = 100_000      # characters encoded at once: tiktoken panics on a million spaces

def encode(items, tokenizer, block_size):
    """Text items -> (the items that fit, the same as ids with EOS, how many prompts were cut).

    The prompt is cut from the left, once for all responses of an item, so that the longest fits in
    block_size tokens. An item with a response that leaves no room for a prompt is left out: cut, it
    would have no EOS and no terminal state.
    """
    fitting, encoded, n_cut = [], [], 0
    same = {}           # equal ids share one int object: 8 bytes a token instead of 40
    for item in items:
        ids = []
        for text in item[:3]:                           # a Pair's values are not text
            parts = (text[start:start + PART] for start in range(0, len(text), PART))
            # encode_ordinary: "<|endoftext|>" written in a text never becomes EOS
            ids.append([same.setdefault(token, token)
                        for part in parts for token in tokenizer.encode_ordinary(part)])
        prompt, *responses = ids
        responses = [response + [tokenizer.eot_token] for response in responses]
        room = block_size - max(map(len, responses))
        if room > 0:
            n_cut += len(prompt) > room
            fitting.append(item)
            encoded.append(type(item)(prompt[-room:], *responses, *item[3:]))
    return fitting, encoded, n_cut


def collate(rows, device="cpu"):
    """Rows (prompt ids, response ids) -> tokens (B, T+1), mask (B, T): the example at the top.

    The mask comes from lengths, never from ids: EOS may well be the padding id.
    """
    starts = np.array([[len(prompt)] for prompt, _ in rows])
    ends = starts + [[len(response)] for _, response in rows]           # (B, 1)
    columns = np.arange(ends.max())                                     # (T+1,)
    tokens = np.zeros((len(rows), len(columns)), dtype=np.int64)        # (B, T+1), any id pads
    tokens[columns < ends] = [token for prompt, response in rows for token in prompt + response]
    # Action t is tokens[t+1], so the first response token, tokens[p], is action p-1.
    mask = (columns[1:] >= starts) & (columns[1:] < ends)               # (B, T)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def shuffled_batches(n, batch_size, generator):
    """Endless batches of indices below n, reshuffled for each epoch; its last may be smaller."""
    while True:
        yield from torch.randperm(n, generator=generator).split(batch_size)
