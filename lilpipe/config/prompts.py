"""Section of the prompts and of the rewards of answers to them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from lilpipe.config.section import Section, Share


class PromptsConfig(Section):
    """A generated family of tasks whose answers a program can verify, split once for the whole pipeline."""

    seed: int = 0
    """Seed of the generator."""
    families: tuple[str, ...] = ("copy", "reverse", "sort")
    """Task families; `lilpipe.alignment.prompts.FAMILIES` lists them."""
    num_documents: NonNegativeInt = 20_000
    """Exercises in plain text form for pretraining."""
    num_demonstrations: NonNegativeInt = 1_000
    """Prompts with a written answer, for supervised fine-tuning."""
    num_train: PositiveInt = 4_000
    """Prompts without an answer, for sampling: rejection sampling, DPO, GRPO."""
    num_dev: PositiveInt = 300
    """Held-out prompts on which hyperparameters may be chosen."""
    num_test: PositiveInt = 500
    """Held-out prompts that only `evaluate` reads."""
    filler_share: Share = 0.75
    """Share of written answers, in exercises and demonstrations, that open with sentences of courtesy."""
    max_filler_sentences: Annotated[int, Field(ge=0, le=8)] = 3
    """Most sentences of courtesy before an answer."""
