"""Estimate of a pretraining worker's peak memory, by arithmetic alone.

A step needs persistent memory (weights, gradients, optimizer state) and, at the start of the backward pass, the
activations saved by the forward pass: counted tensor by tensor for this decoder in eager mode, as in Korthikanti et al.
2022. Sharding divides the persistent part as in ZeRO (Rajbhandari et al. 2020). `torch.compile` saves less; memory of
the allocator and the collectives is extra.

Sizes in formulas: n tokens of a micro-batch on this worker, D width, H query heads, K key/value heads, E size of a
head, F width of the feed-forward layer, V vocabulary; c bytes of an element in the compute precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import MLAConfig, ModelConfig
from lilpipe.config.phases import Phase
from lilpipe.config.training import PretrainConfig
from lilpipe.model.flops import (
    adapter_parameters,
    block_matrices,
    block_parameters,
    embedding_parameters,
    head_parameters,
    head_widths,
)
from lilpipe.model.scores import LOGITS_AT_ONCE, tokens_at_once

FP32 = 4
STANDING = ("weights", "gradients", "optimizer state")
"""Names of the persistent terms."""
LOGIT_COPIES = 5
"""Float32 tensors of the logits' size alive at once when autograd computes their gradient (torch 2.13, eager)."""


@dataclass(frozen=True)
class Term:
    """One part of the memory."""

    name: str
    bytes: float
    arithmetic: str
    """The calculation, for people."""


def peak_memory(config: PretrainConfig, vocab_size: int, *, on_cpu: bool = False, head: int = 0) -> tuple[Term, ...]:
    """Return the memory of the worker that needs most, at the peak of the run; the terms sum to it.

    ``head``: number of outputs of a head in place of the output layer.
    """
    worker = _Worker(config, vocab_size, on_cpu=on_cpu, head=head)
    passing = max((worker.of_phase(phase) for phase in config.resolved_phases), key=total)
    update = worker.update()
    at_peak = passing if total(passing) >= total(update) else update
    return (*worker.standing(), *(term for term in at_peak if term.bytes))


def persistent_memory(config: PretrainConfig, vocab_size: int, *, head: int = 0) -> tuple[Term, ...]:
    """Return weights, gradients and optimizer state of the worker that needs most."""
    return _Worker(config, vocab_size, on_cpu=False, head=head).standing()


def total(terms: tuple[Term, ...]) -> float:
    """Return the bytes of all terms."""
    return math.fsum(term.bytes for term in terms)


