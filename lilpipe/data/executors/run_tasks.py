"""Interface of the executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from datatrove.pipeline.base import PipelineStep


class RunTasks(Protocol):
    """Runs the tasks of a pipeline in parallel, and returns when all are completed."""

    def __call__(
        self, pipeline: Sequence[PipelineStep], *, num_tasks: int, folder: Path, on_done: Callable[[int], None]
    ) -> None:
        """Run the tasks that are not marked as completed in ``folder``.

        ``on_done`` is called with the number of completed tasks, at the start and whenever a task completes. Exceptions
        of a task are raised here. Raises ``ClusterError`` if the cluster refuses, cancels or loses a task.
        """
        ...
