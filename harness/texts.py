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
    """The toy task, or `pairs`, the preferences of --data -> Task. Prints what was left out.

    Raises UserError before the counts are printed.
    """
    sizes, lines = (config.train_pairs, config.val_pairs, config.test_pairs), [f"seed {seed}"]
    if pairs is None:
        prompts = len(data.THINGS) * math.prod(map(len, data.FACTS))
        if sum(sizes) > prompts:
            raise UserError(f"--train_pairs + --val_pairs + --test_pairs: expected at most "
                            f"{prompts} toy prompts, got {sum(sizes)}")
        texts = data.toy_splits(*sizes, seed)
    else:
        texts = split_pairs(pairs, *sizes, seed)
        lines += count_oddities(config.data, pairs, texts)
    if config.tokenizer:
        tokenizer = named_tokenizer(config.tokenizer)
    else:
        tokenizer = learn_tokenizer(texts.train, config.vocab_size)
    fitting, ids = [], []
    for name, items in texts._asdict().items():
        fits, encoded, cut = data.encode(counted(items, "tokenised"), tokenizer, config.block_size)
        if not encoded:
            raise UserError(f"--block_size: expected room for a prompt and a response ({name}), "
                            f"got {config.block_size}")
        fitting.append(fits)
        ids.append(encoded)
        unit, dropped = "rows" if name == "sft" else "pairs", len(items) - len(encoded)
        lines.append(f"  {name}: {len(encoded)} of {len(items)} {unit}; {cut} with the prompt cut "
                     f"from the left, {dropped} dropped because a response does not fit in "
                     f"{config.block_size} tokens")
    task = Task(data.Splits(*fitting), data.Splits(*ids), tokenizer)
    if config.student_pairs > len(task.ids.train):
        raise UserError(f"--student_pairs: expected at most the {len(task.ids.train)} training "
                        f"pairs, got {config.student_pairs}")
    print("\n".join(lines))
    return task


def count_oddities(path, pairs, texts):
    """What was left out of a preference file, and what is odd in it: a line, or none."""
    once = {pair[:3] for pair in pairs}
    unused = len(pairs) - len(texts.train) - len(texts.val) - len(texts.test)
    repeated = len(pairs) - len(once)
    contradicted = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
    if not (unused or repeated or contradicted):
        return []
    return [f"  {printable(path)}: {len(pairs)} pairs; {unused} left out by --train_pairs; "
            f"kept: {repeated} that repeat another, {contradicted} that another contradicts"]
