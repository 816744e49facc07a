"""How a run ends: results.json and the report, what is printed, and the exit code."""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from shutil import get_terminal_size

import torch

from harness.errors import CheckFailed, printable, UserError
from harness.ask import show_answers
from harness.evaluate import HeldOut, fill, measure
from harness.files import write
from harness.psi import psi_of_pairs
from harness.steps import is_first
from harness.report import write_report
from harness.table import Row, show_psi, table
from harness.tokenizers import tokenizer_text


class Outcome:
    """Collects the rows of every seed. They are saved before anything is shown."""

    def __init__(self, config, keep, started):
        self.config, self.keep, self.started = config, keep, started
        self.rows, self.psi, self.tokenizers = [], [], {}

    def add(self, task, models):
        """Measure, save and show the models of one seed, {label: (model, reference, beta)}."""
        config, keep = self.config, self.keep
        test = HeldOut.of(task, "test", config, keep.seed)
        rows = [Row.of(label, keep.seed) for label in models]
        fill(rows, {label: keep.alone(f"{label}.row", measure, *model, test)
                    for label, model in models.items()})
        psi = [keep.alone(f"{row.label}.psi", psi_of_pairs, row.value, row.terminal, config.gamma,
                          *models["teacher"], *models[row.label], test)
               for row in rows if row.method == "tvkd" and row.value != "given"]
        self.rows, self.psi = self.rows + rows, self.psi + psi
        self.tokenizers[str(self.keep.seed)] = keep.describe("x", task.tokenizer)["x"]
        if task.tokenizer.name == "learned":
            write(keep.out / f"seed{keep.seed}" / "tokenizer.tiktoken",
                  tokenizer_text(task.tokenizer).encode())
        self.save()
        texts, ids = ([pair.prompt for pair in split.test[:2]] for split in task[:2])
        answering = {label: model for label, (model, _, _) in models.items()}
        show_answers(texts, ids, answering, task.tokenizer, self.config, self.keep.seed)
        colour = bool(sys.stdout) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for shown in psi:                                   # the first held-out pair, each value
            show_psi(shown["pairs"][0], colour=colour, width=get_terminal_size().columns)
        print(f"\n{table(rows)}")

    def save(self):
        out = self.keep.out
        made = {"torch": torch.__version__, "device": str(self.keep.device),
                "threads": torch.get_num_threads(),
                "seconds": round(time.perf_counter() - self.started, 1)}
        results = {"config": asdict(self.config), "rows": [row.flat() for row in self.rows],
                   "pairs": [pair for shown in self.psi for pair in shown["pairs"]],
                   "scatter": [point for shown in self.psi for point in shown["scatter"]],
                   "tokenizers": self.tokenizers, "made": made}
        results = without_nan(results)
        self.keep.log_file.flush()
        log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        try:
            write_report(results, [json.loads(line) for line in log], out / "report.html")
        except OSError as error:
            raise UserError(f"--out: expected a folder with room to write {out / 'report.html'}: "
                            f"{error.strerror}") from None
        text = json.dumps(results, indent=1, allow_nan=False)
        write(out / "results.json", f"{text}\n".encode())

    def finish(self):
        self.keep.close()
        if not is_first():
            return
        if self.config.seeds > 1:
            print(f"\nall seeds\n{table(self.rows)}")
        out = self.keep.out
        print(f"\n{time.perf_counter() - self.started:.0f} s; rows in "
              f"{printable(str(out / 'results.json'))}, pairs and curves in "
              f"{printable(str(out / 'report.html'))}")


def without_nan(value):
    """The same JSON value with null for what is not finite: a mean over nothing is unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(x) for name, x in value.items()}
    return [without_nan(x) for x in value] if isinstance(value, (list, tuple)) else value


def expect_working_folder():
    """In a deleted folder, relative paths lead nowhere and Intel's MKL ends the process."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("expected a working folder that exists, got one that was deleted") from None


def exit_code(run, *args):
    """run(*args) -> 0, or a line on stderr and an exit code: 2 the user's mistake, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")    # no sampled character may end a finished run
    try:
        expect_working_folder()
        run(*args)
        return 0
    except UserError as error:
        status, message = 2, str(error)
    except FloatingPointError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command goes on from here"
    except BrokenPipeError:                         # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        status, message = 2, "expected models and batches that fit in memory; try smaller ones"
    except OSError as error:
        status, message = 2, f"expected files that can be read and written: {error}"
    except CheckFailed as error:
        status, message = 1, str(error)
    except RuntimeError as error:
        status, message = 1, str(error).partition("\n")[0]
        if "memory" in message:
            status = 2
            message = f"expected models and batches that fit in memory, try smaller ones: {message}"
        else:
            raise
    if sys.stderr:
        print(f"train.py: {printable(message)}", file=sys.stderr)
    return status
