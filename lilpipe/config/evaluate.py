"""Sections of evaluation and registration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import PositiveInt

from lilpipe.config.sampling import SamplingSection
from lilpipe.config.section import Operational, Section


class EvaluateConfig(SamplingSection):
    """How good the model is after each training stage."""

    split: Literal["test", "dev"] = "test"
    """Prompts to report on; choose hyperparameters on `dev`."""
    samples_per_prompt: PositiveInt = 8
    """Samples behind pass@k."""
    validation_rows: PositiveInt = 200
    """Rows of validation text behind bits per byte."""


class RegisterConfig(Section):
    """The final model in Hugging Face layout, and its name in the MLflow registry."""

    model_name: Annotated[str, Operational] = "lilpipe"
    """Registered model's name."""
    alias: Annotated[str, Operational] = "champion"
    """Alias given to the new version."""
