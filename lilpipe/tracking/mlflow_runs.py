"""The MLflow runs of a pipeline run: its parent run, a nested run per step, and the runs that made its artifacts."""

from __future__ import annotations

import functools
import getpass
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lilpipe.config.pipeline import PipelineConfig
from lilpipe.credentials import hide_credentials
from lilpipe.tracking.client import MAX_BATCH_PARAMS, batches, connect, tracking_uri
from lilpipe.tracking.curve import Curve
from lilpipe.tracking.events import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "lilpipe"


class Runs:
    """Finds the run of an earlier attempt, or creates one."""

    def __init__(self, config: PipelineConfig, *, pipeline_run: str) -> None:
        self.config = config
        self.pipeline_run = pipeline_run
        self.parent_id: str | None = None
        self._is_new = False
        """Whether the parent run was created here, so that there are no nested runs to look for."""
        self.of_step: dict[str, str] = {}
        """Step → its nested run."""
        self.curves: dict[str, Curve] = {}
        self.origins: dict[str, Run] = {}
        """Fingerprint → the run that made the artifact, for those looked up so far."""

    @functools.cached_property
    def client(self) -> MlflowClient:
        """The client, created on first use, because importing MLflow takes more than a second."""
        return connect()

    @functools.cached_property
    def experiment_id(self) -> str:
        """The experiment of all runs. With a local database its files are next to the database."""
        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is not None:
            return found.experiment_id
        local = not tracking_uri().startswith("http")
        location = (Path(".lilpipe").resolve() / "mlartifacts").as_uri() if local else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # otherwise its page opens on agent traces
        return self.client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags)

    def page(self, run_id: str) -> str:
        """Return the address of a run's page, relative to the server."""
        return f"#/experiments/{self.experiment_id}/runs/{run_id}"

    def open(self, started: float | None = None) -> str:
        """Return the parent run: that of an earlier attempt, or a new one."""
        if self.parent_id is None:
            run = self._find(f"tags.pipeline_run = '{self.pipeline_run}' and tags.level = 'pipeline'")
            if run is None:
                config = self.config
                name = f"{config.recipe}, seed {config.seed}"
                run = self._create(name, started=started or time.time(), level="pipeline", recipe=config.recipe)
                self._is_new = True
                self._log_params(run.info.run_id, {"recipe": config.recipe, "seed": str(config.seed)})
            else:
                self.client.update_run(run.info.run_id, status="RUNNING")
            self.parent_id = run.info.run_id
        return self.parent_id

    def open_step(self, step: str, stage: str, fingerprint: str, *, started: float) -> None:
        """Open the step's nested run: an unfinished one of an earlier attempt of this pipeline run, or a new one."""
        parent_id, run = self.open(started), None
        if not self._is_new or step in self.of_step:
            same = f"tags.pipeline_run = '{self.pipeline_run}' and tags.fingerprint = '{fingerprint}'"
            run = self._find(f"{same} and tags.step = '{step}' and attributes.status != 'FINISHED'")
        if run is not None:
            self.client.update_run(run.info.run_id, status="RUNNING")
            last_steps = self._last_steps(run)
        else:
            tags = {"level": "step", "step": step, "stage": stage, "fingerprint": fingerprint}
            run = self._create(step, started=started, **tags, **{"mlflow.parentRunId": parent_id})
            self._log_params(run.info.run_id, dict(flatten(self.config.section(step).model_dump())))
            last_steps = {}
        self.of_step[step] = run.info.run_id
        self.curves[step] = Curve(run.info.run_id, last_steps)

    def origin(self, fingerprint: str) -> Run | None:
        """Return the run that made the artifact, or the first run that recorded it."""
        if fingerprint not in self.origins:
            run = self._find(f"tags.fingerprint = '{fingerprint}' and tags.origin = 'true'")
            if run is not None:
                self.origins[fingerprint] = run
        return self.origins.get(fingerprint)

    def _find(self, filter_string: str) -> Run | None:
        """Return the newest matching run of the experiment."""
        order = ["attributes.start_time DESC"]
        found = self.client.search_runs([self.experiment_id], filter_string, max_results=1, order_by=order)
        return found[0] if found else None

    def _create(self, name: str, *, started: float, **tags: str) -> Run:
        return self.client.create_run(
            self.experiment_id,
            run_name=name,
            start_time=int(started * 1000),
            tags={"pipeline_run": self.pipeline_run, "mlflow.user": _user(), "mlflow.source.name": "lilpipe", **tags},
        )

    def _last_steps(self, run: Run) -> dict[str, int]:
        """Return the last step of each metric that a reopened run has received."""
        histories = {name: self.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return {name: max(point.step for point in history) for name, history in histories.items()}

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        shown = [Param(name, hide_credentials(value)) for name, value in params.items()]
        for batch in batches(shown, MAX_BATCH_PARAMS):
            self.client.log_batch(run_id, params=batch)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
