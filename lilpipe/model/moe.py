"""Mixture of experts instead of the feed-forward layer: a router sends each token to a few of many small SwiGLU layers.

Router, shared experts and auxiliary-loss-free load balancing follow DeepSeek-V3 (2024, section 2.1.2). Affinity is the
sigmoid of the router's logit. The top experts by affinity plus bias are chosen; their outputs are weighted by affinity
alone. After each optimizer step, the bias of an underloaded expert increases and that of an overloaded one decreases.
With ``scoring_func`` softmax, affinity is the softmax of the logits, and there is no bias (Mixtral, Jiang et al. 2024;
Qwen 3). No token is dropped. Parameters have DeepSeek-V3's names, with the experts' matrices stacked.

Dimensions: B sequences, T tokens, N = B T tokens, D width, E experts, K experts of a token, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import MoEConfig
from lilpipe.model.grouped import grouped_linear
from lilpipe.model.layers import GatedMLP

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


class Router(nn.Module):
    """Top-k router."""

    e_score_correction_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.routed_scaling_factor = moe.routed_scaling_factor
        self.softmax, self.norm_topk_prob = moe.scoring_func == "softmax", moe.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(moe.num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", None if self.softmax else torch.zeros(moe.num_experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and weights of the chosen experts, both ``[N, K]``.

        Computes affinities in at least float32.
        """
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
            affinities_NE = logits_NE.softmax(-1) if self.softmax else logits_NE.sigmoid()
        with torch.no_grad():
            bias_E = self.e_score_correction_bias
            biased_NE = affinities_NE if bias_E is None else affinities_NE + bias_E
            chosen_NK = biased_NE.topk(self.num_experts_per_tok, sorted=False).indices
        weights_NK = affinities_NE.gather(1, chosen_NK)
        if not self.norm_topk_prob:
            return chosen_NK, self.routed_scaling_factor * weights_NK
        return chosen_NK, self.routed_scaling_factor * weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)


class Experts(nn.Module):
    """The routed experts, with stacked matrices for grouped matrix products."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.zeros(moe.num_experts, moe.moe_intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.zeros(moe.num_experts, moe.moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(moe.num_experts, hidden_size, moe.moe_intermediate_size))

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, loads_E: Tensor) -> Tensor:
        """Return weighted sums over each token's experts ``[N, D]``; ``loads_E`` is the tokens per expert."""
        N, K = chosen_NK.shape
        order = chosen_NK.flatten().argsort(stable=True)  # [N K]: sorted by expert
        inverse = order.argsort()
        ends_E = loads_E.cumsum(0)
        x = reorder(x_ND[:, None].expand(-1, K, -1).flatten(0, 1), order, inverse)
        gated = F.silu(grouped_linear(x, self.gate_proj, ends_E)) * grouped_linear(x, self.up_proj, ends_E)
        y = reorder(grouped_linear(gated, self.down_proj, ends_E), inverse, order)
        return (y.view(N, K, -1) * weights_NK[..., None].to(y.dtype)).sum(1)


class MoE(nn.Module):
    """Routed experts plus shared experts, which are one SwiGLU layer of their total width."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe)
        shared_size = moe.n_shared_experts * moe.moe_intermediate_size
        self.shared_experts = GatedMLP(hidden_size, shared_size) if shared_size else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output ``[B, T, D]`` and the tokens per expert, int64 ``[E]``.

        The loads are returned instead of accumulated here, so that activation checkpointing does not count them twice.
        """
        x_ND = x_BTD.flatten(0, -2)
        chosen_NK, weights_NK = self.gate(x_ND)
        experts_E = torch.arange(len(self.gate.weight), device=x_ND.device)
        loads_E = (chosen_NK.flatten()[:, None] == experts_E).sum(0)
        y_BTD = self.experts(x_ND, chosen_NK, weights_NK, loads_E).view_as(x_BTD)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, loads_E


class _Reorder(torch.autograd.Function):
    """Permute rows. The gradient of plain indexing accumulates, since rows may repeat; on a CPU it does so serially."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``x[order]``; ``inverse`` is the inverse permutation of ``order``."""
    return _Reorder.apply(x, order, inverse)


def balanced_bias(bias_LE: Tensor, loads_LE: Tensor, rate: float) -> Tensor:
    """Return the updated biases of L layers, given the tokens per expert in a step (DeepSeek-V3, 2.1.2)."""
    return bias_LE + rate * (loads_LE.double().mean(-1, keepdim=True) - loads_LE).sign().to(bias_LE.dtype)


def imbalance(loads_LE: Tensor) -> Tensor:
    """Return the largest over the mean number of tokens per expert, float64 [L]: 1 if balanced, E if all go to one."""
    return loads_LE.amax(-1).double() / loads_LE.double().mean(-1).clamp(min=1e-9)


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unstack the experts' matrices to ``...experts.<number>.gate_proj.weight``; other tensors are unchanged."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, matrix = name.rpartition(".")
        if prefix.endswith("mlp.experts") and matrix in EXPERT_MATRICES:
            result |= {f"{prefix}.{number}.{matrix}.weight": expert for number, expert in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert ``to_huggingface``."""
    result: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        prefix, _, rest = name.partition(".mlp.experts.")
        parts = rest.split(".")
        if len(parts) == 3 and parts[0].isdigit() and parts[1] in EXPERT_MATRICES:
            stacks.setdefault(f"{prefix}.mlp.experts.{parts[1]}", {})[int(parts[0])] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([e for _, e in sorted(stack.items())]) for name, stack in stacks.items()}
