"""Muon: momentum, orthogonalised by Newton-Schulz iterations (Jordan et al. 2024).

The same update as ``torch.optim.Muon`` with its default learning-rate adjustment. That one takes the matrices one by
one in bfloat16, which on a CPU without bfloat16 arithmetic is slower than the whole backward pass of a small model
(184 ms against 11 ms a step for 21 matrices of about 96 x 256, one core with AVX2). Here matrices of one shape go
together, in float32 on a CPU, and each worker orthogonalises its share of them.

Dimensions: M matrices of one shape, R rows, C columns, R <= C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lilpipe import distributed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; chosen for the steepest slope at zero, so singular values end in about 0.7 to 1.2, not at 1."""
NUM_ITERATIONS = 5
EPSILON = 1e-7


def orthogonalize(x_MRC: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values are moved towards 1. R <= C."""
    a, b, c = COEFFICIENTS
    x_MRC = x_MRC / x_MRC.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers.

    ``learning_rate`` follows Jordan et al.: the update is scaled by sqrt(max(1, rows / columns)), and 0.02 is the
    usual value. Decay is decoupled, ``learning_rate * weight_decay`` a step.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices by their gradients."""
        assert closure is None
        for group in self.param_groups:
            updates = _orthogonalize_all([self._nesterov(matrix, group["momentum"]) for matrix in group["params"]])
            for matrix, update in zip(group["params"], updates, strict=True):
                scale = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        """The gradient and the momentum that it has just entered, mixed."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return matrix.grad.lerp(state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum), momentum)


def _orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised; those of one shape in one call, each worker its share."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(index)
    sizes = [matrix.numel() for matrix in matrices]
    buffer = matrices[0].new_zeros(sum(sizes))
    results = [part.view_as(matrix) for part, matrix in zip(buffer.split(sizes), matrices, strict=True)]
    dtype = torch.bfloat16 if buffer.is_cuda else buffer.dtype
    for indices in by_shape.values():
        mine = indices[distributed.rank() :: distributed.world_size()]
        if mine:
            wide = orthogonalize(torch.stack([_wide(matrices[index]) for index in mine]).to(dtype))
            for index, result in zip(mine, wide, strict=True):
                _wide(results[index]).copy_(result)
    distributed.all_reduce_sum(buffer)  # the others' parts are zeros here, so this gathers without rounding
    return results


def _wide(matrix: Tensor) -> Tensor:
    """The matrix as a view with no more rows than columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
