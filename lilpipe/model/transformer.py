"""Decoder-only transformer: one block whose options make the families of ``lilpipe.config.families``.

The defaults are Llama's (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm RMSNorm, RoPE, grouped-query
attention, SwiGLU, no biases. ``ModelConfig`` documents the options.

Parameters have Hugging Face's names: those of ``LlamaForCausalLM``, and for options those of the class that introduced
them. ``lilpipe.model.families`` converts the weights that are stored differently.

Dimensions: B sequences, T tokens, D width, V vocabulary, E size of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.model.attention import Cache
from lilpipe.model.backend import Backend
from lilpipe.model.decoder import Decoder, ModelPart
from lilpipe.model.dropout import dropout_seed
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Linear
from lilpipe.model.moe import MoE, balanced_bias, imbalance
from lilpipe.model.scores import Scores, soften, token_scores

if TYPE_CHECKING:
    from lilpipe.model.masks import Mask


class Transformer(nn.Module):
    """The language model, or one pipeline stage of it.

    Weights are zero until ``init_weights`` or a checkpoint sets them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, part: ModelPart | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.part = part or ModelPart(range(config.num_layers), first=True, last=True)
        own_head = self.part.last and not config.tie_embeddings
        if isinstance(config, BackendConfig):
            self.model, own_head = Backend(config), False
        else:
            self.model = Decoder(config, vocab_size, self.part)
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
        if isinstance(self.model, Backend):
            return self.model.output_weight
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
