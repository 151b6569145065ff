"""Sections of optimizer and pretraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import Launch, LaunchConfig, ParallelConfig, ParallelDims
from lilpipe.config.parallel_checks import check_model, check_phases
from lilpipe.config.phases import MixtureConfig, Phase, PhaseConfig, resolve_phases
from lilpipe.config.section import Operational, Ratio, Rounding, Section


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the rest."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon; ignored by `adamw`."""
    beta1: Ratio = 0.9
    beta2: Ratio = 0.95
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay, on matrices alone."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warmup."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warmup. `wsd`: warmup, stable, decay (Hu et al. 2024)."""
    decay_ratio: Ratio = 0.2
    """Share of the steps, at the end, over which `wsd` falls; the others do not use it."""
    min_lr_ratio: Ratio = 0.0
    """Learning rate at the end as a share of the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class TrainingSection(Section):
    """What every stage that trains has in common."""

    seed: int | None = None
    """Seed of initialisation, data order and sampling; the pipeline's `seed` where none is given."""
    num_workers: Annotated[PositiveInt, Rounding] = 1
    """Processes under torchrun. Part of the fingerprint: another world size sums in another order."""
    threads_per_worker: Annotated[PositiveInt, Rounding] = 1
    """Threads of a process; also able to change the order of summation."""
    checkpoint_every: Annotated[PositiveInt, Operational] = 200
    """Steps between checkpoints."""
    keep_last: Annotated[PositiveInt, Operational] = 2
    """Checkpoints kept to go on from."""
    keep_every: Annotated[PositiveInt | None, Operational] = None
    """Checkpoints after multiples of so many steps are kept as well, without their optimizer state."""
    log_every: Annotated[PositiveInt, Operational] = 10
    """Steps between logged points."""
    launch: Launch = LaunchConfig()


class ParallelSection(TrainingSection):
    """What every stage has in common whose model may be cut over its processes."""

    accumulation_steps: Annotated[PositiveInt, Rounding] = 1
    """Micro-batches of one optimizer step on each worker; those of the pipeline where there is one."""
    parallel: Annotated[ParallelConfig, Rounding] = ParallelConfig()
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Arithmetic of forward and backward passes; weights, reductions and optimizer state stay in fp32. `fp8` takes the
    extra `fp8` and a GPU that has it."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], Rounding] = "none"
    """What is computed again in the backward pass: nothing, all but the matrix products, or whole blocks."""
    compile: Annotated[bool | None, Rounding] = None
    """Whether blocks are compiled (`torch.compile`); none compiles where the run is long enough to earn it."""

    @property
    def layout(self) -> ParallelDims:
        """The mesh of processes."""
        return self.parallel.layout(self.num_workers)

    def check_batch(self, batch_size: int) -> None:
        """Raise ``ValueError`` for a batch that cannot be divided into micro-batches over the workers."""
        replicate, shard = self.layout.replicate, self.layout.shard
        parts = replicate * shard * self.accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of replicate x shard x accumulation_steps = {replicate} x "
                f"{shard} x {self.accumulation_steps} = {parts}"
            )


class HealthConfig(Section):
    """What to do about steps that would spoil the weights."""

    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """Where the loss or the gradient is not finite. `skip` leaves the update out. `rollback` goes back to the last
    checkpoint and leaves out the batches from there to here (PaLM, Chowdhery et al. 2022, 5.1)."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """Where the loss or the gradient's norm lies above what the last steps lead one to expect."""
    spike_deviations: PositiveFloat = 6.0
    """A spike lies so many standard deviations above the mean of the last `window` steps."""
    window: PositiveInt = 128
    """Steps that the mean and the deviation are taken from; before there are so many, nothing is a spike."""
    max_events: PositiveInt = 10
    """Skips and roll-backs after which the run stops."""


class NeedleConfig(Section):
    """Needle in a haystack: a fact set in a long text, and how much likelier the model finds it than a wrong one."""

    depths: Annotated[tuple[Ratio, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the text the fact stands, from its beginning (0) to its end (1)."""
    num_samples: PositiveInt = 8
    """Texts for each depth."""


class BudgetConfig(Section):
    """What `lilpipe plan` reckons with; nothing here can change an output."""

    device: str | None = None
    """Accelerator by name (`h100`); the one at hand where none is given. See `lilpipe.model.devices`."""
    mfu: Ratio = 0.4
    """Share of the device's peak that is expected to be reached (Chowdhery et al. 2022)."""
    price_per_hour: NonNegativeFloat = 0.0
    """Price of one device for an hour."""


class PretrainConfig(ParallelSection):
    """Next-token training of a fresh model on token shards."""

    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_steps: PositiveInt = 1_000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences of one optimizer step, over all workers and accumulation steps."""
    seq_len: PositiveInt | None = None
    """Tokens of a sequence; model.max_seq_len where none is given."""
    phases: tuple[PhaseConfig, ...] = ()
    """Changes on the way, in order."""
    intra_document_masking: bool = False
    """Attention stays inside documents (Llama 3, 3.2)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the squared logarithm of the softmax's normaliser (PaLM: 1e-4)."""
    health: HealthConfig = HealthConfig()
    exercise_ratio: Ratio = 0.5
    """Share of tokens from the exercises of the `prompts` stage; the rest comes from the corpus."""
    mixture: MixtureConfig = MixtureConfig()
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill rows. `concat`: windows of all documents end to end. `best_fit`: whole documents, cut only
    where they are longer than a row, the rest of a row padded (Ding et al. 2024)."""
    stride: PositiveInt | None = None
    """Tokens from one window of `concat` to the next; seq_len where none is given. With fewer, windows overlap
    and a token is a target seq_len / stride times in a pass."""
    eval_every: Annotated[PositiveInt, Operational] = 200
    """Steps between validations."""
    validation_rows: PositiveInt = 64
    """Validation rows of each stream."""
    needle: NeedleConfig | None = None
    """Needle-in-a-haystack at the end of each phase; none leaves it out."""
    sample_prompts: Annotated[tuple[str, ...], Operational] = ("The ",)
    """Beginnings that the model continues at each validation, for people to read."""
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
            if phase.rope_theta is not None and self.model.architecture == "gpt2":
                raise ValueError(f"phases.{number}.rope_theta would be ignored: gpt2 has learned positions")
            least = phase.from_step + 1
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> PretrainConfig:
        if self.stride is not None and self.packing == "best_fit":
            raise ValueError(f"stride {self.stride} would be ignored by packing best_fit; leave it out, or take concat")
        for phase in self.resolved_phases:
            if phase.seq_len > self.model.max_seq_len:
                raise ValueError(
                    f"{phase.setting('seq_len')} {phase.seq_len} must be at most model.max_seq_len "
                    f"{self.model.max_seq_len}"
                )
            if self.stride is not None and self.stride > phase.seq_len:
                raise ValueError(
                    f"stride {self.stride} must be at most {phase.setting('seq_len')} {phase.seq_len}: what lies "
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
                f"{num_steps} must be at most {num_steps}; shorten one of them, or take more steps"
            )
        return self

    @property
    def resolved_phases(self) -> tuple[Phase, ...]:
        """The settings of all steps: the first phase begins at step 0, each of `phases` where it says."""
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
        """The settings of a step."""
        return next(phase for phase in self.resolved_phases if step < phase.stop)
