"""Section of direct preference optimisation and its family."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lilpipe.config.training import OptimizerConfig, TrainingSection


class DPOConfig(TrainingSection):
    """Direct preference optimisation (Rafailov et al. 2023) with Llama 3's NLL term on chosen answers."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0)
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference model (Llama 3: 0.1)."""
    nll_coefficient: NonNegativeFloat = 0.2
    """Weight of the negative log-likelihood of chosen answers (Llama 3: 0.2)."""
    preference_coefficient: NonNegativeFloat = 1.0
    """Weight of the preference loss; 0 leaves the NLL-only control."""
    mask_formatting_tokens: bool = True
    """Leave the turn's end and header tokens out of the log-probabilities (Llama 3)."""
    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    """Pairs of one optimizer step."""
