"""The interface of all executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from datatrove.pipeline.base import PipelineStep


class RunTasks(Protocol):
    """Runs the tasks of a pipeline, some at a time, and returns when all are done."""

    def __call__(
        self, pipeline: Sequence[PipelineStep], *, num_tasks: int, folder: Path, on_done: Callable[[int], None]
    ) -> None:
        """Run the tasks that are not yet marked as completed in ``folder``.

        ``on_done`` is told how many tasks are done: at the start, and as they end. What a task raises is raised here;
        ``ClusterError`` says that the cluster refused, cancelled or lost a task.
        """
        ...
