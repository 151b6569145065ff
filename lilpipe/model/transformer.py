"""The decoder: Llama's (Touvron et al. 2023; Grattafiori et al. 2024), GPT-2's (Radford et al. 2019), and options.

Llama: RMSNorm before each part, rotary positions, grouped key/value heads, SwiGLU, no biases. GPT-2: LayerNorm,
learned positions, GELU, biases. Options are normalised queries and keys, a mixture of experts (``moe``), latent
attention (``mla``) and dropout. The output layer may share the embedding's weights.

Parameters have Hugging Face's names: of ``LlamaForCausalLM``, and for the options of ``Qwen3ForCausalLM`` and
``DeepseekV3ForCausalLM``. What is stored otherwise there is mapped in ``gpt2``, ``moe`` and ``mla``.

Dimensions: B sequences, T tokens, D width, V vocabulary, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.errors import DataError
from lilpipe.model.attention import Angles, Attention, Cache, KeysAndValues, rope_table
from lilpipe.model.dropout import dropout, dropout_seed, layer_numbers, token_numbers
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Embedding, GELULayer, Linear, SwiGLU, residual_norm
from lilpipe.model.masks import document_mask
from lilpipe.model.mla import LatentAttention
from lilpipe.model.moe import MoE, balanced_bias, imbalance
from lilpipe.model.scores import Scores, soften, token_scores

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
        self.mlp = feed_forward(config, layer)
        self.input_layernorm = residual_norm(config)
        self.post_attention_layernorm = residual_norm(config)
        self.dropout = config.dropout

    def forward(
        self,
        x_BTD: Tensor,
        rope: Angles | None,
        mask: Mask | None,
        view: KeysAndValues | None,
        draws_2BT: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer's output, and of a mixture of experts how many tokens went to each expert, int64 [experts].

        ``draws_2BT`` are the ``layer_numbers`` by which elements are dropped; none leaves all in place.
        """
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), rope, mask, view)
        x_BTD = x_BTD + (y_BTD if draws_2BT is None else dropout(y_BTD, draws_2BT[0], self.dropout))
        y_BTD, loads_E = self.mlp(self.post_attention_layernorm(x_BTD)), None
        if isinstance(self.mlp, MoE):
            y_BTD, loads_E = y_BTD
        return x_BTD + (y_BTD if draws_2BT is None else dropout(y_BTD, draws_2BT[1], self.dropout)), loads_E


def feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward layer of one block."""
    if config.architecture == "gpt2":
        return GELULayer(config.hidden_size, config.intermediate_size)
    if config.moe is None or layer < config.moe.first_k_dense_replace:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    return MoE(config.hidden_size, config.moe)


class ModelPart(NamedTuple):
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

    def __init__(self, config: ModelConfig, vocab_size: int, part: ModelPart) -> None:
        super().__init__()
        self.config = config
        self.part = part
        self.context: Callable[[Tensor, Tensor | None], KeysAndValues] | None = None
        """Under context parallelism, (positions, documents) of the tokens at hand to those of the whole rows."""
        embeds = part.first or (part.last and config.tie_embeddings)
        self.embed_tokens = Embedding(vocab_size, config.hidden_size) if embeds else None
        # By their numbers in the whole model, so that a name means the same in every layout.
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in part.layers})
        self.norm = residual_norm(config) if part.last else None
        learned = part.first and config.architecture == "gpt2"
        self.embed_positions = Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.register_buffer("rope_cos", None, persistent=False)
        self.register_buffer("rope_sin", None, persistent=False)
        self.set_rope(config.rope_theta)
        self.dropout_seed: int | None = None
        self.expert_loads: dict[str, Tensor] = {}
        """Tokens that went to each expert of a layer since ``balance_experts``, int64 [experts]."""

    def set_rope(self, theta: float) -> None:
        """Make the rotary embedding's tables anew, for another base; GPT-2 has none."""
        if self.config.architecture == "gpt2":
            return
        size = self.config.head_size if self.config.mla is None else self.config.mla.qk_rope_head_dim
        with torch.device(next(self.parameters()).device):
            self.rope_cos, self.rope_sin = rope_table(self.config.max_seq_len, size, theta)

    def forward(
        self,
        x: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        rows_B: Tensor | None = None,
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
        view = None if cache is None else cache.view(num_tokens, positions_BT)
        x_BTD = self._embed(x, positions_BT) if self.part.first else x
        rope = self._angles(num_tokens, positions_BT, x_BTD.dtype)
        if self.context is not None:
            assert positions_BT is not None, "context parallelism needs the tokens' positions"
            view = self.context(positions_BT, documents_BT)
        elif documents_BT is not None:
            mask = document_mask(documents_BT)
        tokens_BT = self._token_numbers(x, rows_B, documents_BT, positions_BT)
        for layer, block in self.layers.items():
            draws_2BT = None if tokens_BT is None else layer_numbers(tokens_BT, int(layer))
            x_BTD, loads_E = block(x_BTD, rope, mask, view, draws_2BT)
            if loads_E is not None and self.training:
                self.expert_loads[layer] = self.expert_loads.get(layer, 0) + loads_E
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """The residual stream ``[B, T, D]`` below the first block."""
        assert self.embed_tokens is not None
        if self.embed_positions is None:
            return self.embed_tokens(tokens_BT)
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return self.embed_tokens(tokens_BT) + self.embed_positions(positions_BT)

    def _token_numbers(
        self, x: Tensor, rows_B: Tensor | None, documents_BT: Tensor | None, positions_BT: Tensor | None
    ) -> Tensor | None:
        """What dropout draws by, ``[B, T]``; none where nothing is dropped."""
        if not self.training or self.config.dropout == 0:
            return None
        assert self.dropout_seed is not None, "call set_dropout_seed before each step"
        num_rows, num_tokens = x.shape[:2]
        rows_B = torch.arange(num_rows, device=x.device) if rows_B is None else rows_B
        positions = torch.arange(num_tokens, device=x.device)[None] if positions_BT is None else positions_BT
        return token_numbers(self.dropout_seed, rows_B, documents_BT, positions)

    def _angles(self, num_tokens: int, positions_BT: Tensor | None, dtype: torch.dtype) -> Angles | None:
        """Cosines and sines for the tokens' positions; none where positions are learned."""
        if self.config.architecture == "gpt2":
            return None
        cos, sin = self.rope_cos.to(dtype), self.rope_sin.to(dtype)
        if positions_BT is None:
            return cos[None, :num_tokens, None], sin[None, :num_tokens, None]
        return F.embedding(positions_BT, cos)[:, :, None], F.embedding(positions_BT, sin)[:, :, None]


class Transformer(nn.Module):
    """The language model, or one pipeline stage of it.

    Its weights are zeros until ``init_weights`` or a checkpoint fills them.
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
        mask: Mask | None = None,
        cache: Cache | None = None,
        rows_B: Tensor | None = None,
    ) -> Any:
        """Logits ``[B, T, V]`` in float32 of the token that follows each token, or ``Scores`` of ``targets_BT``.

        ``positions_BT`` is the place of each token in its row, 0..T-1 where it is not given. ``documents_BT`` numbers
        the documents of a row: attention then stays within each. ``mask`` is boolean, ``[B or 1, 1, T, T]``, True
        where a token may attend, and takes the place of the causal mask (it must be causal itself). With a ``cache``,
        keys and values are written to it at ``positions_BT`` and each token attends to the positions of its row up to
        its own; ``mask`` then is not used. A pipeline stage that is not the first takes hidden states ``[B, T, D]``
        in place of tokens, and one that is not the last returns them. ``rows_B`` numbers the rows for dropout, 0..B-1
        where it is not given: rows of one ``set_dropout_seed`` need numbers of their own. Raises ``DataError`` for a
        sequence longer than ``max_seq_len``.
        """
        hidden_BTD = self.model(tokens_BT, positions_BT, documents_BT, mask, cache, rows_B)
        if not self.part.last:
            return hidden_BTD
        if targets_BT is None:
            return self.logits(hidden_BTD)
        return self.token_scores(hidden_BTD, self.output_weight, targets_BT, softcap=self.config.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` in float32 of final hidden states ``[..., D]``."""
        return soften(F.linear(hidden, self.output_weight).float(), self.config.logit_softcap)

    def set_dropout_seed(self, *parts: int) -> None:
        """Let what dropout draws follow from these numbers: of the run, the step and, without ``rows_B``, the
        micro-batch and the worker.
        """
        self.model.dropout_seed = dropout_seed(*parts)

    @torch.no_grad()
    def balance_experts(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, float]:
        """After an optimizer step, move each router's biases by what its experts got in the step, and forget that.

        ``reduce`` sums an int64 tensor [layers, experts] over the workers that hold other tokens. Gives each layer's
        imbalance: tokens of the busiest expert over those of the average one.
        """
        moe, loads = self.config.moe, self.model.expert_loads
        if moe is None or not loads:
            return {}
        routers = [cast(MoE, self.model.layers.get_submodule(layer).mlp).gate for layer in loads]
        loads_LE = reduce(torch.stack(list(loads.values())))
        biases_LE = torch.stack([router.e_score_correction_bias for router in routers])
        biases_LE = balanced_bias(biases_LE, loads_LE, moe.bias_update_rate)
        for router, bias_E in zip(routers, biases_LE, strict=True):
            router.e_score_correction_bias.copy_(bias_E)
        result = dict(zip(map(int, loads), imbalance(loads_LE).tolist(), strict=True))
        loads.clear()
        return result

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all that is saved with its ``initial_value``."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(initial_value(name, tensor.shape, seed=seed, config=self.config))


def token_logprobs(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Log-probability ``[B, T-1]`` in float32 of each token after the first, given those before it.

    Differentiable. Rows may be padded on the right; what is computed for padding is to be masked by the caller.
    """
    logits = model(tokens_BT[:, :-1])
    return gather_logprobs(logits, tokens_BT[:, 1:])


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of ``tokens [...]`` under ``logits [..., V]``, at temperature 1."""
    return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)
