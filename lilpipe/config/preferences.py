"""Sections of the stages that keep or pair sampled answers: rejection sampling and preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lilpipe.config.sampling import SamplingSection


class RejectionSamplingConfig(SamplingSection):
    """Sample K answers to each prompt, keep what a verifier accepts."""

    prompt_form: Literal["text", "chat"] = "text"
    """How the model meets a question: `text` as in its pretraining (a base model), `chat` as a user's turn."""
    num_prompts: PositiveInt = 1_000
    """Prompts of the `train` split."""
    samples_per_prompt: PositiveInt = 8
    """K; Llama 3 draws 10 to 30."""
    max_kept_per_prompt: PositiveInt = 1
    """Distinct correct answers kept for one prompt."""


class PreferencesConfig(SamplingSection):
    """Pairs of answers sampled from a model: one preferred to the other by a stated rule."""

    rule: Literal["brevity"] = "brevity"
    """`brevity`: of two answers with the same verdict of the verifier, the one with fewer words."""
    num_prompts: PositiveInt = 600
    """Prompts of the `train` split, taken from its end, so that rejection sampling's come last."""
    num_heldout: PositiveInt = 100
    """Prompts of the `dev` split whose pairs are held out, to measure preference accuracy."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    max_pairs_per_prompt: PositiveInt = 1
    contrast: Literal["widest", "nearest"] = "widest"
    """`widest`: the shortest answer against the longest. `nearest`: an answer as the model drew it against the nearest
    longer one, so that chosen answers are hardly shorter than the model's own and likelihood on them teaches less."""
    min_words_apart: PositiveInt = 1
    """Fewest words by which the answers of a pair differ."""
    only_correct: bool = True
    """Pair correct answers alone; else, after them, also answers that are wrong or malformed alike."""
