"""Optimizers: which parameters get weight decay, which get Muon, and the optimizer state by name.

`adamw` (Loshchilov & Hutter 2019) updates everything. `muon` (Jordan et al. 2024) updates the matrices of the blocks by
their orthogonalized momentum, and AdamW the embeddings, norms, routers and the output layer.

Each is a ``torch.optim.Optimizer`` with named parameters, compatible with torch's schedulers, hooks and profiler. The
first one in a process imports torch's compiler, which takes 0.6 s (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ConfigError
from lilpipe.training.muon import Muon

OUTPUT_LAYERS = ("lm_head.", "score.")
ROUTER = ".gate.weight"
FUSED_DEVICES = ("cpu", "cuda")
"""Devices with a fused AdamW; on others torch chooses (for-each if available)."""

NamedParameters = list[tuple[str, nn.Parameter]]


def split_parameters(parts: Sequence[nn.Module]) -> tuple[NamedParameters, NamedParameters, NamedParameters]:
    """Return trainable parameters as (matrices of the blocks, other matrices, the rest).

    The first two get weight decay. Embeddings belong to the rest, with norms and biases: rare tokens get no gradient
    for many steps. Routers are not orthogonalized, because their outputs are choices.
    """
    modules = [module for part in parts for module in part.modules()]
    embeddings = {id(p) for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks, matrices, rest = [], [], []
    for name, parameter in (named for part in parts for named in part.named_parameters()):
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            rest.append((name, parameter))
        elif parameter.ndim > 3 or name.startswith(OUTPUT_LAYERS) or name.endswith(ROUTER):
            matrices.append((name, parameter))
        else:
            blocks.append((name, parameter))
    return blocks, matrices, rest


def make_optimizers(
    parts: nn.Module | Sequence[nn.Module],
    config: OptimizerConfig,
    *,
    replicas: dist.ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW, or AdamW alone, with initial state.

    ``parts`` is the model, or the pipeline stages that this process holds; names are those of the whole model.
    Parameters may be DTensors. ``replicas``: see ``Muon``. Each group's ``initial_lr`` is its peak learning rate.
    Raises ``ConfigError`` if no parameter is trainable.
    """
    blocks, matrices, rest = split_parameters([parts] if isinstance(parts, nn.Module) else parts)
    optimizers: list[torch.optim.Optimizer] = []
    if config.kind == "muon" and blocks:
        rate, decay = config.muon_learning_rate, config.weight_decay
        optimizers.append(Muon(blocks, lr=rate, weight_decay=decay, replicas=replicas))
        blocks = []
    groups = [
        *({"params": group, "weight_decay": config.weight_decay} for group in _by_mesh(blocks + matrices)),
        *({"params": group, "weight_decay": 0.0} for group in _by_mesh(rest)),
    ]
    if groups:
        optimizers.append(_adamw(groups, config))
    if not optimizers:
        raise ConfigError("got a model without trainable parameters, expected at least one; check what is frozen")
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def take_step(optimizers: Sequence[torch.optim.Optimizer], lr_scale: float = 1.0) -> None:
    """Take an optimizer step at ``lr_scale`` times the peak learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
        optimizer.step()


def named_state(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return state tensors as ``<parameter name>/<key>``; they share memory with the optimizers."""
    return {
        f"{name}/{key}": value
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with the state that its first step would create, so that a checkpoint can be loaded into it."""
    fused = groups[0]["params"][0][1].device.type in FUSED_DEVICES
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused or None)
    for parameter in (parameter for group in adamw.param_groups for parameter in group["params"]):
        adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return adamw


def _by_mesh(parameters: NamedParameters) -> list[NamedParameters]:
    """Group parameters that one fused kernel can update: plain tensors, or DTensors of one mesh."""
    groups: dict[object, NamedParameters] = {}
    for name, parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append((name, parameter))
    return list(groups.values())
