"""What a training step, the teacher's values, sampling and the output head cost.

    python -m evidence.bench                      a line a figure: ok or MISSED, value, limit
    python -m evidence.bench --data=FILE.jsonl    padding on real preferences as well
    python -m evidence.bench --pairs[=100000]     how reading, tokenising and training grow
    python -m evidence.bench --large[=cuda]       a GPT-2 small student, a GPT-2 medium teacher
    python -m evidence.bench --sizes              a table of the memory of training, computed
    python -m evidence.bench --json               {key: {"value", "limit", "what"}}, and where timed
                                                  twice "value_2_threads", "limit_2_threads"
    python -m evidence.bench --quick              tiny sizes: whether it runs; no figure counts

Most times are ratios: two things run in turn, A B A B ..., and the median of the ratios of
neighbours counts, so that a busy machine slows both alike. The first column is for one thread, the
second for two, if there are two cores. Memory is counted: every call of torch's allocator, every
tensor that autograd keeps. A missed limit is marked; the exit status is 2 for a user's mistake.
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import argparse
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "9")      # or torch's profiler writes to stderr
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import model as scoring
import train
from evidence.run import machine
from harness.evaluate import pair_logps
from harness.options import Config, parse_args
from harness.preferences import load_pairs
from harness.processes import two_halves
from harness.texts import load_task
from model import (GPT, GPTConfig, batches, both_responses, frozen_copy, response_logps,
                   rows_logps_with_grad, state_values, summed_psi)
from train import DPO, TVKD, Likelihood, OfPairs, part_size, tokens_in

ROOT, CPU, GIB = Path(__file__).resolve().parent.parent, torch.device("cpu"), 2 ** 30
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = (1, 2)[:CORES]
LIMITS = {"tvkd_over_dpo_step": "<= 1.02", "dpo_cached_over_uncached": "<= 0.765",
          "step_over_plain_lm": "<= 0.80", "second_thread_gain": ">= 1.5",
          "precompute_over_forward": "<= 1.15", "generate_speedup": ">= 5",
          "teacher_bytes_per_token": "= 4", "head_memory_ratio": "<= 0.50",
          "memory_formula_error": "<= 0.10", "padding_waste": "<= 0.10",
          "large_memory": "<= 1.05", "exponent_reading": "<= 1.10",
          "exponent_precomputing": "<= 1.10"}
ON_TWO_THREADS = LIMITS | {"step_over_plain_lm": "<= 0.90", "quickstart_seconds": "<= 60"}


def holds(value, limit):
    sign, number = limit.split()
    return {"<=": operator.le, ">=": operator.ge, "=": operator.eq}[sign](value, float(number))


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


def medians(repeats, *functions):
    return [statistics.median(times) for times in zip(*in_turn(repeats, *functions))]


def exponent(sizes, times):
    """Slope of log time over log size: 1 where time grows with the size, 0 where it does not."""
    return statistics.linear_regression(*([math.log(x) for x in xs] for xs in (sizes, times))).slope


def with_threads(n, function):
    torch.set_num_threads(n)
    return function()


class Step:
    """A training step as train.fit takes it, always of the same batch: gradient, clip, AdamW."""

    def __init__(self, model, loss, n, gradient=train.gradient):
        self.model, self.loss, self.gradient = model, loss, gradient
        self.ids = torch.arange(n, device=scoring.device_of(model))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient(self.model, self.model, self.loss, self.ids, 0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.ids.is_cuda:
            torch.cuda.synchronize()


def random_pairs(n, length, vocab_size):
    """Pairs of rows of `length` tokens, the second half of every row the response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (n, 3, length // 2), generator=generator).tolist()
    return [data.Pair(*texts) for texts in ids]


def dpo_and_tvkd(pairs):
    """Both losses of the pairs; the log-probs of the reference and psi are any numbers."""
    ref_logps = torch.zeros(2, len(pairs))
    return DPO(pairs, ref_logps, 1.0), TVKD(pairs, ref_logps, ref_logps + 1, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class UncachedDPO(OfPairs):
    """DPO's loss as it is without a cache: the reference scores the batch in every step."""
    ref: GPT

    def __call__(self, model, ids):
        rows = self.rows(ids.tolist())
        with torch.no_grad():
            ref_logps = rows_logps_with_grad(self.ref, rows, part_size(rows)).view(2, -1)
        of_batch = [self.pairs[i] for i in ids.tolist()]
        return DPO(of_batch, ref_logps, 1.0)(model, torch.arange(len(of_batch)))


def plain_lm(rows, model, ids):
    """A language model's loss: the rows padded as one batch, every position scored."""
    tokens, _ = data.collate(rows)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return {"loss": loss, "n": 1, "tokens": tokens_in(rows)}


def whole_gradient(model, network, loss, ids, micro_batch):
    """`train.gradient` of a loss that reads the whole batch at once."""
    loss(network, ids)["loss"].backward()


def of_a_step(student, pairs, repeats):
    """What a step costs beside another step on the same pairs."""
    losses = *dpo_and_tvkd(pairs), UncachedDPO(pairs, frozen_copy(student))
    dpo, tvkd, uncached = (Step(deepcopy(student), loss, len(pairs)) for loss in losses)
    plain = Step(deepcopy(student), partial(plain_lm, both_responses(pairs)), len(pairs),
                 whole_gradient)
    yield ("tvkd_over_dpo_step", ratio(3 * repeats, tvkd, dpo),
           "a TVKD step of the student over a DPO step")
    yield ("dpo_cached_over_uncached", ratio(repeats, dpo, uncached), "a DPO step of the student "
           "with cached reference log-probs over one that computes them; 3/4 by the number of "
           "forward passes")
    yield ("step_over_plain_lm", ratio(repeats, dpo, plain), "a DPO step of the student over a "
           "language-model step on the same rows, padded as one batch, every position scored")


def of_two_threads(config, student, teacher, ids, n, repeats):
    """What the second thread gains in the steps of the quickstart."""
    pairs, sft = ids.train[:n], Likelihood([[row] for row in ids.sft[:n]])
    dpo, tvkd = dpo_and_tvkd(pairs)
    plain = partial(plain_lm, both_responses(pairs))
    stages = (("teacher's fine-tuning", config.teacher_sft_steps, teacher, sft),
              ("teacher's DPO", config.teacher_dpo_steps, teacher, dpo),
              ("student's fine-tuning", config.student_sft_steps, student, sft),
              ("student's TVKD", config.steps, student, tvkd),
              ("not counted: a language-model step of the student", 0, student, plain,
               whole_gradient))
    totals, gains = [0.0, 0.0], []
    for name, steps, model, loss, *gradient in stages:
        step = Step(deepcopy(model), loss, n, *gradient)
        times = medians(repeats, *(partial(with_threads, k, step) for k in (1, 2)))
        totals = [total + steps * time for total, time in zip(totals, times)]
        gains.append(f"{name} {times[0] / times[1]:.2f}")
    yield ("second_thread_gain", totals[0] / totals[1], "seconds of the quickstart's steps on one "
           f"thread over those on two: {', '.join(gains)}")


def reread(model, prompts, n):
    """The n most likely tokens after every prompt; the whole prefix is read for each of them.

    As nanoGPT's generate does: every state goes through every block, only the last state through
    the head.
    """
    tokens, parts = prompts, model.transformer
    with torch.no_grad():
        for _ in range(n):
            x = parts.wte(tokens) + parts.wpe.weight[:tokens.shape[1]]          # (B, T, C)
            for block in parts.h:
                x = block(x)
            drawn = model.lm_head(parts.ln_f(x[:, -1])).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn], 1)
    return tokens[:, prompts.shape[1]:].tolist()


