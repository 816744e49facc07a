"""What a stage of training reports while it runs: log, validation, checkpoints, Ctrl-C.

`fit` in train.py calls `go_on_from`, then `after` once a step. None of it changes what is trained.
"""

import json
import math
import signal
import sys
import time
from contextlib import contextmanager

from harness.processes import in_all, is_first


class Progress:
    """The default only prints. harness/keep.py hands out one that writes the log and checkpoints.

    partial: a harness.keep.Partial, where a checkpoint goes every `save_interval` seconds and at
    Ctrl-C; log: a function that takes one line of log.jsonl.
    """

    def __init__(self, stage="", seed=0, log_interval=20, eval_interval=20, save_interval=30.0,
                 partial=None, log=None):
        self.stage, self.seed, self.partial, self.log = stage, seed, partial, log
        self.log_interval, self.eval_interval = log_interval, eval_interval
        self.save_interval = save_interval
        self.lines, self.first_step, self.tokens, self.seconds = [], 1, 0, 0.0
        self.resumed = self.saved = time.perf_counter()

    def go_on_from(self, model, optimizer):
        """Load the checkpoint of an interrupted stage -> the steps it has behind it, or 0."""
        state = self.partial and self.partial.load()
        if not state:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"  {self.stage}: going on from step {state['step']}")
        for line in state["log"]:
            self.write(line)
        self.first_step = state["step"] + 1
        return state["step"]

    def write(self, line):
        self.lines.append(line)
        if self.log:
            self.log(line)

    def after(self, step, steps, total, model, optimizer, validate, interrupted):
        """One step is done. total: the sums of the loss over its batch, "n" and "tokens" too.

        validate(model) -> metrics, or None. interrupted: a list that Ctrl-C fills.
        """
        self.tokens += total["tokens"]
        validate_now = (validate is not None and is_first()             # one process is enough
                        and (step == steps or step % self.eval_interval == 0))
        if validate_now or step in (1, steps) or step % self.log_interval == 0:
            self.seconds += time.perf_counter() - self.resumed      # training without validation
            metrics = {name: x / total["n"] for name, x in total.items()
                       if name not in ("n", "tokens")}
            metrics |= self.validation(validate, model, step) if validate_now else {}
            line = {"seed": self.seed, "stage": self.stage, "step": step, **metrics}
            self.write(json.dumps(line))
            self.show(step, steps, metrics)
            self.resumed = time.perf_counter()
        if self.partial:
            # If any process got Ctrl-C, all of them stop.
            stop = not in_all(not interrupted)
            due = time.perf_counter() - self.saved >= self.save_interval
            if stop or due and step < steps:
                self.partial.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                   "step": step, "log": self.lines})
                self.saved = time.perf_counter()
            if stop:
                raise KeyboardInterrupt

    def validation(self, validate, model, step):
        """validate(model), where it is finite. A kept result would only fail in a later stage."""
        try:
            metrics = validate(model)
            for name, x in metrics.items():
                if x is not None and not math.isfinite(x):
                    raise FloatingPointError(f"{name} {x}; expected finite numbers, try a lower "
                                             "learning rate")
            return metrics
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.stage}: after step {step}: {error}") from None

    def show(self, step, steps, metrics):
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()
                            if value is not None)
        done = step - self.first_step + 1
        # The first steps are slow (memory, caches), so the time left is not known yet.
        left = f"  {self.seconds / done * (steps - step):.0f} s left" if done >= 5 else ""
        rate = self.tokens / self.seconds
        print(f"  {self.stage} {step}/{steps}  {numbers}  {rate:,.0f} tokens/s{left}", flush=True)


@contextmanager
def ctrl_c_held(active=True):
    """Inside the block the first Ctrl-C only fills the yielded list; a second one interrupts.

    So the caller can finish a step and save it. active=False: Ctrl-C interrupts as usual.
    """
    pressed = []

    def press(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, press) if active else None
    try:
        yield pressed
    finally:
        if active:
            signal.signal(signal.SIGINT, before)
