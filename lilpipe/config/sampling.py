"""How answers are drawn from a model, and what every stage that samples has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from lilpipe.config.section import NumWorkers, Section


class SamplingConfig(Section):
    """How answers are drawn from a model."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus (Holtzman et al. 2020)."""
    max_new_tokens: PositiveInt = 48
    """Longest answer."""
    batch_size: PositiveInt = 256
    """Sequences decoded together."""


class SamplingSection(Section):
    """What every stage that samples from a model has in common."""

    seed: int | None = None
    """Seed of sampling; the pipeline's `seed` where none is given."""
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_chunk: PositiveInt = 100
    """Prompts between two points from which a killed run continues."""
    num_workers: NumWorkers = 1
    """Processes that sample; the chunks are divided among them and do not depend on their number."""
    threads_per_worker: PositiveInt = 1
    """Threads of a process."""
