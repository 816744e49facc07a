"""What a step, the teacher's values, sampling and the output head cost, each against the plain way of doing the same.

    python tests/bench.py                       a line a figure: ok or MISSED, its value, what it must reach, what it is
    python tests/bench.py --data=FILE.jsonl     padding on real preferences too
    python tests/bench.py --json                one JSON object: {key: {"value", "limit", "what"}}
    python tests/bench.py --sizes               a table of the memory that training takes, computed for larger models
    python tests/bench.py --quick               tiny sizes: whether it all runs; its times say nothing

A time is a ratio of two things done in turn, A B A B ..., the median of the ratios of neighbours, so that a busy machine slows
both alike. On one thread, unless OMP_NUM_THREADS says more: threads that wait for each other on a busy machine are not slowed
alike. Memory is counted, not timed: every call of torch's allocator (`peak_bytes`), every tensor that autograd keeps
(`kept_bytes`). A figure that is missed is marked; the exit status is 2 for an option that cannot work, else 0.
"""

import argparse
import copy
import io
import itertools
import json
import math
import os
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":                                      # read by torch when it is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")              # or its profiler writes to stderr at every use
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import measure
import train
from measure import batches, both_responses, cached_logps, cached_values, response_logps, tokens_in
from model import GPT, GPTConfig, frozen
from options import Config, parse_args

CPU = torch.device("cpu")
LIMITS = {"tvkd_over_dpo_step": "<= 1.02", "dpo_cached_over_uncached": "<= 0.75", "step_over_plain_lm": "<= 1.10",
          "precompute_over_forward": "<= 1.15", "generate_speedup": ">= 5", "head_memory_ratio": "<= 0.50",
          "memory_formula_error": "<= 0.10", "teacher_bytes_per_token": "= 4", "padding_waste": "<= 0.10"}      # others: a report


def holds(value, limit):
    sign, number = (limit or "").split() or ("", 0)
    return {"<=": value <= float(number), ">=": value >= float(number), "=": value == float(number), "": True}[sign]


# ---------------------------------------------------------------------------------------------------------------------------
# Times

def in_turn(repeats, *functions):
    """Seconds of each function, called in turn: a list of `repeats` lists, after one call of each to warm up."""
    found = []
    for _ in range(repeats + 1):
        found.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            found[-1].append(time.perf_counter() - start)
    return found[1:]


def ratio(repeats, first, second):
    """How many times as long the first function takes as the second."""
    return statistics.median(a / b for a, b in in_turn(repeats, first, second))


def exponent(repeats, sizes, functions):
    """Slope of log seconds over log size, by least squares: 1 where the time grows with the size, 0 where it does not."""
    seconds = [statistics.median(column) for column in zip(*in_turn(repeats, *functions))]
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in seconds]).slope