class _Worker:
    """The worker of the layout that needs most memory."""

    def __init__(self, config: PretrainConfig, vocab_size: int, *, on_cpu: bool, head: int) -> None:
        self.config = config
        self.head = head
        self.model = config.model
        self.vocab_size = vocab_size
        self.layout = config.layout
        self.on_cpu = on_cpu
        self.element_bytes = FP32 if config.precision == "fp32" else 2
        low_and_cut = self.element_bytes < FP32 and self.layout.pipeline * self.layout.context * self.layout.tensor > 1
        self.gathers = self.layout.shard > 1 or low_and_cut
        """Whether FSDP holds the weights. With lower precision it does so for every sharded model."""
        stages = self.layout.pipeline * config.parallel.stages_per_worker
        self.blocks_per_stage = math.ceil(self.model.num_layers / stages)
        self.num_blocks = self.blocks_per_stage * config.parallel.stages_per_worker

    # --- persistent memory ------------------------------------------------------------------------------------------

    def standing(self) -> tuple[Term, ...]:
        """Return weights, gradients and optimizer state, in fp32."""
        if self.config.lora is not None:
            return self._standing_with_adapters(self.config.lora)
        parts = self.layout.shard * self.layout.tensor
        weights, matrices = self._parameters(), self._block_matrices()
        held = f"{_millions(weights)} parameters" + (f" / {self._divisor()}" if parts > 1 else "")
        if self.config.optimizer.kind == "muon":
            state = FP32 * matrices + 2 * FP32 * (weights - matrices)
            how = f"(4 B x {_millions(matrices)} by Muon + 8 B x {_millions(weights - matrices)})"
            how += f" / {self._divisor()}" if parts > 1 else ""
        else:
            state, how = 2 * FP32 * weights, f"8 B x {held}"
        return (
            Term("weights", FP32 * weights / parts, f"4 B x {held}"),
            Term("gradients", FP32 * weights / parts, f"4 B x {held}"),
            Term("optimizer state", state / parts, how),
        )

    def _standing_with_adapters(self, lora: LoRAConfig) -> tuple[Term, ...]:
        """As ``standing``: only the adapters have gradients and optimizer state. They count as if not sharded by tensor
        parallelism, which leaves one of each two matrices whole.
        """
        parts = self.layout.shard * self.layout.tensor
        weights = self._parameters()
        adapters = self.num_blocks * adapter_parameters(self.model, lora)
        held = f"{_millions(weights)} parameters" + (f" / {self._divisor()}" if parts > 1 else "")
        own, how = adapters / self.layout.shard, f"{_millions(adapters)} in adapters"
        how += f" / shard {self.layout.shard}" if self.layout.shard > 1 else ""
        per_element = FP32 if self.config.optimizer.kind == "muon" and not lora.use_dora else 2 * FP32
        return (
            Term("weights", FP32 * (weights / parts + own), f"4 B x ({held} + {how})"),
            Term("gradients", FP32 * own, f"4 B x {how}"),
            Term("optimizer state", per_element * own, f"{per_element} B x {how}"),
        )

    def _divisor(self) -> str:
        sizes = {"shard": self.layout.shard, "tensor": self.layout.tensor}
        return "(" + " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) + ")"

    def _parameters(self) -> int:
        """Return this worker's parameters before sharding: those of the larger of the first and the last stage."""
        blocks = sum(self._per_block(layer) for layer in self._layers())
        first, last = embedding_parameters(self.model, self.vocab_size), head_parameters(self.model, self.vocab_size)
        if self.head:
            without = self.model.model_copy(update={"tie_embeddings": True})
            last = head_parameters(without, self.vocab_size) + self.model.hidden_size * self.head
        if self.layout.pipeline == 1:
            return blocks + first + last
        if self.model.tie_embeddings and not self.head:  # both ends hold the embedding
            last += embedding_parameters(self.model, self.vocab_size)
        return blocks + max(first, last)

    def _block_matrices(self) -> int:
        """Return the weights of the blocks' matrices, which Muon updates."""
        matrices = (matrix for layer in self._layers() for matrix in block_matrices(self.model, layer))
        return sum(matrix.inputs * matrix.outputs for matrix in matrices)

    def _layers(self) -> range:
        """Return the last blocks, as many as a worker holds: with a mixture of experts they are the largest."""
        return range(self.model.num_layers - self.num_blocks, self.model.num_layers)

    def _per_block(self, layer: int) -> int:
        return block_parameters(self.model, max(layer, 0))

    # --- forward and backward pass -----------------------------------------------------------------------------------

    def of_phase(self, phase: Phase) -> tuple[Term, ...]:
        """Return the additional memory of the forward and backward pass."""
        rows = phase.batch_size // (self.layout.data * phase.accumulation_steps)
        num_tokens = rows * math.ceil(phase.seq_len / self.layout.context)
        return (
            self._copies(),
            self._unsharded_gradients(phase),
            self._kept(phase, num_tokens),
            *max(self._logits(num_tokens), self._one_block(phase, num_tokens), key=total),
        )

    def _copies(self) -> Term:
        """Return copies of the weights: gathered by FSDP, or cast to lower precision."""
        c = self.element_bytes
        weights = self._parameters() / self.layout.tensor
        if not self.gathers:
            size = c * weights if c < FP32 else 0
            return Term("cast weights", size, f"{c} B x {_millions(weights)} parameters")
        block = self._per_block(self.model.num_layers - 1) / self.layout.tensor
        rest = weights - self.num_blocks * block
        largest = max(block, rest)
        gradients = f"{c + FP32} B x gradients of {_millions(largest)}"
        if self.layout.pipeline > 1:  # gathered weights are kept for the next micro-batch
            size, how = c * weights, f"{c} B x {_millions(weights)}"
        else:
            size, how = c * (2 * block + rest), f"{c} B x (2 blocks of {_millions(block)} + {_millions(rest)})"
        return Term("gathered weights", size + (c + FP32) * largest, f"{how} + {gradients}")

    def _unsharded_gradients(self, phase: Phase) -> Term:
        """Return unsharded gradients: FSDP accumulates them whole, and shards them in the last micro-batch."""
        if not self.gathers or phase.accumulation_steps == 1:
            return Term("gathered gradients", 0, "")
        weights = self._parameters() / self.layout.tensor
        how = f"4 B x {_millions(weights)}, unsharded until the last of {phase.accumulation_steps} micro-batches"
        return Term("gathered gradients", FP32 * weights, how)

    def _kept(self, phase: Phase, num_tokens: int) -> Term:
        """Return saved activations of blocks, for all micro-batches in flight."""
        passes, in_flight = self._passes_in_flight(phase.accumulation_steps)
        blocks = passes * self.blocks_per_stage
        mode = self.config.activation_checkpointing
        per_token = {
            "none": self._of_block(phase),
            "selective": self._selective(),
            "full": self._stream() / self.layout.tensor,
        }[mode]
        how = f"{per_token:,.0f} B x {num_tokens:,} tokens x {blocks} blocks{in_flight}, checkpointing {mode}"
        return Term("activations", per_token * num_tokens * blocks, how)

    def _passes_in_flight(self, micro_batches: int) -> tuple[int, str]:
        """Return the forward passes in flight on the first worker of the pipeline."""
        size, chunks = self.layout.pipeline, self.config.parallel.stages_per_worker
        if size == 1:
            return 1, ""
        if chunks == 1:
            passes, how = size, f"pipeline {size}"
        else:  # Narayanan et al. 2021, 2.2: the warmup and one more
            passes, how = (chunks - 1) * size + 2 * (size - 1) + 1, f"{chunks} x {size} stages"
        passes = min(passes, micro_batches * chunks)
        return passes, f" ({passes} passes in flight: {how}, {micro_batches} micro-batches)"

    def _of_block(self, phase: Phase) -> float:
        """Return the bytes per token saved by the larger of the first and the last block."""
        saved = (
            activation_bytes(
                self.model,
                layer,
                element_bytes=self.element_bytes,
                stream_bytes=self._stream_bytes(),
                tensor=self.layout.tensor,
                context=self.layout.context,
            )
            for layer in (0, self.model.num_layers - 1)
        )
        return max(saved) + self._mask(phase)

    def _stream_bytes(self) -> int:
        """Return bytes per element of the residual stream: autocast keeps it in fp32, FSDP does not."""
        return self.element_bytes if self.gathers else FP32

    def _stream(self) -> int:
        return self.model.hidden_size * self._stream_bytes()

    def _selective(self) -> float:
        """Return bytes per token of the block's input and the outputs of its matrix products and attention."""
        _, value = head_widths(self.model)
        matrices = block_matrices(self.model, self.model.num_layers - 1, active=True)
        outputs = sum(matrix.outputs for matrix in matrices) + self.model.num_heads * value
        return (self._stream() + outputs * self.element_bytes) / self.layout.tensor

    def _mask(self, phase: Phase) -> float:
        """Return bytes per token of masks and scores that attention keeps, on a CPU.

        A mask of documents or of a sliding window is [rows, T, T], converted to float. Soft-capped scores are kept
        twice, before and after the softmax, [rows, H, T, T] each.
        """
        if not self.on_cpu:
            return 0.0
        windows = (self.model.window(layer) or phase.seq_len for layer in range(self.model.num_layers))
        masked = self.config.intra_document_masking or self.layout.context > 1 or min(windows) < phase.seq_len
        capped = 2 * self.model.num_heads / self.layout.tensor if self.model.attn_logit_softcap else 0
        return FP32 * phase.seq_len * (bool(masked or capped) + capped)

    def _logits(self, num_tokens: int) -> tuple[Term, ...]:
        """Return the memory at the start of the output layer's backward pass.

        That is the exponentials (of all tokens or of a chunk), a chunk of their gradient, and the gradient of the
        matrix.
        """
        if self.head:
            how = f"2 x 4 B x {num_tokens:,} tokens x {self.head} outputs of the head"
            return (Term("outputs", 2 * FP32 * num_tokens * self.head, how),)
        vocab = self.vocab_size // self.layout.tensor
        if self.layout.tensor > 1:
            at_once = min(num_tokens, max(1, LOGITS_AT_ONCE // vocab))
            how = f"{LOGIT_COPIES} x 4 B x {at_once:,} tokens at once x {vocab:,} vocabulary entries of this worker"
            return (Term("logits", LOGIT_COPIES * FP32 * at_once * vocab, how),)
        at_once = min(num_tokens, tokens_at_once(vocab, torch.device("cpu" if self.on_cpu else "cuda")))
        kept = num_tokens if num_tokens * vocab <= LOGITS_AT_ONCE else at_once
        gradient = FP32 if self.element_bytes == FP32 else FP32 + self.element_bytes
        matrix, width = FP32 * vocab * self.model.hidden_size, self.model.hidden_size
        how = f"(4 B x {kept:,} tokens + {gradient} B x {at_once:,} at once + 4 B x {width:,}) x vocabulary {vocab:,}"
        return (Term("logits", vocab * (FP32 * kept + gradient * at_once) + matrix, how),)

    def _one_block(self, phase: Phase, num_tokens: int) -> tuple[Term, ...]:
        """Return the memory of a block's backward pass: its recomputed activations and its working tensors."""
        c, again = self.element_bytes, self._of_block(phase)
        checkpoints = self.config.activation_checkpointing != "none"
        widest, width = max(matrix.outputs for matrix in block_matrices(self.model, 0)), self.model.hidden_size
        working = c * num_tokens * 2 * (widest + width) / self.layout.tensor
        return (
            Term("recomputed block", again * num_tokens * checkpoints, f"{again:,.0f} B x {num_tokens:,} tokens"),
            Term("working tensors", working, f"{c} B x {num_tokens:,} tokens x 2 x (widest {widest:,} + {width:,})"),
        )

    # --- optimizer step -----------------------------------------------------------------------------------------------

    def update(self) -> tuple[Term, ...]:
        """Return the additional memory of the optimizer step: Muon's updates of all matrices."""
        if self.config.optimizer.kind != "muon":
            return ()
        matrices = self._block_matrices() / (self.layout.shard * self.layout.tensor)
        return (Term("Muon's updates", 3 * FP32 * matrices, f"3 x 4 B x {_millions(matrices)} in matrices"),)


def activation_bytes(
    model: ModelConfig,
    layer: int,
    *,
    element_bytes: int = FP32,
    stream_bytes: int = FP32,
    tensor: int = 1,
    context: int = 1,
) -> float:
    """Return the bytes per token that one block saves for its backward pass.

    Norms save their input and their output, which is the input of the next matrices. Attention saves queries, keys,
    values, its output, and a number per head. SwiGLU saves gate, its SiLU, up and their product; GELU its input and
    output. Tensor parallelism with sequence parallelism divides all but the gathered inputs of attention and
    feed-forward layer.
    """
    c, s, width = element_bytes, stream_bytes, model.hidden_size
    norm = s * width + FP32 * (2 if model.norm == "layer" else 1)
    norms = (4 if model.norm_placement == "both" else 2) * norm
    norms -= s * width if model.parallel_residual else 0  # both norms have the same input
    divided = norms + _attention_bytes(model, c, context=context)
    divided += _feed_forward_bytes(model, layer, c) + (2 * width if model.dropout else 0)
    return 2 * c * width + divided / tensor


def _attention_bytes(model: ModelConfig, c: int, *, context: int) -> float:
    heads = model.num_heads
    key, _ = head_widths(model)
    if (mla := model.mla) is not None:
        return _latent_attention_bytes(model, mla, c, context=context)
    kv = model.num_kv_heads * model.head_size
    norms = c * (heads * key + kv) + FP32 * (heads + model.num_kv_heads) if model.qk_norm else 0
    return c * (2 * heads * key + 2 * kv * context) + norms + FP32 * heads


def _latent_attention_bytes(model: ModelConfig, mla: MLAConfig, c: int, *, context: int) -> float:
    """Return bytes of latents before and after their norm, and of queries, keys, values and output.

    Values and output have the width of keys if these are wider.
    """
    heads = model.num_heads
    key, value = head_widths(model)
    queries = 2 * c * mla.q_lora_rank + FP32 if mla.q_lora_rank else 0
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    latents = c * latent * (1 + context) + FP32
    wide = max(key, value)
    cut = value if value < key else 0  # the output without the padding of the values
    return queries + latents + c * heads * (key + (key + wide) * context + wide + cut) + FP32 * heads


def _feed_forward_bytes(model: ModelConfig, layer: int, c: int) -> float:
    if (moe := model.moe) is None or layer < model.first_moe_layer:
        return (4 if model.gated_mlp else 2) * c * model.intermediate_size
    # Per routed copy of a token: the input, SwiGLU, and the output that is multiplied by its weight.
    routed = moe.num_experts_per_tok * (2 * model.hidden_size + 4 * moe.moe_intermediate_size)
    shared = 4 * moe.n_shared_experts * moe.moe_intermediate_size
    router = moe.num_experts + 8 * moe.num_experts_per_tok + 1  # affinities, weights, and the order by expert in int64
    return c * (routed + shared) + FP32 * router


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f} M"
