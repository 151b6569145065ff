"""Inputs of a step: the steps that it reads, and the artifacts of its input roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lilpipe.artifact import Artifact, Inputs, all_inputs, optional_input
from lilpipe.config.lora import ADAPTER_DIRECTORY, ADAPTER_FILES, LoRAConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.stage import Stage, get_stage

ADAPTER = "adapter"
"""Input role of a training stage: a checkpoint whose adapter training continues, on the step's input `model`."""


def stage_of(config: PipelineConfig, step: str) -> Stage:
    """Return the stage of a step, built-in or custom."""
    return get_stage(config.steps[step].stage, config.steps[step].file)


def sources(config: PipelineConfig, step: str) -> list[str]:
    """Return the steps that a step reads, without duplicates."""
    names: list[str] = []
    for value in config.steps[step].inputs.values():
        names += [value] if isinstance(value, str) else value
    return list(dict.fromkeys(names))


def check_wiring(config: PipelineConfig, step: str) -> None:
    """Raise ``ConfigError`` if a step's inputs do not match its stage."""
    stage = stage_of(config, step)
    roles = config.steps[step].inputs
    known = {**stage.inputs, **stage.optional_inputs}
    if unknown := roles.keys() - known.keys():
        raise ConfigError(
            f"steps.{step}.inputs: got {', '.join(sorted(unknown))}; stage {stage.name} accepts {', '.join(known)}"
        )
    if absent := stage.inputs.keys() - roles.keys():
        raise ConfigError(f"steps.{step}.inputs: {', '.join(sorted(absent))} missing; set it to the step that makes it")
    for role, value in roles.items():
        names = (value,) if isinstance(value, str) else value
        if len(names) != 1 and role not in stage.several:
            raise ConfigError(f"steps.{step}.inputs.{role}: got {len(names)} steps, expected one: {', '.join(names)}")
        for name in names:
            kind = stage_of(config, name).output
            if kind != known[role]:
                raise ConfigError(f"steps.{step}.inputs.{role}: step {name} makes a {kind}, expected a {known[role]}")
    lora: LoRAConfig | None = getattr(config.section(step), "lora", None)
    if ADAPTER in roles and (lora is None or lora.path is not None):
        got = "no lora" if lora is None else f"also lora.path {lora.path}"
        raise ConfigError(
            f"steps.{step}.inputs.{ADAPTER}: got {got}, expected the settings of the adapter in {stage.name}.lora "
            "without path"
        )


def fill_roles(config: PipelineConfig, step: str, made: Mapping[str, Artifact]) -> Inputs:
    """Return the inputs of a step. Each artifact has the name of its step in this pipeline.

    The artifact may have been made by another pipeline, or by a step of another name with the same fingerprint.
    """

    def named(source: str) -> Artifact:
        artifact = made[source]
        return replace(artifact, manifest=artifact.manifest.model_copy(update={"step": source}))

    return {
        role: named(value) if isinstance(value, str) else tuple(named(source) for source in value)
        for role, value in config.steps[step].inputs.items()
    }


def check_adapter(step: str, inputs: Inputs) -> None:
    """Raise ``ConfigError`` if the input `adapter` has no adapter, or one of another checkpoint than `model`."""
    if (source := optional_input(inputs, ADAPTER)) is None:
        return
    if f"{ADAPTER_DIRECTORY}/{ADAPTER_FILES[0]}" not in source.manifest.files:
        raise ConfigError(
            f"steps.{step}.inputs.{ADAPTER}: step {source.manifest.step} made no adapter, expected a step with lora"
        )
    bases = [entry.content_digest for entry in source.manifest.inputs.get("model", ())]
    if bases != [model.content_digest for model in all_inputs(inputs, "model")]:
        raise ConfigError(
            f"steps.{step}.inputs.{ADAPTER}: step {source.manifest.step} made an adapter of another checkpoint than "
            "inputs.model; expected the same `model` in both steps"
        )


def continue_adapter(section: Any, inputs: Inputs) -> Any:
    """Return the settings with the adapter of the input `adapter`, if there is one, as the one to start from."""
    if (source := optional_input(inputs, ADAPTER)) is None:
        return section
    lora = section.lora.model_copy(update={"path": str(source.path / ADAPTER_DIRECTORY)})
    return section.model_copy(update={"lora": lora})