def training_step(model, loss_of, ids):
    """A function that takes one step as train.fit does: gradient, clipping, AdamW. ids: the batch, the same in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        train.gradient(model, model, loss_of, torch.tensor(list(ids)), 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def random_pairs(n, length, vocab_size):
    """Pairs of rows of `length` tokens, the second half of each the response."""
    ids = torch.randint(vocab_size, (n, 3, length // 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [data.Pair(*three) for three in ids]


def dpo(pairs, psi=None):
    return train.preference(pairs, torch.zeros(2, len(pairs)), 1.0, CPU, psi, 1.0)


def of_a_step(student, pairs, repeats):
    """What a training step costs beside another step on the same pairs."""
    rows = both_responses(pairs)
    ref, cached = frozen(student), dpo(pairs)

    def uncached(model, ids):
        with torch.no_grad():
            logps = response_logps(ref, rows, train.part_size(rows), CPU)
        return train.preference(pairs, logps.view(2, -1), 1.0, CPU)(model, ids)

    def plain_lm(model, ids):
        tokens, _ = data.collate(rows)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        return {"loss": loss, "n": 1, "tokens": tokens_in(rows)}

    def step(loss_of):
        return training_step(copy.deepcopy(student), loss_of, range(len(pairs)))
    tvkd = dpo(pairs, torch.randn(2, len(pairs)))
    yield "tvkd_over_dpo_step", ratio(3 * repeats, step(tvkd), step(cached)), "a TVKD step of the student over a DPO step"
    yield ("dpo_cached_over_uncached", ratio(repeats, step(cached), step(uncached)),
           "a DPO step of the student with kept reference log-probs over one that recomputes them; by count of forwards 3/4")
    yield ("step_over_plain_lm", ratio(repeats, step(cached), step(plain_lm)),
           "a DPO step of the student over a language-model step on the same rows, padded as one batch, every position scored")


def of_generate(model, B, n):
    """Sampling with keys and values kept over reading the whole prefix again for every token."""
    prompts = torch.randint(model.config.vocab_size, (B, 16), generator=torch.Generator().manual_seed(0))
    kept, read = [], []

    @torch.no_grad()
    def again():
        tokens = prompts
        for _ in range(n):
            last = torch.zeros(tokens.shape, dtype=torch.bool)
            last[:, -1] = True
            tokens = torch.cat([tokens, model(tokens, last).argmax(-1, keepdim=True)], 1)
        read[:] = tokens[:, 16:].tolist()

    def generate():
        kept[:] = model.generate(prompts.tolist(), n, eos=-1, temperature=0)            # no token has the id -1
    speedup = ratio(2, again, generate)
    assert kept == read, "expected the same tokens with and without keys and values kept"
    yield "generate_speedup", speedup, f"{n} tokens after {B} prompts, the prefix read again for each, over GPT.generate"


def of_values(teacher, teacher_ref, pairs, repeats, batch_size):
    """What the teacher's values cost, and what is kept of them."""
    rows, kept = both_responses(pairs), []
    known = [(tokens, F.pad(mask, (0, 1))) for _, tokens, mask in batches(rows, batch_size, CPU)]

    def values():
        kept[:] = cached_values("implicit", teacher, teacher_ref, rows, 1.0, batch_size, CPU)

    @torch.no_grad()
    def forward():
        for tokens, states in known:
            teacher(tokens, states), teacher_ref(tokens, states)
    seconds, nbytes = ratio(repeats, values, forward), sum(value.nbytes for value in kept)
    yield "precompute_over_forward", seconds, "the teacher's values over bare forwards of it and its reference"
    yield "teacher_bytes_per_token", nbytes / tokens_in(rows), "kept of the teacher for a token of a pair"


def of_matmuls(model, pairs, repeats):
    """FLOP/s of a step over what torch.matmul alone reaches on the step's own shapes."""
    step, shapes = training_step(model, dpo(pairs), range(len(pairs))), []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                shapes.append([x.shape for x in args[-2:]])
            return function(*args, **(kwargs or {}))
    step()
    with Shapes():
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    factors = [(torch.randn(a), torch.randn(b)) for a, b in shapes]
    flops = sum(2 * a.numel() * b.shape[-1] for a, b in factors)

    def matmuls():
        for a, b in factors:
            a @ b
    fraction = ratio(repeats, matmuls, step) * counter.get_total_flops() / flops
    yield ("matmul_fraction", fraction, "FLOP/s of a DPO step of the teacher, linear layers counted alone, over those of "
           "torch.matmul on the step's own shapes")


def of_growth(quick, repeats):
    """How a step grows with rows, pairs, vocabulary and model, and how precomputing and an epoch do with the pairs."""
    T, B, V, C = (16, 2, 300, 16) if quick else (64, 8, 512, 64)
    grown = (1, 2, 4, 8)

    def fitted(sizes, of):
        """The exponent of a DPO step in `sizes`; of: (B, T, V, width) of each."""
        steps = [training_step(GPT(GPTConfig(V, T, 2, 4, width)), dpo(random_pairs(B, T, V)), range(B)) for B, T, V, width in of]
        return exponent(repeats, sizes, steps)
    growing = {"T": ([T * k for k in grown], [(B, T * k, V, C) for k in grown], "tokens of a row"),
               "B": ([B * k for k in grown], [(B * k, T, V, C) for k in grown], "pairs"),
               "V": ([V * k ** 2 for k in grown], [(B, T, V * k ** 2, C) for k in grown], "the vocabulary"),
               "size": ([sum(p.numel() for p in GPT(GPTConfig(V, T, 2, 4, C * k)).parameters()) for k in grown],
                        [(B, T, V, C * k) for k in grown], "parameters")}
    for name, (sizes, of, what) in growing.items():
        yield f"exponent_{name}", fitted(sizes, of), f"seconds of a DPO step in {what}: {sizes[0]:,} to {sizes[-1]:,}"

    def whole(n):
        """Precomputing, then an epoch in batches of B, for n pairs."""
        pairs, student, teacher = random_pairs(n, T, V), GPT(GPTConfig(V, T, 2, 4, C)), GPT(GPTConfig(V, T, 3, 4, 2 * C))
        steps = [training_step(student, dpo(pairs), range(i, min(n, i + B))) for i in range(0, n, B)]

        def function():
            cached_values("implicit", teacher, teacher, both_responses(pairs), 1.0, B, CPU)
            cached_logps(student, both_responses(pairs), B, CPU)
            for step in steps:
                step()
        return function
    sizes = [2 * B * k for k in grown]
    yield ("exponent_pairs", exponent(repeats, sizes, [whole(n) for n in sizes]),
           f"seconds of precomputing and an epoch in pairs: {sizes[0]} to {sizes[-1]}")


