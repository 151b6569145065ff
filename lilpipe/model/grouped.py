"""Grouped matrix products: each group of rows has its own matrix.

A custom operator for autograd and the compiler, because the group sizes are known only at run time.

Dimensions: N rows, E groups, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_ND: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """Return ``x @ weight[e].T`` for the rows of each group e, ``[N, O]``.

    Group e is rows ``ends_E[e - 1]`` (0 for the first) to ``ends_E[e]``, exclusive; the last end is N.
    """
    return _linear(x_ND, weight_EOD, ends_E)


@torch.library.custom_op("lilpipe::grouped_linear", mutates_args=())
def _linear(x_ND: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    if x_ND.dtype != torch.float64:
        return F.grouped_mm(x_ND, weight_EOD.transpose(1, 2), offs=ends_E.int())
    groups = x_ND.tensor_split(ends_E[:-1].cpu())
    return torch.cat([rows @ weight_OD.T for rows, weight_OD in zip(groups, weight_EOD, strict=True)])


@torch.library.custom_op("lilpipe::grouped_linear_backward", mutates_args=())
def _linear_backward(grad_NO: Tensor, x_ND: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    grad_NO = grad_NO.contiguous()
    if x_ND.dtype != torch.float64:
        offsets = ends_E.int()
        return F.grouped_mm(grad_NO, weight_EOD, offs=offsets), F.grouped_mm(grad_NO.T, x_ND, offs=offsets)
    ends = ends_E[:-1].cpu()
    grads, rows = grad_NO.tensor_split(ends), x_ND.tensor_split(ends)
    to_x = torch.cat([grad @ weight_OD for grad, weight_OD in zip(grads, weight_EOD, strict=True)])
    return to_x, torch.stack([grad.T @ group for grad, group in zip(grads, rows, strict=True)])


@_linear.register_fake
def _(x_ND: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:  # noqa: ARG001
    return x_ND.new_empty(x_ND.shape[0], weight_EOD.shape[1])


@_linear_backward.register_fake
def _(grad_NO: Tensor, x_ND: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x_ND), torch.empty_like(weight_EOD)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    to_x, to_weight = _linear_backward(grad_NO, *ctx.saved_tensors)
    return to_x, to_weight, None


_linear.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    _linear.register_autocast(_device, torch.bfloat16)
