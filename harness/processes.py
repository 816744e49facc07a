"""Work shared out: among torchrun's processes, and of one batch among two threads."""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from data import UserError
from model import tokens_in


def rank_and_world():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    return rank_and_world()[0] == 0


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ      # RANK alone may be anybody's


def in_all(flag):
    """Whether the flag is set in every process. All of them get here before one goes on."""
    if rank_and_world()[1] == 1:
        return bool(flag)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    lowest = torch.tensor(float(flag), device=device)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return bool(lowest)


SECOND = ThreadPoolExecutor(1)          # its thread starts with the first task


def two_halves(loss, ids):
    """The indices of a batch -> two parts with about half of its tokens each, short rows first.

    Each part needs less padding than a half of the batch as it comes. loss: as train.py has it.
    """
    tokens = torch.tensor([tokens_in(loss.rows([i])) for i in ids.tolist()])    # (B,)
    order = tokens.argsort(stable=True)
    first = int((2 * tokens[order].cumsum(0) <= tokens.sum()).sum())
    return ids[order.to(ids.device)].tensor_split([first])


def two_at_once(f, items, device, *args):
    """[f(*args, item) for every item that is not empty]. On a CPU, two threads take half of them
    each.

    A second thread inside each of many small operations saves little time; one at other items
    does. torch.no_grad holds for one thread only: f has to say it itself.
    """
    items = [item for item in items if len(item)]
    threads, half = torch.get_num_threads(), (len(items) + 1) // 2
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return one_by_one(f, items, threads, *args)
    other = SECOND.submit(one_by_one, f, items[half:], threads // 2, *args)
    try:
        return one_by_one(f, items[:half], threads // 2, *args) + other.result()
    finally:
        wait([other])
        torch.set_num_threads(threads)


def one_by_one(f, items, threads, *args):
    torch.set_num_threads(threads)      # for this thread: each has a number of its own
    return [f(*args, item) for item in items]


@contextmanager
def joined_processes(device):
    """Join torchrun's processes, if there are any -> the device of this one. Only the first prints.

    With GPUs each process takes one of its own.
    """
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
