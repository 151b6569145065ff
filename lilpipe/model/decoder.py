"""The layers of the decoder below its output layer.

Dimensions: B sequences, T tokens, D width, V vocabulary, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.errors import DataError
from lilpipe.model.attention import Cache, KeysAndValues
from lilpipe.model.block import Block
from lilpipe.model.dropout import layer_numbers, token_numbers
from lilpipe.model.layers import Embedding, residual_norm
from lilpipe.model.masks import RowMasks
from lilpipe.model.rope import Angles, rope_table

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


RopeKind = Literal["none", "global", "local"]
"""Without RoPE; with it; with the base of layers that have a sliding window."""


class ModelPart(NamedTuple):
    """The part of the model that a pipeline stage holds."""

    layers: range
    """Indices of its blocks."""
    first: bool
    """Whether it contains the embedding."""
    last: bool
    """Whether it contains the final norm and the output layer. With tied embeddings it holds its own copy of the
    embedding."""


class Decoder(nn.Module):
    """All layers below the output layer, or a pipeline stage of them."""

    rope_cos: Tensor | None
    rope_sin: Tensor | None
    local_cos: Tensor | None
    local_sin: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, part: ModelPart) -> None:
        super().__init__()
        self.config = config
        self.part = part
        self.context: Callable[[Tensor, Tensor | None], KeysAndValues] | None = None
        """Under context parallelism: maps positions and documents of the local tokens to the keys and values of whole
        rows."""
        embeds = part.first or (part.last and config.tie_embeddings)
        self.embed_tokens = Embedding(vocab_size, config.hidden_size) if embeds else None
        # Keyed by the index in the whole model, so that parameter names do not depend on the parallel layout.
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in part.layers})
        self.norm = residual_norm(config) if part.last else None
        learned = part.first and config.position_embedding == "learned"
        self.embed_positions = Embedding(config.max_seq_len, config.hidden_size) if learned else None
        for name in ("rope_cos", "rope_sin", "local_cos", "local_sin"):
            self.register_buffer(name, None, persistent=False)
        self.set_rope(config.rope_theta)
        self.dropout_seed: int | None = None
        self.expert_loads: dict[str, Tensor] = {}
        """Tokens routed to each expert of a layer since ``balance_experts``, int64 [experts]."""

    def set_rope(self, theta: float) -> None:
        """Recompute the RoPE tables for another base. Does nothing for learned positions."""
        config = self.config
        if config.position_embedding == "learned":
            return
        with torch.device(next(self.parameters()).device):
            tables = rope_table(config.max_seq_len, config.rotary_size, theta, config.rope_scaling)
            self.rope_cos, self.rope_sin = tables
            if config.rope_local_theta is not None:
                tables = rope_table(config.max_seq_len, config.rotary_size, config.rope_local_theta)
                self.local_cos, self.local_sin = tables

    def forward(
        self,
        x: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        rows_B: Tensor | None = None,
    ) -> Tensor:
        """Return final hidden states ``[B, T, D]`` after the norm; a stage that is not the last returns its block
        output.

        ``x`` is tokens ``[B, T]``; for a stage that is not the first, the output of the previous stage.
        """
        num_tokens = x.shape[1]
        if num_tokens > self.config.max_seq_len:
            raise DataError(
                f"sequence of {num_tokens} tokens: expected at most model.max_seq_len = {self.config.max_seq_len}; "
                "shorten the sequence or increase model.max_seq_len"
            )
        view = None if cache is None else cache.view(num_tokens, positions_BT)
        x_BTD = self._embed(x, positions_BT) if self.part.first else x
        angles = self._angles(num_tokens, positions_BT, x_BTD.dtype)
        if self.context is not None:
            assert positions_BT is not None, "context parallelism requires positions_BT"
            view = self.context(positions_BT, documents_BT)
        rows = RowMasks(num_tokens, x.device, positions_BT=positions_BT, documents_BT=documents_BT, given=mask)
        masks = rows if view is None else view if cache is None else None  # a cache knows what it needs
        tokens_BT = self._token_numbers(x, rows_B, documents_BT, positions_BT)
        for layer, block in self.layers.items():
            number = int(layer)
            draws_2BT = None if tokens_BT is None else layer_numbers(tokens_BT, number)
            seen = None if masks is None else masks.mask(self.config.window(number))
            x_BTD, loads_E = block(x_BTD, angles[self.kind_of_rope(number)], seen, view, draws_2BT)
            if loads_E is not None and self.training:
                self.expert_loads[layer] = self.expert_loads.get(layer, 0) + loads_E
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def kind_of_rope(self, layer: int) -> RopeKind:
        """Return the kind of RoPE of a layer."""
        config = self.config
        if config.position_embedding == "learned" or layer in config.nope_layers:
            return "none"
        return "local" if config.rope_local_theta is not None and config.window(layer) is not None else "global"

    def _embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Return the embeddings ``[B, T, D]``, the input of the first block."""
        assert self.embed_tokens is not None
        x_BTD = self.embed_tokens(tokens_BT)
        if self.config.scale_embeddings:  # rounded to the dtype of the weights first, as in transformers
            x_BTD = x_BTD * torch.tensor(self.config.hidden_size**0.5, dtype=x_BTD.dtype, device=x_BTD.device)
        if self.embed_positions is None:
            return x_BTD
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return x_BTD + self.embed_positions(positions_BT)

    def _token_numbers(
        self, x: Tensor, rows_B: Tensor | None, documents_BT: Tensor | None, positions_BT: Tensor | None
    ) -> Tensor | None:
        """Return random numbers for dropout, ``[B, T]``; None without dropout."""
        if not self.training or self.config.dropout == 0:
            return None
        assert self.dropout_seed is not None, "call set_dropout_seed before each step"
        num_rows, num_tokens = x.shape[:2]
        rows_B = torch.arange(num_rows, device=x.device) if rows_B is None else rows_B
        positions = torch.arange(num_tokens, device=x.device)[None] if positions_BT is None else positions_BT
        return token_numbers(self.dropout_seed, rows_B, documents_BT, positions)

    def _angles(
        self, num_tokens: int, positions_BT: Tensor | None, dtype: torch.dtype
    ) -> dict[RopeKind, Angles | None]:
        """Return RoPE cosines and sines for the tokens' positions, by kind of RoPE."""
        tables: dict[RopeKind, tuple[Tensor | None, Tensor | None]] = {
            "global": (self.rope_cos, self.rope_sin),
            "local": (self.local_cos, self.local_sin),
        }
        angles: dict[RopeKind, Angles | None] = {"none": None}
        for kind, (cos, sin) in tables.items():
            if cos is None or sin is None:
                continue
            cos, sin = cos.to(dtype), sin.to(dtype)
            if positions_BT is None:
                angles[kind] = cos[None, :num_tokens, None], sin[None, :num_tokens, None]
            else:
                angles[kind] = F.embedding(positions_BT, cos)[:, :, None], F.embedding(positions_BT, sin)[:, :, None]
        return angles
