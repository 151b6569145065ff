"""Metrics by step, sent once each, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lilpipe.tracking.client import MAX_BATCH_METRICS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

FLUSH_SECONDS = 5
"""Minimum time between two batches."""


class Curve:
    """The metrics of one run by step, sent once each, in batches."""

    def __init__(self, run_id: str, last_steps: dict[str, int]) -> None:
        self.run_id = run_id
        self.last_steps = last_steps
        """Metric → last step that was sent or is queued."""
        self._waiting: list[Metric] = []
        self._delivered_at = time.time()

    def add(self, events: Iterable[dict[str, Any]]) -> None:
        """Queue new metrics. A step recorded again after a kill has the same values and is skipped."""
        from mlflow.entities import Metric

        for event in events:
            for name, value in event.get("metrics", {}).items():
                if event["done"] > self.last_steps.get(name, -1):
                    self.last_steps[name] = event["done"]
                    self._waiting.append(Metric(name, value, int(event["time"] * 1000), event["done"]))

    def is_due(self) -> bool:
        """Whether a batch is full or enough time has passed."""
        return len(self._waiting) >= MAX_BATCH_METRICS or time.time() - self._delivered_at >= FLUSH_SECONDS

    def deliver(self, client: MlflowClient) -> None:
        """Send the queued metrics; those that fail stay queued."""
        self._delivered_at = time.time()
        while self._waiting:
            client.log_batch(self.run_id, metrics=self._waiting[:MAX_BATCH_METRICS])
            del self._waiting[:MAX_BATCH_METRICS]
