"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021).

A layer of weight W adds ``alpha / rank * B A x`` to ``W x``. It keeps W under its own name, so that a checkpoint's
tensors are the model's and the adapters'. B starts as zeros: the model is what it was. Before it is exported the
adapters are added to the weights. They are also written in ``peft``'s format.

Dimensions: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lilpipe.artifact import write_atomically
from lilpipe.config import LoRAConfig
from lilpipe.errors import ConfigError
from lilpipe.model.layers import Linear
from lilpipe.model.layouts import layout_for
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed

ADAPTABLE = ("llama", "qwen3")
"""Model types whose linear layers have the same names here and in ``peft``."""


class LoRALinear(Linear):
    """A linear layer with an adapter."""

    def __init__(self, base: Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_zeros(config.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """``[..., I]`` to ``[..., O]``."""
        x = F.dropout(input, self.dropout, training=self.training) if self.dropout else input
        return super().forward(input) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        """``W + alpha / rank * B A``, ``[O, I]``, summed in float64."""
        change = self.lora_B.double() @ self.lora_A.double()
        return (self.weight.double() + self.scale * change).to(self.weight.dtype)


def add_adapters(model: Transformer, config: LoRAConfig, *, seed: int) -> None:
    """Freeze the model and give its linear layers adapters, in place.

    A is uniform within +- 1 / sqrt(I), as ``peft`` has it, drawn for each layer from the seed. Raises ``ConfigError``
    for a model whose layers ``peft`` calls otherwise.
    """
    if (kind := layout_for(model.config).model_type) not in ADAPTABLE:
        raise ConfigError(
            f"sft.lora: got a model of type {kind!r}, expected one of {', '.join(ADAPTABLE)}; leave sft.lora out, "
            "which trains all weights"
        )
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in config.target_modules and isinstance(layer, Linear):
            adapted = LoRALinear(layer, config)
            adapted.train(layer.training)
            generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
            bound = 1 / math.sqrt(layer.in_features)
            with torch.no_grad():
                adapted.lora_A.copy_(torch.empty(adapted.lora_A.shape).uniform_(-bound, bound, generator=generator))
            setattr(model.get_submodule(parent), kind, adapted)


@torch.no_grad()
def merge_adapters(model: Transformer) -> None:
    """Add the adapters to the weights and take them away, in place."""
    for name, layer in list(adapted_layers(model)):
        parent, _, kind = name.rpartition(".")
        plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(layer.merged_weight()), layer.bias
        setattr(model.get_submodule(parent), kind, plain)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every layer with an adapter, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            yield name, layer


def save_adapters(model: Transformer, config: LoRAConfig, directory: Path) -> None:
    """Write the adapters as ``peft`` reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.{part}.weight": tensor.detach().cpu().contiguous()
        for name, layer in adapted_layers(model)
        for part, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_atomically(directory / "adapter_config.json", json.dumps(stated, indent=2, sort_keys=True) + "\n")
