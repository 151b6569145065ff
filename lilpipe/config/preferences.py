"""Sections of the stages that keep or pair sampled answers: rejection sampling and preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from lilpipe.config.prompts import ANSWER_REWARD, RewardConfigs
from lilpipe.config.sampling import SamplingSection


class RejectionSamplingConfig(SamplingSection):
    """Sample K answers to each prompt, keep what a verifier or a reward model accepts."""

    prompt_form: Literal["text", "chat"] = "text"
    """How the model meets a question: `text` as in its pretraining (a base model), `chat` as a user's turn."""
    num_prompts: PositiveInt = 1_000
    """Prompts of the `train` split."""
    num_generations: PositiveInt = 8
    """K; Llama 3 draws 10 to 30."""
    rewards: RewardConfigs = ANSWER_REWARD
    """What an answer is worth; a weighted sum, each part of it logged apart."""
    keep: Literal["all_correct", "best", "threshold"] = "all_correct"
    """`all_correct`: those that the verifier accepts, in the order sampled. `best`: those of the highest reward.
    `threshold`: those whose reward reaches `threshold`, the highest first. Only answers that ended are kept."""
    threshold: float | None = None
    """Least reward of an answer that is kept; for `threshold`, and if wanted for `best`."""
    max_kept_per_prompt: PositiveInt | None = 1
    """Distinct answers kept for one prompt; all where none is given, which `best` cannot do."""
    policy: Literal["latest", "best"] = "latest"
    """Which of several checkpoints given as `model` samples: the last one named, or the one whose answers to prompts of
    the `validation` split are worth most (Llama 3 takes the best of the last round)."""
    policy_prompts: PositiveInt = 50
    """Prompts of the `validation` split by which `best` is found, `num_generations` answers to each."""

    @model_validator(mode="after")
    def _threshold_is_used(self) -> RejectionSamplingConfig:
        if self.keep == "threshold" and self.threshold is None:
            raise ValueError("keep is 'threshold', but threshold is not given; say the least reward to keep")
        if self.keep == "all_correct" and self.threshold is not None:
            raise ValueError(f"keep is 'all_correct', which does not use threshold (got {self.threshold}); remove it")
        if self.keep == "best" and self.max_kept_per_prompt is None:
            raise ValueError("keep is 'best' of how many? give max_kept_per_prompt, or keep by 'threshold'")
        return self


class PreferencesConfig(SamplingSection):
    """Pairs of answers, one preferred to the other by a stated rule; or unpaired completions, desirable or not."""

    rule: Literal["brevity", "reward", "correctness", "data"] = "brevity"
    """`brevity`: of two answers with the same verdict of the verifier, the one with fewer words. `reward`: the best
    answer against the worst by `rewards`. `correctness`: one that the verifier accepts against one that it does not.
    `data`: the pairs that the input `prompts` holds, made from a preference set; nothing is sampled."""
    unpaired: bool = False
    """Single answers, each desirable or not, instead of pairs: what `kto` learns from, where most prompts have answers
    of one kind alone. Every answer that ended is taken: right or wrong (`correctness`), of a reward that reaches
    `threshold` or not (`reward`), or as its row says (`data`)."""
    threshold: float | None = None
    """Least reward of a desirable answer (`reward`, `unpaired`)."""
    rewards: RewardConfigs = ANSWER_REWARD
    """What an answer is worth; a weighted sum, each part of it logged apart."""
    min_margin: NonNegativeFloat = 0.0
    """Least difference of reward between the answers of a pair; it must be more than 0 in any case (`reward`)."""
    num_prompts: PositiveInt = 600
    """Prompts of the `train` split, taken from its end, so that rejection sampling's come last."""
    num_validation: PositiveInt = 100
    """Prompts of the `validation` split whose pairs are held out, to measure preference accuracy."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    max_pairs_per_prompt: PositiveInt = 1
    contrast: Literal["widest", "nearest"] = "widest"
    """`widest`: the shortest answer against the longest. `nearest`: an answer as the model drew it against the nearest
    longer one, so that chosen answers are hardly shorter than the model's own and likelihood on them teaches less.
    (`brevity`)"""
    min_words_apart: PositiveInt = 1
    """Fewest words by which the answers of a pair differ (`brevity`)."""
    only_correct: bool = True
    """Pair correct answers alone; else, after them, also answers that are wrong or malformed alike (`brevity`)."""

    @model_validator(mode="after")
    def _each_answer_has_a_verdict(self) -> PreferencesConfig:
        if self.unpaired and self.rule == "brevity":
            raise ValueError(
                "unpaired: rule 'brevity' compares two answers and says nothing of one; take 'correctness', 'reward' "
                "or 'data'"
            )
        if (self.threshold is not None) != (self.unpaired and self.rule == "reward"):
            raise ValueError(
                f"threshold: got {self.threshold} with rule {self.rule!r} and unpaired {self.unpaired}; it is the "
                "least reward of a desirable answer, for rule 'reward' with unpaired, and needed there"
            )
        return self
