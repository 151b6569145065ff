"""The MLflow client and its limits per request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_BATCH_METRICS = 1_000
MAX_BATCH_PARAMS = 100
"""MLflow's limits per request."""

CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default retries for minutes when a server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Item = TypeVar("Item")


def tracking_uri() -> str:
    """Return the tracking URI: ``MLFLOW_TRACKING_URI``, or a SQLite file next to the default store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.lilpipe').resolve() / 'mlflow.db'}"


def connect() -> MlflowClient:
    """Return a client. Sets lilpipe's defaults for environment variables that are not set."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow import MlflowClient

    if not (uri := tracking_uri()).startswith("http"):
        Path(".lilpipe").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)  # the registry looks up a version's model here, not through the client
    return MlflowClient(uri)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Split into consecutive batches of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))
