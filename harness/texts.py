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
        texts, once = split_pairs(pairs, *sizes, seed), {pair[:3] for pair in pairs}
        unused, repeated = len(pairs) - sum(map(len, texts[1:])), len(pairs) - len(once)
        contradicted = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        if unused or repeated or contradicted:
            lines.append(f"  {printable(config.data)}: {len(pairs)} pairs; {unused} left out "
                         f"by --train_pairs; kept: {repeated} that repeat another, {contradicted} "
                         "that another contradicts")
    tokenizer = (named_tokenizer(config.tokenizer) if config.tokenizer else
                 learn_tokenizer(texts.train, config.vocab_size))
    fitting, ids = [], []
    for name, items in texts._asdict().items():
        unit = "rows" if name == "sft" else "pairs"
        fits, encoded, cut = data.encode(counted(items, f"{name} tokenised", unit), tokenizer,
                                         config.block_size)
        if not encoded:
            raise UserError(f"--block_size: expected room for a prompt and a response ({name}), "
                            f"got {config.block_size}")
        fitting.append(fits)
        ids.append(encoded)
        lines.append(f"  {name}: {len(encoded)} of {len(items)} {unit}; {cut} with the prompt cut "
                     f"from the left, {len(items) - len(encoded)} dropped because a response does "
                     f"not fit in {config.block_size} tokens")
    task = Task(data.Splits(*fitting), data.Splits(*ids), tokenizer)
    if config.student_pairs > len(task.ids.train):
        raise UserError(f"--student_pairs: expected at most the {len(task.ids.train)} training "
                        f"pairs, got {config.student_pairs}")
    print("\n".join(lines))
    return task
