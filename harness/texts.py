"""From the options to the texts and ids of one seed."""

import math
from typing import NamedTuple

import data
from harness.errors import UserError, printable
from harness.preferences import counted, split_pairs
from harness.tokenizers import learn_tokenizer, named_tokenizer


class Task(NamedTuple):
    texts: data.Splits
    ids: data.Splits            # the same items in the same order, as ids
    tokenizer: object           # a tiktoken.Encoding


def load_task(config, seed, pairs=None):
    """The toy task, or `pairs`, the preferences of --data -> Task. Prints what was left out."""
    print(f"seed {seed}")
    *sizes, room = config.train_pairs, config.val_pairs, config.test_pairs, config.block_size
    if pairs is None:
        prompts = len(data.THINGS) * math.prod(map(len, data.FACTS))
        if sum(sizes) > prompts:
            raise UserError("--train_pairs + --val_pairs + --test_pairs: expected at most "
                            f"{prompts} toy prompts, got {sum(sizes)}")
        texts = data.toy_splits(*sizes, seed)
    else:
        texts, once = split_pairs(pairs, *sizes, seed), {pair[:3] for pair in pairs}
        contradicted = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        unused, repeated = len(pairs) - sum(map(len, texts[1:])), len(pairs) - len(once)
        print(f"  {printable(config.data)}: {len(pairs)} pairs; {unused} left out by --train_pairs"
              f"; kept: {repeated} that repeat another, {contradicted} that another contradicts")
    tokenizer = (named_tokenizer(config.tokenizer) if config.tokenizer else
                 learn_tokenizer(texts.train, config.vocab_size))
    fitting = []
    for name, items in texts._asdict().items():
        fits, ids, cut = data.encode(counted(items, f"{name} tokenised", "rows"), tokenizer, room)
        if not ids:
            raise UserError(f"--block_size: expected room for a prompt and a response, got {room}")
        fitting.append((fits, ids))
        print(f"  {name}: {len(ids)} of {len(items)} rows; {cut} with the prompt cut from the left,"
              f" {len(items) - len(ids)} dropped because a response does not fit in {room} tokens")
    texts, ids = (data.Splits(*items) for items in zip(*fitting))
    if config.student_pairs > len(ids.train):
        raise UserError(f"--student_pairs: expected at most the {len(ids.train)} training pairs, "
                        f"got {config.student_pairs}")
    return Task(texts, ids, tokenizer)
