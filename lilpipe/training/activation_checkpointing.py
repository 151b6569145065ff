"""Activation checkpointing: the backward pass recomputes activations instead of storing them (Chen et al. 2016).

``full`` stores only the inputs of blocks. ``selective`` stores what is expensive to recompute, the results of matrix
products and of attention, and recomputes the rest (Korthikanti et al. 2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lilpipe.model import grouped  # noqa: F401 (registers lilpipe::grouped_linear)
from lilpipe.model.transformer import Transformer

Mode = Literal["none", "selective", "full"]

_aten = torch.ops.aten
DEAR = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        torch.ops.lilpipe.grouped_linear.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Operations whose results ``selective`` stores."""


def apply(model: Transformer, mode: Mode) -> None:
    """Apply activation checkpointing to the blocks of ``model``, in place; names of parameters stay.

    Losses and gradients are bitwise the same: dropout is a function of token and layer, not of a random state.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.model.layers.values():
        block.forward = partial(checkpoint, block.forward, **options)


def _policy(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE
