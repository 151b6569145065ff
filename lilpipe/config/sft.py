"""Section of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import Ratio, Rounding, Section
from lilpipe.config.training import OptimizerConfig, ParallelSection

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAConfig(Section):
    """Low-rank adapters on linear layers, beside frozen weights (Hu et al. 2021)."""

    rank: PositiveInt = 8
    """Width of the adapters."""
    alpha: PositiveFloat = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training; not with `tensor` or activations computed again."""
    target_modules: Annotated[tuple[Projection, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get one; all of them match full fine-tuning best (Dettmers et al. 2023)."""


class SFTConfig(ParallelSection):
    """Supervised fine-tuning on conversations; loss on the assistant's tokens alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 16
    """Conversations of one optimizer step."""
    max_demonstrations: NonNegativeInt | None = None
    """Use at most this many written demonstrations of the `prompts` stage; all where none is given."""
    mixture: dict[str, NonNegativeFloat] = {}
    """How often an epoch shows the conversations of an origin (`demonstration`, `rejection_sampling`, the name of one
    of `prompts.sources`): 2 is twice, 0.5 a half of them, drawn once, 0 none. Once where an origin is not named."""
    packing: Annotated[bool, Rounding] = True
    """Several whole conversations in a row, attention inside each: less padding, the same loss."""
    min_supervised_ratio: Ratio = 0.01
    """Share of tokens that are learnt, below which the data are refused: answers have got lost."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """Noise on the embeddings in training, alpha over the root of the numbers in a conversation's embeddings; 0 is
    none (Jain et al. 2023 take 5 to 15)."""
    lora: LoRAConfig | None = None
    """Train adapters in place of the weights; none trains the weights."""

    @model_validator(mode="after")
    def _batches_divide(self) -> SFTConfig:
        self.check_batch(self.batch_size)
        return self

    @model_validator(mode="after")
    def _adapters_are_computed(self) -> SFTConfig:
        if self.lora is None:
            return self
        if self.precision == "fp8":
            raise ValueError("lora: got precision fp8, which would leave the adapters out; take bf16")
        # What is dropped follows from a worker's random state: the other workers that hold parts of a matrix, and a
        # block that is computed again, would drop other elements.
        if self.lora.dropout and self.layout.tensor > 1:
            raise ValueError(
                f"lora.dropout: got {self.lora.dropout} with parallel.tensor {self.layout.tensor}, expected 0, or "
                "parallel.tensor = 1"
            )
        if self.lora.dropout and self.activation_checkpointing != "none":
            raise ValueError(
                f"lora.dropout: got {self.lora.dropout} with activation_checkpointing "
                f"{self.activation_checkpointing!r}, expected 0, or activation_checkpointing = 'none'"
            )
        return self
