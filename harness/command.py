"""The command line behind train.py: options, a run of every seed, or the use of a finished one;
what a run leaves behind, what it prints, and its exit code."""

import json
import os
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size

import torch

from harness import IS_PROGRAM
from harness.ask import show_answers, use_run
from harness.errors import CheckFailed, UserError, one_line, printable
from harness.evaluate import HeldOut, evaluate, psi_of_pairs, rows_of
from harness.files import refuse_inside, write
from harness.keep import Keep, digest_of
from harness.numbers import show_psi, table
from harness.options import in_bfloat16, parse_args, pick_device
from harness.preferences import load_pairs
from harness.report import page
from harness.steps import is_first, joined_processes, under_torchrun
from harness.texts import load_task
from harness.tokenizers import tokenizer_text
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
        return None if under_torchrun() and os.environ["RANK"] != "0" else use_run(config, device)
    for option in ("data", "teacher_init", "student_init", "teacher"):
        refuse_inside(option, getattr(config, option), config.out)
    # Read once: a file that changes between two seeds must not be mixed.
    pairs = (load_pairs(config.data, "given" in config.value, config.skip_bad)
             if config.data else None)
    with joined_processes(device) as device, \
            closing(Keep(config.out, device, config.save_interval)) as keep:
        outcome = Outcome(config, keep)
        for keep.seed in range(config.seed, config.seed + config.seeds):
            task = load_task(config, keep.seed, pairs)
            if keep.seed == config.seed:
                announce(config)
            models = experiment(config.with_steps(task), keep.seed, task, device, keep)
            if is_first():              # one process is enough for the table
                outcome.add(task, models)
        if config.seeds > 1 and is_first():
            print(f"\nall seeds\n{table(outcome.rows)}")
        print(f"\n{time.perf_counter() - started:.0f} s; in {printable(config.out)}: the rows in "
              "results.json, pairs token by token in report.html, the curves in log.jsonl")


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


# --------------------------------------------------------------------------------------------------
# What a run leaves and prints

def announce(config):
    """Before the first stage: what this command replaces in --out."""
    path, now = Path(config.out) / "results.json", json.loads(json.dumps(asdict(config)))
    try:
        was = json.loads(path.read_text(encoding="utf-8"))["config"]
        changed = [f"--{name}={was.get(name)}" for name in now
                   if name != "out" and was.get(name) != now[name]]         # it may have moved
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if changed:
        print(one_line(f"{config.out}: replaces the results of a run with {' '.join(changed)}; "
                       "a scores.jsonl there is of that run"))


class Outcome:
    """Collects the rows of every seed. They are saved before anything is shown."""

    def __init__(self, config, keep):
        self.config, self.keep = config, keep
        self.rows, self.shown, self.models = [], [], {}         # shown: what psi_of_pairs gave

    def add(self, task, models):
        """Measure, save and show the models of one seed, {label: (model, reference, beta)}."""
        config, keep, seed = self.config, self.keep, self.keep.seed
        test = HeldOut.of(task, "test", config, seed)
        rows = rows_of({label: keep.alone(f"{label}.row", evaluate, *model, test)
                        for label, model in models.items()}, seed)
        kinds = {row["value"]: row["terminal"] for row in rows}
        shown = [keep.alone(f"{kind}.psi", psi_of_pairs, kind, terminal, config.gamma,
                            *models["teacher"], test)
                 for kind, terminal in kinds.items() if kind not in (None, "given")]
        trained = {label: model for label, (model, _, _) in models.items()}
        sft = {"teacher-sft": models["teacher"][1]} if "teacher" in models else {}
        self.models[str(seed)] = {label: keep.digest(made) for label, made in (
            trained | sft | {"tokenizer": task.tokenizer}).items()}
        if task.tokenizer.name == "learned":
            write(keep.out / f"seed{seed}" / "tokenizer.tiktoken",
                  tokenizer_text(task.tokenizer).encode())
        self.rows, self.shown = self.rows + rows, self.shown + shown
        self.save()
        texts, ids = ([pair.prompt for pair in split.test[:2]] for split in task[:2])
        show_answers(texts, ids, trained, task.tokenizer, config, seed)
        for pairs in shown:                                 # the first held-out pair, each value
            show_psi(pairs[0], get_terminal_size().columns)
        print(f"\n{table(rows)}")

    def save(self):
        """The page, and results.json: JSON has no NaN, and not every path is text."""
        out, config = self.keep.out, asdict(self.config)
        results = json.loads(json.dumps({
            "config": {k: printable(x) if isinstance(x, str) else x for k, x in config.items()},
            "rows": self.rows, "pairs": sum(self.shown, []), "models": self.models,
            "made": {"torch": torch.__version__, "device": str(self.keep.device),
                     "threads": torch.get_num_threads()}}), parse_constant=lambda constant: None)
        results["digest"] = digest_of([results["config"], results["models"]])
        html = page(self.config, self.rows, self.shown)
        write(out / "report.html", html.encode("utf-8", "replace"))
        write(out / "results.json", f"{json.dumps(results, indent=1)}\n".encode())


def exit_code(run, argv, *args, program="train.py"):
    """run(argv, *args) -> 0, or a line on stderr and an exit code. 2: files, options or memory; 1:
    numbers that are not finite, or a failed check; 130: Ctrl-C; 141: nobody reads stdout any more.
    Errors of the program are raised."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")    # no sampled character may end a finished run
    status, message = 0, ""
    try:
        run(argv, *args)
        print(end="", flush=True)
    except (UserError, FloatingPointError, CheckFailed) as error:
        status, message = 2 if isinstance(error, UserError) else 1, error
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command continues from here"
    except OSError as error:
        status, message = 2, f"expected files that can be read and written: {error}"
        if isinstance(error, BrokenPipeError):      # the reader, such as head, has gone
            status, message = 141, "stopped: nobody reads its output; the same command continues"
        try:
            print(end="", flush=True)
        except OSError:                             # what is left to print goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as error:    # torch has no type for memory of the CPU
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        status, message = 2, "out of memory; try a smaller --micro_batch, --samples or model"
    if message and sys.stderr:
        print(f"{program}: {one_line(message)}", file=sys.stderr)
    if IS_PROGRAM and under_torchrun():     # gloo's threads may abort a process that ends as usual
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
    return status
