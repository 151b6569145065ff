"""Sections of model, optimizer and pretraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import Operational, Section, Share


class ModelConfig(Section):
    """Llama-style decoder (Touvron et al. 2023; Grattafiori et al. 2024)."""

    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Decoder blocks."""
    num_heads: PositiveInt = 4
    """Query heads; hidden_size is divided among them."""
    num_kv_heads: PositiveInt = 2
    """Key and value heads (GQA, Ainslie et al. 2023); divides num_heads."""
    intermediate_size: PositiveInt = 704
    """Width of the SwiGLU layer."""
    max_seq_len: PositiveInt = 256
    """Longest sequence."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding (Llama 3: 500,000)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"head size hidden_size / num_heads = {self.hidden_size // self.num_heads} must be even for RoPE"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the rest."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon; ignored by `adamw`."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay, on matrices alone."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warmup."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the end as a share of the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class TrainingSection(Section):
    """What every stage that trains has in common."""

    seed: int | None = None
    """Seed of initialisation, data order and sampling; the pipeline's `seed` where none is given."""
    num_workers: PositiveInt = 1
    """Processes under torchrun. Part of the fingerprint: another world size sums in another order."""
    threads_per_worker: PositiveInt = 1
    """Threads of a process; also able to change the order of summation."""
    checkpoint_every: Annotated[PositiveInt, Operational] = 200
    """Steps between checkpoints."""
    log_every: Annotated[PositiveInt, Operational] = 10
    """Steps between logged points."""


class MixtureConfig(Section):
    """How the training tokens of the corpus are shared out among its streams; see `tokens.streams_by`."""

    weights: dict[str, NonNegativeFloat] = {}
    """Weight of each stream, by tokens, in any unit; a stream that is not named has none. Empty: every stream in
    proportion to its tokens. Llama 3 (Grattafiori et al. 2024, 3.1.2): 50 general, 25 mathematics and reasoning,
    17 code, 8 multilingual."""
    max_epochs: PositiveFloat = 4.0
    """Most times that a token of a stream is trained on; what a stream cannot give goes to the others in proportion
    to their weights. Up to 4 epochs repeated text is worth nearly as much as new (Muennighoff et al. 2023)."""
    max_epochs_of: dict[str, PositiveFloat] = {}
    """Another limit for single streams."""


class PretrainConfig(TrainingSection):
    """Next-token training of a fresh model on token shards."""

    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_steps: PositiveInt = 1_000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences of one optimizer step, over all workers and accumulation steps."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches of one optimizer step on each worker."""
    exercise_share: Share = 0.5
    """Share of tokens from the exercises of the `prompts` stage; the rest comes from the corpus."""
    mixture: MixtureConfig = MixtureConfig()
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill rows. `concat`: windows of all documents end to end. `best_fit`: whole documents, cut only
    where they are longer than a row, the rest of a row padded (Ding et al. 2024)."""
    stride: PositiveInt | None = None
    """Tokens from one window of `concat` to the next; max_seq_len where none is given. With fewer, windows overlap
    and a token is a target max_seq_len / stride times in a pass."""
    eval_every: Annotated[PositiveInt, Operational] = 200
    """Steps between validations."""
    eval_rows: PositiveInt = 64
    """Validation rows of each stream."""

    @model_validator(mode="after")
    def _stride_fits(self) -> PretrainConfig:
        if self.stride is not None and self.packing == "best_fit":
            raise ValueError(f"stride {self.stride} would be ignored by packing best_fit; leave it out, or take concat")
        if self.stride is not None and self.stride > self.model.max_seq_len:
            raise ValueError(
                f"stride {self.stride} must be at most model.max_seq_len {self.model.max_seq_len}: what lies between "
                "two windows would never be trained on"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> PretrainConfig:
        parts = self.num_workers * self.accumulation_steps
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of num_workers x accumulation_steps = "
                f"{self.num_workers} x {self.accumulation_steps} = {parts}"
            )
        return self
