"""How MLflow is reached, and how much one request may hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_BATCH_METRICS = 1_000
MAX_BATCH_PARAMS = 100
"""MLflow's limits for one request."""

CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits minutes for a server that is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Item = TypeVar("Item")


def tracking_uri() -> str:
    """Where runs go: ``MLFLOW_TRACKING_URI``, or SQLite beside the default store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('.lilpipe').resolve() / 'mlflow.db'}"


def connect() -> MlflowClient:
    """A client, with our settings wherever the environment has none."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow import MlflowClient

    if not (uri := tracking_uri()).startswith("http"):
        Path(".lilpipe").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)  # the registry looks for a version's model there and not where the client does
    return MlflowClient(uri)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive parts of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))
