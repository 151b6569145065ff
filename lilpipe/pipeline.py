"""Planning and running the steps of a pipeline: the command line, a Prefect task and a test all go through here."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from lilpipe.artifact import Artifact, InputEntry, Inputs, Manifest, content_digest, list_files, write_atomically
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.section import Section
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.fingerprint import CacheKey, code_and_packages, difference
from lilpipe.launch import launch
from lilpipe.stage import Metrics, Stage, get_stage
from lilpipe.store import Store

CACHE_KEY_FILE = "cache_key.json"
"""In a workspace: what is being made there."""


@dataclass(frozen=True)
class PlannedStep:
    """What is known about a step before it runs."""

    name: str
    stage: Stage
    config: Any
    inputs: Inputs | None
    """The artifacts it reads; none while a step before it has not run."""
    cache_key: CacheKey | None
    artifact: Artifact | None
    status: Literal["cached", "run", "waits"]
    """`waits`: it cannot be told yet, since its inputs are still to be made."""
    reason: str

    @property
    def workspace(self) -> str:
        """Name of its workspace: its fingerprint but for what changes rounding alone, so that it may go on under
        another number of workers.
        """
        return _workspace(self.cache_key, self.config) if self.cache_key else ""


class Listener(Protocol):
    """Something that is told what happens to steps: the display, the tracker, Prefect."""

    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """A step that is not cached begins."""

    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """The stage recorded a line in ``events.jsonl``."""

    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """The step has its artifact."""

    def stage_failed(self, step: str, error: BaseException) -> None:
        """The step ended without one."""


def plan(config: PipelineConfig, store: Store, *, until: str | None = None) -> dict[str, PlannedStep]:
    """Which steps are cached, which will run, and why; up to and with the step ``until``."""
    planned: dict[str, PlannedStep] = {}
    made: dict[str, Artifact] = {}
    for name in config.steps:
        planned[name] = _plan_step(config, store, name, made)
        if (artifact := planned[name].artifact) is not None:
            made[name] = artifact
        if name == until:
            break
    return planned


def _plan_step(config: PipelineConfig, store: Store, name: str, made: dict[str, Artifact]) -> PlannedStep:
    check_wiring(config, name)
    stage = get_stage(config.steps[name].stage)
    section = config.section(name)
    missing = [source for source in _sources(config, name) if source not in made]
    if missing:
        stage.external(section)  # so that a path that does not exist is told of now
        reason = f"after {', '.join(missing)}"
        return PlannedStep(name, stage, section, None, None, None, "waits", reason)
    inputs = _inputs(config, name, made)
    cache_key = _cache_key(stage, section, inputs)
    lookup = store.find(stage.name, cache_key.fingerprint)
    if lookup.artifact is not None:
        return PlannedStep(name, stage, section, inputs, cache_key, lookup.artifact, "cached", "up to date")
    if lookup.problems:
        reason = f"damaged: {'; '.join(lookup.problems[:3])}"
    elif store.is_in_progress(stage.name, _workspace(cache_key, section)):
        reason = "goes on from where it was interrupted"
    elif other := _unfinished(store, name, cache_key):
        reason = f"from the start: unfinished work was under other settings ({'; '.join(other[:3])})"
    else:
        reason = "; ".join(changes(store, name, cache_key)[:3]) or "never run"
    return PlannedStep(name, stage, section, inputs, cache_key, None, "run", reason)


def _workspace(cache_key: CacheKey, section: Section) -> str:
    return replace(cache_key, config=section.identity(rounding=False)).fingerprint


def changes(store: Store, step: str, cache_key: CacheKey) -> list[str]:
    """What differs from the artifact of this step that is nearest, the newest of equals; nothing if there is none."""
    earlier = [manifest for manifest in reversed(store.manifests(cache_key.stage)) if manifest.step == step]
    return min((difference(_cache_key_of(manifest), cache_key) for manifest in earlier), key=len, default=[])


def _unfinished(store: Store, step: str, cache_key: CacheKey) -> list[str]:
    """What differs from the nearest work of this step that was left unfinished; nothing if there is none."""
    found = []
    for path in store.workspaces(cache_key.stage):
        try:
            left = json.loads((path / CACHE_KEY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # killed before it began
        if left.pop("step") == step:
            found.append(difference(CacheKey(**left), cache_key))
    return min(found, key=len, default=[])


def _cache_key_of(manifest: Manifest) -> CacheKey:
    inputs = {role: [entry.content_digest for entry in entries] for role, entries in manifest.inputs.items()}
    return CacheKey(manifest.stage, manifest.config, inputs, manifest.external, manifest.code, manifest.packages)


def _cache_key(stage: Stage, section: Section, inputs: Inputs) -> CacheKey:
    digests = {role: [artifact.content_digest for artifact in _tuple(value)] for role, value in inputs.items()}
    external = dict(stage.external(section))
    if stage.names_inputs:
        for role, value in inputs.items():
            external |= {f"name of {role}.{n}": artifact.manifest.step for n, artifact in enumerate(_tuple(value))}
    code, packages = code_and_packages(stage.name)
    return CacheKey(stage.name, section.identity(), digests, external, code, packages)


def _tuple(value: Artifact | tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    return (value,) if isinstance(value, Artifact) else value


def _sources(config: PipelineConfig, name: str) -> list[str]:
    """The steps that a step reads."""
    sources: list[str] = []
    for value in config.steps[name].inputs.values():
        sources += [value] if isinstance(value, str) else value
    return list(dict.fromkeys(sources))


def check_wiring(config: PipelineConfig, name: str) -> None:
    """Raise ``ConfigError`` if a step's inputs are not what its stage takes."""
    stage = get_stage(config.steps[name].stage)
    roles = config.steps[name].inputs
    known = {**stage.inputs, **stage.optional_inputs}
    if unknown := roles.keys() - known.keys():
        raise ConfigError(
            f"steps.{name}.inputs: got {', '.join(sorted(unknown))}; stage {stage.name} takes {', '.join(known)}"
        )
    if absent := stage.inputs.keys() - roles.keys():
        raise ConfigError(f"steps.{name}.inputs: {', '.join(sorted(absent))} missing; name the step that makes it")
    for role, value in roles.items():
        for source in (value,) if isinstance(value, str) else value:
            kind = get_stage(config.steps[source].stage).output
            if kind != known[role]:
                raise ConfigError(f"steps.{name}.inputs.{role}: step {source} makes a {kind}, expected a {known[role]}")


