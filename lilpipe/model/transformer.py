"""The decoder: Llama's (Touvron et al. 2023; Grattafiori et al. 2024), with Hugging Face's names for parameters.

RMSNorm before each part (Zhang & Sennrich 2019), rotary positions, grouped key/value heads, SwiGLU (Shazeer 2020),
no biases, and an output layer that may share the embedding's weights. A checkpoint needs no conversion in either
direction: the state dict is the one of ``transformers.LlamaForCausalLM``.

Dimensions: B sequences, T tokens, D width, V vocabulary, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config import ModelConfig
from lilpipe.errors import DataError
from lilpipe.model.attention import Attention, CacheView, KeysAndValues, KVCache, Linear, document_mask, rope_table
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.scores import soften, token_scores


class Embedding(nn.Embedding):
    """A table that starts as zeros, for the reason given at ``Linear``."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)


class RMSNorm(nn.Module):
    """Divide by the root mean square over D, and scale each element."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, view: KeysAndValues | None
    ) -> Tensor:
        """One layer."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask, view)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Part(NamedTuple):
    """What of the model a pipeline stage holds."""

    layers: range
    """Numbers of its blocks."""
    first: bool
    """Whether it begins with the embedding."""
    last: bool
    """Whether it ends with the last norm and the output layer; if that is tied, it holds an embedding of its own."""


class Decoder(nn.Module):
    """Everything below the output layer, or the part of it that a pipeline stage holds."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int, part: Part) -> None:
        super().__init__()
        self.config = config
        self.part = part
        self.context: Callable[[Tensor, Tensor | None], KeysAndValues] | None = None
        """Under context parallelism, (positions, documents) of the tokens at hand to those of the whole rows."""
        embeds = part.first or (part.last and config.tie_embeddings)
        self.embed_tokens = Embedding(vocab_size, config.hidden_size) if embeds else None
        # By their numbers in the whole model, so that a name means the same in every layout.
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in part.layers})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if part.last else None
        self.register_buffer("rope_cos", None, persistent=False)
        self.register_buffer("rope_sin", None, persistent=False)
        self.set_rope(config.rope_theta)

    def set_rope(self, theta: float) -> None:
        """Make the rotary embedding's tables anew, for another base."""
        device = next(self.parameters()).device
        with torch.device(device):
            self.rope_cos, self.rope_sin = rope_table(self.config.max_seq_len, self.config.head_size, theta)

    def forward(
        self,
        x: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states ``[B, T, D]``, normalised; of a stage that is not the last, what goes to the next.

        ``x`` is tokens ``[B, T]``, or for a stage that is not the first what came from the one before.
        """
        num_tokens = x.shape[1]
        if num_tokens > self.config.max_seq_len:
            raise DataError(
                f"sequence of {num_tokens} tokens: the model takes at most max_seq_len = {self.config.max_seq_len}; "
                "cut the sequence or raise model.max_seq_len"
            )
        view = None if cache is None else CacheView(cache, num_tokens, positions_BT)
        x_BTD = self.embed_tokens(x) if self.part.first and self.embed_tokens is not None else x
        rope = self._angles(num_tokens, positions_BT, x_BTD.dtype)
        if self.context is not None:
            assert positions_BT is not None, "context parallelism needs the tokens' positions"
            view = self.context(positions_BT, documents_BT)
        elif documents_BT is not None:
            mask = document_mask(documents_BT)
        for block in self.layers.values():
            x_BTD = block(x_BTD, rope, mask, view)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _angles(self, num_tokens: int, positions_BT: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1 or B, T, 1, E]`` for the tokens' positions."""
        cos, sin = self.rope_cos.to(dtype), self.rope_sin.to(dtype)
        if positions_BT is None:
            return cos[None, :num_tokens, None], sin[None, :num_tokens, None]
        return F.embedding(positions_BT, cos)[:, :, None], F.embedding(positions_BT, sin)[:, :, None]


class Transformer(nn.Module):
    """The language model, or one pipeline stage of it.

    Its weights are zeros until ``init_weights`` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.part = part or Part(range(config.num_layers), first=True, last=True)
        self.model = Decoder(config, vocab_size, self.part)
        own_head = self.part.last and not config.tie_embeddings
        self.lm_head = Linear(config.hidden_size, vocab_size) if own_head else None
        self.token_scores = token_scores
        """Replaced under tensor parallelism, where a worker holds a part of the vocabulary."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def set_rope(self, theta: float) -> None:
        """Give the rotary embedding another base: a phase of pretraining with longer context raises it."""
        if theta != self.config.rope_theta:
            self.config = self.config.model_copy(update={"rope_theta": theta})
            self.model.set_rope(theta)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's matrix ``[V, D]``."""
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
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits ``[B, T, V]`` in float32 of the token that follows each token, or ``Scores`` of ``targets_BT``.

        ``positions_BT`` is the place of each token in its row, 0..T-1 where it is not given. ``documents_BT`` numbers
        the documents of a row: attention then stays within each. ``mask`` is boolean, ``[B or 1, 1, T, T]``, True
        where a token may attend, and takes the place of the causal mask (it must be causal itself). With a ``cache``,
        keys and values are written to it at ``positions_BT`` and each token attends to the positions of its row up to
        its own; ``mask`` then is not used. A pipeline stage that is not the first takes hidden states ``[B, T, D]``
        in place of tokens, and one that is not the last returns them. Raises ``DataError`` for a sequence longer than
        ``max_seq_len``.
        """
        hidden_BTD = self.model(tokens_BT, positions_BT, documents_BT, mask, cache)
        if not self.part.last:
            return hidden_BTD
        if targets_BT is None:
            return self.logits(hidden_BTD)
        return self.token_scores(hidden_BTD, self.output_weight, targets_BT, softcap=self.config.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` in float32 of final hidden states ``[..., D]``."""
        return soften(F.linear(hidden, self.output_weight).float(), self.config.logit_softcap)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with its ``initial_value``."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed=seed, config=self.config))


def token_logprobs(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Log-probability ``[B, T-1]`` in float32 of each token after the first, given those before it.

    Differentiable. Rows may be padded on the right; what is computed for padding is to be masked by the caller.
    """
    logits = model(tokens_BT[:, :-1])
    return gather_logprobs(logits, tokens_BT[:, 1:])


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of ``tokens [...]`` under ``logits [..., V]``, at temperature 1."""
    return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)
