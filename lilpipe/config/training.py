"""Sections of the optimizer and of pretraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import Launch, LaunchConfig, ParallelConfig, ParallelDims
from lilpipe.config.parallel_checks import check_model, check_phases
from lilpipe.config.phases import MixtureConfig, Phase, PhaseConfig, resolve_phases
from lilpipe.config.section import Operational, Ratio, Rounding, Section


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the decoder layers (Jordan et al. 2024), AdamW for all other parameters."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon; not used by `adamw`."""
    beta1: Ratio = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Ratio = 0.95
    """Decay rate of AdamW's second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, applied only to matrices."""
    warmup_steps: NonNegativeInt = 50
    """Optimizer steps of linear warmup."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning-rate schedule after warmup. `wsd`: warmup, stable, decay (Hu et al. 2024)."""
    decay_ratio: Ratio = 0.2
    """Fraction of all steps in the decay phase of `wsd`; not used by other schedules."""
    min_lr_ratio: Ratio = 0.0
    """Final learning rate as a fraction of the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum global gradient norm; larger gradients are clipped."""


class TrainingSection(Section):
    """Settings shared by all stages that train."""

    seed: int | None = None
    """Seed of initialization, data order and sampling; if None, the pipeline's `seed`."""
    num_workers: Annotated[PositiveInt, Rounding] = 1
    """Number of workers (world size). It is part of the fingerprint because it changes the order of summation."""
    threads_per_worker: Annotated[PositiveInt, Rounding] = 1
    """CPU threads per worker. They also can change the order of summation."""
    checkpoint_every: Annotated[PositiveInt, Operational] = 200
    """Optimizer steps between checkpoints."""
    keep_last: Annotated[PositiveInt, Operational] = 2
    """Number of latest checkpoints to keep for resuming."""
    keep_every: Annotated[PositiveInt | None, Operational] = None
    """Also keep the checkpoints at multiples of this number of steps, without optimizer state; if None, only the
    latest."""
    log_every: Annotated[PositiveInt, Operational] = 10
    """Optimizer steps between logged metrics."""
    launch: Launch = LaunchConfig()


class ParallelSection(TrainingSection):
    """Settings shared by all stages that can shard their model over workers."""

    accumulation_steps: Annotated[PositiveInt, Rounding] = 1
    """Micro-batches per optimizer step on each worker (gradient accumulation); with pipeline parallelism, the
    micro-batches of its schedule."""
    parallel: Annotated[ParallelConfig, Rounding] = ParallelConfig()
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Data type of the forward and backward passes; weights, reductions and optimizer state stay in fp32. `fp8` needs
    the extra `fp8` and a GPU with FP8 support."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], Rounding] = "none"
    """What the backward pass recomputes: nothing, everything except matrix products (`selective`), or whole decoder
    layers (`full`)."""
    compile: Annotated[bool | None, Rounding] = None
    """Compile decoder layers with `torch.compile`. If None, compile only if the run is long enough to save more time
    than compilation takes."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters instead of the weights; if None, train the weights."""

    @model_validator(mode="after")
    def _adapters_are_computed(self) -> ParallelSection:
        if self.lora is not None and self.precision == "fp8":
            raise ValueError("lora: got precision fp8, which would skip the adapters; use bf16")
        if self.lora is not None and self.lora.load_in_4bit and self._splits_or_compiles:
            raise ValueError("lora.load_in_4bit: expected only parallel.replicate, and compile = false; set it so")
        return self

    @property
    def _splits_or_compiles(self) -> bool:
        return self.layout.replicate < self.num_workers or bool(self.compile)

    @property
    def layout(self) -> ParallelDims:
        """Device mesh of the workers."""
        return self.parallel.layout(self.num_workers)

    def check_batch(self, batch_size: int) -> None:
        """Raise ``ValueError`` if ``batch_size`` is not divisible into equal micro-batches over the workers."""
        replicate, shard = self.layout.replicate, self.layout.shard
        parts = replicate * shard * self.accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of replicate x shard x accumulation_steps = {replicate} x "
                f"{shard} x {self.accumulation_steps} = {parts}"
            )


class HealthConfig(Section):
    """Handling of loss spikes and values that are not finite."""

    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """Action if the loss or the gradient is not finite. `skip` omits the update. `rollback` returns to the last
    checkpoint and omits the batches since then (PaLM, Chowdhery et al. 2022, 5.1)."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """Action if the loss or the gradient norm spikes."""
    spike_deviations: PositiveFloat = 6.0
    """A spike is a value more than this many standard deviations above the mean of the last `window` steps."""
    window: PositiveInt = 128
    """Optimizer steps used for the mean and the standard deviation; before this many steps, no spike is detected."""
    max_events: PositiveInt = 10
    """Maximum number of skips and rollbacks before the run stops."""


class NeedleConfig(Section):
    """Needle in a haystack: a fact inserted into a long text, and how much more likely the model finds it than a wrong
    one.
    """

    depths: Annotated[tuple[Ratio, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Positions of the fact in the text, from the beginning (0) to the end (1)."""
    num_samples: PositiveInt = 8
    """Number of texts per depth."""