def _inputs(config: PipelineConfig, name: str, made: dict[str, Artifact]) -> Inputs:
    """The artifacts that a step reads, each under the name of the step that it comes from in this pipeline.

    Another pipeline may have made it, or another step that had the same to do, under another name.
    """

    def named(source: str) -> Artifact:
        artifact = made[source]
        return replace(artifact, manifest=artifact.manifest.model_copy(update={"step": source}))

    return {
        role: named(value) if isinstance(value, str) else tuple(named(source) for source in value)
        for role, value in config.steps[name].inputs.items()
    }


def _used(config: PipelineConfig, step: str, store: Store, pipeline_run: str) -> dict[str, Artifact] | None:
    """The inputs that this pipeline run has already come to; none unless all of them are there.

    Within one run they stand, whatever is edited meanwhile; and raw sources are looked at once.
    """
    refs = store.refs(pipeline_run)
    used = {}
    for source in _sources(config, step):
        ref = refs.get(source)
        artifact = store.find(ref["stage"], ref["fingerprint"]).artifact if ref else None
        if artifact is None:
            return None
        used[source] = artifact
    return used


def run_step(
    config: PipelineConfig, step: str, *, store: Store, pipeline_run: str, listeners: Sequence[Listener] = ()
) -> tuple[Artifact, bool]:
    """The artifact of one step, and whether it was cached. The steps before it must have theirs.

    Raises ``LilpipeError`` for what the user can mend, ``StageFailure`` for what another try may mend.
    """
    if step not in config.steps:
        raise ConfigError(f"step {step!r}: there is no such step; known: {', '.join(config.steps)}")
    started = time.time()
    used = _used(config, step, store, pipeline_run)
    planned = plan(config, store, until=step)[step] if used is None else _plan_step(config, store, step, used)
    if planned.cache_key is None:
        raise ArtifactError(f"step {step}: {planned.reason} is still to be run; run that first, or the full pipeline")
    stage, fingerprint = planned.stage, planned.cache_key.fingerprint
    with store.lock(stage.name, planned.workspace):
        # Another process may have run it while this one waited for the lock.
        lookup = store.find(stage.name, fingerprint)
        if lookup.problems:
            store.quarantine(stage.name, fingerprint)
        cached = lookup.artifact is not None
        artifact = lookup.artifact or _run(planned, store, listeners)
    store.set_ref(pipeline_run, step, artifact)
    for listener in listeners:
        listener.stage_finished(step, artifact, cached=cached, seconds=time.time() - started)
    return artifact, cached


