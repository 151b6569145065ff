"""Inputs of a step: the steps that it reads, and the artifacts of its input roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lilpipe.artifact import Artifact, Inputs
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.stage import Stage, get_stage


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
