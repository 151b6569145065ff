"""Process group under torchrun, srun or Kubernetes; a plain process is a group of one.

A training stage gets its rank and collectives here, independent of the launcher. Gloo on CPU, NCCL on CUDA. It also
reports its position here (``heartbeat``) and asks whether it should stop (``stop_requested``).
"""

from __future__ import annotations

import contextlib
import functools
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

# Imported after `init_process_group` (torch.optim does), this module keeps the group in its default arguments. The
# group then outlives `destroy_process_group`, and its threads race with interpreter exit: SIGABRT in one of six runs
# (torch 2.13).
import torch.distributed.nn
from torch import Tensor

from lilpipe.errors import HungCollective
from lilpipe.errors import Preempted as Preempted
from lilpipe.heartbeat import Heartbeat, describe_hang

TIMEOUT_SECONDS = 600
"""Default timeout of a collective; a worker that died is detected much earlier."""
FLIGHT_RECORDER_ENTRIES = 2_000
"""Number of collectives per rank in NCCL's flight recorder."""

_TIMED_OUT = re.compile(r"timed out (waiting|after)|wait timeout", re.IGNORECASE)  # gloo; torch's store

_heartbeat: Heartbeat | None = None
_stop = threading.Event()


def init(*, timeout_seconds: float = TIMEOUT_SECONDS, folder: Path | None = None) -> None:
    """Join the process group given by the environment variables, if any, and choose the fastest matrix products.

    ``folder``, shared by all workers, receives the heartbeat of each worker, and NCCL's flight recorder when a
    collective times out.
    """
    global _heartbeat
    use_onednn()
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
    """Enable NCCL's flight recorder, which is dumped when a collective times out, before NCCL aborts the process."""
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
    """Record that this worker reached a phase of a step. Takes about a microsecond."""
    if _heartbeat is not None:
        _heartbeat.beat(step, phase)


def hang(error: BaseException, folder: Path, *, timeout_seconds: float) -> HungCollective | None:
    """Return the error that names the missing workers, if ``error`` is a timeout of a collective, else None."""
    if isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
        return HungCollective(describe_hang(folder, timeout_seconds=timeout_seconds))
    return None


@contextlib.contextmanager
def honours_stop() -> Iterator[None]:
    """Within this context SIGTERM only sets ``stop_requested``: the caller saves a checkpoint and raises ``Preempted``.

    SIGTERM is sent on preemption, by Slurm or Kubernetes before they kill (30 s earlier by default), by a cancelled
    task, and when another worker has died. Outside this context it ends the process at once.
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
    """Return whether this worker received SIGTERM. Workers receive it at different times: agree on it before acting."""
    return _stop.is_set()


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process writes the files (rank 0)."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def use_onednn() -> bool:
    """Let oneDNN multiply float32 matrices on a CPU, if it does so in float32; return whether it does.

    PyTorch multiplies by MKL, whose float32 kernels use half of an AMD processor's vector units (AVX2): oneDNN's take
    half the time there. The setting that selects oneDNN ("medium") allows bfloat16, which only processors with AMX then
    use; one product, compared with float64, tells. With a GPU, nothing is changed.
    """
    if torch.cuda.is_available():
        return False
    with _probing:
        is_float32 = _onednn_is_float32()
    if is_float32:
        torch.set_float32_matmul_precision("medium")
    return is_float32


_probing = threading.Lock()
"""The setting is global: of two threads that try it at once, the second would restore what the first had set."""


@functools.cache
def _onednn_is_float32() -> bool:
    generator = torch.Generator().manual_seed(0)
    left_NN, right_NN = torch.randn(2, 256, 256, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        exact_NN = left_NN.double() @ right_NN.double()
        return bool(((left_NN @ right_NN) - exact_NN).abs().max() < 1e-5 * exact_NN.abs().max())
    finally:
        torch.set_float32_matmul_precision(before)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place; the result is bitwise equal on all of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_floats(values: list[float]) -> list[float]:
    """Sum a few numbers over all processes in float64."""
    if not dist.is_initialized():
        return values
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64, device=device())).tolist()


def barrier() -> None:
    """Wait until all processes reach this point."""
    if dist.is_initialized():
        dist.barrier()
