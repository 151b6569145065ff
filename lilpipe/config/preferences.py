"""Sections of rejection sampling and of preference pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from lilpipe.config.prompts import ANSWER_REWARD, RewardConfigs
from lilpipe.config.sampling import SamplingSection


class RejectionSamplingConfig(SamplingSection):
    """Sample K completions per prompt and keep those that a verifier or a reward model accepts."""

    prompt_form: Literal["text", "chat"] = "text"
    """Prompt format: `text` as in pretraining (for a base model), `chat` as a user turn of the chat template."""
    num_prompts: PositiveInt = 1_000
    """Number of prompts from the `train` split."""
    num_generations: PositiveInt = 8
    """Completions per prompt, K; Llama 3 samples 10 to 30."""
    rewards: RewardConfigs = ANSWER_REWARD
    """Reward functions; the reward is their weighted sum, and each one is logged separately."""
    keep: Literal["all_correct", "best", "threshold"] = "all_correct"
    """`all_correct`: keep completions that the verifier accepts, in sampling order. `best`: keep those with the highest
    reward. `threshold`: keep those with a reward of at least `threshold`, highest first. Truncated completions are
    never kept."""
    threshold: float | None = None
    """Minimum reward of a kept completion; required by `threshold`, optional for `best`."""
    max_kept_per_prompt: PositiveInt | None = 1
    """Maximum number of distinct completions kept per prompt; if None, all (not possible with `best`)."""
    policy: Literal["latest", "best"] = "latest"
    """Which checkpoint samples if `model` names several: the last one named, or the one with the highest reward on
    prompts of the `validation` split (Llama 3 uses the best model of the previous round)."""
    policy_prompts: PositiveInt = 50
    """Prompts of the `validation` split to select the `best` policy, with `num_generations` completions each."""

    @model_validator(mode="after")
    def _threshold_is_used(self) -> RejectionSamplingConfig:
        if self.keep == "threshold" and self.threshold is None:
            raise ValueError("keep is 'threshold', but threshold is not set; set it to the minimum reward to keep")
        if self.keep == "all_correct" and self.threshold is not None:
            raise ValueError(f"keep is 'all_correct', which does not use threshold (got {self.threshold}); remove it")
        if self.keep == "best" and self.max_kept_per_prompt is None:
            raise ValueError("keep is 'best', but max_kept_per_prompt is None; set it, or use keep 'threshold'")
        return self


class PreferencesConfig(SamplingSection):
    """Pairs of completions ranked by a rule, or unpaired desirable and undesirable completions."""

    rule: Literal["brevity", "reward", "correctness", "data"] = "brevity"
    """`brevity`: of two completions with the same verdict of the verifier, prefer the one with fewer words. `reward`:
    the completion with the highest reward against the one with the lowest. `correctness`: a correct completion against
    an incorrect one. `data`: the pairs of the preference data sets in the input `prompts`; nothing is sampled."""
    unpaired: bool = False
    """Write single completions, each desirable or undesirable, instead of pairs: the data of `kto`, useful if most
    prompts have only correct or only incorrect completions. Every completion that is not truncated is used. It is
    desirable if it is correct (`correctness`), has a reward of at least `threshold` (`reward`), or is labelled so
    (`data`)."""
    threshold: float | None = None
    """Minimum reward of a desirable completion (`reward` with `unpaired`)."""
    rewards: RewardConfigs = ANSWER_REWARD
    """Reward functions; the reward is their weighted sum, and each one is logged separately."""
    min_margin: NonNegativeFloat = 0.0
    """Minimum reward difference between the completions of a pair; it must always be above 0 (`reward`)."""
    num_prompts: PositiveInt = 600
    """Number of prompts from the end of the `train` split, so that prompts used by rejection sampling come last."""
    num_validation: PositiveInt = 100
    """Prompts of the `validation` split whose pairs form the validation split of DPO, to measure preference
    accuracy."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions sampled per prompt."""
    max_pairs_per_prompt: PositiveInt = 1
    """Maximum number of pairs per prompt."""
    contrast: Literal["widest", "nearest"] = "widest"
    """`widest`: the shortest completion against the longest. `nearest`: a completion against the next longer one, so
    that chosen completions are hardly shorter than the model's own and the NLL term alone teaches little brevity.
    (`brevity`)"""
    min_words_apart: PositiveInt = 1
    """Minimum difference in words between the completions of a pair (`brevity`)."""
    only_correct: bool = True
    """Pair only correct completions. If false, also pair completions that are both wrong or both malformed, after the
    correct ones (`brevity`)."""

    @model_validator(mode="after")
    def _each_answer_has_a_verdict(self) -> PreferencesConfig:
        if self.unpaired and self.rule == "brevity":
            raise ValueError(
                "unpaired: rule 'brevity' compares two completions and cannot label a single one; use 'correctness', "
                "'reward' or 'data'"
            )
        if (self.threshold is not None) != (self.unpaired and self.rule == "reward"):
            raise ValueError(
                f"threshold: got {self.threshold} with rule {self.rule!r} and unpaired {self.unpaired}; it is the "
                "minimum reward of a desirable completion: required by rule 'reward' with unpaired, not allowed "
                "otherwise"
            )
        return self
