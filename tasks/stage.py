"""The only Prefect task: it runs a step of the pipeline.

Prefect retries, applies timeouts and displays; the fingerprint in ``lilpipe.pipeline`` decides whether a step is
cached. So the task disables Prefect's caching, passes no data, and ends in a state named `Cached` if the store had the
artifact. Only infrastructure failures are retried: an error in config or data would occur again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging.loggers import LoggingAdapter
from prefect.states import Completed, Failed

from lilpipe.artifact import Artifact
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import LilpipeError
from lilpipe.pipeline.plan import PlannedStep
from lilpipe.pipeline.run import Listener, run_step
from lilpipe.store import Store
from lilpipe.terminal import visible
from lilpipe.tracking import MLflowTracker

_listeners: ContextVar[Sequence[Listener]] = ContextVar("listeners", default=())

PROGRESS_SECONDS = 5
"""Minimum interval between two progress updates of a stage."""


def failed(error: LilpipeError) -> State:
    """Return the final state of a run that the user must fix; Prefect also prints its message in terminals."""
    return Failed(message=visible(str(error)))


def is_retryable(_task: Any, _run: TaskRun, state: State) -> bool:
    """Return whether a failed attempt is retried. A user error is a returned state without an exception, and is not."""
    return isinstance(state.data, BaseException)


@task(
    name="stage",
    task_run_name="{step}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=is_retryable,
)
def run_stage(
    step: str,
    *,
    config: PipelineConfig,
    tracker: MLflowTracker,
    listeners: Sequence[Listener] = (),
) -> State:
    """Run one step unless it is cached, and return its final state.

    A ``LilpipeError`` becomes a failed state with its message; any other exception is raised and retried.
    """
    everyone = (*listeners, tracker, StagePage(tracker))
    try:
        _, cached = run_step(config, step, store=Store(), pipeline_run=tracker.pipeline_run, listeners=everyone)
    except LilpipeError as error:
        tracker.stage_failed(step, error)
        state = failed(error)
        get_run_logger().error("%s", state.message)
        return state
    return Completed(name="Cached", message="Found in the store") if cached else Completed()


@contextmanager
def heard_by(*listeners: Listener) -> Iterator[None]:
    """Add listeners of this process to the flows called in this context; flow parameters cannot carry them."""
    token = _listeners.set(listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


def run_configured(config: PipelineConfig, step: str, tracker: MLflowTracker) -> State:
    """Run one step as a task, with the retries and timeout of its configuration; returns the task's state."""
    settings = config.orchestration
    task = run_stage.with_options(
        retries=settings.retries,
        retry_delay_seconds=settings.retry_delay_seconds,
        timeout_seconds=settings.stage_timeout_seconds.get(step, settings.timeout_seconds),
    )
    return task(step, config=config, tracker=tracker, listeners=_listeners.get(), return_state=True)


class StagePage:
    """Page of a stage in Prefect: log lines, progress, metrics, and a link to its MLflow run."""

    def __init__(self, tracker: MLflowTracker) -> None:
        self.logger: LoggingAdapter = get_run_logger()  # type: ignore[assignment]
        self.tracker = tracker
        self._progress: Any = None
        self._updated = 0.0

    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """Log why the step runs, and create its progress artifact."""
        self.logger.info("%s runs (%s)", step, planned.reason)
        self._progress = self._show(
            create_progress_artifact, 0.0, key=f"{_key(step)}-progress", description=f"{step}: starting"
        )

    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """Log messages, and update the progress at intervals."""
        if "message" in event:
            self.logger.info("%s", visible(event["message"]))
        elif "metrics" in event and self._progress is not None and time.time() - self._updated >= PROGRESS_SECONDS:
            self._updated = time.time()
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
            text = f"{step}: {event['done']:,} of {event['total']:,} {event['unit']}" + (f", {numbers}" * bool(numbers))
            self.logger.info("%s", text)
            percent = 100 * event["done"] / max(event["total"], 1)
            self._show(update_progress_artifact, self._progress, percent, description=text)

    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """Publish the metrics and the location of the artifact."""
        self.logger.info("%s %s", step, "found in the store" if cached else f"done in {seconds:.1f} s")
        if self._progress is not None:
            self._show(update_progress_artifact, self._progress, 100.0, description=f"{step}: done")
        self._show(
            create_markdown_artifact, describe(artifact), key=_key(step), description=f"{step}: artifact and metrics"
        )
        if url := self.tracker.run_url(step):
            self._show(create_link_artifact, url, key=f"{_key(step)}-mlflow", link_text=f"{step} in MLflow")

    def stage_failed(self, step: str, error: BaseException) -> None:
        """Do nothing: Prefect shows the error."""

    def _show(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call Prefect to display something; if its server does not respond, only log a warning."""
        try:
            return function(*arguments, **options)
        except Exception as error:
            self.logger.warning("Prefect call %s failed: %s", function.__name__, error)
            return None


def describe(artifact: Artifact) -> str:
    """Describe an artifact in Markdown: location, digest, metrics."""
    manifest = artifact.manifest
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in manifest.metrics.items())
    table = f"\n\n| metric | value |\n| --- | --- |\n{rows}" if rows else ""
    return (
        f"**{manifest.step}**: {manifest.kind} of stage `{manifest.stage}`, made {manifest.created_at} in "
        f"{manifest.elapsed_seconds:.1f} s\n\n`{artifact.uri}`\n\ncontent `{artifact.content_digest}`{table}\n"
    )


def _key(step: str) -> str:
    """Convert a step name to characters that Prefect allows in artifact keys."""
    return "".join(letter if letter.isalnum() else "-" for letter in step.lower())