# ---------------------------------------------------------------------------------------------------------------------------
# Memory

def peak_bytes(function):
    """Most bytes of tensors alive at a time in function(), above those before it. Every call of the allocator counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def kept_bytes(model, function):
    """Bytes that autograd keeps of function() for its backward, each storage once, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor                                                       # holds it, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(nbytes for address, nbytes in kept.items() if address not in weights)


def training_bytes(config, rows, length, scored, frozen=0, parts=train.PARTS):
    """Bytes that DPO, TVKD or SFT takes in float32, computed: {"weights", "frozen", "activations", "head", "spare"}, to be added.

    config: the GPTConfig of the trained model; `rows` rows of `length` tokens at a time, a share `scored` of them response;
    frozen: parameters of the other models in memory. Left out: sampling's keys and values, and what
    libraries and the allocator take for themselves.

    weights      16 a parameter: it, its gradient, AdamW's two moments
    frozen       4 a parameter
    activations  4 * (16 C + H + 4) a token and layer: input of ln_1 (C, its mean and deviation 2) and output (C); queries, keys,
                 values (3 C); attention's output (C, a logsumexp for each of H heads); input of ln_2 (C, 2) and output (C);
                 c_fc's output (4 C); gelu's (4 C). And 8 a token, its id
    head         4 * (V + 2 C + 12) a scored token: logits (V); input of ln_f (C, 2) and output (C); its place, action, log-prob
    spare        4 * 3 V a scored token of one part: three copies of its logits, while logsumexp goes backward
    """
    C, V, tokens = config.n_embd, config.vocab_size, rows * length
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(config).parameters())
    part = math.ceil(rows / parts) / rows                                   # the share of the rows that goes through at once
    return {"weights": 16 * n, "frozen": 4 * frozen, "head": round(4 * tokens * scored * (V + 2 * C + 12)),
            "activations": 4 * tokens * (config.n_layer * (16 * C + config.n_head + 4) + 2),
            "spare": round(4 * tokens * scored * part * 3 * V)}


def of_memory(quick):
    """The output head's memory, and the formula of `training_bytes` against what is kept and what is alive."""
    V, T, B, C = (5000, 32, 6, 8) if quick else (50257, 128, 6, 64)
    torch.manual_seed(0)
    model, loss_of = GPT(GPTConfig(V, T, 1, 4, C)), dpo(random_pairs(B, T, V))

    def everywhere(model, tokens, mask):
        """measure.score by log_softmax of every position."""
        logps = F.log_softmax(model(tokens), -1)[:, :-1].gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        return torch.where(mask, logps, 0.0)

    def peak(score, parts):
        model.zero_grad(set_to_none=True)
        with patch.object(measure, "score", score), patch.object(train, "PARTS", parts):
            return peak_bytes(lambda: train.gradient(model, model, loss_of, torch.arange(B), 0))
    own, same, whole = (peak(*way) for way in ((measure.score, train.PARTS), (everywhere, train.PARTS), (everywhere, 1)))
    yield ("head_memory_ratio", own / whole, "peak memory of a DPO gradient over that with log_softmax at every position of the "
           f"batch, rows half response, V = {V:,}; {own / same:.2f} over the latter in {train.PARTS} parts by length too")

    errors, peaks = [], []
    for config in (GPTConfig(512, 64, 2, 4, 48), GPTConfig(512, 128, 4, 8, 128), GPTConfig(20000, 64, 2, 4, 64)):
        model, loss_of = GPT(config), dpo(random_pairs(6, config.block_size, config.vocab_size))
        computed = training_bytes(config, 12, config.block_size, 0.5)
        kept = computed["activations"] + computed["head"]
        errors.append(abs(kept / kept_bytes(model, lambda: loss_of(model, list(range(6)))) - 1))
        alive = peak_bytes(lambda: train.gradient(model, model, loss_of, torch.arange(6), 0))
        peaks.append(abs((kept + computed["spare"]) / alive - 1))
    yield ("memory_formula_error", max(errors + peaks), f"of training_bytes: from what autograd keeps of a step {max(errors):.3f}"
           f", from its peak {max(peaks):.3f}, the largest of {len(errors)} models")


