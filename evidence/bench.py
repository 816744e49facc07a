"""What a training step, a second thread and memory cost: docs/speed.md.

    python -m evidence.bench            a line a figure
    python -m evidence.bench --sizes    a table of the memory of training, computed
    python -m evidence.bench --quick    tiny sizes: whether it runs; no figure counts

Times are ratios: two things run in turn, A B A B ..., and the median of the ratios of neighbours
counts, so that a busy machine slows both alike. Memory is that of all tensors that autograd keeps.
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import io
import os
import platform
import statistics
import sys
import time
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch

import data
from evidence.records import Parser
from harness.command import exit_code, new_model
from harness.options import Config
from harness.steps import cut, gradient
from harness.texts import load_task
from model import GPT, GPTConfig, frozen_copy, pair_logps
from train import DPO, TVKD, Likelihood
from tvkd import dpo_loss

CPU, GIB = torch.device("cpu"), 2 ** 30
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --------------------------------------------------------------------------------------------------
# Times

def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(repeats, *functions):
    """Seconds of every function, called in turn: `repeats` lists, after one call to warm up."""
    return [[seconds(function) for function in functions] for _ in range(repeats + 1)][1:]


def ratio(repeats, first, second):
    """How many times as long the first function takes as the second."""
    return statistics.median(a / b for a, b in in_turn(repeats, first, second))


def with_threads(n, function):
    torch.set_num_threads(n)
    return function()


class Step:
    """A training step as train.fit takes it, always of the same batch: gradient, clip, AdamW."""

    def __init__(self, model, loss):
        self.model, self.loss = model.requires_grad_(True), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)

    def __call__(self):
        gradient(self.model, self.loss, list(range(len(self.loss.lengths))))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def random_pairs(n, length, vocab_size):
    """Pairs of rows of `length` tokens, the second half of every row the response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (n, 3, length // 2), generator=generator).tolist()
    return [data.Pair(*texts) for texts in ids]


def dpo_and_tvkd(pairs):
    """Both losses of the pairs; the log-probs of the reference and psi are any numbers."""
    ref_logps = torch.zeros(2, len(pairs))
    return DPO(pairs, ref_logps, 1.0), TVKD(pairs, ref_logps, 1.0, ref_logps + 1, 1.0)


@dataclass(frozen=True, eq=False)
class UncachedDPO(DPO):
    """DPO's loss as it is without a cache: the reference scores the batch in every step."""
    ref: GPT

    def losses(self, logps, ids):
        with torch.no_grad():
            ref_logps = pair_logps(self.ref, [self.pairs[i] for i in ids])
        return dpo_loss(*logps, *ref_logps, self.beta)


def of_steps(config, task, student, teacher, n, repeats):
    """What a step costs beside another on the same pairs, and what a second thread gains."""
    pairs = task.ids.train[:n]
    dpo, tvkd = dpo_and_tvkd(pairs)
    uncached = UncachedDPO(pairs, torch.zeros(2, n), 1.0, frozen_copy(student))
    steps = [Step(deepcopy(student), loss) for loss in (dpo, tvkd, uncached)]
    yield ("tvkd_over_dpo_step", ratio(3 * repeats, steps[1], steps[0]),
           "a TVKD step of the student over a DPO step")
    yield ("dpo_cached_over_uncached", ratio(repeats, steps[0], steps[2]), "a DPO step of the "
           "student with cached reference log-probs over one that computes them; 3/4 by the number "
           "of forward passes")
    if CORES > 1:
        sft = Likelihood([[row] for row in task.ids.sft[:n]])
        yield second_thread(((config.teacher_sft_steps, Step(deepcopy(teacher), sft)),
                             (config.teacher_dpo_steps, Step(deepcopy(teacher), dpo)),
                             (config.student_sft_steps, Step(deepcopy(student), sft)),
                             (config.steps, Step(deepcopy(student), tvkd))), repeats)


def second_thread(stages, repeats):
    """stages: (number of steps, Step) -> the figure of the quickstart's steps."""
    totals, gains = [0.0, 0.0], []
    for steps, step in stages:
        both = zip(*in_turn(repeats, *(partial(with_threads, k, step) for k in (1, 2))))
        times = [statistics.median(of_threads) for of_threads in both]
        totals = [total + steps * time for total, time in zip(totals, times)]
        gains.append(f"{times[0] / times[1]:.2f}")
    torch.set_num_threads(1)
    return ("second_thread_gain", totals[0] / totals[1], "seconds of the quickstart's steps on one "
            "thread over those on two: the teacher's fine-tuning and DPO, the student's "
            f"fine-tuning and TVKD {', '.join(gains)}")


# --------------------------------------------------------------------------------------------------
# Memory

def count(config):
    """Parameters of a model of this GPTConfig."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def saved_bytes(model, function):
    """Bytes that autograd keeps of function() for its backward, every storage once, no weights."""
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor                           # holds it, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(nbytes for address, nbytes in saved.items() if address not in weights)


def pairs_at_once(n, length):
    """How many of n pairs with rows of `length` tokens harness.steps lets a thread read at once."""
    [parts] = cut([[length, length]] * n, list(range(n)), 0, 1)
    return max(map(len, parts))


def training_bytes(config, pairs, length, scored, others=0):
    """Bytes that DPO, TVKD or SFT takes in float32: {"weights", "others", "activations", ...}.

    The sum of the values counts. config: GPTConfig of the trained model; pairs of rows of `length`
    tokens in memory at a time, a share `scored` of them response; others: parameters of the other
    models in memory. Left out: keys and values of sampling, and what libraries take for themselves.

    weights      24 a parameter: it, AdamW's two moments, the gradients of the step before, of the
                 parts of the batch so far and of the last part
    others       4 a parameter
    activations  4 (16 C + H + 4) a token and layer: input of ln_1 (C, mean and deviation 2) and
                 output (C); queries, keys, values (3 C); attention's output (C, a logsumexp for
                 each of H heads); input of ln_2 (C, 2) and output (C); c_fc's output (4 C); gelu's
                 (4 C). And 8 a token, its id. In the last layer those from ln_2 on, 10 C + 2, of
                 scored tokens alone
    head         4 (V + 2 C + 12) a scored token: logits (V); input of ln_f (C, 2) and output (C);
                 its place, action, log-prob
    spare        4 * 3 V a scored token of the chosen or the rejected rows: three copies of their
                 logits, while logsumexp goes backward
    """
    C, V, tokens = config.n_embd, config.vocab_size, 2 * pairs * length
    of_token = config.n_layer * (16 * C + config.n_head + 4) - (1 - scored) * (10 * C + 2) + 2
    return {"weights": 24 * count(config), "others": 4 * others,
            "activations": round(4 * tokens * of_token),
            "head": round(4 * tokens * scored * (V + 2 * C + 12)),
            "spare": round(4 * pairs * length * scored * 3 * V)}


def of_memory():
    """What is counted, on one thread."""
    errors = []
    for sizes in ((512, 64, 2, 4, 48), (512, 128, 4, 8, 128), (20000, 64, 2, 4, 64)):
        model = GPT(GPTConfig(*sizes))
        loss, _ = dpo_and_tvkd(random_pairs(6, sizes[1], sizes[0]))
        computed = training_bytes(model.config, 6, sizes[1], 0.5)
        saved = computed["activations"] + computed["head"]
        errors.append(abs(saved / saved_bytes(model, partial(loss, model, list(range(6)))) - 1))
    yield ("memory_formula_error", max(errors), "of training_bytes, from what autograd keeps of a "
           f"step: the largest of {len(errors)} models")


SMALL, MEDIUM = GPTConfig(50257, 1024, 12, 12, 768), GPTConfig(50257, 1024, 24, 16, 1024)


def sizes():
    """Lines of a table: computed memory of the teacher's DPO and of the last student's TVKD."""
    toy = Config()
    toys = [GPTConfig(toy.vocab_size, toy.block_size, *(
        getattr(toy, f"{who}_{size}") for size in ("layers", "heads", "width")))
        for who in ("student", "teacher")]
    yield "trained          parameters      of others  context  pairs at once    GiB"
    for name, models, batch in (("toy", toys, 64), ("GPT-2", (SMALL, MEDIUM), 8)):
        n, m = map(count, models)
        # train.py holds both models as they were built, the teacher and its reference and, by the
        # last student, the student's reference and the four students trained before.
        for who, config, others in (("teacher", models[1], 2 * m + n),
                                    ("student", models[0], 3 * m + 6 * n)):
            pairs = pairs_at_once(batch, config.block_size)
            nbytes = sum(training_bytes(config, pairs, config.block_size, 0.5, others).values())
            yield (f"{f'{name} {who}':15}{count(config):12,}{others:15,}{config.block_size:9}"
                   f"{pairs:15}{nbytes / GIB:7.2f}")


# --------------------------------------------------------------------------------------------------

def measured(options):
    """(key, value, what it is) of every figure, at the default sizes of the toy task."""
    torch.set_num_threads(1)
    config = Config(train_pairs=40, student_pairs=40) if options.quick else Config()
    with redirect_stdout(io.StringIO()):
        task = load_task(config, config.seed)
        student, teacher = (new_model(who, config, task, config.seed, CPU)
                            for who in ("student", "teacher"))
    repeats, n = (2, 6) if options.quick else (40, config.batch_size)
    yield from of_steps(config, task, student, teacher, n, repeats)
    yield from of_memory()


def command(argv):
    parser = Parser("python -m evidence.bench", __doc__)
    parser.add_argument("--sizes", action="store_true", help="the table of memory alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(argv)
    if options.sizes:
        print(*sizes(), sep="\n")
        return
    print(f"{CORES} cores, Python {platform.python_version()}, torch {torch.__version__}"
          + "; tiny sizes: no figure counts" * options.quick)
    for key, value, what in measured(options):
        print(f"{key:25}{value:9.3f}  {what}", flush=True)


def main(argv=None):
    return exit_code(command, argv, program="evidence")


if __name__ == "__main__":
    sys.exit(main())
