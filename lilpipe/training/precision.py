"""Precision of forward and backward passes.

Weights, gradient reductions and optimizer state are always float32 (Micikevicius et al. 2018). ``fp8`` computes the
blocks' matrix products in float8 with one scale per tensor, with torchao.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError

FP8_CAPABILITY = (8, 9)
"""Minimum CUDA capability for float8: Ada; Hopper is 9.0."""


def check(config: ParallelSection, device: torch.device) -> None:
    """Raise ``ConfigError`` if the device or the installed packages do not support ``config.precision``."""
    if config.precision != "fp8":
        return
    if config.layout.replicate < config.num_workers:
        raise ConfigError(
            "pretrain.precision: fp8 supports data parallelism by replicas only; use bf16, or only parallel.replicate"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(f"pretrain.precision: fp8 requires an Ada or Hopper GPU, got {name}; use bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "pretrain.precision: fp8 requires torchao, which is not installed; pip install 'lilpipe[fp8]'"
        )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return an autocast context: matrix products in bfloat16, sums and norms in float32; disabled for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def convert_fp8(model: nn.Module) -> None:
    """Convert the blocks' linear layers to float8 in place; names and dtypes of parameters stay."""
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]

    def of_a_block(module: nn.Module, name: str) -> bool:
        matrix = isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
        return matrix and ".layers." in name

    convert_to_float8_training(model, module_filter_fn=of_a_block)
