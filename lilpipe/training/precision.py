"""Arithmetic of forward and backward passes.

Weights, their reductions over workers and the optimizer's state are float32 whatever is chosen here (Micikevicius et
al. 2018). ``fp8`` has the matrices of the blocks multiply in float8 with a scale for each tensor, by torchao.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError

FP8_CAPABILITY = (8, 9)
"""Least CUDA capability with float8: Ada; Hopper is 9.0."""


def check(config: ParallelSection, device: torch.device) -> None:
    """Raise ``ConfigError`` if the device or an installed package cannot do ``config.precision``."""
    if config.precision != "fp8":
        return
    if config.layout.replicate < config.num_workers:
        raise ConfigError("pretrain.precision: fp8 is for whole models on each worker; take bf16, or replicate alone")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(f"pretrain.precision: fp8 takes a GPU of Ada or Hopper, got {name}; take bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("pretrain.precision: fp8 takes torchao, which is not installed: pip install 'lilpipe[fp8]'")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Where a model runs in ``precision``: matrix products in bfloat16, sums and norms in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def convert_fp8(model: nn.Module) -> None:
    """Have the matrices of the blocks multiply in float8, in place; names and dtypes of parameters stay."""
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]

    def of_a_block(module: nn.Module, name: str) -> bool:
        matrix = isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
        return matrix and ".layers." in name

    convert_to_float8_training(model, module_filter_fn=of_a_block)
