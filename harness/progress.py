"""What a stage of training reports while it runs: log, validation, checkpoints.

`fit` in train.py calls `begin` once and `after` in every step. None of it changes what is trained.
"""

import json
import math
import time

from harness.steps import is_first


class Progress:
    """Prints. With a Keep it also logs, and holds a checkpoint in the file `path`, under `key`."""

    def __init__(self, stage="", seed=0, keep=None, path=None, key=None):
        self.stage, self.seed, self.keep, self.path, self.key = stage, seed, keep, path, key
        self.lines, self.first_step, self.tokens, self.seconds = [], 1, 0, 0.0
        self.resumed = self.saved = time.perf_counter()

    def begin(self, model, optimizer, recipe, validate):
        """Before the first step -> how many steps an interrupted stage has behind it."""
        self.model, self.optimizer, self.recipe, self.validate = model, optimizer, recipe, validate
        state = self.keep and self.keep.find(self.path, self.key)
        if not state:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"  {self.stage}: resumed at step {state['step']}")
        self.write(*state["log"])
        self.first_step = state["step"] + 1
        return state["step"]

    def check_finite(self, step, total, norm):
        """Raise before the step is taken, so that no checkpoint contains what is not finite."""
        mean = total["loss"] / total["n"]
        if not math.isfinite(mean + norm):
            hint = f"a lower learning rate than {self.recipe.lr:g}" if step > 1 else \
                "another start: its weights, or the teacher's values, are not finite or too large"
            raise FloatingPointError(f"{self.stage}: loss {mean}, gradient norm {norm} at step "
                                     f"{step}; expected finite numbers, try {hint}")

    def write(self, *lines):
        self.lines += lines
        if self.keep:
            self.keep.log(*lines)

    def after(self, step, total):
        """One step is done. total: the sums of the loss over its batch, "n" and "tokens" too."""
        recipe, steps = self.recipe, self.recipe.steps
        self.tokens += total["tokens"]
        validate_now = (self.validate and is_first()                    # one process is enough
                        and (step == steps or step % recipe.eval_interval == 0))
        if validate_now or step in (1, steps) or step % recipe.log_interval == 0:
            self.seconds += time.perf_counter() - self.resumed      # training without validation
            metrics = {name: x / total["n"] for name, x in total.items()
                       if name not in ("n", "tokens")}
            metrics |= self.validate(self.model) if validate_now else {}
            self.write(json.dumps({"seed": self.seed, "stage": self.stage, "step": step,
                                   **metrics}))
            self.show(step, steps, metrics)
            self.resumed = time.perf_counter()
        due = self.keep and time.perf_counter() - self.saved >= self.keep.save_interval
        if due and step < steps:
            self.keep.put(self.path, self.key, {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "step": step, "log": self.lines})
            self.saved = time.perf_counter()

    def show(self, step, steps, metrics):
        numbers = "  ".join(f"{name} {x:.3f}" for name, x in metrics.items() if x is not None)
        done, rate = step - self.first_step + 1, self.tokens / self.seconds
        # The first steps are slow (memory, caches), so the time left is not known yet.
        left = f"  {self.seconds / done * (steps - step):.0f} s left" if done >= 5 else ""
        print(f"  {self.stage} {step}/{steps}  {numbers}  {rate:,.0f} tokens/s{left}", flush=True)
