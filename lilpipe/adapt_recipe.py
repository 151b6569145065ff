"""Recipe ``adapt``: an open base model and a team's own data to an evaluated, registered and released model.

Its steps can be turned on and off (``enable``). Learning rates follow from the base (``lilpipe.pipeline.base_model``).
"""

from __future__ import annotations

import os

from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.pipeline import PipelineConfig, Step, step
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.pipeline.base_model import ASSUMED_PARAMETERS, rate


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
            "evaluate": step("evaluate", models=models, reference="import_model", prompts="prompts"),
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
        evaluate=EvaluateConfig(win_by="none", num_generations=1, num_workers=workers, sampling=sampling),
    )
