"""Sections of reinforcement learning: GRPO and PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.prompts import ANSWER_REWARD, RewardConfig, RewardConfigs
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.section import Ratio, Rounding, Section
from lilpipe.config.training import OptimizerConfig, ParallelSection


class CollapseMonitorConfig(Section):
    """Limits that stop a collapsed reinforcement learning run: see `alignment/rollout/collapse_monitor.py`."""

    patience: PositiveInt = 30
    """Number of consecutive rollouts beyond a limit after which the run stops; half as many log an alarm."""
    max_logprob_mismatch: PositiveFloat = 1e-2
    """Maximum mean difference, in nats per token, between the log-probabilities of sampler and trainer. A larger one
    stops the run at once: probability ratios and clipping would reflect the mismatch and not the update."""
    max_frac_reward_zero_std: Ratio = 0.99
    """Maximum fraction of groups whose completions all have the same reward, and thus no gradient. 1 disables it."""
    min_entropy: NonNegativeFloat = 1e-4
    """Minimum entropy in nats per sampled token, estimated from its log-probability."""
    max_kl: PositiveFloat = 5.0
    """Maximum KL divergence from the reference model in nats per token, if there is a reference model."""
    min_length: NonNegativeFloat = 1.5
    """Minimum mean number of tokens of a completion, including the end token: 1 is an empty completion."""
    max_truncated_ratio: Ratio = 0.99
    """Maximum fraction of completions truncated at `sampling.max_new_tokens`. 1 disables it."""
    max_reward_drop: PositiveFloat = 0.3
    """Maximum drop of the mean reward below the best mean of `patience` rollouts."""


class GRPOConfig(ParallelSection):
    """Group relative policy optimization (Shao et al. 2024) and its variants.

    GRPO as published: `aggregation` sequence, `beta` 0.04. DAPO (Yu et al. 2025): `epsilon_high` 0.28,
    `dynamic_sampling_rounds`, `mask_truncated_completions` or a reward of kind `length` with `limit_tokens`. Dr.GRPO
    (Liu et al. 2025): `scale_rewards` none, `aggregation` constant. GSPO (Zheng et al. 2025):
    `importance_sampling_level` sequence, `aggregation` sequence, `epsilon_low` 3e-4, `epsilon_high` 4e-4.
    """

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 150
    """Number of rollouts. Each one is trained on for `num_iterations` x `num_mini_batches` optimizer steps; warmup,
    checkpoints and logs count optimizer steps."""
    prompts_per_step: PositiveInt = 16
    """Prompts per rollout."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions sampled per prompt (group size)."""
    prompt_form: Literal["text", "chat"] = "chat"
    """Prompt format: `text` for a base model, `chat` after supervised fine-tuning."""
    rewards: RewardConfigs = ANSWER_REWARD
    """Reward functions; the reward is their weighted sum."""
    num_iterations: PositiveInt = 1
    """Epochs over the completions of a rollout."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps per epoch over the completions of a rollout."""
    epsilon: PositiveFloat = 0.2
    """Clipping range of the probability ratio (PPO's epsilon)."""
    epsilon_low: PositiveFloat | None = None
    """Lower clipping range of the probability ratio, 1 - epsilon_low; if None, `epsilon`."""
    epsilon_high: PositiveFloat | None = None
    """Upper clipping range of the probability ratio, 1 + epsilon_high; if None, `epsilon`. A value above `epsilon_low`
    keeps exploration (DAPO's clip-higher)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Level of the probability ratio: each token, or the sequence (geometric mean over the tokens of a completion)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Average of the loss: `token` over all tokens; `sequence` over completions, each the mean of its tokens;
    `constant` over completions, each the sum of its tokens divided by `sampling.max_new_tokens`."""
    beta: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the initial policy (k3 estimator, Schulman 2020)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the `group`, of the rollout (`batch`; REINFORCE++, Hu
    2025), or `none` (Dr.GRPO)."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """Maximum rounds that replace groups of equal rewards by groups of new prompts (DAPO's dynamic sampling). Groups
    that are still equal after that are kept; their gradient is zero."""
    mask_truncated_completions: bool = False
    """Exclude completions truncated at `sampling.max_new_tokens` from the loss (DAPO's overlong filtering)."""
    sampling: SamplingConfig = SamplingConfig()
    collapse_monitor: CollapseMonitorConfig = CollapseMonitorConfig()

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_iterations * self.num_mini_batches

    @model_validator(mode="after")
    def _rollout_fits(self) -> GRPOConfig:
        _check_rollout(self, data_ranks=self.layout.data, num_generations=self.num_generations)
        return self


class PPOConfig(ParallelSection):
    """Proximal policy optimization (Schulman et al. 2017) with a reward model: the last stage of InstructGPT."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 100
    """Number of rollouts. Each one is trained on for `num_iterations` x `num_mini_batches` optimizer steps; warmup,
    checkpoints and logs count optimizer steps."""
    accumulation_steps: Annotated[PositiveInt, Rounding] = 2
    """Micro-batches per optimizer step on each worker, of completions of similar length."""
    prompts_per_step: PositiveInt = 64
    """Prompts per rollout, with one completion each."""
    prompt_form: Literal["text", "chat"] = "chat"
    """Prompt format: `text` for a base model, `chat` after supervised fine-tuning."""
    rewards: RewardConfigs = (RewardConfig(kind="reward_model"),)
    """Reward functions; the reward is their weighted sum."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Penalty on the reward of a completion truncated at `sampling.max_new_tokens`."""
    num_iterations: PositiveInt = 4
    """Epochs over the completions of a rollout."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps per epoch over the completions of a rollout."""
    epsilon: PositiveFloat = 0.2
    """Clipping range of the probability ratio."""
    cliprange_value: PositiveFloat = 0.2
    """Clipping range of the value loss around the old values."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount factor per token."""
    gae_lambda: Ratio = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    beta: NonNegativeFloat = 0.05
    """Coefficient of the KL penalty against the initial policy in the reward of each token."""
    kl_target: PositiveFloat | None = None
    """Target KL divergence in nats per completion for the adaptive KL coefficient (Ziegler et al. 2019); if None, the
    coefficient is fixed."""
    kl_rate: PositiveFloat = 0.1
    """Rate of the adaptive KL coefficient: it changes by at most a fifth of this fraction per rollout."""
    sampling: SamplingConfig = SamplingConfig()
    collapse_monitor: CollapseMonitorConfig = CollapseMonitorConfig(max_reward_drop=2.0)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_iterations * self.num_mini_batches

    @model_validator(mode="after")
    def _rollout_fits(self) -> PPOConfig:
        _check_rollout(self, data_ranks=self.layout.data, num_generations=1)
        return self


_FREE_SAMPLING = {"temperature", "stop", "keep_stop", "max_new_tokens", "batch_size", "engine"}
"""Sampling settings that may differ from the default because completions are still sampled from the policy itself: the
temperature is applied in the loss too, and where a completion ends does not change how its tokens were sampled."""


def _check_rollout(section: GRPOConfig | PPOConfig, *, data_ranks: int, num_generations: int) -> None:
    """Raise ``ValueError`` if completions are not divisible, or would not be sampled from the policy itself."""
    if section.lora is not None and section.lora.lora_dropout:
        raise ValueError(
            f"lora.lora_dropout {section.lora.lora_dropout} must be 0: completions are sampled without dropout, so "
            "probability ratios would measure it"
        )
    if section.prompts_per_step % data_ranks:
        raise ValueError(
            f"prompts_per_step {section.prompts_per_step} must be a multiple of the {data_ranks} data-parallel workers"
        )
    num_completions, parts = section.prompts_per_step // data_ranks * num_generations, section.num_mini_batches
    if num_completions % parts or num_completions // parts < section.accumulation_steps:
        raise ValueError(
            f"num_mini_batches {parts} must divide the {num_completions} completions of a worker into parts of at "
            f"least accumulation_steps = {section.accumulation_steps}"
        )
    if section.sampling.temperature == 0:
        raise ValueError("sampling.temperature must be above 0: all greedy completions of a prompt are equal")
    for name, field in SamplingConfig.model_fields.items():
        value = getattr(section.sampling, name)
        if name not in _FREE_SAMPLING and value != field.default:
            raise ValueError(
                f"sampling.{name} {value} must be {field.default}: the loss assumes completions sampled from the "
                "unmodified policy"
            )
