"""Sections of the stages that replace the output layer: the reward model and classification."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.training import OptimizerConfig, ParallelSection


class RewardModelConfig(ParallelSection):
    """A scalar head trained on preferences (Bradley & Terry 1952)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 1
    """InstructGPT took one: with more it overfitted at once (Ouyang et al. 2022, appendix C.2)."""
    batch_size: PositiveInt = 16
    """Rankings of one optimizer step: pairs, or an edited, a chosen and a rejected answer."""
    margin: NonNegativeFloat = 0.0
    """By how much an answer must win for each place that it stands above another. Llama 2 took one that grew with the
    strength of the preference (Touvron et al. 2023, equation 2); Llama 3 took none."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of the square of a pair's summed scores, which draws scores towards a mean of 0 (Eisenstein et al. 2023);
    0.01 there."""

    @model_validator(mode="after")
    def _batches_divide(self) -> RewardModelConfig:
        self.check_batch(self.batch_size)
        return self


class ClassifyConfig(ParallelSection):
    """Fine-tuning for classification: the output layer is replaced by one of as many outputs as there are labels."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)
    path: str | None = None
    """JSONL file of rows with a text and a label. Where none is given, the step's input `prompts` is classified: its
    questions by their families."""
    text_key: str = "text"
    """Key of the text in a row."""
    label_key: str = "label"
    """Key of the label in a row."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the texts that are held out, by a hash of the text."""
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 16
    """Texts of one optimizer step."""
    frozen_layers: NonNegativeInt = 0
    """The first so many blocks are not trained."""
    freeze_embedding: bool = False
    """Leave the embedding as it is."""

    @model_validator(mode="after")
    def _batches_divide(self) -> ClassifyConfig:
        self.check_batch(self.batch_size)
        return self

    @model_validator(mode="after")
    def _every_stage_learns(self) -> ClassifyConfig:
        if self.parallel.pipeline > 1 and (self.frozen_layers or self.freeze_embedding):
            raise ValueError(
                f"parallel.pipeline: got {self.parallel.pipeline} with frozen_layers {self.frozen_layers} and "
                f"freeze_embedding {self.freeze_embedding}, expected 1: a stage may be left with nothing to train; "
                "take shard or tensor"
            )
        return self
