"""Hand-written gradients for operations where autograd needs more passes over memory on a CPU.

Used for eager training on a CPU only: compilers and GPU kernels fuse these operations themselves. Results
are bitwise equal to those of the plain operations.

Dimensions: N rows, D width, E size of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def by_hand(x: Tensor) -> bool:
    """Return whether the hand-written gradient is faster for ``x``."""
    return type(x) is Tensor and x.requires_grad and x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide ``x [..., D]`` by its root mean square and multiply by ``weight_D`` (Zhang & Sennrich 2019)."""
    if by_hand(x) and x.dtype == weight_D.dtype != torch.bfloat16:  # torch computes it in float32
        return _RMSNorm.apply(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return torch.mul(x, inverse).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, weight_D, inverse = ctx.saved_tensors
        width = len(weight_D)
        x_ND, grad_ND, inverse_N = x.reshape(-1, width), grad.reshape(-1, width), inverse.reshape(-1)
        product_ND = grad_ND * x_ND
        weight_grad_D = product_ND.t().mv(inverse_N)
        slope_N = product_ND.mv(weight_D).mul_(inverse_N.square()).div_(-width)
        x_grad_ND = torch.mul(grad_ND, weight_D, out=product_ND)
        x_grad_ND.addcmul_(x_ND, slope_N[:, None]).mul_(inverse_N[:, None])
        return x_grad_ND.view_as(x), weight_grad_D, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x * cos + swap(x) * sin``, where ``swap`` exchanges the halves of ``x [..., E]``."""
    if by_hand(x):
        return _Rotation.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


class _Rotation(torch.autograd.Function):
    """RoPE; its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
