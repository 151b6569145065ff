"""Post-training recipes after four published models, as steps that follow pretraining.

Each takes a complete configuration and replaces the steps after pretraining and the settings that the recipe defines.
The steps up to pretraining are unchanged, so all recipes share prompts, corpus, tokens and pretrained model in a store.
Each ends with `evaluate` over all its models, and `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilpipe.config.pipeline import PipelineConfig, Step, step

FRONT = ("prompts", "corpus", "tokenizer", "tokens", "pretrain")
"""Steps shared by all recipes."""

BY_REWARD_MODEL: dict[str, Any] = {"rewards": ({"kind": "reward_model"},)}
"""Reward of the reward model only."""
COMPARISONS: dict[str, Any] = {
    "rule": "reward",
    "rewards": ({"kind": "answer"}, {"kind": "length", "limit_tokens": 40, "buffer_tokens": 36, "weight": 0.5}),
    "max_pairs_per_prompt": 4,
}
"""Replaces human comparisons: a correct answer is better than a wrong one, and of two equal ones the shorter is better.
The best answer to a prompt is paired with the worst, the second best with the second worst, and so on; InstructGPT
ranked four to nine answers and used all pairs."""
RULES: dict[str, Any] = {"rewards": ({"kind": "answer"},), "scale_rewards": "group"}
"""R1 used rule-based rewards only, for correct answers in the correct format; the verifier checks both."""
VERIFIED: dict[str, Any] = {
    "rewards": ({"kind": "answer", "weight": 100.0}, {"kind": "reward_model"}),
    "threshold": 50.0,
}
"""Of the completions that a verifier accepts, those with the highest score of the reward model, as Llama 3 for
mathematics and code."""


def llama3(start: PipelineConfig, *, rounds: int = 2) -> PipelineConfig:
    """Llama 3 (Grattafiori et al. 2024, section 4): a reward model, then rounds of rejection sampling, SFT and DPO.

    A first model, fine-tuned on written demonstrations, samples the answers that the reward model learns to compare;
    the reward model is trained from the pretrained model. In each round the better model of the previous round samples,
    the reward model selects the best correct answers, the pretrained model is fine-tuned on all answers kept so far,
    and DPO uses new comparisons. Llama 3 used six rounds.
    """
    steps = {
        "sft_0": step("sft", model="pretrain", prompts="prompts"),
        "preferences_0": step("preferences", COMPARISONS, model="sft_0", prompts="prompts"),
        "reward_model": step("reward_model", model="pretrain", preferences="preferences_0"),
    }
    models = ["sft_0"]
    for number in range(1, rounds + 1):
        last_round = tuple(name for name in models if name.endswith(f"_{number - 1}"))
        steps |= _llama3_round(number, last_round)
        models += [f"sft_{number}", f"dpo_{number}"]
    return _with_steps(start, "llama3", steps, models, reward_model="reward_model")


def _llama3_round(number: int, last_round: tuple[str, ...]) -> dict[str, Step]:
    """Return the steps of one round; the better model of ``last_round`` samples."""
    sample = {"prompt_form": "chat", "keep": "best", "policy": "best", **VERIFIED}
    kept = tuple(f"rejection_sampling_{earlier}" for earlier in range(1, number + 1))
    sft, preferences = f"sft_{number}", f"preferences_{number}"
    return {
        kept[-1]: step("rejection_sampling", sample, model=last_round, prompts="prompts", reward_model="reward_model"),
        sft: step("sft", model="pretrain", conversations=kept, prompts="prompts"),
        preferences: step("preferences", COMPARISONS, model=sft, prompts="prompts"),
        f"dpo_{number}": step("dpo", model=sft, preferences=preferences, prompts="prompts"),
    }


def r1(start: PipelineConfig) -> PipelineConfig:
    """DeepSeek-R1 (Guo et al. 2025): GRPO on the pretrained model ("Zero"), fine-tuning of the pretrained model on its
    verified answers, and GRPO again.

    R1's small set of long written answers is omitted; the demonstrations, mixed with the sampled completions, replace
    it.
    """
    steps = {
        "zero": step("grpo", {"prompt_form": "text", **RULES}, model="pretrain", prompts="prompts"),
        "rejection_sampling": step("rejection_sampling", {"prompt_form": "text"}, model="zero", prompts="prompts"),
        "sft": step("sft", model="pretrain", conversations="rejection_sampling", prompts="prompts"),
        "grpo": step("grpo", {"prompt_form": "chat", **RULES}, model="sft", prompts="prompts"),
    }
    return _with_steps(start, "r1", steps, ["zero", "sft", "grpo"])


def instruct_gpt(start: PipelineConfig) -> PipelineConfig:
    """InstructGPT (Ouyang et al. 2022): SFT on demonstrations, a reward model trained on comparisons of its answers,
    PPO.
    """
    steps = {
        "sft": step("sft", model="pretrain", prompts="prompts"),
        "preferences": step("preferences", COMPARISONS, model="sft", prompts="prompts"),
        "reward_model": step("reward_model", model="sft", preferences="preferences"),
        "ppo": step("ppo", BY_REWARD_MODEL, model="sft", reward_model="reward_model", prompts="prompts"),
    }
    return _with_steps(start, "instruct-gpt", steps, ["sft", "ppo"], reward_model="reward_model")


def lillm(start: PipelineConfig) -> PipelineConfig:
    """lilLM: SFT only."""
    steps = {"sft": step("sft", model="pretrain", prompts="prompts")}
    return _with_steps(start, "lillm", steps, ["sft"])


ALIGNMENT_RECIPES: Mapping[str, Callable[[PipelineConfig], PipelineConfig]] = {
    "llama3": llama3,
    "r1": r1,
    "instruct-gpt": instruct_gpt,
    "lillm": lillm,
}
"""Maps recipe names to functions that add their steps to a configuration."""


def _with_steps(
    start: PipelineConfig, name: str, steps: Mapping[str, Step], models: list[str], *, reward_model: str | None = None
) -> PipelineConfig:
    """Return ``start`` with its own steps up to pretraining, then ``steps``, evaluation of ``models`` in order, and
    registration.

    The win rate of each chat model is measured against the first fine-tuned model.
    """
    inputs: dict[str, str | tuple[str, ...]] = {
        "models": ("pretrain", *models),
        "reference": next(model for model in models if steps[model].stage == "sft"),
        "prompts": "prompts",
        "tokens": "tokens",
    }
    if reward_model is not None:
        inputs["reward_model"] = reward_model
    ending = {
        "evaluate": Step(stage="evaluate", inputs=inputs),
        "register": step("register", model=models[-1], report="evaluate"),
    }
    front = {step_name: start.steps[step_name] for step_name in FRONT}
    return PipelineConfig.model_validate({**dict(start), "recipe": name, "steps": {**front, **steps, **ending}})
