"""Optimizers by parameter: which are decayed, which are orthogonalised, and their state by name.

`adamw` (Loshchilov & Hutter 2019) updates everything. `muon` (Jordan et al. 2024) updates the matrices of the
blocks by their orthogonalised momentum and leaves embeddings, norms and the output layer to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lilpipe.config import OptimizerConfig
from lilpipe.errors import ConfigError
from lilpipe.training.muon import Muon

ADAM_EPSILON = 1e-8
OUTPUT_LAYER = "lm_head."


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (matrices of the blocks, other matrices, the rest).

    The first two are decayed. Embeddings, which stay tied to rare tokens that get no gradient for long, belong to
    the rest, with norms and biases.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            rest.append(parameter)
        elif parameter.ndim > 2 or name.startswith(OUTPUT_LAYER):
            matrices.append(parameter)
        else:
            blocks.append(parameter)
    return blocks, matrices, rest


class Optimizer:
    """One or two torch optimizers that share a schedule and whose state is addressed by parameter name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        blocks, matrices, rest = split_parameters(model)
        self._optimizers: list[torch.optim.Optimizer] = []
        if config.kind == "muon" and blocks:
            self._optimizers.append(
                Muon(blocks, learning_rate=config.muon_learning_rate, weight_decay=config.weight_decay)
            )
            blocks = []
        groups = [
            {"params": blocks + matrices, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if groups:
            betas = (config.beta1, config.beta2)
            adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=ADAM_EPSILON, fused=True)
            self._optimizers.append(adamw)
        if not self._optimizers:
            raise ConfigError("the model has no trainable parameter")
        self._groups = [(group, group["lr"]) for opt in self._optimizers for group in opt.param_groups]

    def step(self, lr_scale: float) -> None:
        """Update the parameters by their gradients, at ``lr_scale`` times the peak learning rates."""
        for group, peak in self._groups:
            group["lr"] = peak * lr_scale
        for optimizer in self._optimizers:
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """State tensors as ``<parameter name>/<key>``, sharing memory with the optimizer's."""
        return {
            f"{name}/{key}": value
            for optimizer, parameter, name in self._owned()
            for key, value in optimizer.state[parameter].items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state that ``state`` gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            by_name.setdefault(name, {})[key] = tensor
        for optimizer, parameter, name in self._owned():
            state = by_name.get(name, {})
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}

    def _owned(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield optimizer, parameter, self._names[parameter]
