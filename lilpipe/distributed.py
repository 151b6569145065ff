"""The process group under torchrun, srun or Kubernetes; a plain process is a group of one.

A stage that trains asks here for its rank and for the two collectives it needs, and does not know how it was
launched. Gloo on CPU, NCCL on CUDA. Here it also says how far it has come (``heartbeat``), and asks whether it has
been told to end (``stop_requested``).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

# Imported late (torch.optim does), this module takes the process group into its default arguments. The group then
# outlives `destroy_process_group`, and its threads race the interpreter's end: SIGABRT in one of six runs (torch 2.13).
import torch.distributed.nn
from torch import Tensor

from lilpipe.errors import HungCollective
from lilpipe.errors import Preempted as Preempted
from lilpipe.heartbeat import Heartbeat, describe_hang

TIMEOUT_SECONDS = 600
"""How long a collective waits for a peer, by default; a worker that died is noticed much earlier."""
FLIGHT_RECORDER_ENTRIES = 2_000
"""Collectives that NCCL's flight recorder keeps of each rank."""

_TIMED_OUT = re.compile(r"timed out (waiting|after)|wait timeout", re.IGNORECASE)  # gloo; torch's store

_heartbeat: Heartbeat | None = None
_stop = threading.Event()


def init(*, timeout_seconds: float = TIMEOUT_SECONDS, folder: Path | None = None) -> None:
    """Join the process group that the environment names; does nothing in a plain process.

    With a ``folder``, which all workers share, each writes there how far it has come, and NCCL its flight recorder
    when a collective times out.
    """
    global _heartbeat
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if folder is not None:
        interval_seconds = min(5.0, timeout_seconds / 10)
        _heartbeat = Heartbeat(folder, int(os.environ["RANK"]), interval_seconds=interval_seconds)
    timeout = timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        _record_flight(folder)
        torch.cuda.set_device(device())
        dist.init_process_group("nccl", timeout=timeout, device_id=device())
    else:
        dist.init_process_group("gloo", timeout=timeout)


def _record_flight(folder: Path | None) -> None:
    """Let NCCL keep its last collectives, and write them down when one times out, before it aborts the process."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(FLIGHT_RECORDER_ENTRIES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if folder is not None:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_trace_rank_"))


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def heartbeat(step: int, phase: str = "step") -> None:
    """Note that this worker has come to this phase of this step. Costs a microsecond; call it freely."""
    if _heartbeat is not None:
        _heartbeat.beat(step, phase)


def hang(error: BaseException, folder: Path, *, timeout_seconds: float) -> HungCollective | None:
    """The error that names who is missing, if ``error`` says that a wait for others has timed out."""
    if isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
        return HungCollective(describe_hang(folder, timeout_seconds=timeout_seconds))
    return None


@contextlib.contextmanager
def honours_stop() -> Iterator[None]:
    """Inside, SIGTERM only sets ``stop_requested``: the caller saves at the next chance and raises ``Preempted``.

    SIGTERM comes from a pre-emption, from Slurm or Kubernetes before they kill (30 s later by default), from a
    cancelled task, and when another worker has died; outside of this context it ends the process at once.
    """
    previous = signal.signal(signal.SIGTERM, _request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop.clear()


def _request_stop(_signum: int, _frame: FrameType | None) -> None:
    _stop.set()


def stop_requested() -> bool:
    """Whether this worker has been told to end. Workers are told at different times: agree before you act on it."""
    return _stop.is_set()


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
