"""How a run ends: results.json and the report, what is printed, and the exit code."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size

import torch

from harness import IS_PROGRAM
from harness.ask import show_answers
from harness.errors import CheckFailed, UserError, one_line, printable
from harness.evaluate import HeldOut, evaluate, rows_of
from harness.files import write
from harness.keep import digest_of
from harness.psi import psi_of_pairs
from harness.report import page
from harness.steps import under_torchrun
from harness.table import show_psi, table
from harness.tokenizers import tokenizer_text


class Outcome:
    """Collects the rows of every seed. They are saved before anything is shown."""

    def __init__(self, config, keep, started):
        self.config, self.keep, self.started = config, keep, started
        self.rows, self.shown, self.models = [], [], {}         # shown: what psi_of_pairs gave
        self.past, self.earlier = {}, []            # models of results.json as it was; older tables

    def announce(self):
        """Before the first stage: what this command replaces in --out. Older tables are kept."""
        path, now = self.keep.out / "results.json", json.loads(json.dumps(asdict(self.config)))
        try:                                                    # opening a pipe would hang
            past = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            was = past["config"]
            changed = [f"--{name}={was.get(name)}" for name in now
                       if name != "out" and was.get(name) != now[name]]     # it may have moved
            old = [{"config": was, "rows": past["rows"]}] if changed else []
            self.past, self.earlier = past["models"], [*past["earlier"], *old][-20:]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        if changed:
            print(one_line(f"{self.keep.out}: replaces the results of a run with "
                           f"{' '.join(changed)}; its table stays in results.json as \"earlier\""))

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
        self.prompt = task.texts.train[0].prompt
        self.save()
        texts, ids = ([pair.prompt for pair in split.test[:2]] for split in task[:2])
        show_answers(texts, ids, trained, task.tokenizer, config, seed)
        colour = bool(sys.stdout) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for pairs in shown:                                 # the first held-out pair, each value
            show_psi(pairs[0], colour, get_terminal_size().columns)
        print(f"\n{table(rows)}")

    def save(self):
        """The page, and results.json: JSON has no NaN, and not every path is text."""
        out, config = self.keep.out, asdict(self.config)
        results = json.loads(json.dumps({
            "config": {k: printable(x) if isinstance(x, str) else x for k, x in config.items()},
            "rows": self.rows, "pairs": sum(self.shown, []), "models": self.models,
            "earlier": self.earlier, "prompt_looked_like": self.prompt, "made": {
                "torch": torch.__version__, "device": str(self.keep.device),
                "threads": torch.get_num_threads()}}), parse_constant=lambda constant: None)
        results["digest"] = digest_of([results["config"], results["models"]])
        log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        html = page(self.config, self.rows, self.shown, [json.loads(line) for line in log])
        write(out / "report.html", html.encode("utf-8", "replace"))
        write(out / "results.json", f"{json.dumps(results, indent=1)}\n".encode())

    def finish(self):
        config, out = self.config, self.keep.out
        if config.seeds > 1:
            print(f"\nall seeds\n{table(self.rows)}")
        if config.data and any(row["value"] for row in self.rows):
            print(f"The teacher's weight is alpha / beta, here {config.alpha / config.beta:g}: too "
                  "high a one chases the teacher whatever the labels say; try a smaller --alpha.")
        again = [label for seed, digests in self.models.items() for label, digest in digests.items()
                 if self.past.get(seed, {}).get(label, digest) != digest]
        if again and (out / "scores.jsonl").exists():
            print(f"scores.jsonl is of {', '.join(again)} as they were before; repeat --score")
        print(f"\n{time.perf_counter() - self.started:.0f} s; in {printable(out)}: the rows in "
              "results.json, pairs and curves in report.html")


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
        try:
            print(end="", flush=True)
        except OSError:                             # what is left to print goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message = f"expected files that can be read and written: stdout: {error}"
        if isinstance(error, BrokenPipeError):      # the reader, such as head, has gone
            status, message = 141, "stopped: nobody reads its output; the same command continues"
    except (MemoryError, RuntimeError) as error:    # torch has no type for memory of the CPU
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        status, message = 2, "out of memory; try a smaller --micro_batch, --samples or model"
    if IS_PROGRAM:          # a further Ctrl-C would only put more lines behind the last one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if message and sys.stderr:
        print(f"{program}: {one_line(message)}", file=sys.stderr)
    if message and "TORCHELASTIC_ERROR_FILE" in os.environ:     # torchrun says it again, last
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(
            {"message": one_line(message), "timestamp": int(time.time())}), encoding="utf-8")
    if IS_PROGRAM and under_torchrun():     # gloo's threads may abort a process that ends as usual
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
    return status
