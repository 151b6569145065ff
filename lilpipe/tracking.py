"""MLflow: a parent run for each pipeline run, a nested run for each step, and the registry.

The tracker listens to a pipeline run. What it delivers is read from ``events.jsonl`` and the manifest, which are the
truth: a run that was cut off is opened again and receives what it lacks. A tracker that cannot be reached costs no
stage: the failure is reported, and what is missing is delivered when the step is next met in the store.

A cached step has a nested run too, tagged so, with a link to its *origin*, the run that made the artifact.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lilpipe.artifact import MANIFEST, Artifact, InputEntry, Manifest
from lilpipe.config import PipelineConfig
from lilpipe.errors import ArtifactError
from lilpipe.events import flatten, read_events
from lilpipe.pipeline import PlannedStep
from lilpipe.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EXPERIMENT = "lilpipe"
FLUSH_SECONDS = 5
"""Metrics are delivered in batches, so far apart at least."""
MAX_BATCH_METRICS = 1_000
MAX_BATCH_PARAMS = 100
"""MLflow's limits for one request."""

DIGEST_CHARS = 32
"""MLflow's columns end there; the whole digest is in the dataset's source."""
CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits minutes for a server that is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

logger = logging.getLogger(__name__)
Args = ParamSpec("Args")


def tracking_uri() -> str:
    """Where runs go: ``MLFLOW_TRACKING_URI``, or SQLite beside the default store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.lilpipe').resolve() / 'mlflow.db'}"


def _client() -> MlflowClient:
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow import MlflowClient

    if not (uri := tracking_uri()).startswith("http"):
        Path(".lilpipe").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)  # the registry looks for a version's model there and not where the client does
    return MlflowClient(uri)


def registered_files(uri: str) -> Path:
    """Where the files of a registered model lie, such as ``models:/lilpipe@champion``; fetched if they lie elsewhere.

    Raises ``ArtifactError`` if there is no such model.
    """
    _client()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(uri))
    except MlflowException as error:
        raise ArtifactError(f"{uri}: got no model from MLflow at {tracking_uri()} ({error}); register one") from error


def _shielded(method: Callable[Args, None]) -> Callable[Args, None]:
    """Report what goes wrong with tracking instead of raising it."""

    @functools.wraps(method)
    def shielded(*args: Args.args, **kwargs: Args.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            logger.warning(
                "MLflow at %s failed in %s (%s: %s); the stage goes on, its artifact is not affected",
                *(tracking_uri(), method.__name__, type(error).__name__, str(error).splitlines()[0]),
            )

    return shielded


class MLflowTracker:
    """Listens to one pipeline run and records it in MLflow."""

    def __init__(self, config: PipelineConfig, *, pipeline_run: str, store: Store | None = None) -> None:
        self.config = config
        self.pipeline_run = pipeline_run
        self.store = store or Store()
        self.parent_id: str | None = None
        self._is_new = False
        """Whether the parent run was made by this tracker, so that there are no nested runs to look for."""
        self._runs: dict[str, str] = {}
        """Step to its nested run."""
        self._curves: dict[str, Curve] = {}
        self._origins: dict[str, Run] = {}
        """Fingerprint to the run that made the artifact."""
        self._reports: dict[str, str] = {}
        """Step to the page of its report."""
        self._failed: set[str] = set()

    # --- what a pipeline run tells its listeners ------------------------------------------------------------------

    @_shielded
    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """Open the step's run, and deliver what an earlier try has left in ``events.jsonl``."""
        assert planned.ingredients is not None
        fingerprint = planned.ingredients.fingerprint
        self._open(step, planned.stage.name, fingerprint, started=time.time())
        work = self.store.work(planned.stage.name, planned.workspace)
        self._curves[step].add(read_events(work / "events.jsonl"))

    @_shielded
    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """Keep the metrics of one step of training; deliver a batch now and then. Texts go at once."""
        if "text" in event and step in self._runs:
            self.client.log_text(self._runs[step], event["text"], f"{event['name']}/{event['done']:08d}.txt")
        elif (curve := self._curves.get(step)) is not None:
            curve.add([event])
            if curve.is_due():
                curve.deliver(self.client)

    @_shielded
    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """Complete the step's run. A cached artifact of which MLflow holds no record is recorded in full."""
        manifest = artifact.manifest
        self._failed.discard(step)
        origin = self._origin(manifest.fingerprint) if cached else None
        if cached or step not in self._runs:
            self._open(step, manifest.stage, manifest.fingerprint, started=time.time() - seconds)
        model_id = None if origin is not None else self._record(step, self.store.fetch(artifact))
        self._complete(step, artifact, origin, cached=cached, model_id=model_id)
        if manifest.stage == "register":
            self.register(step, artifact)

    @_shielded
    def stage_failed(self, step: str, error: BaseException) -> None:
        """Close the step's run as failed, or as killed where the process was told to end."""
        self._failed.add(step)
        if (run_id := self._runs.get(step)) is not None:
            self._curves[step].deliver(self.client)
            self.client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:5000])
            self.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")

    @_shielded
    def close(self) -> None:
        """Close the parent run, and say on its page what it consists of."""
        if self.parent_id is not None:
            self.client.set_tag(self.parent_id, "mlflow.note.content", self._overview())
            self.client.set_terminated(self.parent_id, "FAILED" if self._failed else "FINISHED")

    def run_url(self, step: str) -> str | None:
        """Address of the step's run, in the MLflow server configured or in the one that `make up` starts."""
        if step not in self._runs:
            return None
        uri = tracking_uri()
        server = uri if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}"
        return f"{server.rstrip('/')}/{self._page(self._runs[step])}"

    # --- runs -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def client(self) -> MlflowClient:
        """The client; made when first needed, for importing MLflow takes more than a second."""
        return _client()

    @functools.cached_property
    def experiment_id(self) -> str:
        """The experiment that holds all runs; its files lie beside the database where that is local."""
        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is not None:
            return found.experiment_id
        local = not tracking_uri().startswith("http")
        location = (Path(".lilpipe").resolve() / "mlartifacts").as_uri() if local else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # or its page opens on traces of agents
        return self.client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags)

    def _find(self, filter_string: str) -> Run | None:
        """The newest run of the experiment that matches."""
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

    def open(self, started: float | None = None) -> str:
        """The pipeline run's own run: the one that an earlier try has left, or a new one."""
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

    def _open(self, step: str, stage: str, fingerprint: str, *, started: float) -> None:
        """The step's nested run: the one that an earlier try of this pipeline run left unfinished, or a new one."""
        parent_id, run = self.open(started), None
        if not self._is_new or step in self._runs:
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
        self._runs[step] = run.info.run_id
        self._curves[step] = Curve(run.info.run_id, last_steps)

    def _last_steps(self, run: Run) -> dict[str, int]:
        """Up to which step each metric of a reopened run has been delivered."""
        histories = {name: self.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return {name: max(point.step for point in history) for name, history in histories.items()}

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        for batch in batches([Param(name, value) for name, value in params.items()], MAX_BATCH_PARAMS):
            self.client.log_batch(run_id, params=batch)

    def _origin(self, fingerprint: str) -> Run | None:
        """The run that made the artifact, or that recorded it first."""
        if fingerprint not in self._origins:
            run = self._find(f"tags.fingerprint = '{fingerprint}' and tags.origin = 'true'")
            if run is not None:
                self._origins[fingerprint] = run
        return self._origins.get(fingerprint)

    # --- what a finished step leaves ------------------------------------------------------------------------------

    def _record(self, step: str, artifact: Artifact) -> str | None:
        """The curve, the files and the model of an artifact; returns the id of the model, if it is one."""
        run_id = self._runs[step]
        self._curves[step].add(read_events(artifact.path / "logs" / "events.jsonl"))
        self._curves[step].deliver(self.client)
        self.client.log_artifact(run_id, str(artifact.path / MANIFEST))
        if (artifact.path / "report").is_dir():
            self.client.log_artifacts(run_id, str(artifact.path / "report"), "report")
        return self._log_model(step, artifact) if artifact.manifest.kind == "Checkpoint" else None

    def _log_model(self, step: str, artifact: Artifact) -> str:
        """An MLflow model for a checkpoint, as an output of the step's run. Only a registered one carries its files.

        Models go through the client: the fluent functions would record them as inputs.
        """
        from mlflow.entities import LoggedModelOutput

        run_id, manifest = self._runs[step], artifact.manifest
        tags = {"content_digest": artifact.content_digest, "uri": artifact.uri, "fingerprint": manifest.fingerprint}
        model = self.client.create_logged_model(
            self.experiment_id,
            name=step,
            source_run_id=run_id,
            tags=tags,
            params=dict(list(flatten(manifest.config))[:MAX_BATCH_PARAMS]),
        )
        if manifest.stage == "register":
            self.client.log_model_artifacts(model.model_id, str(artifact.path))
            self._make_loadable(model.model_id, run_id)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def _make_loadable(self, model_id: str, run_id: str) -> None:
        """Add the file that tells ``mlflow.pyfunc`` and ``mlflow models serve`` which module answers."""
        from mlflow import pyfunc
        from mlflow.models import Model

        described = Model(run_id=run_id, model_id=model_id)
        pyfunc.add_to_model(described, loader_module="lilpipe.generation.pyfunc")
        with tempfile.TemporaryDirectory() as folder:
            described.save(str(Path(folder) / "MLmodel"))
            self.client.log_model_artifacts(model_id, folder)

    def _complete(
        self, step: str, artifact: Artifact, origin: Run | None, *, cached: bool, model_id: str | None
    ) -> None:
        """Final metrics, tags, inputs and links; then the run ends."""
        from mlflow.entities import Metric, RunTag

        run_id, manifest, now = self._runs[step], artifact.manifest, int(time.time() * 1000)
        last_step = max(self._curves[step].last_steps.values(), default=0)
        metrics = {"elapsed_seconds": manifest.elapsed_seconds, **manifest.metrics}
        tags = {
            "cached": str(cached).lower(),
            "origin": str(origin is None).lower(),
            "content_digest": artifact.content_digest,
            "uri": artifact.uri,
            "mlflow.note.content": self._note(step, manifest, origin),
        }
        if model_id is not None:
            tags["model_id"] = model_id
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, last_step, model_id=model_id) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        self._log_inputs(run_id, manifest)
        self.client.set_terminated(run_id)
        self._origins[manifest.fingerprint] = origin or self.client.get_run(run_id)

    def _log_inputs(self, run_id: str, manifest: Manifest) -> None:
        """Input artifacts as datasets with their digests; input models as models, which MLflow links."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        datasets, models = [], []
        for role, entry in _inputs(manifest):
            source = json.dumps({"uri": entry.uri, "content_digest": entry.content_digest})
            dataset = Dataset(entry.stage, entry.content_digest[:DIGEST_CHARS], "local", source)
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
            origin = self._origin(entry.fingerprint)
            if origin is not None and "model_id" in origin.data.tags:
                models.append(LoggedModelInput(origin.data.tags["model_id"]))
        if datasets or models:
            self.client.log_inputs(run_id, datasets=datasets, models=models)

    # --- links ----------------------------------------------------------------------------------------------------

    def _page(self, run_id: str) -> str:
        """A run's page, relative to the server's address."""
        return f"#/experiments/{self.experiment_id}/runs/{run_id}"

    def _note(self, step: str, manifest: Manifest, origin: Run | None) -> str:
        """The run's description: links to the runs that made it and its inputs, which MLflow renders."""
        parts = []
        if origin is not None:
            parts.append(f"Cached; made by [this run]({self._page(origin.info.run_id)}).")
        links = dict.fromkeys(self._link(entry) for _, entry in _inputs(manifest))
        if links:
            parts.append(f"Made from {', '.join(links)}.")
        if "report/report.html" in manifest.files:
            parts.append(f"[Report]({self._report_page(origin, step)}).")
        return " ".join(parts)

    def _report_page(self, origin: Run | None, step: str) -> str:
        run_id = origin.info.run_id if origin is not None else self._runs[step]
        self._reports[step] = f"{self._page(run_id)}/artifacts/report/report.html"
        return self._reports[step]

    def _overview(self) -> str:
        """The steps of this pipeline run in order, each with a link to its run and to its report."""
        lines = []
        for step, run_id in self._runs.items():
            report = f" ([report]({self._reports[step]}))" if step in self._reports else ""
            lines.append(f"[{step}]({self._page(run_id)}){report}")
        return ", ".join(lines)

    def _link(self, entry: InputEntry) -> str:
        origin = self._origin(entry.fingerprint)
        return entry.stage if origin is None else f"[{entry.stage}]({self._page(origin.info.run_id)})"

    # --- registry -------------------------------------------------------------------------------------------------

    def register(self, step: str, artifact: Artifact) -> str | None:
        """Give the alias to the version that holds these bytes, making it if there is none. Returns the version."""
        section = self.config.section(step)
        origin = self._origin(artifact.manifest.fingerprint)
        if origin is None or "model_id" not in origin.data.tags:
            return None
        name, digest = section.model_name, artifact.content_digest
        self._create_registered_model(name)
        found = self.client.search_model_versions(f"name = '{name}' and tags.content_digest = '{digest}'")
        version = found[0].version if found else self._create_version(name, origin, artifact)
        self.client.set_registered_model_alias(name, section.alias, version)
        return version

    def _create_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(name)
        except MlflowException:
            self.client.create_registered_model(name, description="Models made by lilpipe")

    def _create_version(self, name: str, origin: Run, artifact: Artifact) -> str:
        run_id, model_id = origin.info.run_id, origin.data.tags["model_id"]
        links = ", ".join(dict.fromkeys(self._link(entry) for _, entry in _inputs(artifact.manifest)))
        parent_id = origin.data.tags["mlflow.parentRunId"]
        pipeline = f"[this pipeline run]({self._page(parent_id)}), which links to all reports"
        version = self.client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            await_creation_for=0,
            tags={"content_digest": artifact.content_digest, "uri": artifact.uri},
            description=f"From [this run]({self._page(run_id)}), made from {links}, in {pipeline}.",
        )
        return str(version.version)