def sizes():
    """Lines of a table: computed memory of the teacher's DPO and of the last student's TVKD, for larger models too."""
    toy = Config()
    small, medium = GPTConfig(50257, 1024, 12, 12, 768), GPTConfig(50257, 1024, 24, 16, 1024)
    default = [GPTConfig(toy.vocab_size, toy.block_size, *(getattr(toy, f"{who}_{x}") for x in ("layers", "heads", "width")))
               for who in ("student", "teacher")]
    yield ("trained               parameters   others in memory   context   pairs at once   GiB   of which weights   others   "
           "activations   head")
    for name, (student, teacher), at_once in (("toy", default, [64]), ("GPT-2", (small, medium), [8, 4, 1])):
        with torch.device("meta"):
            n, m = (sum(p.numel() for p in GPT(config).parameters()) for config in (student, teacher))
        # By the last student train.py holds the teacher, the teacher's reference, the student's and the four trained before.
        for who, config, trained, others in (("teacher", teacher, m, m), ("student", student, n, 2 * m + 5 * n)):
            for pairs in at_once:
                found = {key: x / 2 ** 30 for key, x in training_bytes(config, 2 * pairs, config.block_size, 0.5, others).items()}
                head = found["head"] + found["spare"]
                yield (f"{name + ' ' + who:16}{trained:16,}{others:19,}{config.block_size:10}{pairs:16}{sum(found.values()):6.2f}"
                       f"{found['weights']:19.2f}{found['frozen']:9.2f}{found['activations']:14.2f}{head:7.2f}")


# ---------------------------------------------------------------------------------------------------------------------------

def of_padding(path):
    """Padding among the tokens that a model reads in an epoch of DPO at the default settings of --data."""
    config = parse_args([f"--data={path}"])
    with redirect_stdout(io.StringIO()):
        pairs = train.prepare(config, config.seed, CPU).ids.train

    def waste(parts):
        order, read, real = data.epochs(len(pairs), config.batch_size, torch.Generator().manual_seed(config.seed)), 0, 0
        for ids in itertools.islice(order, math.ceil(len(pairs) / config.batch_size)):
            rows = both_responses([pairs[i] for i in ids])
            read += sum(tokens.numel() for _, tokens, _ in batches(rows, math.ceil(len(rows) / parts), CPU))
            real += tokens_in(rows)
        return 1 - real / read
    yield ("padding_waste", waste(train.PARTS), f"share of padding in what a model reads in an epoch of DPO on {len(pairs)} "
           f"pairs, {config.batch_size} to a batch in {train.PARTS} parts; {waste(1):.2f} in one part")


def measured(quick, path):
    """(key, value, what it is) of every figure, at the default sizes of the toy task where nothing else is said."""
    config = Config(**(dict(train_pairs=40, student_pairs=40, val_pairs=1, test_pairs=1) if quick else {}))
    with redirect_stdout(io.StringIO()):
        setup = train.prepare(config, config.seed, CPU)
        student, teacher = (train.new_model(who, setup) for who in ("student", "teacher"))
    repeats, pairs = (1, setup.ids.train[:6]) if quick else (40, setup.ids.train[:config.batch_size])
    yield from of_a_step(student, pairs, repeats)
    yield from of_values(teacher, frozen(teacher), setup.ids.train[:4 * len(pairs)], math.ceil(repeats / 2), config.batch_size)
    yield from of_generate(GPT(replace(student.config, block_size=160)), *((2, 4) if quick else (32, 128)))
    yield from of_memory(quick)
    if path:
        yield from of_padding(path)
    yield from of_matmuls(teacher, pairs, math.ceil(repeats / 2))
    yield from of_growth(quick, math.ceil(repeats / 8))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE", help="JSONL file of preferences, to measure padding on")
    for name, what in (("json", "one JSON object"), ("quick", "tiny sizes"), ("sizes", "print the table of memory alone")):
        parser.add_argument(f"--{name}", action="store_true", help=what)
    args, found = parser.parse_args(argv), {}
    if args.sizes:
        print(*sizes(), sep="\n")
        return 0
    if not args.json:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}" + "; tiny sizes: no figure says anything" * args.quick)
    try:
        for key, value, what in measured(args.quick, args.data):
            limit = LIMITS.get(key)
            found[key] = {"value": value, "limit": limit, "what": what}
            if not args.json:
                mark = "" if limit is None or args.quick else "ok" if holds(value, limit) else "MISSED"
                print(f"{mark:8}{key:26}{value:8.3f}  {limit or '':8}  {what}", flush=True)
    except data.UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
    elif not args.data:
        print("        padding_waste             left out: it needs --data=FILE.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
