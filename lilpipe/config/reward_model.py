"""Sections of the stages that replace the output layer: reward model and classification."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.training import OptimizerConfig, ParallelSection


class RewardModelConfig(ParallelSection):
    """Reward model with a scalar head, trained on preferences (Bradley & Terry 1952)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 1
    """Number of epochs. InstructGPT used 1: with more, the model overfitted (Ouyang et al. 2022, appendix C.2)."""
    batch_size: PositiveInt = 16
    """Rankings per optimizer step: a chosen and a rejected completion, or an edited, a chosen and a rejected one."""
    margin: NonNegativeFloat = 0.0
    """Margin of the ranking loss for each rank between two completions. Llama 2 used a margin that grows with the
    strength of the preference (Touvron et al. 2023, equation 2); Llama 3 used none."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's rewards, which centres rewards at 0 (Eisenstein et al. 2023: 0.01)."""

    @model_validator(mode="after")
    def _batches_divide(self) -> RewardModelConfig:
        self.check_batch(self.batch_size)
        return self


class ClassifyConfig(ParallelSection):
    """Sequence classification: the output layer is replaced by a head with one output per label."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)
    path: str | None = None
    """JSONL file of rows with a text and a label. If None, the stage classifies the questions of its input `prompts` by
    their family."""
    text_key: str = "text"
    """Key of the text in a row."""
    label_key: str = "label"
    """Key of the label in a row."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the texts in the validation split, chosen by a hash of the text."""
    num_epochs: PositiveInt = 3
    """Number of epochs."""
    batch_size: PositiveInt = 16
    """Texts per optimizer step."""
    frozen_layers: NonNegativeInt = 0
    """Number of first layers that are frozen."""
    freeze_embedding: bool = False
    """Freeze the embedding."""

    @model_validator(mode="after")
    def _batches_divide(self) -> ClassifyConfig:
        self.check_batch(self.batch_size)
        return self

    @model_validator(mode="after")
    def _freezing_is_used(self) -> ClassifyConfig:
        if self.lora is not None and (self.frozen_layers or self.freeze_embedding):
            raise ValueError(
                f"frozen_layers {self.frozen_layers} and freeze_embedding {self.freeze_embedding} would be ignored: "
                "with lora, all weights but the adapters and the head are frozen; remove them"
            )
        return self

    @model_validator(mode="after")
    def _every_stage_learns(self) -> ClassifyConfig:
        if self.parallel.pipeline > 1 and (self.frozen_layers or self.freeze_embedding):
            raise ValueError(
                f"parallel.pipeline: got {self.parallel.pipeline} with frozen_layers {self.frozen_layers} and "
                f"freeze_embedding {self.freeze_embedding}, expected 1: a pipeline stage might have no trainable "
                "parameters; use parallel.shard or parallel.tensor"
            )
        return self
