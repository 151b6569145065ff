"""Data parallelism with replicas: every worker holds the whole model and trains on its rows of the batch.

Gradients are views of one flat buffer, so that all-reduce, norm and clipping are one call each. ``lilpipe.parallel`` is
the equivalent for sharded models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lilpipe import distributed
from lilpipe.metrics.bits_per_byte import nats
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import held_tensors

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch on one worker."""

    total: Tensor
    """Scalar with a gradient: the sum of the loss, not the mean."""
    count: float
    """Divisor of the loss after summing both over the whole step: tokens, pairs, ..."""
    num_tokens: int
    """Tokens processed by the model, for tokens/s."""
    metrics: Mapping[str, tuple[float | Tensor, float]] = field(default_factory=dict)
    """Further metrics as (sum, count), averaged like the loss; the same names on every worker."""


LossFunction = Callable[[nn.Module, int, int], Loss]
"""Maps (model, step from 0, micro-batch from 0) to the loss of this worker's rows; a pure function."""


class TrainerModule(Protocol):
    """A model in training, independent of the parallel layout."""

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that this worker holds: the model, or pipeline stages of it."""
        ...

    @property
    def replicas(self) -> ProcessGroup | None:
        """The workers that hold the same plain tensors; None means all workers."""
        ...

    def forward_backward(self, step: int) -> list[Loss]:
        """Accumulate gradients over this worker's micro-batches and return their losses."""
        ...

    def zero_grad(self) -> None:
        """Reset the gradients."""
        ...

    def sum_gradients(self) -> float:
        """Sum gradients over workers; return the global norm of the sum."""
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply gradients by ``factor``."""
        ...

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over workers, divide by ``count``, clip to ``max_norm``; return the norm before clipping."""
        ...

    def after_update(self) -> Mapping[str, float]:
        """Balance experts after an optimizer step, alike on all workers. Returns metrics."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return this worker's parameters and persistent buffers by their names in the whole model."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the whole model by name. Collective; only the first worker gets them."""
        ...


class Scorer(TrainerModule, Protocol):
    """A language model in training that scores tokens."""

    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        """Return the negative log-likelihood of all targets. Every worker gets all rows and returns the same number."""
        ...

    @property
    def data_ranks(self) -> tuple[int, int]:
        """Rank and number of data ranks."""
        ...

    def score(self, inputs_BT: Tensor, targets_BT: Tensor) -> Scores:
        """Return scores of targets. Workers of one data rank pass the same rows; all ranks pass equally many."""
        ...


class Replica:
    """Trainer module for a model that every worker holds whole."""

    def __init__(self, model: nn.Module, loss: LossFunction, *, accumulation_steps: Callable[[int], int]) -> None:
        self.model = model
        self.parts: list[nn.Module] = [model]
        self.replicas = None
        self._loss = loss
        self._accumulation_steps = accumulation_steps
        self._gradients = FlatGradients(model)

    def forward_backward(self, step: int) -> list[Loss]:
        """Accumulate gradients over this worker's micro-batches and return their losses."""
        losses = []
        for micro in range(self._accumulation_steps(step)):
            loss = self._loss(self.model, step, micro)
            loss.total.backward()
            losses.append(loss)
        return losses

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self._gradients.buffer.zero_()
        if isinstance(self.model, Transformer):
            self.model.model.expert_loads.clear()  # from a skipped step

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over workers, divide by ``count``, clip to ``max_norm``; return the norm before clipping."""
        return clip_sum(self, count=count, max_norm=max_norm)

    def sum_gradients(self) -> float:
        """Sum gradients over workers; return the norm of the sum."""
        distributed.all_reduce_sum(self._gradients.buffer)
        return torch.linalg.vector_norm(self._gradients.buffer).item()

    def scale_gradients(self, factor: float) -> None:
        """Multiply gradients by ``factor``."""
        self._gradients.buffer.mul_(factor)

    def after_update(self) -> Mapping[str, float]:
        """Balance the experts, if any; `expert_imbalance` is the maximum over layers."""
        if not isinstance(self.model, Transformer):
            return {}
        imbalances = self.model.balance_experts(distributed.all_reduce_sum)
        return {"expert_imbalance": max(imbalances.values())} if imbalances else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers by name."""
        return dict(held_tensors(self.model))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and persistent buffers by name."""
        yield from self.tensors().items()

    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        """Return the negative log-likelihood of all targets; the rows are divided among the workers."""
        mine, device = slice(distributed.rank(), None, distributed.world_size()), distributed.device()
        return distributed.sum_floats([nats(self.model, inputs_BT[mine].to(device), targets_BT[mine].to(device))])[0]

    @property
    def data_ranks(self) -> tuple[int, int]:
        """The worker's rank and the number of workers: each has its own rows."""
        return distributed.rank(), distributed.world_size()

    @torch.no_grad()
    def score(self, inputs_BT: Tensor, targets_BT: Tensor) -> Scores:
        """Return scores of targets."""
        device = distributed.device()
        return self.model(inputs_BT.to(device), targets_BT=targets_BT.to(device))


class FlatGradients:
    """The gradients of a model as views of one buffer [number of parameters]."""

    def __init__(self, model: nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, view in zip(parameters, self.buffer.split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)


def clip_sum(trainer_module: TrainerModule, *, count: float, max_norm: float) -> float:
    """Implement ``TrainerModule.reduce`` with ``sum_gradients`` and ``scale_gradients``."""
    norm = trainer_module.sum_gradients() / count
    trainer_module.scale_gradients(min(1.0, max_norm / (norm + CLIP_EPSILON)) / count)
    return norm