def of_generate(model, B, n):
    prompts = torch.randint(model.config.vocab_size, (B, 16))
    again = partial(reread, model, prompts, n)
    cached = partial(model.generate, prompts.tolist(), n, eos=-1, temperature=0)    # no id is -1
    assert again() == cached(), "expected the same tokens with and without the cache"
    yield ("generate_speedup", ratio(5, again, cached),
           f"{n} tokens after {B} prompts, the prefix read again for each, over GPT.generate")


@torch.no_grad()
def forward(models, inputs):
    for tokens, states in inputs:
        for model in models:
            model(tokens, states)


def of_values(teacher, teacher_ref, pairs, repeats, batch_size):
    rows = both_responses(pairs)
    inputs = [(tokens, F.pad(mask, (0, 1))) for _, tokens, mask in batches(rows, batch_size, CPU)]
    values = partial(state_values, "implicit", teacher, teacher_ref, rows, 1.0, batch_size)
    yield ("precompute_over_forward",
           ratio(repeats, values, partial(forward, (teacher, teacher_ref), inputs)),
           "the teacher's values over bare forward passes of it and its reference")


class MatmulShapes(TorchDispatchMode):
    """Notes the shapes of the two factors of every matrix product."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append([x.shape for x in args[-2:]])
        return function(*args, **(kwargs or {}))


def multiply(factors):
    for a, b in factors:
        a @ b


def of_matmuls(model, pairs, repeats):
    """FLOP/s of a step over what torch.matmul alone reaches on the same shapes."""
    step, products = Step(model, dpo_and_tvkd(pairs)[0], len(pairs)), MatmulShapes()
    products.shapes = []
    threads = torch.get_num_threads()
    with products, FlopCounterMode(display=False) as counter:       # they see this thread alone
        with_threads(1, step)
    torch.set_num_threads(threads)
    factors = [(torch.randn(a), torch.randn(b)) for a, b in products.shapes]
    share = counter.get_total_flops() / sum(2 * a.numel() * b.shape[-1] for a, b in factors)
    yield ("matmul_fraction", share * ratio(repeats, partial(multiply, factors), step),
           "FLOP/s of a DPO step of the teacher, linear layers counted alone, over those of "
           "torch.matmul on the same shapes")


TINY = ("--train_pairs=8 --student_pairs=4 --val_pairs=1 --test_pairs=2 --samples=1 "
        "--teacher_sft_steps=1 --teacher_dpo_steps=1 --student_sft_steps=1 --steps=1").split()


def of_quickstart(quick):
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", f"--out={out}", *(TINY if quick else ())]
        run = partial(subprocess.run, command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                      env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        yield "quickstart_seconds", seconds(run), f"`python train.py`, start to table; {machine()}"


def of_padding(path):
    """Padding in what a model reads in an epoch of DPO with the defaults of --data."""
    config = parse_args([f"--data={path}"], train.METHODS)
    with redirect_stdout(io.StringIO()):
        pairs = load_task(config, config.seed, load_pairs(path)).ids.train
    order = data.shuffled_batches(len(pairs), config.batch_size,
                                  torch.Generator().manual_seed(config.seed))
    epoch = list(itertools.islice(order, math.ceil(len(pairs) / config.batch_size)))
    halves = [half for ids in epoch for half in two_halves(OfPairs(pairs), ids) if len(half)]
    in_parts, whole = (padding(pairs, shares, size)
                       for shares, size in ((halves, part_size), (epoch, len)))
    yield ("padding_waste", in_parts, f"share of padding in what a model reads in an epoch of DPO "
           f"on {len(pairs)} pairs, {config.batch_size} to a batch; without parts {whole:.2f}")


def padding(pairs, shares, size):
    """Share of padding where `shares`, tensors of indices of pairs, are read size(rows) at once."""
    of_shares = [both_responses([pairs[i] for i in ids.tolist()]) for ids in shares]
    read = sum(tokens.numel() for rows in of_shares
               for _, tokens, _ in batches(rows, size(rows), CPU))
    return 1 - sum(map(tokens_in, of_shares)) / read


# --------------------------------------------------------------------------------------------------
# Memory

def count(config):
    """Parameters of a model of this GPTConfig."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def peak_bytes(function):
    """Most bytes of tensors alive at a time in function(), above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


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


def training_bytes(config, rows, length, scored, others=0):
    """Bytes that DPO, TVKD or SFT takes in float32: {"weights", "others", "activations", ...}.

    The sum of the values counts. config: GPTConfig of the trained model; rows of `length` tokens in
    memory at a time, a share `scored` of them response; others: parameters of the other models
    in memory. Left out: keys and values of sampling, and what libraries take for themselves.

    weights      16 a parameter: it, its gradient, AdamW's two moments
    others       4 a parameter
    activations  4 (16 C + H + 4) a token and layer: input of ln_1 (C, mean and deviation 2) and
                 output (C); queries, keys, values (3 C); attention's output (C, a logsumexp for
                 each of H heads); input of ln_2 (C, 2) and output (C); c_fc's output (4 C); gelu's
                 (4 C). And 8 a token, its id. In the last layer those from ln_2 on, 10 C + 2, of
                 scored tokens alone
    head         4 (V + 2 C + 12) a scored token: logits (V); input of ln_f (C, 2) and output (C);
                 its place, action, log-prob
    spare        4 * 3 V a scored token of a part (model.part_size): three copies of its logits,
                 while logsumexp goes backward. With two threads, of a part of each half
    """
    C, V, tokens = config.n_embd, config.vocab_size, rows * length
    part = part_size([data.Example([0] * length, [])] * rows)
    of_token = config.n_layer * (16 * C + config.n_head + 4) - (1 - scored) * (10 * C + 2) + 2
    return {"weights": 16 * count(config), "others": 4 * others,
            "activations": round(4 * tokens * of_token),
            "head": round(4 * tokens * scored * (V + 2 * C + 12)),
            "spare": round(4 * part * length * scored * 3 * V)}


def score_everywhere(model, tokens, mask):
    """model.score by log_softmax of every position."""
    logps = F.log_softmax(model(tokens)[:, :-1], -1)
    return torch.where(mask, logps.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1), 0.0)


def peak_of_gradient(model, loss, n, response_logps=response_logps, part_size=part_size):
    model.zero_grad(set_to_none=True)
    with patch.object(scoring, "response_logps", response_logps), \
            patch.object(train, "part_size", part_size):
        return peak_bytes(partial(train.gradient, model, model, loss, torch.arange(n), 0))


def of_memory(teacher, pairs, quick):
    """What is counted, on one thread."""
    rows = both_responses(pairs)
    values = state_values("implicit", teacher, teacher, rows, 1.0, len(rows))
    yield ("teacher_bytes_per_token", sum(value.nbytes for value in values) / tokens_in(rows),
           "stored of the teacher's values for a token of a pair")
    V, T, B, C = (5000, 128, 6, 8) if quick else (50257, 128, 6, 64)
    model, (loss, _) = GPT(GPTConfig(V, T, 1, 4, C)), dpo_and_tvkd(random_pairs(B, T, V))
    ours, parts, whole = (peak_of_gradient(model, loss, B, *changes)
                          for changes in ((), (score_everywhere,), (score_everywhere, len)))
    yield ("head_memory_ratio", ours / whole, "peak memory of a DPO gradient over that with "
           f"log_softmax at every position of the batch, rows half response, V = {V:,}; over the "
           f"same in parts {ours / parts:.2f}")
    errors, peaks = [], []
    for sizes in ((512, 64, 2, 4, 48), (512, 128, 4, 8, 128), (20000, 64, 2, 4, 64)):
        model, pairs = GPT(GPTConfig(*sizes)), random_pairs(6, sizes[1], sizes[0])
        loss, _ = dpo_and_tvkd(pairs)
        computed = training_bytes(model.config, 12, sizes[1], 0.5)
        saved = computed["activations"] + computed["head"]
        errors.append(abs(saved / saved_bytes(model, partial(loss, model, torch.arange(6))) - 1))
        peaks.append(abs((saved + computed["spare"]) / peak_of_gradient(model, loss, 6) - 1))
    yield ("memory_formula_error", max(errors + peaks), "of training_bytes: from what autograd "
           f"keeps of a step {max(errors):.3f}, from its peak {max(peaks):.3f}, the largest of "
           f"{len(errors)} models")


SMALL, MEDIUM = GPTConfig(50257, 1024, 12, 12, 768), GPTConfig(50257, 1024, 24, 16, 1024)


def sizes():
    """Lines of a table: computed memory of the teacher's DPO and of the last student's TVKD.

    Pairs at once: --micro_batch, or without it half a batch (on a CPU a whole one).
    """
    toy = Config()
    toys = [GPTConfig(toy.vocab_size, toy.block_size, *(
        getattr(toy, f"{who}_{size}") for size in ("layers", "heads", "width")))
        for who in ("student", "teacher")]
    yield "trained          parameters      of others  context  pairs at once    GiB"
    for name, models, at_once in (("toy", toys, [64]), ("GPT-2", (SMALL, MEDIUM), [8, 4, 1])):
        n, m = map(count, models)
        # train.py holds both models as they were built, the teacher and its reference and, by the
        # last student, the student's reference and the four students trained before.
        for who, config, others in (("teacher", models[1], 2 * m + n),
                                    ("student", models[0], 3 * m + 6 * n)):
            for pairs in at_once:
                nbytes = training_bytes(config, 2 * pairs, config.block_size, 0.5, others)
                yield (f"{f'{name} {who}':15}{count(config):12,}{others:15,}"
                       f"{config.block_size:9}{pairs:15}{sum(nbytes.values()) / GIB:7.2f}")


def resident_bytes(device=CPU):
    """The most memory that this process has had so far: resident, or of the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource                     # here, for there is none on Windows
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def of_large(device, quick):
    """A TVKD step of a GPT-2 small student under a GPT-2 medium teacher, random weights.

    Measured on a CPU only: nothing here has run on CUDA.
    """
    small, medium, T = ((GPTConfig(500, 32), GPTConfig(500, 32), 32) if quick
                        else (SMALL, MEDIUM, 256))
    before, pairs = resident_bytes(device), random_pairs(8, T, small.vocab_size)
    rows = both_responses(pairs)
    teacher, teacher_ref, ref = (GPT(config).to(device).requires_grad_(False)
                                 for config in (medium, medium, small))
    start = time.perf_counter()
    values = state_values("implicit", teacher, teacher_ref, rows, 1.0, 8)
    precomputing = time.perf_counter() - start
    psi = summed_psi(values, rows, 1.0, "value").view(2, -1).to(device)
    ref_logps = pair_logps(ref, pairs, 8)
    step = Step(deepcopy(ref).requires_grad_(True), TVKD(pairs, ref_logps, psi, 1.0, 1.0), 8)
    [[training]] = in_turn(1, step)
    peak = resident_bytes(device) - before
    others = 2 * count(medium) + count(small)
    computed = sum(training_bytes(small, len(rows), T, 0.5, others).values())
    where = f"8 pairs, rows of {T} tokens, on {device}, {torch.get_num_threads()} threads"
    yield "large_step", training, f"seconds of a TVKD step of a GPT-2 small student; {where}"
    yield "large_values", precomputing, f"seconds of the values of a GPT-2 medium teacher; {where}"
    yield ("large_memory", peak / computed, f"peak of both over the formula: {peak / GIB:.2f} GiB, "
           f"computed {computed / GIB:.2f}; {where}")


