"""What a step takes from its input model: learning rates, the shape of continued pretraining, and limits.

In recipe ``adapt``, learning rates follow from the size of the base and the method:

- full fine-tuning: that of a published 7 B model times ``sqrt(7e9 / parameters)``. SFT 2e-5 (Llama 2, Touvron et al.
  2023), DPO 5e-7 (Zephyr 7B, Tunstall et al. 2023), GRPO 1e-6 (DeepSeekMath 7B, Shao et al. 2024). Continued
  pretraining 3e-5, a tenth of Llama 2's peak, warmed up again and decayed (Ibrahim et al. 2024).
- LoRA: ten times that (Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"), at most ``MAX_RATE``.

A local base is read before anything runs; one of the hub or a GGUF file as soon as it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lilpipe.artifact import Artifact
from lilpipe.config.backend import BackendConfig
from lilpipe.config.overrides import set_dotted
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.training import ParallelSection, PretrainConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.continuation import check_shape
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import CONFIG_FILE, read_model_config
from lilpipe.store import Store
from lilpipe.training.model_limits import check_division, check_limits

RATES = {"pretrain": 3e-5, "sft": 2e-5, "dpo": 5e-7, "grpo": 1e-6}
"""Learning rates of full fine-tuning for ``RATED_PARAMETERS``."""
RATED_PARAMETERS = 7e9
ASSUMED_PARAMETERS = 1e9
"""Size of a base whose ``config.json`` cannot be read before it is imported."""
LORA_FACTOR = 10
SEQ_LEN = 2048
"""Tokens of a row in continued pretraining, if the base's context is longer."""
MAX_RATE = 1e-3
CONTEXT = "pretrain.model.max_seq_len"
"""The only setting of ``pretrain.model`` that has an effect on a model of transformers: the default sequence length."""


def rate(stage: str, parameters: float, *, lora: bool) -> float:
    """Return the learning rate of a stage for a model size, rounded to two digits."""
    value = RATES[stage] * math.sqrt(RATED_PARAMETERS / parameters) * (LORA_FACTOR if lora else 1)
    return float(f"{min(value, MAX_RATE):.1e}")


def derive_from_path(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the settings of recipe ``adapt`` that follow from the base at ``import_model.path``, by dotted name,
    without those in ``given``.
    """
    if values["recipe"] != "adapt":
        return {}
    return _derive(values, given, _local_base(values["import_model"]["path"]))


def follow_model(config: PipelineConfig, model: Path) -> PipelineConfig:
    """Return the configuration with the settings that follow from an imported or trained model.

    ``model`` is its directory, which may hold no more than ``config.json``.
    """
    if config.recipe != "adapt":
        return config
    values = config.model_dump(by_alias=True)
    for key, value in _derive(values, config.given, model).items():
        set_dotted(values, key, value, model=type(config), where=str(model))
    return type(config).model_validate(values).with_given(config.given)


def _derive(values: Mapping[str, Any], given: Collection[str], model: Path | None) -> dict[str, Any]:
    base = None if model is None else read_model_config(model)
    size = ASSUMED_PARAMETERS if base is None else float(num_parameters(*base))
    derived: dict[str, Any] = {
        f"{stage}.optimizer.learning_rate": rate(stage, size, lora=values[stage]["lora"] is not None) for stage in RATES
    }
    if base is not None:
        shape = base[0].model_dump(include={"max_seq_len"} if isinstance(base[0], BackendConfig) else None)
        derived |= {f"pretrain.model.{name}": value for name, value in shape.items()}
        derived["pretrain.seq_len"] = min(shape["max_seq_len"], SEQ_LEN)
    return {name: value for name, value in derived.items() if name not in given}


def known_model(config: PipelineConfig, step: str, made: Mapping[str, Artifact], store: Store) -> Path | None:
    """Return the directory of the model that a step starts from, or of the imported one that this descends from.

    The directory may hold no more than ``config.json``. None if the model is not known yet, or if the step does not
    train.
    """
    if not isinstance(config.section(step), ParallelSection):
        return None
    ancestors = ancestors_of(config, step)
    for source in ancestors[1:]:
        if source in made:
            has_config = CONFIG_FILE in made[source].manifest.files
            return store.fetch_file(made[source], CONFIG_FILE) if has_config else None
    root = ancestors[-1]
    return _local_base(config.section(root).path) if config.steps[root].stage == "import_model" else None


def ancestors_of(config: PipelineConfig, step: str) -> list[str]:
    """Return a step, the step of its input model, and so on to the one that made or imported the first model."""
    found = [step]
    while isinstance(source := config.steps[found[-1]].inputs.get("model"), str):
        found.append(source)
    return found


def _local_base(path: str) -> Path | None:
    """Return the directory of a local base; None if it is not a readable directory."""
    if not path or not (Path(path) / CONFIG_FILE).is_file():
        return None
    try:
        read_model_config(Path(path))
    except ArtifactError:  # the import reports it
        return None
    return Path(path)


def check_model_limits(config: PipelineConfig, step: str, section: object, model: Path) -> None:
    """Raise ``ConfigError`` if a training step has settings that its input model does not support."""
    if not isinstance(section, ParallelSection):
        return
    stage, (shape, _) = config.steps[step].stage, read_model_config(model)
    if isinstance(shape, BackendConfig):
        check_limits(section, class_name=shape.class_name, stage=stage)
        _check_ignored(config, stage, shape)
    elif isinstance(section, PretrainConfig):
        check_shape(section.model, model)
    else:
        check_division(section, shape, stage=stage)


def _check_ignored(config: PipelineConfig, stage: str, shape: BackendConfig) -> None:
    ignored = sorted(name for name in config.given if name.startswith("pretrain.model.") and name != CONTEXT)
    if stage == "pretrain" and ignored:
        raise ConfigError(
            f"{ignored[0]}: would be ignored: the step continues a {shape.class_name} of transformers; remove it"
        )
