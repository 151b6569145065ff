"""One block of the decoder: attention and a feed-forward layer.

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.model.attention import Attention, KeysAndValues
from lilpipe.model.dropout import dropout
from lilpipe.model.layers import MLP, GatedMLP, residual_norm
from lilpipe.model.mla import LatentAttention
from lilpipe.model.moe import MoE
from lilpipe.model.rope import Angles

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual connection.

    Norms have transformers' names, which differ by placement: ``post_attention_layernorm`` is before the feed-forward
    layer for ``pre``, and after attention otherwise.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
        self.mlp = feed_forward(config, layer)
        self.norm_placement, self.parallel_residual = config.norm_placement, config.parallel_residual
        if config.norm_placement != "post":
            self.input_layernorm = residual_norm(config)
        self.post_attention_layernorm = residual_norm(config)
        if config.norm_placement == "both":
            self.pre_feedforward_layernorm = residual_norm(config)
        if config.norm_placement != "pre":
            self.post_feedforward_layernorm = residual_norm(config)
        self.dropout = config.dropout

    def forward(
        self,
        x_BTD: Tensor,
        rope: Angles | None,
        mask: Mask | None,
        view: KeysAndValues | None,
        draws_2BT: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's output and, for a mixture of experts, the tokens per expert, int64 [experts].

        ``draws_2BT`` are the random numbers from ``layer_numbers`` for dropout; None applies no dropout.
        """
        before, after = self.norm_placement != "post", self.norm_placement != "pre"
        y_BTD = self.self_attn(self.input_layernorm(x_BTD) if before else x_BTD, rope, mask, view)
        y_BTD = self.post_attention_layernorm(y_BTD) if after else y_BTD
        attended_BTD = x_BTD + (y_BTD if draws_2BT is None else dropout(y_BTD, draws_2BT[0], self.dropout))
        y_BTD, loads_E = self.mlp(self._before_mlp(x_BTD if self.parallel_residual else attended_BTD)), None
        if isinstance(self.mlp, MoE):
            y_BTD, loads_E = y_BTD
        y_BTD = self.post_feedforward_layernorm(y_BTD) if after else y_BTD
        return attended_BTD + (y_BTD if draws_2BT is None else dropout(y_BTD, draws_2BT[1], self.dropout)), loads_E

    def _before_mlp(self, x_BTD: Tensor) -> Tensor:
        """Return the input of the feed-forward layer."""
        if self.norm_placement == "pre":
            return self.post_attention_layernorm(x_BTD)
        return self.pre_feedforward_layernorm(x_BTD) if self.norm_placement == "both" else x_BTD


def feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """Return the feed-forward layer of one block."""
    if config.moe is not None and layer >= config.first_moe_layer:
        return MoE(config.hidden_size, config.moe)
    kind = GatedMLP if config.gated_mlp else MLP
    return kind(config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)
