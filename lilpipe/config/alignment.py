"""Sections of everything behind pretraining: prompts, sampling, fine-tuning, evaluation, registration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lilpipe.config.section import NumWorkers, Operational, Section, Share
from lilpipe.config.training import OptimizerConfig, TrainingSection


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


class SFTConfig(TrainingSection):
    """Supervised fine-tuning on conversations; loss on the assistant's tokens alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 16
    """Conversations of one optimizer step."""
    max_demonstrations: NonNegativeInt | None = None
    """Use at most this many written demonstrations of the `prompts` stage; all where none is given."""


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
