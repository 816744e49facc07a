"""How the gradient of a batch is computed: in parts, by two threads, among torchrun's processes.

None of it changes what is computed: the sums over all parts are those over the batch.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist

from harness.errors import UserError
from model import device_of

# --- the gradient ---------------------------------------------------------------------------------

TOKENS = 1500           # that a model reads at a time: more run no faster


def gradient(model, loss, ids, micro_batch=0):
    """Fill .grad with the gradient of the mean loss over the batch -> the sums of the loss over it.
    micro_batch: how many indices may be in memory at a time, 0: as fits best. We divide once by
    "n": parts are of unequal size, so a mean of means would be wrong."""
    rank, world = rank_and_world()
    share = ids[rank::world]
    weight = float(len(share) > 0)      # a process without data computes one index for nothing
    model.zero_grad()                   # its memory serves the new one
    shares = cut(loss.lengths, share or ids[:1], micro_batch, torch.get_num_threads())
    done = two_at_once(partial(add_up, model, loss, weight), shares, device_of(model))
    names, (values, *gradients) = done[0][0], [sum(x[1:], x[0]) for x in zip(*(x[1] for x in done))]
    if world > 1:
        values = values.to(device_of(model))
        for tensor in (values, *gradients):
            dist.all_reduce(tensor)
    total = dict(zip(names, values.tolist()))
    total["tokens"] = sum(sum(loss.lengths[i]) for i in ids)
    for parameter in model.parameters():
        parameter.grad = gradients.pop(0) / total["n"]
    return total


def add_up(model, loss, weight, parts):
    """Over some parts of a batch -> (names of the loss's sums, [their values, gradients...])."""
    added, parameters = None, list(model.parameters())
    for part in parts:
        sums = loss(model, part)
        # Not .backward(): two threads that add to one .grad in turn would round in varying order.
        gradients = torch.autograd.grad(sums["loss"] * weight, parameters)
        values = [torch.as_tensor(x, dtype=torch.float32, device=gradients[0].device).detach()
                  for x in sums.values()]
        new = [weight * torch.stack(values).cpu().double(), *gradients]
        added = new if added is None else [x + y for x, y in zip(added, new)]
    return list(sums), added


def cut(lengths, ids, micro_batch, threads):
    """A batch -> for each of at most two threads the parts it takes, lists of indices. lengths[i]:
    tokens of each row that index i reads. Sorted by length, the batch falls into two halves of
    about as many tokens, the short rows in one, and each into parts of like length."""
    order = sorted(ids, key=lambda i: sum(lengths[i]))
    tokens = list(accumulate(sum(lengths[i]) for i in order))
    first = sum(2 * so_far <= tokens[-1] for so_far in tokens)
    halves = [order[:first], order[first:]] if threads > 1 and micro_batch != 1 else [order]
    halves = [half for half in halves if half]
    most = micro_batch // len(halves) or len(ids)
    return [parts_of(half, lengths, most) for half in halves]


def parts_of(order, lengths, most):
    """Indices sorted by length -> parts of at most `most`. As few as keep what is read at a time
    within some TOKENS and the padding within an eighth, at most eight where `most` allows it."""
    tokens = sum(sum(lengths[i]) for i in order)
    at_a_time = tokens // len(lengths[order[0]])
    fewest = max(math.ceil(len(order) / most), min(8, 1 + at_a_time // TOKENS))
    for n in range(fewest, max(fewest, 8) + 1):
        size = min(most, math.ceil(len(order) / min(n, 8)))
        parts = [order[start:start + size] for start in range(0, len(order), size)]
        if tokens >= 0.875 * sum(padded(part, lengths) for part in parts):
            break
    return parts


def padded(part, lengths):
    """Tokens of a part with padding: its rows are read sorted by length, len(part) at a time."""
    rows, size = sorted(x for i in part for x in lengths[i]), len(part)
    return sum(len(rows[k:k + size]) * rows[k:k + size][-1] for k in range(0, len(rows), size))


# --- two threads ----------------------------------------------------------------------------------

SECOND = ThreadPoolExecutor(1)          # its thread starts with the first task


def two_at_once(f, items, device):
    """[f(item) for every item]. On a CPU, two threads take half of them each. A second thread
    inside each of many small operations saves little time; one at other items does."""
    threads, half, grad = torch.get_num_threads(), (len(items) + 1) // 2, torch.is_grad_enabled()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return [f(item) for item in items]
    other = SECOND.submit(one_by_one, f, items[half:], threads // 2, grad)
    try:
        return one_by_one(f, items[:half], threads // 2, grad) + other.result()
    finally:
        wait([other])
        torch.set_num_threads(threads)


def one_by_one(f, items, threads, grad):
    torch.set_num_threads(threads)      # this and torch.no_grad hold for one thread alone
    with torch.set_grad_enabled(grad):
        return [f(item) for item in items]


# --- several processes ----------------------------------------------------------------------------

def rank_and_world():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    return rank_and_world()[0] == 0


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ      # RANK alone may be anybody's


def in_all(flag):
    """Whether the flag is set in every process. All of them get here before one goes on."""
    if not dist.is_initialized():
        return bool(flag)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    lowest = torch.tensor(float(flag), device=device)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return bool(lowest)


@contextmanager
def joined_processes(device):
    """Join torchrun's processes, if there are any -> the device of this one. Only the first prints.
    With GPUs each process takes one of its own."""
    if not under_torchrun():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: expected at most the {torch.cuda.device_count()} "
                            "GPUs of this machine")
        torch.cuda.set_device(device)
    # A long timeout: the others wait while the first one evaluates.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, \
            nullcontext() if is_first() else redirect_stdout(nowhere):
        yield device
    in_all(True)                        # nobody leaves while another one is at work
    dist.destroy_process_group()        # not after an error: the others may never answer
