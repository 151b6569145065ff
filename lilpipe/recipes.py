"""Recipes: functions that return a complete configuration; ``load`` applies a user's settings to one."""

from __future__ import annotations

import functools
import operator
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lilpipe.adapt_recipe import adapt
from lilpipe.alignment_recipes import ALIGNMENT_RECIPES
from lilpipe.config.corpus import CorpusConfig, LanguageConfig, QualityConfig
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.overrides import dotted, explain, merge, resolve_files, set_dotted
from lilpipe.config.pipeline import PipelineConfig, enabled_steps
from lilpipe.config.preferences import PreferencesConfig, RejectionSamplingConfig
from lilpipe.config.prompts import PromptsConfig, RewardConfig
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.config.reward_model import RewardModelConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.section import Section
from lilpipe.config.sft import SFTConfig
from lilpipe.config.sources import Source
from lilpipe.config.tokens import TokenizerConfig, TokensConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.extensions import find, installed
from lilpipe.extensions import load as load_extension
from lilpipe.pipeline.base_model import derive_from_path
from lilpipe.scaling.depth import derive
from lilpipe.stage import get_stage


def tiny() -> PipelineConfig:
    """Every stage at a size that two CPU cores finish in minutes: a 0.4 M parameter model, small tasks, vocabulary of
    1024.

    It shows that each stage works; it does not make a useful model. With two or more cores two workers train, otherwise
    one; the world size changes the fingerprint. ``tests/benchmarks/LOG.md`` lists the experiments on the `validation`
    prompts behind these values.
    """
    workers = min(2, len(os.sched_getaffinity(0)))
    sampling = SamplingConfig(max_new_tokens=40)
    return PipelineConfig(
        recipe="tiny",
        corpus=CorpusConfig(
            sources=(Source(kind="installed-docs", name="installed-docs", max_bytes=6_000_000),),
            # Documentation is English with a lot of code; the defaults, for web pages, keep only a sixth of it.
            language=LanguageConfig(min_score=0.5),
            quality=QualityConfig(min_alpha_word_ratio=0.55),
            num_workers=workers,
        ),
        prompts=PromptsConfig(
            families=("copy", "reverse", "sort", "addition", "subtraction"),
            num_documents=40_000,
            num_demonstrations=2_500,
            num_validation=500,
            num_test=1_000,
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
        # 2 % would be 25 documents, and a single one could be half of the text.
        tokens=TokensConfig(validation_ratio=0.05, num_workers=workers),
        pretrain=PretrainConfig(
            model=ModelConfig(
                hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=128
            ),
            optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, muon_learning_rate=0.02, warmup_steps=100),
            num_steps=2_000,
            batch_size=16,
            num_workers=workers,
            exercise_ratio=0.6,
        ),
        rejection_sampling=RejectionSamplingConfig(num_workers=workers, sampling=sampling),
        sft=SFTConfig(num_workers=workers),
        preferences=PreferencesConfig(
            num_prompts=2_000, contrast="nearest", min_words_apart=4, num_workers=workers, sampling=sampling
        ),
        dpo=DPOConfig(
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10, weight_decay=0.0),
            # Llama 3's 0.2 lowered accuracy here; 1.0 keeps it.
            rpo_alpha=1.0,
            num_workers=workers,
        ),
        grpo=GRPOConfig(
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"),
            num_steps=400,
            prompts_per_step=32,
            # With the answer reward alone, the model lost the brevity learned in DPO. Advantages are not divided by the
            # group's standard deviation: if all answers are correct, they would depend on length only, and be as large.
            rewards=(
                RewardConfig(kind="answer"),
                RewardConfig(kind="length", limit_tokens=40, buffer_tokens=36, weight=0.1),
            ),
            scale_rewards="none",
            num_workers=workers,
            sampling=sampling,
        ),
        # Used by the recipes that have these stages.
        reward_model=RewardModelConfig(
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0),
            num_epochs=2,
            batch_size=32,
            num_workers=workers,
        ),
        ppo=PPOConfig(
            optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=3, weight_decay=0.0, schedule="linear"),
            num_steps=40,
            beta=0.2,
            num_workers=workers,
            sampling=sampling,
        ),
        evaluate=EvaluateConfig(num_workers=workers, sampling=sampling),
    )


RECIPES: dict[str, Callable[[], PipelineConfig]] = {
    "tiny": tiny,
    "adapt": adapt,
    **{name: lambda lay=lay: lay(tiny()) for name, lay in ALIGNMENT_RECIPES.items()},
}
"""Maps recipe names to functions. The recipes of published post-training share the steps of ``tiny`` up to
pretraining."""


