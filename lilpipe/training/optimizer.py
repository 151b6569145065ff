"""Optimizers by parameter: which are decayed, which are orthogonalised, and their state by name.

`adamw` (Loshchilov & Hutter 2019) updates everything. `muon` (Jordan et al. 2024) updates the matrices of the
blocks by their orthogonalised momentum and leaves embeddings, norms, routers and the output layer to AdamW.

Neither is a ``torch.optim.Optimizer``: the first of these that is made imports torch's compiler, which takes a second
of every stage and worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lilpipe.config.training import OptimizerConfig
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


class _Group(NamedTuple):
    """Parameters that one kernel updates together."""

    parameters: list[nn.Parameter]
    weight_decay: float


class AdamW:
    """AdamW of groups of parameters, by torch's kernels."""

    def __init__(self, groups: Sequence[_Group], config: OptimizerConfig) -> None:
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._groups, self._config = groups, config
        self._fused = self.parameters[0].device.type in FUSED_DEVICES

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Update the parameters that have gradients, at ``lr_scale`` times the peak learning rate."""
        config = self._config
        for group in self._groups:
            held = [parameter for parameter in group.parameters if parameter.grad is not None]
            states = [self.state.setdefault(parameter, {}) for parameter in held]
            for parameter, state in zip(held, states, strict=True):
                state.update({} if state else self.fresh_state(parameter))
            adamw(
                list(held),
                [parameter.grad for parameter in held if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=self._fused or None,
                amsgrad=False,
                maximize=False,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=ADAM_EPSILON,
                lr=config.learning_rate * lr_scale,
                weight_decay=group.weight_decay,
            )

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before the first step."""
        return {
            "step": torch.zeros((), device=parameter.device if self._fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


class Optimizer:
    """Muon and AdamW, or AdamW alone, with one schedule; their state is addressed by parameter name.

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
        self._rules: list[Muon | AdamW] = []
        if config.kind == "muon" and blocks:
            muon = Muon(
                blocks,
                learning_rate=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                replicas=replicas,
            )
            self._rules.append(muon)
            blocks = []
        groups = [
            *(_Group(group, config.weight_decay) for group in _by_mesh(blocks + matrices)),
            *(_Group(group, 0.0) for group in _by_mesh(rest)),
        ]
        if groups:
            self._rules.append(AdamW(groups, config))
        if not self._rules:
            raise ConfigError("the model has no trainable parameter")

    def step(self, lr_scale: float) -> None:
        """Update the parameters by their gradients, at ``lr_scale`` times the peak learning rates."""
        for rule in self._rules:
            rule.step(lr_scale)

    def init_state(self) -> None:
        """Give every parameter the state that it has before the first step, so that a checkpoint can be read into it.

        Without this, the first step makes it.
        """
        for rule in self._rules:
            for parameter in rule.parameters:
                if parameter not in rule.state:
                    rule.state[parameter] = rule.fresh_state(parameter)

    def state(self) -> dict[str, Tensor]:
        """State tensors as ``<parameter name>/<key>``, sharing memory with the optimizer's."""
        return {
            f"{self._names[parameter]}/{key}": value
            for rule in self._rules
            for parameter in rule.parameters
            for key, value in rule.state.get(parameter, {}).items()
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
