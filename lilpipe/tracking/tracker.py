"""Listener that records a pipeline run in MLflow.

It reads ``events.jsonl`` and the manifest, which are the source of truth: an interrupted run is reopened and receives
the missing data. If MLflow is not reachable, no stage fails: the error is logged, and the missing data is sent when the
step is next found in the store.

A cached step also has a nested run, tagged as cached, with a link to its *origin*, the run that made the artifact.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from lilpipe.artifact import MANIFEST, Artifact
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.credentials import hide_credentials
from lilpipe.pipeline.plan import PlannedStep
from lilpipe.store import Store
from lilpipe.tracking.client import tracking_uri
from lilpipe.tracking.events import read_events
from lilpipe.tracking.lineage import REPORT, log_inputs, note, report_page
from lilpipe.tracking.mlflow_runs import Runs
from lilpipe.tracking.registry import log_model, register

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)
Args = ParamSpec("Args")


def _shielded(method: Callable[Args, None]) -> Callable[Args, None]:
    """Log errors of tracking instead of raising them."""

    @functools.wraps(method)
    def shielded(*args: Args.args, **kwargs: Args.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            text = f"MLflow at {tracking_uri()} failed in {method.__name__} ({found})"
            logger.warning("%s; the stage continues, its artifact is not affected", hide_credentials(text))

    return shielded


class MLflowTracker:
    """Records one pipeline run in MLflow."""

    def __init__(self, config: PipelineConfig, *, pipeline_run: str, store: Store | None = None) -> None:
        self.pipeline_run = pipeline_run
        self.store = store or Store()
        self.runs = Runs(config, pipeline_run=pipeline_run)
        self._reports: dict[str, str] = {}
        """Step → address of its report."""
        self._failed: set[str] = set()

    @_shielded
    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """Open the step's run, and queue the metrics that an earlier attempt left in ``events.jsonl``."""
        self.runs.open_step(step, planned.stage.name, planned.cache_key.fingerprint, started=time.time())
        work = self.store.work(planned.stage.name, planned.workspace)
        self.runs.curves[step].add(read_events(work / "events.jsonl"))

    @_shielded
    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """Queue the metrics of one optimizer step and send batches when due. Texts are sent at once."""
        runs = self.runs
        if "text" in event and step in runs.of_step:
            runs.client.log_text(runs.of_step[step], event["text"], f"{event['name']}/{event['done']:08d}.txt")
        elif (curve := runs.curves.get(step)) is not None:
            curve.add([event])
            if curve.is_due():
                curve.deliver(runs.client)

    @_shielded
    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """Complete the step's run. A cached artifact that MLflow has no record of is recorded in full."""
        manifest = artifact.manifest
        self._failed.discard(step)
        origin = self.runs.origin(manifest.fingerprint) if cached else None
        if cached or step not in self.runs.of_step:
            self.runs.open_step(step, manifest.stage, manifest.fingerprint, started=time.time() - seconds)
        model_id = None if origin is not None else self._record(step, self.store.fetch(artifact))
        self._complete(step, artifact, origin, cached=cached, model_id=model_id)
        if manifest.stage == "register":
            register(self.runs, step, artifact)

    @_shielded
    def stage_failed(self, step: str, error: BaseException) -> None:
        """Close the step's run as FAILED, or as KILLED if the process was told to stop."""
        self._failed.add(step)
        if (run_id := self.runs.of_step.get(step)) is not None:
            client = self.runs.client
            self.runs.curves[step].deliver(client)
            client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:5000])
            client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")

    @_shielded
    def close(self) -> None:
        """Close the parent run and write the overview of its steps on its page."""
        if (parent_id := self.runs.parent_id) is not None:
            self.runs.client.set_tag(parent_id, "mlflow.note.content", self._overview())
            self.runs.client.set_terminated(parent_id, "FAILED" if self._failed else "FINISHED")

    def run_url(self, step: str) -> str | None:
        """Return the address of the step's run in the configured MLflow server, or in the one that `make up` starts."""
        if step not in self.runs.of_step:
            return None
        uri = tracking_uri()
        server = uri if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}"
        return f"{server.rstrip('/')}/{self.runs.page(self.runs.of_step[step])}"

    def _record(self, step: str, artifact: Artifact) -> str | None:
        """Record the metrics, files and model of an artifact; returns the model's id, if it is a model."""
        client, run_id, curve = self.runs.client, self.runs.of_step[step], self.runs.curves[step]
        curve.add(read_events(artifact.path / "logs" / "events.jsonl"))
        curve.deliver(client)
        client.log_artifact(run_id, str(artifact.path / MANIFEST))
        if (artifact.path / "report").is_dir():
            client.log_artifacts(run_id, str(artifact.path / "report"), "report")
        return log_model(self.runs, step, artifact) if artifact.manifest.kind == "Checkpoint" else None

    def _complete(
        self, step: str, artifact: Artifact, origin: Run | None, *, cached: bool, model_id: str | None
    ) -> None:
        """Record final metrics, tags, inputs and links, then end the run."""
        from mlflow.entities import Metric, RunTag

        runs, manifest, now = self.runs, artifact.manifest, int(time.time() * 1000)
        client, run_id = runs.client, runs.of_step[step]
        if REPORT in manifest.files:
            self._reports[step] = report_page(runs, run_id if origin is None else origin.info.run_id)
        last_step = max(runs.curves[step].last_steps.values(), default=0)
        metrics = {"elapsed_seconds": manifest.elapsed_seconds, **manifest.metrics}
        tags = {
            "cached": str(cached).lower(),
            "origin": str(origin is None).lower(),
            "content_digest": artifact.content_digest,
            "uri": artifact.uri,
            "mlflow.note.content": note(runs, manifest, origin, report=self._reports.get(step)),
        }
        if model_id is not None:
            tags["model_id"] = model_id
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, last_step, model_id=model_id) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        log_inputs(runs, run_id, manifest)
        client.set_terminated(run_id)
        runs.origins[manifest.fingerprint] = origin or client.get_run(run_id)

    def _overview(self) -> str:
        """Return the steps of this pipeline run in order, each with links to its run and report."""
        lines = []
        for step, run_id in self.runs.of_step.items():
            report = f" ([report]({self._reports[step]}))" if step in self._reports else ""
            lines.append(f"[{step}]({self.runs.page(run_id)}){report}")
        return ", ".join(lines)
