"""Dropout of the inputs of low-rank adapters, with counter-based random numbers (``lilpipe.model.dropout``).

What is dropped depends on the seed, the step, the sequence, the position in it and the layer, so accumulation, packing,
recomputation and the parallel layout do not change it. The trainer passes a random number per token to the model as
``adapter_dropout_BT``. Hooks carry it to the adapters: each block gets it as an argument, so that activation
checkpointing recomputes with the same numbers, also when a pipeline has other micro-batches in flight.

Dimensions: B rows, T tokens, I inputs of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilpipe.config.lora import LoRAConfig
from lilpipe.model.dropout import dropout, dropout_seed, layer_numbers, token_numbers
from lilpipe.model.transformer import Transformer

_ARGUMENT = "adapter_dropout_BT"


def adapter_dropout(config: LoRAConfig | None, sequences_BT: Tensor | None, *seed: int) -> dict[str, Tensor]:
    """Return the additional argument of a model's forward pass in training; empty without adapters' dropout.

    ``sequences_BT`` is the index in the step's batch of each token's sequence, whose tokens are consecutive in a row.
    ``seed`` are the run's seed and the step.
    """
    if config is None or not config.lora_dropout:
        return {}
    assert sequences_BT is not None, "the objective must state TokenBatch.sequences"
    columns_T = torch.arange(sequences_BT.shape[1], device=sequences_BT.device)
    begins_BT = torch.ones_like(sequences_BT, dtype=torch.bool)
    begins_BT[:, 1:] = sequences_BT[:, 1:] != sequences_BT[:, :-1]
    positions_BT = columns_T - (columns_T * begins_BT).cummax(dim=1).values
    rows_B = torch.zeros_like(sequences_BT[:, 0])
    return {_ARGUMENT: token_numbers(dropout_seed(*seed), rows_B, sequences_BT, positions_BT)}


class Numbers:
    """The random numbers of the tokens in a block."""

    arriving_BT: Tensor | None = None
    """Of the current forward pass."""
    tokens_BT: Tensor | None = None
    """Of the current forward pass, or of the one that is recomputed."""


def salt_of(name: str) -> int:
    """Return a number that tells a layer, by its name in its block, from the others of the block."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def drop(x_BTI: Tensor, numbers: Numbers, rate: float, *, salt: int, first: int = 0) -> Tensor:
    """Apply dropout to the inputs of an adapter.

    ``salt`` is its layer's, ``first`` the index of the first of these inputs, if they are a shard.
    """
    assert numbers.tokens_BT is not None, f"pass {_ARGUMENT} to the model"
    return dropout(x_BTI, layer_numbers(numbers.tokens_BT ^ salt, 0)[0], rate, first=first)


def carry_numbers(model: Transformer) -> dict[str, Numbers]:
    """Let a model, or a pipeline stage of it, take random numbers; return where each block's adapters find them."""
    result = {layer: Numbers() for layer in model.model.layers}

    # Blocks differ in their numbers alone, a tensor, so that compiled blocks share their code.
    def take(_module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens_BT = inputs.pop(_ARGUMENT, None)
        for layer, numbers in result.items():
            numbers.arriving_BT = None if tokens_BT is None else layer_numbers(tokens_BT, int(layer))[0]
        return args, inputs

    model.register_forward_pre_hook(take, with_kwargs=True)
    for layer, block in model.model.layers.items():
        block.register_forward_pre_hook(partial(_give, result[layer]), with_kwargs=True)
        block.forward = partial(_forward, block.forward, result[layer])
    return result


def _give(numbers: Numbers, _module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**inputs, _ARGUMENT: numbers.arriving_BT}


def _forward(forward: Callable[..., Any], numbers: Numbers, *args: Any, adapter_dropout_BT: Tensor | None) -> Any:
    """Run a block whose adapters use these random numbers."""
    numbers.tokens_BT = adapter_dropout_BT
    return forward(*args)
