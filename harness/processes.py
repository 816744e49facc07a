"""Several processes under torchrun: who this one is, and what all of them agree on."""

import os
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from data import UserError


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


@contextmanager
def together(device):
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
    dist.destroy_process_group()        # not after an error: the others may never answer
