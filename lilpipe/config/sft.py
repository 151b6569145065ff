"""Section of supervised fine-tuning."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from lilpipe.config.training import OptimizerConfig, TrainingSection


class SFTConfig(TrainingSection):
    """Supervised fine-tuning on conversations; loss on the assistant's tokens alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 16
    """Conversations of one optimizer step."""
    max_demonstrations: NonNegativeInt | None = None
    """Use at most this many written demonstrations of the `prompts` stage; all where none is given."""
