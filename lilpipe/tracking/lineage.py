"""Lineage of an artifact: inputs as MLflow datasets and models, and links between runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lilpipe.artifact import InputEntry, Manifest
from lilpipe.tracking.mlflow_runs import Runs

if TYPE_CHECKING:
    from mlflow.entities import Run

DIGEST_CHARS = 32
"""Width of MLflow's column; the whole digest is in the dataset's source."""
REPORT = "report/report.html"


def log_inputs(runs: Runs, run_id: str, manifest: Manifest) -> None:
    """Log input artifacts as datasets with their digests, and input models as models, which MLflow links."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    datasets, models = [], []
    for role, entry in _inputs(manifest):
        source = json.dumps({"uri": entry.uri, "content_digest": entry.content_digest})
        dataset = Dataset(entry.stage, entry.content_digest[:DIGEST_CHARS], "local", source)
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
        origin = runs.origin(entry.fingerprint)
        if origin is not None and "model_id" in origin.data.tags:
            models.append(LoggedModelInput(origin.data.tags["model_id"]))
    if datasets or models:
        runs.client.log_inputs(run_id, datasets=datasets, models=models)


def links_to_inputs(runs: Runs, manifest: Manifest) -> str:
    """Return the stages of an artifact's inputs, each with a link to the run that made it."""
    return ", ".join(dict.fromkeys(_link(runs, entry) for _, entry in _inputs(manifest)))


def report_page(runs: Runs, run_id: str) -> str:
    """Return the address of a run's report, relative to the server."""
    return f"{runs.page(run_id)}/artifacts/{REPORT}"


def note(runs: Runs, manifest: Manifest, origin: Run | None, *, report: str | None) -> str:
    """Return the run's description: links (which MLflow renders) to the runs that made it and its inputs."""
    parts = []
    if origin is not None:
        parts.append(f"Cached; made by [this run]({runs.page(origin.info.run_id)}).")
    if links := links_to_inputs(runs, manifest):
        parts.append(f"Made from {links}.")
    if report is not None:
        parts.append(f"[Report]({report}).")
    return " ".join(parts)


def _link(runs: Runs, entry: InputEntry) -> str:
    origin = runs.origin(entry.fingerprint)
    return entry.stage if origin is None else f"[{entry.stage}]({runs.page(origin.info.run_id)})"


def _inputs(manifest: Manifest) -> list[tuple[str, InputEntry]]:
    return [(role, entry) for role, entries in manifest.inputs.items() for entry in entries]