class Curve:
    """The metrics of one run by step, delivered once each, in batches."""

    def __init__(self, run_id: str, last_steps: dict[str, int]) -> None:
        self.run_id = run_id
        self.last_steps = last_steps
        """Metric to the last step that has been delivered or waits to be."""
        self._waiting: list[Metric] = []
        self._delivered_at = time.time()

    def add(self, events: Iterable[dict[str, Any]]) -> None:
        """Take up what is new. A step that is recorded again after a kill has the same values: once is enough."""
        from mlflow.entities import Metric

        for event in events:
            for name, value in event.get("metrics", {}).items():
                if event["done"] > self.last_steps.get(name, -1):
                    self.last_steps[name] = event["done"]
                    self._waiting.append(Metric(name, value, int(event["time"] * 1000), event["done"]))

    def is_due(self) -> bool:
        """Whether enough has come together, or enough time has passed."""
        return len(self._waiting) >= MAX_BATCH_METRICS or time.time() - self._delivered_at >= FLUSH_SECONDS

    def deliver(self, client: MlflowClient) -> None:
        """Send what waits; what could not be sent waits on."""
        self._delivered_at = time.time()
        while self._waiting:
            client.log_batch(self.run_id, metrics=self._waiting[:MAX_BATCH_METRICS])
            del self._waiting[:MAX_BATCH_METRICS]


Item = TypeVar("Item")


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive parts of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _inputs(manifest: Manifest) -> list[tuple[str, InputEntry]]:
    return [(role, entry) for role, entries in manifest.inputs.items() for entry in entries]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
