"""Optimizers by parameter: which are decayed, which are orthogonalised, and their state by name.

`adamw` (Loshchilov & Hutter 2019) updates everything. `muon` (Jordan et al. 2024) updates the matrices of the
blocks by their orthogonalised momentum and leaves embeddings, norms, routers and the output layer to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lilpipe.config import OptimizerConfig
from lilpipe.errors import ConfigError
from lilpipe.training.muon import Muon

ADAM_EPSILON = 1e-8
OUTPUT_LAYERS = ("lm_head.", "score.")
ROUTER = ".gate.weight"
FUSED_DEVICES = ("cpu", "cuda")
"""Where AdamW is one kernel; elsewhere torch chooses (for-each, where there is one)."""


def split_parameters(
    parts: Sequence[nn.Module],
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (matrices of the blocks, other matrices, the rest).

    The first two are decayed. Embeddings, which stay tied to rare tokens that get no gradient for long, belong to
    the rest, with norms and biases. Routers are no layers whose outputs should be orthogonal, but a choice.
    """
    modules = [module for part in parts for module in part.modules()]
    embeddings = {id(p) for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks, matrices, rest = [], [], []
    for name, parameter in _named_parameters(parts):
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            rest.append(parameter)
        elif parameter.ndim > 3 or name.startswith(OUTPUT_LAYERS) or name.endswith(ROUTER):
            matrices.append(parameter)
        else:
            blocks.append(parameter)
    return blocks, matrices, rest


class Optimizer:
    """One or two torch optimizers that share a schedule and whose state is addressed by parameter name.

    ``parts``: the model, or the stages of it that this process holds; names are those of the whole model. Parameters
    may be DTensors. ``replicas``: see ``Muon``.
    """

    def __init__(
        self,
        parts: nn.Module | Sequence[nn.Module],
        config: OptimizerConfig,
        *,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        parts = [parts] if isinstance(parts, nn.Module) else parts
        self._names = {parameter: name for name, parameter in _named_parameters(parts)}
        blocks, matrices, rest = split_parameters(parts)
        self._optimizers: list[torch.optim.Optimizer] = []
        if config.kind == "muon" and blocks:
            muon = Muon(
                blocks,
                learning_rate=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                replicas=replicas,
            )
            self._optimizers.append(muon)
            blocks = []
        groups = [
            *({"params": group, "weight_decay": config.weight_decay} for group in _by_mesh(blocks + matrices)),
            *({"params": group, "weight_decay": 0.0} for group in _by_mesh(rest)),
        ]
        if groups:
            self._optimizers.append(
                torch.optim.AdamW(
                    groups,
                    lr=config.learning_rate,
                    betas=(config.beta1, config.beta2),
                    eps=ADAM_EPSILON,
                    fused=groups[0]["params"][0].device.type in FUSED_DEVICES or None,
                )
            )
        if not self._optimizers:
            raise ConfigError("the model has no trainable parameter")
        self._groups = [(group, group["lr"]) for opt in self._optimizers for group in opt.param_groups]

    def step(self, lr_scale: float) -> None:
        """Update the parameters by their gradients, at ``lr_scale`` times the peak learning rates."""
        for group, peak in self._groups:
            group["lr"] = peak * lr_scale
        for optimizer in self._optimizers:
            optimizer.step()

    def init_state(self) -> None:
        """Give every parameter the state that it has before the first step, so that a checkpoint can be read into it.

        Without this, torch's optimizers make it in the first step.
        """
        for optimizer, parameter, _ in self._owned():
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = _fresh_state(optimizer, parameter)

    def state(self) -> dict[str, Tensor]:
        """State tensors as ``<parameter name>/<key>``, sharing memory with the optimizer's."""
        return {
            f"{name}/{key}": value
            for optimizer, parameter, name in self._owned()
            for key, value in optimizer.state[parameter].items()
        }

    def _owned(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield optimizer, parameter, self._names[parameter]


def _fresh_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer would make of nothing in its first step."""
    if isinstance(optimizer, Muon):
        return optimizer.fresh_state(parameter)
    return {
        "step": torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _named_parameters(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for part in parts:
        yield from part.named_parameters()


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one kernel can take together: plain tensors, or DTensors of one mesh."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())
