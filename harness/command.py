"""The command line behind train.py: options, a run of every seed, or the use of a finished one."""

import time
from contextlib import closing

import torch

from harness.ask import use_run
from harness.files import refuse_inside
from harness.keep import Keep
from harness.options import in_bfloat16, parse_args, pick_device
from harness.outcome import Outcome, exit_code
from harness.preferences import load_pairs
from harness.steps import is_first, joined_processes
from harness.texts import load_task
from harness.weights import pretrained
from model import GPT, GPTConfig


def command_line(argv, experiment, methods, description):
    """What `python train.py` does -> its exit code."""
    return exit_code(run, argv, experiment, methods, description)


def run(argv, experiment, methods, description):
    started = time.perf_counter()
    config = parse_args(argv, methods, description)
    device = pick_device(config.device)
    if config.ask or config.score or config.export:
        use_run(config, device)
        return
    for option in ("data", "teacher_init", "student_init", "teacher"):
        refuse_inside(option, getattr(config, option), config.out)
    # Read once: a file that changes between two seeds must not be mixed.
    pairs = (load_pairs(config.data, "given" in config.value, config.skip_bad)
             if config.data else None)
    with joined_processes(device) as device, \
            closing(Keep(config.out, device, config.save_interval)) as keep:
        outcome = Outcome(config, keep, started)
        for keep.seed in range(config.seed, config.seed + config.seeds):
            task = load_task(config, keep.seed, pairs)
            if keep.seed == config.seed:
                outcome.announce()
            models = experiment(config.with_steps(task), keep.seed, task, device, keep)
            if is_first():              # one process is enough for the table
                outcome.add(task, models)
        if is_first():
            outcome.finish()


def new_model(who, config, task, seed, device, path=None):
    """The "teacher" or "student" before training: weights of `path` or --WHO_init, or new ones."""
    n_vocab, option = task.tokenizer.n_vocab, f"--{who}" if path else f"--{who}_init"
    path = path or getattr(config, f"{who}_init")
    if path:
        model = pretrained(option, path, n_vocab, config.block_size)
    else:
        torch.manual_seed(seed)         # weights depend on nothing that ran before
        sizes = (getattr(config, f"{who}_{name}") for name in ("layers", "heads", "width"))
        model = GPT(GPTConfig(n_vocab, config.block_size, *sizes))
    model.config.bfloat16 = in_bfloat16(config.precision, device)
    print(f"{who}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.requires_grad_(False).to(device)
