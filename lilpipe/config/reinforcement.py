"""Sections of reinforcement learning: GRPO and PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.prompts import ANSWER_REWARD, RewardConfig, RewardConfigs
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.section import Ratio, Rounding, Section
from lilpipe.config.training import OptimizerConfig, ParallelSection


class CollapseMonitorConfig(Section):
    """When a run of reinforcement learning has collapsed and stops: see `alignment/rollout/collapse_monitor.py`."""

    patience: PositiveInt = 30
    """Rollouts in a row for which a limit must be passed; half as many raise an alarm."""
    max_logprob_mismatch: PositiveFloat = 1e-2
    """Mean difference between the sampler's and the trainer's log-probability of a token, in nats. Stops at once:
    ratios and clipping would act on the difference and not on what was learned."""
    max_frac_reward_zero_std: Ratio = 0.99
    """Share of groups whose completions are all worth the same: they teach nothing. 1 leaves this out."""
    min_entropy: NonNegativeFloat = 1e-4
    """Nats per token drawn, estimated from its log-probability."""
    max_kl: PositiveFloat = 5.0
    """Divergence from the reference in nats per token, where there is one."""
    min_length: NonNegativeFloat = 1.5
    """Mean tokens of a completion, its end included: 1 is an empty completion."""
    max_truncated_ratio: Ratio = 0.99
    """Share of completions that met `sampling.max_new_tokens` and did not end. 1 leaves this out."""
    max_reward_drop: PositiveFloat = 0.3
    """How far the mean reward may fall below the best mean of `patience` rollouts."""


class GRPOConfig(ParallelSection):
    """Group relative policy optimisation (Shao et al. 2024) and its family.

    GRPO as published: `aggregation` sequence, `beta` 0.04. DAPO (Yu et al. 2025): `epsilon_high` 0.28,
    `dynamic_sampling_rounds`, `mask_truncated_completions` or a reward of kind `length` with `limit_tokens`. Dr.GRPO
    (Liu et al. 2025): `scale_rewards` none, `aggregation` constant. GSPO (Zheng et al. 2025):
    `importance_sampling_level` sequence, `aggregation` sequence, `epsilon_low` 3e-4, `epsilon_high` 4e-4.
    """

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 150
    """Rollouts. Each is learned from in `num_iterations` x `num_mini_batches` updates, which are the steps
    that the optimizer's warmup, checkpoints and logs count."""
    prompts_per_step: PositiveInt = 16
    """Prompts of a rollout."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions sampled for each prompt."""
    prompt_form: Literal["text", "chat"] = "chat"
    """How a model meets a question: `text` for a base model, `chat` behind supervised fine-tuning."""
    rewards: RewardConfigs = ANSWER_REWARD
    num_iterations: PositiveInt = 1
    """Times that the completions of a rollout are learned from."""
    num_mini_batches: PositiveInt = 1
    """Updates in a pass through the completions of a rollout."""
    epsilon: PositiveFloat = 0.2
    """Clipping of the probability ratio (PPO's epsilon)."""
    epsilon_low: PositiveFloat | None = None
    """How far below 1 the ratio is clipped; `epsilon` where none is given."""
    epsilon_high: PositiveFloat | None = None
    """How far above 1 the ratio is clipped; `epsilon` where none is given. More than `epsilon_low` keeps exploration
    alive (DAPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose probability the ratio is of: each token's, or the completion's, by the geometric mean over its tokens."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """What the loss is a mean over: all tokens; completions, each by the mean of its tokens; or completions, each by
    its sum over `sampling.max_new_tokens`."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the initial policy (k3 estimator, Schulman 2020)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation of the rewards advantages are divided by: of the completions to one prompt, of the
    rollout (REINFORCE++, Hu 2025), or of none (Dr.GRPO)."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """Times that groups of equal rewards are replaced by those of further prompts (DAPO's dynamic sampling); those
    still equal after so many are kept, and teach nothing."""
    mask_truncated_completions: bool = False
    """Leave completions that met `sampling.max_new_tokens` out of the loss (DAPO's over-long filtering)."""
    sampling: SamplingConfig = SamplingConfig()
    collapse_monitor: CollapseMonitorConfig = CollapseMonitorConfig()

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that a rollout is learned from in."""
        return self.num_iterations * self.num_mini_batches

    @model_validator(mode="after")
    def _rollout_fits(self) -> GRPOConfig:
        _check_rollout(self, data_ranks=self.layout.data, num_generations=self.num_generations)
        return self


class PPOConfig(ParallelSection):
    """Proximal policy optimisation (Schulman et al. 2017) with a reward model: InstructGPT's last stage."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 100
    """Rollouts. Each is learned from in `num_iterations` x `num_mini_batches` updates, which are the steps
    that the optimizer's warmup, checkpoints and logs count."""
    accumulation_steps: Annotated[PositiveInt, Rounding] = 2
    """Micro-batches of an update on each worker, of completions of about the same length."""
    prompts_per_step: PositiveInt = 64
    """Prompts of a rollout, with one completion each."""
    prompt_form: Literal["text", "chat"] = "chat"
    """How a model meets a question: `text` for a base model, `chat` behind supervised fine-tuning."""
    rewards: RewardConfigs = (RewardConfig(kind="reward_model"),)
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Taken from the reward of a completion that met `sampling.max_new_tokens` and did not end."""
    num_iterations: PositiveInt = 4
    """Times that the completions of a rollout are learned from."""
    num_mini_batches: PositiveInt = 1
    """Updates in a pass through the completions of a rollout."""
    epsilon: PositiveFloat = 0.2
    """Clipping of the probability ratio (epsilon)."""
    cliprange_value: PositiveFloat = 0.2
    """How far a value may move from the old one before its loss is clipped."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss beside the policy's."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Gamma: what a reward one token later is worth."""
    gae_lambda: Ratio = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016)."""
    beta: NonNegativeFloat = 0.05
    """Penalty on the divergence from the initial policy, in the reward of each token."""
    kl_target: PositiveFloat | None = None
    """Divergence in nats per completion towards which the coefficient is adapted (Ziegler et al. 2019); none keeps it
    fixed."""
    kl_rate: PositiveFloat = 0.1
    """How fast it is adapted: most by which it changes after a rollout is a fifth of this."""
    sampling: SamplingConfig = SamplingConfig()
    collapse_monitor: CollapseMonitorConfig = CollapseMonitorConfig(max_reward_drop=2.0)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that a rollout is learned from in."""
        return self.num_iterations * self.num_mini_batches

    @model_validator(mode="after")
    def _rollout_fits(self) -> PPOConfig:
        _check_rollout(self, data_ranks=self.layout.data, num_generations=1)
        return self


_FREE_SAMPLING = {"temperature", "stop", "keep_stop", "max_new_tokens", "batch_size", "engine"}
"""Settings of sampling under which the policy itself draws the completions, at its temperature: where a completion ends
does not change how its tokens were drawn."""


def _check_rollout(section: GRPOConfig | PPOConfig, *, data_ranks: int, num_generations: int) -> None:
    """Raise ``ValueError`` for completions that cannot be divided, or would not be drawn from the policy."""
    if section.prompts_per_step % data_ranks:
        raise ValueError(
            f"prompts_per_step {section.prompts_per_step} must be a multiple of the {data_ranks} workers that hold "
            "different rows"
        )
    num_completions, parts = section.prompts_per_step // data_ranks * num_generations, section.num_mini_batches
    if num_completions % parts or num_completions // parts < section.accumulation_steps:
        raise ValueError(
            f"num_mini_batches {parts} must divide the {num_completions} answers of a worker into parts of at least "
            f"accumulation_steps = {section.accumulation_steps}"
        )
    if section.sampling.temperature == 0:
        raise ValueError("sampling.temperature must be above 0: greedy answers are all the same")
    for name, field in SamplingConfig.model_fields.items():
        value = getattr(section.sampling, name)
        if name not in _FREE_SAMPLING and value != field.default:
            raise ValueError(
                f"sampling.{name} {value} must be {field.default}: the loss takes the answers as drawn from the policy "
                "itself"
            )
