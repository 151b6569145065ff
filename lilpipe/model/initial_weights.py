"""What every weight is before training: a function of the seed and of its name.

So a weight does not depend on the order of modules, nor on which process holds it or a part of it.
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
"""Standard deviation of fresh weights (Radford et al. 2019, GPT-2; Hugging Face's default for Llama)."""
_WRITES_RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


def initial_value(name: str, shape: Sequence[int], *, seed: int, config: ModelConfig) -> Tensor:
    """The whole tensor of that name, float32 on the CPU, for a parameter or a buffer that is saved.

    Biases are zeros and norms ones. Matrices, stacked ones too, are normal with ``INIT_STD``; those that write to the
    residual stream are divided by sqrt(2 x num_layers), the number of summands there (Radford et al. 2019). Of an
    adapter (``lora``) A is uniform within +- 1 / sqrt(inputs), as ``peft`` has it, and B zeros.
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
        return torch.ones(*shape)
    std = INIT_STD / math.sqrt(2 * config.num_layers) if name.endswith(_WRITES_RESIDUAL) else INIT_STD
    digest = hashlib.sha256(f"init_weights:{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(*shape, generator=generator) * std
