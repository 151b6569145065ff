"""Section of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import Ratio, Rounding
from lilpipe.config.training import OptimizerConfig, ParallelSection


class SFTConfig(ParallelSection):
    """Supervised fine-tuning on conversations; the loss is on assistant tokens only."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 3
    """Number of epochs."""
    batch_size: PositiveInt = 16
    """Conversations per optimizer step."""
    max_demonstrations: NonNegativeInt | None = None
    """Maximum number of written demonstrations from the `prompts` stage; if None, all."""
    mixture: dict[str, NonNegativeFloat] = {}
    """Repetitions per epoch of the conversations of each origin (`demonstration`, `rejection_sampling`, or the name of
    one of `prompts.sources`): 2 uses them twice, 0.5 uses a random half (the same in each epoch), 0 none. Origins
    that are not named are used once."""
    packing: Annotated[bool, Rounding] = True
    """Pack several whole conversations into a row, with attention masked between them: less padding, the same loss."""
    mask_history: bool = False
    """Loss on the last assistant message of each conversation only; if false, on all of them. A message's own `weight`
    (0 to 1) multiplies its loss; 0 leaves it in the context without loss."""
    excess_length_strategy: Literal["drop", "split", "raise"] = "drop"
    """Conversations longer than the model's context. `drop`: left out, counted and listed in the report. `split`:
    divided before user messages into parts that fit, each with the system message; plain texts into pieces as long as
    the context. What does not fit even so is left out. `raise`: an error. None is ever truncated."""
    max_malformed_ratio: Ratio = 0.01
    """Maximum fraction of conversations that the chat template rejects or does not write out whole. They are left out,
    counted and listed in the report; above this fraction the stage fails."""
    min_supervised_ratio: Ratio = 0.01
    """Minimum fraction of supervised tokens; below it the stage fails, since answers are probably missing."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """Scale of NEFTune noise on the embeddings in training: alpha / sqrt(L D) for L tokens of size D (Jain et al. 2023:
    5 to 15); 0 disables it."""

    @model_validator(mode="after")
    def _batches_divide(self) -> SFTConfig:
        self.check_batch(self.batch_size)
        return self
