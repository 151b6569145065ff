"""Recipe ``adapt``: an open base model and a team's own data to an evaluated, registered and released model.

Its steps can be turned on and off (``enable``). Learning rates follow from the size of the base and the method:

- full fine-tuning: that of a published 7 B model times ``sqrt(7e9 / parameters)``. SFT 2e-5 (Llama 2, Touvron et al.
  2023), DPO 5e-7 (Zephyr 7B, Tunstall et al. 2023), GRPO 1e-6 (DeepSeekMath 7B, Shao et al. 2024).
- LoRA: ten times that (Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"), at most ``MAX_RATE``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.pipeline import PipelineConfig, step
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import CONFIG_FILE, read_model_config

RATES = {"sft": 2e-5, "dpo": 5e-7, "grpo": 1e-6}
"""Learning rates of full fine-tuning for ``RATED_PARAMETERS``."""
RATED_PARAMETERS = 7e9
ASSUMED_PARAMETERS = 1e9
"""Size of a base whose ``config.json`` cannot be read before it is downloaded."""
LORA_FACTOR = 10
MAX_RATE = 1e-3


def adapt() -> PipelineConfig:
    """Import a base, fine-tune it on conversations, optionally DPO and GRPO, evaluate, register and release.

    ``import_model.path`` or ``repo_id`` names the base, ``prompts.sources`` the data. SFT, evaluation, registration and
    release are on; `dpo`, `grpo` and `benchmarks` are off.
    """
    workers = min(2, len(os.sched_getaffinity(0)))
    sampling = SamplingConfig(max_new_tokens=256)

    def optimizer(stage: str) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=rate(stage, ASSUMED_PARAMETERS, lora=False), warmup_steps=10, weight_decay=0.0
        )

    return PipelineConfig(
        recipe="adapt",
        steps={
            "import_model": step("import_model"),
            "prompts": step("prompts"),
            "sft": step("sft", model="import_model", prompts="prompts"),
            "preferences": step("preferences", prompts="prompts").model_copy(update={"enabled": False}),
            "dpo": step("dpo", model="sft", preferences="preferences", prompts="prompts").model_copy(
                update={"enabled": False}
            ),
            "grpo": step("grpo", model="dpo", prompts="prompts").model_copy(update={"enabled": False}),
            "benchmarks": step(
                "benchmarks", models=("import_model", "sft", "dpo", "grpo"), reference="import_model"
            ).model_copy(update={"enabled": False}),
            "evaluate": step("evaluate", models=("import_model", "sft", "dpo", "grpo"), prompts="prompts"),
            "register": step("register", model="grpo", report="evaluate"),
            "release": step("release", model="grpo", report="evaluate"),
        },
        prompts=PromptsConfig(families=(), num_documents=0, num_demonstrations=0),
        sft=SFTConfig(optimizer=optimizer("sft"), num_epochs=2, num_workers=workers),
        preferences=PreferencesConfig(rule="data", num_workers=workers, sampling=sampling),
        dpo=DPOConfig(optimizer=optimizer("dpo"), num_workers=workers),
        grpo=GRPOConfig(optimizer=optimizer("grpo"), num_workers=workers, sampling=sampling),
        benchmarks=BenchmarksConfig(),
        evaluate=EvaluateConfig(num_generations=1, num_workers=workers, sampling=sampling),
    )


def rate(stage: str, parameters: float, *, lora: bool) -> float:
    """Return the learning rate of a stage for a model size, rounded to two digits."""
    value = RATES[stage] * math.sqrt(RATED_PARAMETERS / parameters) * (LORA_FACTOR if lora else 1)
    return float(f"{min(value, MAX_RATE):.1e}")


def derive_rates(values: Mapping[str, Any], given: Collection[str]) -> dict[str, float]:
    """Return the learning rates by dotted name that are not in ``given``, for the base in ``values``."""
    if values["recipe"] != "adapt":
        return {}
    size = _base_parameters(values["import_model"]["path"])
    names = {f"{stage}.optimizer.learning_rate": stage for stage in RATES}
    return {
        name: rate(stage, size, lora=values[stage]["lora"] is not None)
        for name, stage in names.items()
        if name not in given
    }


def _base_parameters(path: str) -> float:
    """Return the number of parameters of a local base; ``ASSUMED_PARAMETERS`` if it is not a readable directory."""
    if not path or not (Path(path) / CONFIG_FILE).is_file():
        return ASSUMED_PARAMETERS
    try:
        config, vocab_size = read_model_config(Path(path))
    except ArtifactError:  # the import reports it
        return ASSUMED_PARAMETERS
    return float(num_parameters(config, vocab_size))
