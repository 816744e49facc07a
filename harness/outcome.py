"""How a run ends: results.json and the report, what is printed, and the exit code."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from shutil import get_terminal_size

import torch

from harness.ask import show_answers
from harness.errors import CheckFailed, UserError, printable
from harness.evaluate import HeldOut, fill, measure
from harness.files import write
from harness.psi import psi_of_pairs
from harness.report import page
from harness.steps import is_first
from harness.table import Row, show_psi, table
from harness.tokenizers import tokenizer_text


class Outcome:
    """Collects the rows of every seed. They are saved before anything is shown."""

    def __init__(self, config, keep, started):
        self.config, self.keep, self.started = config, keep, started
        self.rows, self.shown, self.tokenizers = [], [], {}    # shown: what psi_of_pairs gave

    def add(self, task, models):
        """Measure, save and show the models of one seed, {label: (model, reference, beta)}."""
        config, keep = self.config, self.keep
        test = HeldOut.of(task, "test", config, keep.seed)
        rows = [Row.of(label, keep.seed) for label in models]
        fill(rows, {label: keep.alone(f"{label}.row", measure, *model, test)
                    for label, model in models.items()})
        first = {row.value: row for row in reversed(rows) if row.value not in (None, "given")}
        shown = [keep.alone(f"{row.label}.psi", psi_of_pairs, row.value, row.terminal, config.gamma,
                            *models["teacher"], *models[row.label], test)
                 for row in rows if row in first.values()]          # of each kind of value
        self.rows, self.shown = self.rows + rows, self.shown + shown
        self.tokenizers[str(keep.seed)] = keep.describe("x", task.tokenizer)["x"]
        if task.tokenizer.name == "learned":
            write(keep.out / f"seed{keep.seed}" / "tokenizer.tiktoken",
                  tokenizer_text(task.tokenizer).encode())
        self.save()
        texts, ids = ([pair.prompt for pair in split.test[:2]] for split in task[:2])
        answering = {label: model for label, (model, _, _) in models.items()}
        show_answers(texts, ids, answering, task.tokenizer, config, keep.seed)
        colour = bool(sys.stdout) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for pairs in shown:                                 # the first held-out pair, each value
            show_psi(pairs[0], colour, get_terminal_size().columns)
        print(f"\n{table(rows)}")

    def save(self):
        out, config = self.keep.out, asdict(self.config)
        # A path may hold bytes that are no text. What is not finite becomes null: a mean over
        # nothing is unknown, and JSON has no NaN.
        results = json.loads(json.dumps({
            "config": {k: printable(x) if isinstance(x, str) else x for k, x in config.items()},
            "rows": [row.flat() for row in self.rows],
            "pairs": [pair for pairs in self.shown for pair in pairs],
            "tokenizers": self.tokenizers,
            "made": {"torch": torch.__version__, "device": str(self.keep.device),
                     "threads": torch.get_num_threads(),
                     "seconds": round(time.perf_counter() - self.started, 1)}}),
            parse_constant=lambda constant: None)
        log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        html = page(self.config, self.rows, self.shown, [json.loads(line) for line in log])
        write(out / "report.html", html.encode("utf-8", "replace"))
        write(out / "results.json", f"{json.dumps(results, indent=1)}\n".encode())

    def finish(self):
        if not is_first():
            return
        config, out = self.config, self.keep.out
        if config.seeds > 1:
            print(f"\nall seeds\n{table(self.rows)}")
        if config.data and any(row.value for row in self.rows):
            print(f"The teacher's weight is alpha / beta, here {config.alpha / config.beta:g}. If "
                  "TVKD is below DPO, try a smaller --alpha: too high a weight chases the teacher "
                  "whatever the labels say.")
        print(f"\n{time.perf_counter() - self.started:.0f} s; rows in "
              f"{printable(out / 'results.json')}, pairs and curves in "
              f"{printable(out / 'report.html')}")


def exit_code(run, argv, *args):
    """run(argv, *args) -> 0, or a line on stderr and: 2, files, options or memory are at fault; 1, numbers
    that are not finite or a failed check; 130, Ctrl-C; 141, nobody reads stdout any more.

    argv None: of the command line, whose process then ends. Errors of the program are raised.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")    # no sampled character may end a finished run
    status, message = 0, ""
    try:
        expect_working_folder()
        run(argv, *args)
        print(end="", flush=True)
    except (UserError, FloatingPointError, CheckFailed) as error:
        status, message = 2 if isinstance(error, UserError) else 1, error
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command continues from here"
    except OSError as error:
        where = "stdout: " if stdout_is_lost() else ""
        status, message = 2, f"expected files that can be read and written: {where}{error}"
        if isinstance(error, BrokenPipeError):      # the reader, such as head, has gone
            status, message = 141, "stopped: nobody reads its output; the same command continues"
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):   # torch has no type for this one
            raise
        status, message = 2, "out of memory; try a smaller --micro_batch, --samples or model"
    while argv is None:     # a further Ctrl-C would only put a traceback behind the last line
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            break
        except KeyboardInterrupt:                   # at this very moment
            pass
    if message and sys.stderr:
        print(f"train.py: {printable(message)}", file=sys.stderr)
    return status


def expect_working_folder():
    """In a deleted folder, relative paths lead nowhere and Intel's MKL ends the process."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("expected a working folder that exists, got one that was deleted") from None


def stdout_is_lost():
    """Whether stdout takes no more. What is left to print then goes nowhere, in silence."""
    try:
        print(end="", flush=True)
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
