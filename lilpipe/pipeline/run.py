"""Run a step that is not cached, and commit its artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lilpipe.artifact import Artifact, list_files, write_atomically
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.credentials import without_credentials
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.launch.run_stage import launch
from lilpipe.pipeline.manifest import ATTEMPTS, collect_logs, make_manifest
from lilpipe.pipeline.plan import CACHE_KEY, PlannedStep, WaitingStep, plan, plan_step
from lilpipe.pipeline.wiring import continue_adapter, sources
from lilpipe.store import Store


class Listener(Protocol):
    """Receives the events of steps: the display, the MLflow tracker, Prefect."""

    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """Called when a step that is not cached starts."""

    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """Called for each line that the stage appends to ``events.jsonl``."""

    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """Called when the step has its artifact."""

    def stage_failed(self, step: str, error: BaseException) -> None:
        """Called when the step failed."""


def run_step(
    config: PipelineConfig, step: str, *, store: Store, pipeline_run: str, listeners: Sequence[Listener] = ()
) -> tuple[Artifact, bool]:
    """Return the artifact of one step, and whether it was cached. The steps before it must be finished.

    Raises ``LilpipeError`` for errors that the user must fix, and ``StageFailure`` for retryable failures.
    """
    if step not in config.steps:
        raise ConfigError(f"step {step!r}: there is no such step; known: {', '.join(config.steps)}")
    started = time.time()
    planned = _plan(config, step, store, pipeline_run)
    with store.lock(planned.stage.name, planned.workspace):
        # Another process may have run it while this one waited for the lock.
        lookup = store.find(planned.stage.name, planned.cache_key.fingerprint)
        if lookup.problems:
            store.quarantine(planned.stage.name, planned.cache_key.fingerprint)
        cached = lookup.artifact is not None
        artifact = lookup.artifact or _run(planned, store, listeners)
    store.set_ref(pipeline_run, step, artifact)
    for listener in listeners:
        listener.stage_finished(step, artifact, cached=cached, seconds=time.time() - started)
    return artifact, cached


def _plan(config: PipelineConfig, step: str, store: Store, pipeline_run: str) -> PlannedStep:
    """Return the step with its inputs: those that this pipeline run has already used, otherwise those of the plan.

    So the inputs of a pipeline run stay the same if code or settings are edited meanwhile, and raw sources are hashed
    only once.
    """
    refs = {name: ref for name, ref in store.refs(pipeline_run).items() if name in sources(config, step)}
    used = {name: store.find(ref["stage"], ref["fingerprint"]).artifact for name, ref in refs.items()}
    planned = plan_step(config, store, step, {name: artifact for name, artifact in used.items() if artifact})
    if isinstance(planned, WaitingStep):
        steps = plan(config, store, until=step)
        planned = steps[step]
        if isinstance(planned, WaitingStep):
            missing = [f"{name} ({steps[name].reason})" for name in sources(config, step) if not steps[name].artifact]
            raise ArtifactError(
                f"step {step}: its inputs are not built yet: {', '.join(missing)}; run these steps first, or the full "
                "pipeline"
            )
    return planned


def _run(planned: PlannedStep, store: Store, listeners: Sequence[Listener]) -> Artifact:
    inputs = {
        role: store.fetch(value) if isinstance(value, Artifact) else tuple(store.fetch(item) for item in value)
        for role, value in planned.inputs.items()
    }
    work = store.work(planned.stage.name, planned.workspace)
    write_atomically(
        work / CACHE_KEY, json.dumps(without_credentials({"step": planned.name, **asdict(planned.cache_key)}))
    )

    def on_event(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener.stage_event(planned.name, event)

    try:
        for listener in listeners:
            listener.stage_started(planned.name, planned)
        _append(work / ATTEMPTS, {"started": time.time()})
        try:
            section = continue_adapter(planned.config, inputs)
            metrics = launch(planned.stage, section, inputs, work, on_event=on_event)
        finally:
            _append(work / ATTEMPTS, {"ended": time.time()})
        collect_logs(work)
        files = list_files(work / "output", store.digests.sha256)
        return store.commit(work, make_manifest(planned, work, files, metrics))
    except BaseException as error:
        for listener in listeners:
            listener.stage_failed(planned.name, error)
        raise


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
