"""Sections of the stages that replace the output layer: the reward model and classification."""

from __future__ import annotations

from lilpipe.config.training import OptimizerConfig, TrainingSection


class RewardModelConfig(TrainingSection):
    """A scalar head trained on preferences (Bradley-Terry)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)


class ClassifyConfig(TrainingSection):
    """Fine-tuning for classification: the output layer is replaced by one of as many outputs as there are labels."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0)
