"""Decoder-only transformer: one block whose options make the families of ``lilpipe.config.families``.

The defaults are Llama's (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm RMSNorm, RoPE, grouped-query
attention, SwiGLU, no biases. ``ModelConfig`` documents the options.

Parameters have Hugging Face's names: those of ``LlamaForCausalLM``, and for options those of the class that introduced
them. ``lilpipe.model.families`` converts the weights that are stored differently.

Dimensions: B sequences, T tokens, D width, V vocabulary, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.errors import DataError
from lilpipe.model.attention import Cache, KeysAndValues
from lilpipe.model.block import Block
from lilpipe.model.dropout import dropout_seed, layer_numbers, token_numbers
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Embedding, Linear, residual_norm
from lilpipe.model.masks import RowMasks
from lilpipe.model.moe import MoE, balanced_bias, imbalance
from lilpipe.model.rope import Angles, rope_table
from lilpipe.model.scores import Scores, soften, token_scores

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


class Transformer(nn.Module):
    """The language model, or one pipeline stage of it.

    Weights are zero until ``init_weights`` or a checkpoint sets them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, part: ModelPart | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.part = part or ModelPart(range(config.num_layers), first=True, last=True)
        self.model = Decoder(config, vocab_size, self.part)
        own_head = self.part.last and not config.tie_embeddings
        self.lm_head = Linear(config.hidden_size, vocab_size) if own_head else None
        self.token_scores: Callable[..., Scores] = token_scores
        """Tensor parallelism replaces it, because each worker then holds a shard of the vocabulary."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def set_rope(self, theta: float) -> None:
        """Change the RoPE base. Pretraining phases with a longer context use a larger base."""
        if theta != self.config.rope_theta:
            self.config = self.config.model_copy(update={"rope_theta": theta})
            self.model.set_rope(theta)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer, ``[V, D]``."""
        if self.lm_head is not None:
            return self.lm_head.weight
        assert self.model.embed_tokens is not None, "a pipeline stage without the embedding cannot share its weights"
        return self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        rows_B: Tensor | None = None,
    ) -> Any:
        """Return next-token logits ``[B, T, V]`` in float32, or ``Scores`` of ``targets_BT`` if given.

        ``positions_BT`` is the position of each token in its row, by default 0..T-1. ``documents_BT`` holds document
        ids: attention stays within a document. ``mask`` is boolean, ``[B or 1, 1, T, T]``, True where a token may
        attend; it replaces the causal mask and must be causal itself. With a ``cache``, keys and values are written at
        ``positions_BT``, each token attends to the cached positions of its row up to its own, and ``mask`` is ignored.
        ``rows_B`` holds row ids for dropout, by default 0..B-1; rows that share a ``set_dropout_seed`` call need
        distinct ids.

        A pipeline stage that is not the first takes hidden states ``[B, T, D]`` instead of tokens; one that is not the
        last returns them. Raises ``DataError`` for a sequence longer than ``max_seq_len``.
        """
        hidden_BTD = self.model(tokens_BT, positions_BT, documents_BT, mask, cache, rows_B)
        if not self.part.last:
            return hidden_BTD
        if targets_BT is None:
            return self.logits(hidden_BTD)
        return self.token_scores(hidden_BTD, self.output_weight, targets_BT, softcap=self.config.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[..., V]`` in float32 for final hidden states ``[..., D]``."""
        return soften(F.linear(hidden, self.output_weight).float(), self.config.logit_softcap)

    def set_dropout_seed(self, *parts: int) -> None:
        """Set the dropout seed from these numbers.

        Pass the run's seed and the step and, unless the forward pass gets ``rows_B``, the micro-batch and the worker.
        """
        self.model.dropout_seed = dropout_seed(*parts)

    @torch.no_grad()
    def balance_experts(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, float]:
        """Update each router's bias from the expert loads since the last call, then reset the loads.

        Call it after each optimizer step. ``reduce`` sums an int64 tensor [layers, experts] over the workers that hold
        different tokens. Returns the load imbalance of each layer: largest over mean number of tokens per expert.
        """
        moe, loads = self.config.moe, self.model.expert_loads
        if moe is None or not loads:
            return {}
        names = list(map(int, loads))
        loads_LE = reduce(torch.stack(list(loads.values())))
        if moe.scoring_func == "sigmoid":
            self._move_biases(loads, loads_LE, moe.bias_update_rate)
        loads.clear()
        return dict(zip(names, imbalance(loads_LE).tolist(), strict=True))

    def _move_biases(self, layers: Iterable[str], loads_LE: Tensor, rate: float) -> None:
        routers = [cast(MoE, self.model.layers.get_submodule(layer).mlp).gate for layer in layers]
        biases = [router.e_score_correction_bias for router in routers if router.e_score_correction_bias is not None]
        for bias_E, moved_E in zip(biases, balanced_bias(torch.stack(biases), loads_LE, rate), strict=True):
            bias_E.copy_(moved_E)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter and saved buffer to its ``initial_value``."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(initial_value(name, tensor.shape, seed=seed, config=self.config))


def token_logprobs(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return the log-probability ``[B, T-1]``, float32, of each token after the first given the tokens before it.

    Differentiable. Rows may be padded on the right; the caller masks the values at padding.
    """
    logits = model(tokens_BT[:, :-1])
    return gather_logprobs(logits, tokens_BT[:, 1:])


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of ``tokens [...]`` under ``logits [..., V]``, at temperature 1."""
    return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)