def get_recipe(name: str, file: str | None = None) -> PipelineConfig:
    """Return a recipe by name, built-in or custom. Raises ``ConfigError`` if it does not exist or is not valid."""
    extension = find("recipe", name, file=file, built_in=RECIPES)
    if file is not None and (extension is None or extension.file is None):
        raise ConfigError(f"recipe {name!r}: file {file} would be ignored: a recipe of this name exists; rename yours")
    if extension is None:
        return RECIPES[name]()
    try:
        recipe = load_extension(extension)()
    except ValidationError as error:
        raise ConfigError(f"{extension}: {explain(error)}") from error
    if not isinstance(recipe, PipelineConfig):
        raise ConfigError(f"{extension}: returned a {type(recipe).__name__}, expected a PipelineConfig")
    return recipe.model_copy(update={"recipe": name, "file": file})


@dataclass(frozen=True)
class Resolved:
    """A complete configuration and the origin of its values."""

    config: PipelineConfig
    start: PipelineConfig
    """The recipe without the file and the overrides."""
    file: Path | None
    from_file: frozenset[str]
    """Dotted names of the settings in ``file``."""
    from_overrides: frozenset[str]


def load(recipe: str, *, file: Path | None = None, overrides: dict[str, Any] | None = None) -> PipelineConfig:
    """Return a recipe with the values of a TOML file applied, then dotted ``overrides``.

    The file may name its recipe (``recipe = "tiny"``), which takes precedence. If the file or the overrides set `depth`
    or `params`, the values derived from it (``lilpipe.scaling.depth``) replace the recipe's, except where the file or
    the overrides set them. Raises ``ConfigError`` naming the field.
    """
    return resolve(recipe, file=file, overrides=overrides).config


def resolve(recipe: str, *, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Resolved:
    """Like ``load``, but also return the origin of each value."""
    overrides = overrides or {}
    values = {} if file is None else _read(file)
    folder = Path() if file is None else file.absolute().parent
    values = resolve_files(values, PipelineConfig, folder)
    start = get_recipe(values.pop("recipe", recipe), values.pop("file", None))
    complete = start.model_dump(by_alias=True)
    model = _with_stages(start, overrides.get("steps") or values.get("steps") or complete["steps"])
    for name in model.model_fields.keys() - type(start).model_fields.keys():
        complete[name] = model.model_fields[name].default.model_dump()
    values = resolve_files(values, model, folder)  # again, for the sections of custom stages
    _resolve_settings(values.get("steps"), model, folder)
    where = f"config file {file}" if file else "overrides"
    merge(complete, values, model=model, where=where)
    for key, value in overrides.items():
        set_dotted(complete, key, value, model=model, where="overrides")
    given = frozenset(dotted(values)), frozenset(dotted(overrides))
    all_given = given[0] | given[1]
    for key, value in derive(complete, all_given).items():
        set_dotted(complete, key, value, model=model, where="depth")
    for key, value in derive_from_path(complete, all_given).items():
        set_dotted(complete, key, value, model=model, where="import_model")
    try:
        config = model.model_validate(complete)
        steps = enabled_steps(config.steps, config.enable)
        config = model.model_validate({**dict(config), "steps": steps, "enable": {}})
        return Resolved(config.with_given(all_given), start, file, *given)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file}: cannot be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file}: is not valid TOML: {error}") from error


def _with_stages(start: PipelineConfig, steps: Any) -> type[PipelineConfig]:
    """Return the configuration class with the sections of the custom stages in ``steps``."""
    sections: dict[str, type[Section]] = {}
    for node in _nodes(steps):
        name, file = node.get("stage"), node.get("file")
        if isinstance(name, str) and (isinstance(file, str) or name in installed("stage")):
            sections[name] = get_stage(name, os.path.abspath(file) if file else None).config  # noqa: PTH100
    return type(start).with_sections(**sections)


def _nodes(steps: Any) -> list[dict[str, Any]]:
    return [node for node in steps.values() if isinstance(node, dict)] if isinstance(steps, dict) else []


def _resolve_settings(steps: Any, model: type[PipelineConfig], folder: Path) -> None:
    """Apply ``resolve_files`` to the settings of single steps, which have dotted names."""
    sections = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for node in _nodes(steps):
        settings = node.get("settings")
        if not isinstance(settings, dict):
            continue  # validation reports it
        for key, value in settings.items():
            nested: Any = value
            for name in reversed(names := key.split(".")):
                nested = {name: nested}
            nested = resolve_files(nested, sections.get(str(node.get("stage"))), folder)
            settings[key] = functools.reduce(operator.getitem, names, nested)
