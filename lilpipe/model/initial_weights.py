"""Initial weights as a function of the seed and the parameter's name.

So they do not depend on the order of modules or on which process holds which shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.seeds import derive_seed

INIT_STD = 0.02
"""Standard deviation of initial weights (Radford et al. 2019, GPT-2; Hugging Face's default for Llama)."""
_WRITES_RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


def initial_value(name: str, shape: Sequence[int], *, seed: int, config: ModelConfig) -> Tensor:
    """Return the initial value of a parameter or saved buffer: the whole tensor, float32, on the CPU.

    Biases are 0 and norm weights 1, or 0 if the norm adds 1. Matrices, also stacked ones, are normal with ``INIT_STD``;
    output projections to the residual stream are divided by sqrt(2 * num_layers) (Radford et al. 2019). LoRA's A is
    uniform in +- 1 / sqrt(inputs), as in ``peft``, and B is 0.
    """
    layer, _, kind = name.rpartition(".")
    if kind == "lora_A":
        generator, bound = torch.Generator().manual_seed(derive_seed(seed, "lora", layer)), 1 / math.sqrt(shape[1])
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    if kind == "lora_B":
        return torch.zeros(*shape)
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.zeros(*shape) if config.norm == "rms_plus_one" else torch.ones(*shape)
    std = INIT_STD / math.sqrt(2 * config.num_layers) if name.endswith(_WRITES_RESIDUAL) else INIT_STD
    digest = hashlib.sha256(f"init_weights:{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(*shape, generator=generator) * std
