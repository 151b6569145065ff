"""Peak FLOP/s and memory of accelerators, and model FLOPs utilization (MFU).

Peaks are the vendors' figures for dense matrices (half the figure where a data sheet gives it with sparsity). A CPU's
peak depends on clock and threads, so it is measured with a matrix product.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from lilpipe.distributed import use_onednn
from lilpipe.errors import ConfigError

Arithmetic = Literal["fp32", "tf32", "bf16", "fp8"]
"""`fp32` is torch's default on a GPU, without tensor cores; `tf32` is used when it is allowed."""

TERA = 1e12
GIBI = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process's share of a CPU host."""

    name: str
    peaks: Mapping[str, float]
    """Arithmetic to floating-point operations per second; unsupported arithmetic is absent."""
    memory_bytes: int
    source: str
    """Source of the peaks."""

    def peak(self, arithmetic: Arithmetic) -> float:
        """Return operations per second. Raises ``ConfigError`` if the device does not support this arithmetic."""
        if arithmetic not in self.peaks:
            raise ConfigError(
                f"precision {arithmetic!r}: {self.name} supports only {', '.join(self.peaks)}; choose one of these"
            )
        return self.peaks[arithmetic]


def _gpu(name: str, gibibytes: int, source: str, **teraflops: float) -> Device:
    return Device(name, {kind: value * TERA for kind, value in teraflops.items()}, gibibytes * GIBI, source)


_HOPPER = "NVIDIA H100 data sheet, 2023"
_GPUS = (
    _gpu("h100", 80, _HOPPER, fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9),
    _gpu("h100-pcie", 80, _HOPPER, fp32=51, tf32=378, bf16=756.5, fp8=1513),
    _gpu("h100-nvl", 94, "NVIDIA H100 NVL product brief, 2024", fp32=60, tf32=417.5, bf16=835.5, fp8=1670.5),
    _gpu("h200", 141, "NVIDIA H200 data sheet, 2024", fp32=67, tf32=494.7, bf16=989.4, fp8=1978.9),
    _gpu("h200-nvl", 141, "NVIDIA H200 data sheet, 2024", fp32=60, tf32=417.5, bf16=835.5, fp8=1670.5),
    _gpu("b200", 180, "NVIDIA Blackwell architecture brief, 2024 (HGX)", fp32=80, tf32=1100, bf16=2250, fp8=4500),
    _gpu("a100", 80, "NVIDIA A100 data sheet, 2021", fp32=19.5, tf32=156, bf16=312),
    _gpu("a100-40gb", 40, "NVIDIA A100 data sheet, 2021", fp32=19.5, tf32=156, bf16=312),
    _gpu("a10", 24, "NVIDIA A10 data sheet, 2021", fp32=31.2, tf32=62.5, bf16=125),
    _gpu("l40s", 48, "NVIDIA L40S data sheet, 2023", fp32=91.6, tf32=183, bf16=362.05, fp8=733),
    _gpu("l4", 24, "NVIDIA L4 data sheet, 2023", fp32=30.3, tf32=60, bf16=121, fp8=242.5),
    _gpu("rtx-4090", 24, "NVIDIA Ada architecture paper, 2022", fp32=82.6, tf32=82.6, bf16=165.2, fp8=330.3),
    _gpu("rtx-3090", 24, "NVIDIA GA102 architecture paper, 2020", fp32=35.6, tf32=35.6, bf16=71),
    _gpu("mi300x", 192, "AMD Instinct MI300X data sheet, 2023", fp32=163.4, tf32=653.7, bf16=1307.4, fp8=2614.9),
)
GPUS: dict[str, Device] = {device.name: device for device in _GPUS}

_BY_WORDS = {
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100": "h100",
    "H200 NVL": "h200-nvl",
    "H200": "h200",
    "B200": "b200",
    "A100 40GB": "a100-40gb",
    "A100": "a100",
    "A10": "a10",
    "L40S": "l40s",
    "L4": "l4",
    "RTX 4090": "rtx-4090",
    "RTX 3090": "rtx-3090",
    "MI300X": "mi300x",
}
"""Words in torch's name of a GPU, to its key in ``GPUS``. The first entry whose words all occur is used."""


def get_device(name: str) -> Device:
    """Return the GPU of that name; `cpu` is one process with one thread on this host. Raises ``ConfigError``."""
    if name == "cpu":
        return this_cpu()
    if name not in GPUS:
        close = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: cpu, {', '.join(GPUS)}"
        raise ConfigError(f"budget.device: unknown device {name!r}; {hint}")
    return GPUS[name]


def device_at_hand(*, num_threads: int = 1, num_processes: int = 1) -> Device:
    """Return this host's GPU; without one, the CPU share of one of ``num_processes`` with ``num_threads`` each.

    Raises ``ConfigError`` for a GPU of unknown peak.
    """
    if not torch.cuda.is_available():
        return this_cpu(num_threads=num_threads, num_processes=num_processes)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = set(re.split(r"[\s-]+", properties.name))
    for words, name in _BY_WORDS.items():
        if found.issuperset(words.split()) and not found & {"Laptop", "MIG"}:
            known = GPUS[name]
            return Device(name, known.peaks, properties.total_memory, known.source)
    raise ConfigError(f"budget.device: unknown peak of {properties.name!r}; set the most similar of {', '.join(GPUS)}")


def this_cpu(*, num_threads: int = 1, num_processes: int = 1) -> Device:
    """Return the CPU share of one of ``num_processes``: its part of the memory, and its measured peak."""
    use_onednn()
    peaks = {"fp32": measure_peak(torch.float32, num_threads=num_threads)}
    peaks["bf16"] = measure_peak(torch.bfloat16, num_threads=num_threads)
    source = f"measured: matrix products on {num_threads} thread{'s' if num_threads > 1 else ''}"
    return Device("cpu", peaks, psutil.virtual_memory().total // num_processes, source)


def measure_peak(dtype: torch.dtype = torch.float32, *, num_threads: int = 1, seconds: float = 0.2) -> float:
    """Measure FLOP/s of 1024 x 1024 matrix products: 2 x 1024^3 over the fastest time.

    Takes about ``seconds``. It is an upper bound: a training step with small matrices stays well below it.
    """
    size, before = 1024, torch.get_num_threads()
    torch.set_num_threads(min(num_threads, len(os.sched_getaffinity(0))))
    try:
        left_NN, right_NN = torch.ones(2, size, size, dtype=dtype)
        until, fastest = time.perf_counter() + seconds, float("inf")
        while time.perf_counter() < until or fastest == float("inf"):
            started = time.perf_counter()
            torch.mm(left_NN, right_NN)
            fastest = min(fastest, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / fastest


def mfu(tokens_per_second: float, *, flops_per_token: float, num_devices: int, peak: float) -> float:
    """Return model FLOPs utilization: tokens/s x FLOPs per token over the peak of all devices (PaLM, appendix B).

    ``flops_per_token`` is ``training_flops_per_token`` without recomputation; ``peak`` is that of one device.
    """
    return tokens_per_second * flops_per_token / (num_devices * peak)
