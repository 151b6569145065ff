"""Models in MLflow: a logged model for each checkpoint, and a registered version with an alias for each release."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lilpipe.artifact import Artifact
from lilpipe.errors import ArtifactError
from lilpipe.model.origin import card_metadata, read_origin
from lilpipe.tracking.client import MAX_BATCH_PARAMS, connect, tracking_uri
from lilpipe.tracking.events import flatten
from lilpipe.tracking.lineage import links_to_inputs
from lilpipe.tracking.mlflow_runs import Runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def registered_files(uri: str) -> Path:
    """Return the directory of a registered model such as ``models:/lilpipe@champion``; downloads it if it is remote.

    Raises ``ArtifactError`` if there is no such model.
    """
    connect()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(uri))
    except MlflowException as error:
        raise ArtifactError(f"{uri}: no such model in MLflow at {tracking_uri()} ({error}); register one") from error


def log_model(runs: Runs, step: str, artifact: Artifact) -> str:
    """Create an MLflow model for a checkpoint as an output of the step's run. Only a registered one contains its files.

    Uses the client, because the fluent functions would record models as inputs.
    """
    from mlflow.entities import LoggedModelOutput

    client, run_id, manifest = runs.client, runs.of_step[step], artifact.manifest
    tags = {"content_digest": artifact.content_digest, "uri": artifact.uri, "fingerprint": manifest.fingerprint}
    model = client.create_logged_model(
        runs.experiment_id,
        name=step,
        source_run_id=run_id,
        tags=tags,
        params=dict(list(flatten(manifest.config))[:MAX_BATCH_PARAMS]),
    )
    if manifest.stage == "register":
        client.log_model_artifacts(model.model_id, str(artifact.path))
        _make_loadable(client, model.model_id, run_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def _make_loadable(client: MlflowClient, model_id: str, run_id: str) -> None:
    """Add the ``MLmodel`` file, which names the module for ``mlflow.pyfunc`` and ``mlflow models serve``."""
    from mlflow import pyfunc
    from mlflow.models import Model

    described = Model(run_id=run_id, model_id=model_id)
    pyfunc.add_to_model(described, loader_module="lilpipe.generation.pyfunc")
    with tempfile.TemporaryDirectory() as folder:
        described.save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model_id, folder)


def register(runs: Runs, step: str, artifact: Artifact) -> None:
    """Set the alias to the version with this content digest; create the version if there is none."""
    section, client = runs.config.section(step), runs.client
    origin = runs.origin(artifact.manifest.fingerprint)
    if origin is None or "model_id" not in origin.data.tags:
        return
    name, digest = section.model_name, artifact.content_digest
    _create_registered_model(client, name)
    found = client.search_model_versions(f"name = '{name}' and tags.content_digest = '{digest}'")
    version = found[0].version if found else _create_version(runs, name, origin, artifact)
    client.set_registered_model_alias(name, section.alias, version)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="Models made by lilpipe")


def _create_version(runs: Runs, name: str, origin: Run, artifact: Artifact) -> str:
    run_id, model_id = origin.info.run_id, origin.data.tags["model_id"]
    links = links_to_inputs(runs, artifact.manifest)
    pipeline = f"[this pipeline run]({runs.page(origin.data.tags['mlflow.parentRunId'])}), which links to all reports"
    version = runs.client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        await_creation_for=0,
        tags={"content_digest": artifact.content_digest, "uri": artifact.uri, **_origin_tags(artifact)},
        description=f"From [this run]({runs.page(run_id)}), made from {links}, in {pipeline}.",
    )
    return str(version.version)


def _origin_tags(artifact: Artifact) -> dict[str, str]:
    """Return license and base model of an imported model."""
    metadata = card_metadata(read_origin(artifact.path))
    return {key: value if isinstance(value, str) else ", ".join(value) for key, value in metadata.items()}