def _run(planned: PlannedStep, store: Store, listeners: Sequence[Listener]) -> Artifact:
    """Run a step that is not cached, and commit its artifact."""
    assert planned.inputs is not None
    assert planned.cache_key is not None
    inputs = {
        role: store.fetch(value) if isinstance(value, Artifact) else tuple(store.fetch(item) for item in value)
        for role, value in planned.inputs.items()
    }
    work = store.work(planned.stage.name, planned.workspace)
    write_atomically(work / CACHE_KEY_FILE, json.dumps({"step": planned.name, **asdict(planned.cache_key)}))
    attempts = work / "attempts.jsonl"

    def on_event(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener.stage_event(planned.name, event)

    try:
        for listener in listeners:
            listener.stage_started(planned.name, planned)
        _append(attempts, {"started": time.time()})
        try:
            metrics = launch(planned.stage, planned.config, inputs, work, on_event=on_event)
        finally:
            _append(attempts, {"ended": time.time()})
        return store.commit(work, _manifest(planned, work, metrics))
    except BaseException as error:
        for listener in listeners:
            listener.stage_failed(planned.name, error)
        raise


def _manifest(planned: PlannedStep, work: Path, metrics: Metrics) -> Manifest:
    assert planned.inputs is not None
    assert planned.cache_key is not None
    cache_key, output = planned.cache_key, work / "output"
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in ("events.jsonl", "attempts.jsonl", "worker.log"):
        if (work / name).exists():
            shutil.copyfile(work / name, logs / name)
    files = list_files(output)
    section = planned.config
    identity = section.identity()
    return Manifest(
        kind=planned.stage.output,
        stage=planned.stage.name,
        step=planned.name,
        fingerprint=cache_key.fingerprint,
        config=identity,
        operational={key: value for key, value in section.model_dump().items() if key not in identity},
        inputs={
            role: [
                InputEntry(
                    uri=artifact.uri,
                    stage=artifact.manifest.stage,
                    fingerprint=artifact.manifest.fingerprint,
                    content_digest=artifact.content_digest,
                )
                for artifact in _tuple(value)
            ]
            for role, value in planned.inputs.items()
        },
        external=cache_key.external,
        code=cache_key.code,
        packages=cache_key.packages,
        git_commit=_git_commit(),
        environment=_environment(section),
        files=files,
        content_digest=content_digest(files),
        metrics=metrics,
        elapsed_seconds=round(sum(_attempt_seconds(work)), 3),
        created_at=datetime.now(UTC).isoformat(),
    )


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _attempt_seconds(work: Path) -> list[float]:
    """Seconds of each try. One whose parent was killed left no end; its last recorded event stands for it."""
    attempts = [json.loads(line) for line in (work / "attempts.jsonl").read_text().splitlines()]
    events = work / "events.jsonl"
    times = [json.loads(line)["time"] for line in events.read_text().splitlines()] if events.exists() else []
    seconds = []
    for position, attempt in enumerate(attempts):
        if "started" not in attempt:
            continue
        after = attempts[position + 1] if position + 1 < len(attempts) else {}
        until = after.get("started", float("inf"))
        last_event = max((t for t in times if attempt["started"] <= t < until), default=attempt["started"])
        seconds.append(after.get("ended", last_event) - attempt["started"])
    return seconds


@functools.cache
def _git_commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _environment(section: Section) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lilpipe": metadata.version("lilpipe"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "world_size": getattr(section, "num_workers", 1),
        "threads": getattr(section, "threads_per_worker", None),
        "seed": getattr(section, "seed", None),
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