def run_of_pairs(n):
    """n pairs of random words -> seconds to read and tokenise, to precompute, of a step; GiB."""
    rng, words = random.Random(0), sorted(data.ALL_FACTS)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder, "pairs.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(n):
                texts = (" ".join(rng.choices(words, k=rng.randint(10, 80))) for _ in range(3))
                print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))), file=file)
        config, start = parse_args([f"--data={path}"], train.METHODS), time.perf_counter()
        task = load_task(config, 0, load_pairs(path))
        reading = time.perf_counter() - start
    model = GPT(GPTConfig(task.tokenizer.n_vocab, config.block_size, 1, 1, 8))
    pairs, start = task.ids.train, time.perf_counter()
    rows = both_responses(pairs)
    values = state_values("implicit", model, model, rows, 1.0, 64)
    psi = summed_psi(values, rows, 1.0, "value").view(2, -1)
    ref_logps = pair_logps(model, pairs, 64)
    precomputing = time.perf_counter() - start
    step = Step(model, TVKD(pairs, ref_logps, psi, 1.0, 1.0), config.batch_size)
    return reading, precomputing, *medians(5, step), resident_bytes() / GIB


def of_pairs(most):
    """Reading, precomputing and a step for an eighth of the pairs, a quarter, half and all."""
    sizes = [most // 8, most // 4, most // 2, most]
    rows, spawn = [], multiprocessing.get_context("spawn")
    for n in sizes:                             # in a process for each, or the peak would be shared
        with ProcessPoolExecutor(1, spawn) as pool:
            rows.append(pool.submit(run_of_pairs, n).result())
    names = {"reading": "seconds to read and tokenise", "precomputing": "seconds of psi and of the "
             "reference's log-probs", "step": "seconds of a TVKD step", "peak": "GiB resident"}
    for (name, what), column in zip(names.items(), zip(*rows)):
        yield (f"exponent_{name}", exponent(sizes, column), f"{what}, {sizes[0]:,} to {most:,} "
               f"pairs: {', '.join(f'{x:.3g}' for x in column)}")


# --------------------------------------------------------------------------------------------------

def in_columns(threads, figures, *args):
    """(key, values, what it is) of every figure; a value for each number of threads."""
    for column in zip(*[with_threads(n, partial(list, figures(*args))) for n in threads]):
        yield column[0][0], [value for _, value, _ in column], column[0][2]


def measured(args):
    """(key, values, what it is) of every figure, at the default sizes of the toy task."""
    if args.pairs:
        yield from in_columns(THREADS[-1:], of_pairs, args.pairs)
    if args.large:
        yield from in_columns(THREADS[-1:], of_large, torch.device(args.large), args.quick)
    if args.pairs or args.large:
        return
    config = Config(train_pairs=40, student_pairs=40) if args.quick else Config()
    with redirect_stdout(io.StringIO()):
        _, ids, tokenizer = load_task(config, config.seed)
        student, teacher = (train.new_model(who, config, tokenizer.n_vocab, config.seed, CPU)
                            for who in ("student", "teacher"))
    repeats, n, B, tokens = (2, 6, 2, 4) if args.quick else (40, config.batch_size, 32, 128)
    pairs, longer = ids.train[:n], GPT(GPTConfig(tokenizer.n_vocab, 160, 2, 4, 48))
    yield from in_columns(THREADS, of_a_step, student, pairs, repeats)
    if CORES > 1:
        yield from in_columns([2], of_two_threads, config, student, teacher, ids, n, repeats // 2)
    yield from in_columns(THREADS, of_values, teacher, frozen_copy(teacher), ids.train[:4 * n],
                          repeats // 2, config.batch_size)
    yield from in_columns(THREADS, of_generate, longer, B, tokens)
    yield from in_columns(THREADS, of_matmuls, teacher, pairs, repeats // 2)
    yield from in_columns([1], of_memory, teacher, pairs, args.quick)
    if args.data:
        yield from in_columns([1], of_padding, args.data)
    yield from in_columns(THREADS, of_quickstart, args.quick)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE", help="preferences to measure padding on")
    parser.add_argument("--pairs", type=int, nargs="?", const=100_000, metavar="N",
                        help="the growth alone, up to N pairs")
    parser.add_argument("--large", nargs="?", const="cpu", choices=("cpu", "cuda"),
                        help="the large models alone; nobody has measured them on cuda yet")
    for name, what in (("json", "one JSON object"), ("quick", "tiny sizes"),
                       ("sizes", "the table of memory alone")):
        parser.add_argument(f"--{name}", action="store_true", help=what)
    args, figures = parser.parse_args(argv), {}
    if args.pairs is not None and args.pairs < 2000:
        parser.error(f"--pairs: expected at least 2000, got {args.pairs}")
    if args.large == "cuda" and not torch.cuda.is_available():
        parser.error("--large: expected a device of this machine, got cuda")
    if args.sizes:
        print(*sizes(), sep="\n")
        return 0
    if not args.json:
        print(f"{machine()}, Python {platform.python_version()}, torch {torch.__version__}"
              + "; tiny sizes: no figure counts" * args.quick)
    try:
        for key, values, what in measured(args):
            limits = [LIMITS.get(key), ON_TWO_THREADS.get(key)][:len(values)]
            figures[key] = {"value": values[0], "limit": limits[0], "what": what}
            if len(values) == 2:
                figures[key] |= {"value_2_threads": values[1], "limit_2_threads": limits[1]}
            if not args.json:
                missed = any(limit and not holds(x, limit) for x, limit in zip(values, limits))
                mark = "MISSED" if missed else "ok" if any(limits) else ""
                columns = "".join(f"{x:9.3f} {limit or '':8}" for x, limit in zip(values, limits))
                print(f"{'' if args.quick else mark:7}{key:25}{columns:36}  {what}", flush=True)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(figures, indent=1))
    elif "memory_formula_error" in figures and not args.data:
        print("       padding_waste            left out: it needs --data=FILE.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
