"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021).

A layer of weight W adds ``alpha / rank * B A x`` to ``W x``. It keeps W under its own name, so that a checkpoint's
tensors are the model's and the adapters'. B starts as zeros: the model is what it was. Before it is exported the
adapters are added to the weights, tensor by tensor, since no worker may hold the whole. They are also written in
``peft``'s format.

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
    """A linear layer with an adapter."""

    def __init__(self, base: Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_zeros(config.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """``[..., I]`` to ``[..., O]``."""
        return super().forward(input) + self.change(input, self.lora_A, self.lora_B)

    def change(self, x: Tensor, lora_A_RI: Tensor, lora_B_OR: Tensor) -> Tensor:
        """What the adapter adds, ``[..., O]``; the matrices may be a worker's parts of its own."""
        x = F.dropout(x, self.dropout, training=self.training) if self.dropout else x
        return self.scale * F.linear(F.linear(x, lora_A_RI), lora_B_OR)


def add_adapters(model: Transformer, config: LoRAConfig, *, seed: int) -> None:
    """Freeze the model, or a pipeline stage of it, and give its linear layers adapters, in place.

    They get their ``initial_value``. Raises ``ConfigError`` for a model whose layers ``peft`` calls otherwise.
    """
    if (kind := adapter_for(model.config).model_type) not in ADAPTABLE:
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
            matrix_RI = adapted.lora_A.detach()
            matrix_RI.copy_(initial_value(f"{name}.lora_A", matrix_RI.shape, seed=seed, config=model.config))
            setattr(model.get_submodule(parent), kind, adapted)


def merge(tensors: NamedTensors, config: LoRAConfig, adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapted model, those of a layer one after the other, to the tensors of a plain one.

    A weight becomes ``W + alpha / rank * B A``, summed in float64. What is left out is put into ``adapters``.
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
    """Write the adapters as ``peft`` reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""
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
