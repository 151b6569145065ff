"""Sections of reinforcement learning: GRPO and PPO."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.training import OptimizerConfig, TrainingSection


class GRPOConfig(TrainingSection):
    """Group relative policy optimisation (Shao et al. 2024) with the verifier as reward."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for each prompt."""
    clip_range: PositiveFloat = 0.2
    """Clipping of the probability ratio (PPO's epsilon)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the initial policy (k3 estimator, Schulman 2020)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation; off is Dr.GRPO (Liu et al. 2025)."""
    sampling: SamplingConfig = SamplingConfig()


class PPOConfig(TrainingSection):
    """Proximal policy optimisation (Schulman et al. 2017) with a reward model: InstructGPT's last stage."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_steps=3, weight_decay=0.0)
