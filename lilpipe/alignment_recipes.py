"""Recipes of post-training, after those of four published models, as steps behind any front half.

Each takes a complete configuration and returns it with other steps behind pretraining and with what the recipe sets
of their settings. The front half stays as it is, so that a store makes prompts, corpus, tokens and the pretrained
model once for all of them. All end in `evaluate` over every model they made, and `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilpipe.config.pipeline import PipelineConfig, Step, step

FRONT = ("prompts", "corpus", "tokenizer", "tokens", "pretrain")
"""Steps that all recipes share."""

BY_REWARD_MODEL: dict[str, Any] = {"rewards": ({"kind": "reward_model"},)}
COMPARISONS: dict[str, Any] = {
    "rule": "reward",
    "rewards": ({"kind": "answer"}, {"kind": "length", "limit_tokens": 40, "buffer_tokens": 36, "weight": 0.5}),
    "max_pairs_per_prompt": 4,
}
"""In place of people who compare: a right answer is better than a wrong one, and of two alike the shorter. Of the
answers to a prompt the best against the worst, the second best against the second worst, and so on; InstructGPT had
four to nine answers ranked and took all pairs."""
RULES: dict[str, Any] = {"rewards": ({"kind": "answer"},), "scale_rewards": "group"}
"""R1 was rewarded by rules alone, for right answers in the right form: a verifier's verdict needs both here."""
VERIFIED: dict[str, Any] = {
    "rewards": ({"kind": "answer", "weight": 100.0}, {"kind": "reward_model"}),
    "threshold": 50.0,
}
"""Of the answers that a verifier accepts, as Llama 3 has them for mathematics and code, the best by reward model."""


def llama3(start: PipelineConfig, *, rounds: int = 2) -> PipelineConfig:
    """Llama 3 (Grattafiori et al. 2024, section 4): a reward model, then rounds of rejection sampling, SFT and DPO.

    A first model, fine-tuned on written demonstrations, answers what the reward model learns to compare; it is trained
    on top of the pretrained model. In each round the better of the last round's models samples, the reward model keeps
    the best of the answers that are right, the pretrained model is fine-tuned on all that was kept so far, and new
    comparisons are made for DPO, as people made them. Llama 3 took six rounds.
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
    """The steps of one round; the better model of ``last_round`` samples."""
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
    """DeepSeek-R1 (Guo et al. 2025): GRPO on the pretrained model ("Zero"), whose verified answers the pretrained model
    is then fine-tuned on, and GRPO again.

    Left out is the small set of long written answers that R1 begins with: the demonstrations stand in for it, beside
    the sampled answers.
    """
    steps = {
        "zero": step("grpo", {"prompt_form": "text", **RULES}, model="pretrain", prompts="prompts"),
        "rejection_sampling": step("rejection_sampling", {"prompt_form": "text"}, model="zero", prompts="prompts"),
        "sft": step("sft", model="pretrain", conversations="rejection_sampling", prompts="prompts"),
        "grpo": step("grpo", {"prompt_form": "chat", **RULES}, model="sft", prompts="prompts"),
    }
    return _with_steps(start, "r1", steps, ["zero", "sft", "grpo"])


def instruct_gpt(start: PipelineConfig) -> PipelineConfig:
    """InstructGPT (Ouyang et al. 2022): SFT on demonstrations, a reward model from comparisons of its answers, PPO."""
    steps = {
        "sft": step("sft", model="pretrain", prompts="prompts"),
        "preferences": step("preferences", COMPARISONS, model="sft", prompts="prompts"),
        "reward_model": step("reward_model", model="sft", preferences="preferences"),
        "ppo": step("ppo", BY_REWARD_MODEL, model="sft", reward_model="reward_model", prompts="prompts"),
    }
    return _with_steps(start, "instruct-gpt", steps, ["sft", "ppo"], reward_model="reward_model")


def lillm(start: PipelineConfig) -> PipelineConfig:
    """lilLM: SFT alone."""
    steps = {"sft": step("sft", model="pretrain", prompts="prompts")}
    return _with_steps(start, "lillm", steps, ["sft"])


ALIGNMENT_RECIPES: Mapping[str, Callable[[PipelineConfig], PipelineConfig]] = {
    "llama3": llama3,
    "r1": r1,
    "instruct-gpt": instruct_gpt,
    "lillm": lillm,
}
"""Name of each recipe to the function that lays it behind a front half."""


def _with_steps(
    start: PipelineConfig, name: str, steps: Mapping[str, Step], models: list[str], *, reward_model: str | None = None
) -> PipelineConfig:
    """``start`` with its own front half, these steps, evaluation of ``models`` in their order, and registration.

    Each chat model's answers are set against those of the first that was fine-tuned.
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
