"""Determine which steps are cached, which will run, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lilpipe.artifact import Artifact, Inputs, Manifest, all_inputs
from lilpipe.config.lora import ADAPTER_FILES, LoRAConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.section import Section
from lilpipe.digests import digest_file
from lilpipe.errors import DataError
from lilpipe.extensions import load
from lilpipe.fingerprint import CacheKey, code_and_packages, difference
from lilpipe.pipeline.base_model import check_model_limits, follow_model, known_model
from lilpipe.pipeline.wiring import check_adapter, check_wiring, fill_roles, sources, stage_of
from lilpipe.stage import Stage
from lilpipe.store import Store

CACHE_KEY = "cache_key.json"
"""File in a workspace with the key of the artifact in progress."""


@dataclass(frozen=True)
class WaitingStep:
    """A step whose inputs do not exist yet, so its fingerprint is unknown."""

    name: str
    stage: Stage
    config: Any
    reason: str
    artifact: None = None
    status: Literal["waits"] = "waits"


@dataclass(frozen=True)
class PlannedStep:
    """A step whose inputs are known."""

    name: str
    stage: Stage
    config: Any
    reason: str
    inputs: Inputs
    cache_key: CacheKey
    artifact: Artifact | None
    """The cached output; None if the step has to run."""

    @property
    def status(self) -> Literal["cached", "run"]:
        """Whether the step has to run."""
        return "run" if self.artifact is None else "cached"

    @property
    def workspace(self) -> str:
        """Name of the workspace: the fingerprint without settings that change only rounding.

        So unfinished work can resume with another number of workers.
        """
        return _workspace(self.cache_key, self.config)


def plan(config: PipelineConfig, store: Store, *, until: str | None = None) -> dict[str, PlannedStep | WaitingStep]:
    """Return the state of each step, up to and including ``until``."""
    planned: dict[str, PlannedStep | WaitingStep] = {}
    made: dict[str, Artifact] = {}
    for name in config.steps:
        planned[name] = plan_step(config, store, name, made)
        if (artifact := planned[name].artifact) is not None:
            made[name] = artifact
        if name == until:
            break
    return planned


def plan_step(
    config: PipelineConfig, store: Store, name: str, made: Mapping[str, Artifact]
) -> PlannedStep | WaitingStep:
    """Return the state of one step; ``made`` has the artifacts of the steps before it, by name."""
    check_wiring(config, name)
    stage = stage_of(config, name)
    model = known_model(config, name, made, store)
    if model is not None:
        config = follow_model(config, model)
    section = config.section(name)
    if model is not None:
        check_model_limits(config, name, section, model)
    for extension in section.extensions():
        load(extension, object)  # fail before any step runs if the import fails
    missing = [source for source in sources(config, name) if source not in made]
    if missing:
        external_digests(stage, section)  # reports a path that does not exist before anything runs
        return WaitingStep(name, stage, section, f"after {', '.join(missing)}")
    inputs = fill_roles(config, name, made)
    check_adapter(name, inputs)
    cache_key = _cache_key(stage, section, inputs)
    lookup = store.find(stage.name, cache_key.fingerprint)
    if lookup.artifact is not None:
        return PlannedStep(name, stage, section, "up to date", inputs, cache_key, lookup.artifact)
    if lookup.problems:
        reason = f"damaged: {'; '.join(lookup.problems[:3])}"
    elif store.is_in_progress(stage.name, _workspace(cache_key, section)):
        reason = "resumes from where it was interrupted"
    elif other := _unfinished(store, name, cache_key):
        reason = f"from the start: unfinished work has other settings ({'; '.join(other[:3])})"
    else:
        reason = "; ".join(changes(store, name, cache_key)[:3]) or "never run"
    return PlannedStep(name, stage, section, reason, inputs, cache_key, None)


def changes(store: Store, step: str, cache_key: CacheKey) -> list[str]:
    """Return the differences from the most similar earlier artifact of the step (the newest of equals); empty if there
    is none.
    """
    earlier = [manifest for manifest in reversed(store.manifests(cache_key.stage)) if manifest.step == step]
    return min((difference(_key_of(manifest), cache_key) for manifest in earlier), key=len, default=[])


def _unfinished(store: Store, step: str, cache_key: CacheKey) -> list[str]:
    """Return the differences from the most similar unfinished work of the step; empty if there is none."""
    found = []
    for path in store.workspaces(cache_key.stage):
        try:
            left = json.loads((path / CACHE_KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # killed before it started
        if left.pop("step") == step:
            found.append(difference(CacheKey(**left), cache_key))
    return min(found, key=len, default=[])


def _workspace(cache_key: CacheKey, section: Section) -> str:
    return replace(cache_key, config=section.identity(rounding=False)).fingerprint


def _key_of(manifest: Manifest) -> CacheKey:
    inputs = {role: [entry.content_digest for entry in entries] for role, entries in manifest.inputs.items()}
    return CacheKey(manifest.stage, manifest.config, inputs, manifest.external, manifest.code, manifest.packages)


def external_digests(stage: Stage, section: Section) -> dict[str, str]:
    """Return the digests of what a step reads from outside the store: also the adapter that training starts from."""
    found = dict(stage.external(section))
    lora: LoRAConfig | None = getattr(section, "lora", None)
    if lora is None or lora.path is None:
        return found
    for name in ADAPTER_FILES:
        try:
            found[f"lora {name}"] = digest_file(Path(lora.path) / name)
        except OSError as error:
            raise DataError(
                f"{stage.name}.lora.path: {lora.path}: {name} cannot be read ({error.strerror}), expected the "
                "directory of a peft adapter; check the path"
            ) from error
    return found


def _cache_key(stage: Stage, section: Section, inputs: Inputs) -> CacheKey:
    digests = {role: [artifact.content_digest for artifact in all_inputs(inputs, role)] for role in inputs}
    external = external_digests(stage, section)
    if stage.names_inputs:
        for role in inputs:
            external |= {f"name of {role}.{n}": each.manifest.step for n, each in enumerate(all_inputs(inputs, role))}
    extensions = [*section.extensions(), *([stage.extension] if stage.extension else [])]
    code, packages = code_and_packages(stage.name, extensions)
    return CacheKey(stage.name, section.identity(), digests, external, code, packages)
