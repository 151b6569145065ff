"""LoRA: low-rank adapters for frozen weights (Hu et al. 2021).

A layer of weight W adds ``alpha / rank * B A x`` to ``W x``. W keeps its name, so a checkpoint holds the model's and
the adapters' tensors. B starts as zeros, so the model is unchanged at first. Export merges the adapters into the
weights tensor by tensor, because the whole model may not fit on one worker, and also writes them in ``peft``'s format.

Dimensions: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lilpipe.artifact import write_atomically
from lilpipe.config.sft import LoRAConfig
from lilpipe.errors import ConfigError
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Linear
from lilpipe.model.state_dict_adapters import adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import NamedTensors

ADAPTABLE = ("llama", "qwen3")
"""Model types whose linear layers have the same names here and in ``peft``."""


class LoRALinear(Linear):
    """Linear layer with a LoRA adapter."""

    def __init__(self, base: Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_zeros(config.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Map ``[..., I]`` to ``[..., O]``."""
        return super().forward(input) + self.change(input, self.lora_A, self.lora_B)

    def change(self, x: Tensor, lora_A_RI: Tensor, lora_B_OR: Tensor) -> Tensor:
        """Return the adapter's output, ``[..., O]``. The matrices may be shards (tensor parallelism)."""
        x = F.dropout(x, self.dropout, training=self.training) if self.dropout else x
        return self.scale * F.linear(F.linear(x, lora_A_RI), lora_B_OR)


def add_adapters(model: Transformer, config: LoRAConfig, *, seed: int) -> None:
    """Freeze the model, or a pipeline stage of it, and add adapters to its linear layers, in place.

    Adapters get their ``initial_value``. Raises ``ConfigError`` for a model whose layers have other names in ``peft``.
    """
    if (kind := adapter_for(model.config).model_type) not in ADAPTABLE:
        raise ConfigError(
            f"sft.lora: got a model of type {kind!r}, expected one of {', '.join(ADAPTABLE)}; remove sft.lora "
            "to train all weights"
        )
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        parent, _, kind = name.rpartition(".")
        if kind in config.target_modules and isinstance(layer, Linear):
            adapted = LoRALinear(layer, config)
            adapted.train(layer.training)
            matrix_RI = adapted.lora_A.detach()
            matrix_RI.copy_(initial_value(f"{name}.lora_A", matrix_RI.shape, seed=seed, config=model.config))
            setattr(model.get_submodule(parent), kind, adapted)


def merge(tensors: NamedTensors, config: LoRAConfig, adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Merge the adapters into the weights of a stream of tensors that is grouped by layer.

    A weight becomes ``W + alpha / rank * B A``, computed in float64. The adapters' tensors are put into ``adapters``.
    """
    for layer, members in groupby(tensors, key=lambda item: item[0].rpartition(".")[0]):
        found = dict(members)
        matrices = {name: found.pop(name) for name in (f"{layer}.lora_A", f"{layer}.lora_B") if name in found}
        if matrices:
            adapters |= matrices
            first_RI, second_OR = matrices.values()
            weight_OI = found[f"{layer}.weight"]
            change_OI = config.alpha / config.rank * (second_OR.double() @ first_RI.double())
            found[f"{layer}.weight"] = (weight_OI.double() + change_OI).to(weight_OI.dtype)
        yield from found.items()


def save_adapters(adapters: Mapping[str, Tensor], config: LoRAConfig, directory: Path) -> None:
    """Write the adapters in ``peft``'s format: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.weight": tensor.cpu().contiguous() for name, tensor in adapters.items()}
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