class BudgetConfig(Section):
    """Assumptions of `lilpipe plan`; they cannot change an output."""

    device: str | None = None
    """Name of the accelerator (`h100`); if None, the one of this machine. See `lilpipe.model.devices`."""
    mfu: Ratio = 0.4
    """Expected model FLOPs utilization: fraction of the device's peak (Chowdhery et al. 2022)."""
    price_per_hour: NonNegativeFloat = 0.0
    """Price of one device per hour."""


class PretrainConfig(ParallelSection):
    """Next-token training of a new model on token shards."""

    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_steps: PositiveInt = 1_000
    """Number of optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all workers and accumulation steps."""
    seq_len: PositiveInt | None = None
    """Tokens per sequence; if None, model.max_seq_len."""
    phases: tuple[PhaseConfig, ...] = ()
    """Changes of settings during the run, in order."""
    intra_document_masking: bool = False
    """Mask attention between documents (Llama 3, 3.2)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the z-loss, the squared logarithm of the softmax normalizer (PaLM: 1e-4)."""
    health: HealthConfig = HealthConfig()
    exercise_ratio: Ratio = 0.5
    """Fraction of tokens from the exercises of the `prompts` stage; the rest comes from the corpus."""
    mixture: MixtureConfig = MixtureConfig()
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents are packed into rows. `concat`: documents are concatenated and cut into windows. `best_fit`: whole
    documents, truncated only if they are longer than a row; rows are padded (best-fit packing, Ding et al. 2024)."""
    stride: PositiveInt | None = None
    """Tokens between the starts of two windows of `concat`; if None, seq_len. With a smaller stride, windows overlap
    and each token is a target seq_len / stride times per epoch."""
    eval_every: Annotated[PositiveInt, Operational] = 200
    """Optimizer steps between validations."""
    validation_rows: PositiveInt = 64
    """Number of validation rows per stream."""
    needle: NeedleConfig | None = None
    """Needle-in-a-haystack test at the end of each phase; if None, it is not run."""
    sample_prompts: Annotated[tuple[str, ...], Operational] = ("The ",)
    """Prompts that the model completes at each validation, for inspection."""
    budget: Annotated[BudgetConfig, Operational] = BudgetConfig()

    @model_validator(mode="after")
    def _phases_follow(self) -> PretrainConfig:
        least = 1
        for number, phase in enumerate(self.phases):
            if not least <= phase.from_step < self.num_steps:
                raise ValueError(
                    f"phases.{number}.from_step {phase.from_step} must be {least} to {self.num_steps - 1}: after the "
                    f"phase before it and below num_steps {self.num_steps}"
                )
            if phase.rope_theta is not None and self.model.position_embedding == "learned":
                raise ValueError(f"phases.{number}.rope_theta would be ignored: gpt2 has learned positions")
            least = phase.from_step + 1
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> PretrainConfig:
        if self.lora is not None and self.lora.load_in_4bit:
            raise ValueError("lora.load_in_4bit: pretraining does not support it; set it to false")
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> PretrainConfig:
        if self.stride is not None and self.packing == "best_fit":
            raise ValueError(f"stride {self.stride} would be ignored by packing best_fit; remove it, or use concat")
        for phase in self.resolved_phases:
            if phase.seq_len > self.model.max_seq_len:
                raise ValueError(
                    f"{phase.setting('seq_len')} {phase.seq_len} must be at most model.max_seq_len "
                    f"{self.model.max_seq_len}"
                )
            if self.stride is not None and self.stride > phase.seq_len:
                raise ValueError(
                    f"stride {self.stride} must be at most {phase.setting('seq_len')} {phase.seq_len}: tokens "
                    "between two windows would never be trained on"
                )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> PretrainConfig:
        layout = self.layout
        for phase in self.resolved_phases:
            parts = layout.data * phase.accumulation_steps
            if phase.batch_size % parts:
                raise ValueError(
                    f"{phase.setting('batch_size')} {phase.batch_size} must be a multiple of replicate x shard x "
                    f"accumulation_steps = {layout.replicate} x {layout.shard} x {phase.accumulation_steps} = {parts}"
                )
        return self

    @model_validator(mode="after")
    def _layout_fits(self) -> PretrainConfig:
        check_model(self.parallel, self.layout, self.model, activation_checkpointing=self.activation_checkpointing)
        check_phases(self.parallel, self.layout, self.resolved_phases)
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> PretrainConfig:
        optimizer, num_steps = self.optimizer, self.num_steps
        if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_ratio * num_steps > num_steps:
            raise ValueError(
                f"optimizer: warmup_steps {optimizer.warmup_steps} + decay_ratio {optimizer.decay_ratio} x num_steps "
                f"{num_steps} must be at most {num_steps}; decrease one of them, or increase num_steps"
            )
        return self

    @property
    def resolved_phases(self) -> tuple[Phase, ...]:
        """Complete settings of all phases: the first starts at step 0, the others at their ``from_step``."""
        whole = Phase(
            number=0,
            first=0,
            stop=self.num_steps,
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            seq_len=self.seq_len or self.model.max_seq_len,
            rope_theta=self.model.rope_theta,
            exercise_ratio=self.exercise_ratio,
            mixture=self.mixture,
        )
        return resolve_phases(whole, self.phases)

    def phase_of(self, step: int) -> Phase:
        """Return the phase that contains an optimizer step."""
        return next(phase for phase in self.resolved_phases if step < phase.stop)
