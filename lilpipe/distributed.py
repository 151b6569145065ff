"""The process group under torchrun; a plain process is a group of one.

A stage that trains asks here for its rank and for the two collectives it needs, and does not know how it was
launched. Gloo on CPU, NCCL on CUDA.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported late (torch.optim does), this module takes the process group into its default arguments. The group then
# outlives `destroy_process_group`, and its threads race the interpreter's end: SIGABRT in one of six runs (torch 2.13).
import torch.distributed.nn
from torch import Tensor

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a peer; a worker that died is noticed by torchrun much earlier."""


def init() -> None:
    """Join the process group that torchrun's environment names; does nothing in a plain process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device())
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Position of this process in the group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place; every process gets the same bits."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_floats(values: list[float]) -> list[float]:
    """Sum a few numbers over all processes in float64."""
    if not dist.is_initialized():
        return values
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64, device=device())).tolist()


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()
