"""Recipe ``adapt``: an open base model and a team's own data to an evaluated, registered and released model.

Its steps can be turned on and off (``enable``). Learning rates follow from the size of the base and the method:

- full fine-tuning: that of a published 7 B model times ``sqrt(7e9 / parameters)``. SFT 2e-5 (Llama 2, Touvron et al.
  2023), DPO 5e-7 (Zephyr 7B, Tunstall et al. 2023), GRPO 1e-6 (DeepSeekMath 7B, Shao et al. 2024). Continued
  pretraining 3e-5, a tenth of Llama 2's peak, warmed up again and decayed (Ibrahim et al. 2024).
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
from lilpipe.config.model import ModelConfig
from lilpipe.config.pipeline import PipelineConfig, Step, step
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import CONFIG_FILE, read_model_config

RATES = {"pretrain": 3e-5, "sft": 2e-5, "dpo": 5e-7, "grpo": 1e-6}
"""Learning rates of full fine-tuning for ``RATED_PARAMETERS``."""
RATED_PARAMETERS = 7e9
ASSUMED_PARAMETERS = 1e9
"""Size of a base whose ``config.json`` cannot be read before it is downloaded."""
LORA_FACTOR = 10
SEQ_LEN = 2048
"""Tokens of a row in continued pretraining, if the base's context is longer."""
MAX_RATE = 1e-3


def adapt() -> PipelineConfig:
    """Import a base, fine-tune it on conversations, evaluate, register and release it.

    ``import_model.path`` or ``repo_id`` names the base, ``prompts.sources`` the data. Off by default: continued
    pretraining (``corpus``, ``tokens``, ``pretrain``), DPO (``preferences``, ``dpo``), ``grpo``, ``benchmarks``.
    """
    workers = min(2, len(os.sched_getaffinity(0)))
    sampling = SamplingConfig(max_new_tokens=256)
    models = ("import_model", "pretrain", "sft", "dpo", "grpo")

    def off(node: Step) -> Step:
        return node.model_copy(update={"enabled": False})

    def optimizer(stage: str) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=rate(stage, ASSUMED_PARAMETERS, lora=False), warmup_steps=10, weight_decay=0.0
        )

    return PipelineConfig(
        recipe="adapt",
        steps={
            "import_model": step("import_model"),
            "prompts": step("prompts"),
            "corpus": off(step("corpus", prompts="prompts")),
            "tokens": off(step("tokens", corpus="corpus", model="import_model")),
            "pretrain": off(step("pretrain", tokens="tokens", model="import_model")),
            "sft": step("sft", model="pretrain", prompts="prompts"),
            "preferences": off(step("preferences", prompts="prompts")),
            "dpo": off(step("dpo", model="sft", preferences="preferences", prompts="prompts")),
            "grpo": off(step("grpo", model="dpo", prompts="prompts")),
            "benchmarks": off(step("benchmarks", models=models, reference="import_model")),
            "evaluate": step("evaluate", models=models, prompts="prompts"),
            "register": step("register", model="grpo", report="evaluate"),
            "release": step("release", model="grpo", report="evaluate"),
        },
        prompts=PromptsConfig(families=(), num_documents=0, num_demonstrations=0),
        pretrain=PretrainConfig(optimizer=optimizer("pretrain"), num_workers=workers, exercise_ratio=0.0),
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


def derive_adapted(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return settings that follow from the base in ``values``, by dotted name, without those in ``given``.

    These are the learning rates and, for a local base, the model shape of continued pretraining.
    """
    if values["recipe"] != "adapt":
        return {}
    base = _base(values["import_model"]["path"])
    size = ASSUMED_PARAMETERS if base is None else float(num_parameters(*base))
    derived: dict[str, Any] = {
        f"{stage}.optimizer.learning_rate": rate(stage, size, lora=values[stage]["lora"] is not None) for stage in RATES
    }
    if base is not None:
        shape = base[0].model_dump()
        derived |= {f"pretrain.model.{name}": value for name, value in shape.items()}
        derived["pretrain.seq_len"] = min(shape["max_seq_len"], SEQ_LEN)
    return {name: value for name, value in derived.items() if name not in given}


def _base(path: str) -> tuple[ModelConfig, int] | None:
    """Return config and vocabulary size of a local base; None if it is not a readable directory."""
    if not path or not (Path(path) / CONFIG_FILE).is_file():
        return None
    try:
        return read_model_config(Path(path))
    except ArtifactError:  # the import reports it
        return None
