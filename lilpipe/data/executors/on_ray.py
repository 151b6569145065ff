"""datatrove pipelines as tasks of a Ray cluster (Moritz et al. 2018), optional extra `ray`.

``RayPipelineExecutor`` runs each task and marks it as completed. Task submission is our own: datatrove's loop hangs if
the process of a task (in a pool inside an actor) is killed or if a task needs more than any node has, and it ignores
exceptions of tasks.

Ray pickles the pipeline for its worker processes. They need lilpipe in the cluster's environment, and must see the
store and the sources under the same paths.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.executor import RayPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from lilpipe.config.executors import RayConfig
from lilpipe.data.executors.run_tasks import RunTasks
from lilpipe.errors import ClusterError, ConfigError

MAX_TRIES = 3
"""Maximum number of submissions of a task whose process was killed or whose node was lost."""
CANCEL_SECONDS = 30
CONNECT_SECONDS = 10
OBJECT_STORE_BYTES = 128 * 2**20
"""Shared memory of a cluster that we start; it holds only pipelines."""
NOT_RANK_ZERO = 1


@contextlib.contextmanager
def open_cluster(config: RayConfig, num_workers: int) -> Iterator[RunTasks]:
    """Connect to the cluster at ``config.address``, or start one on this host that stops on exit.

    Raises ``ConfigError`` if Ray is not installed, does not answer, or has no node large enough for a task.
    """
    ray = _import_ray()
    logger.disable("datatrove")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {
        "num_cpus": num_workers * config.cpus_per_task,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        _check_address(config.address)
        ray.init(
            address=config.address or "local",
            log_to_driver=False,
            logging_level="warning",
            **({} if config.address else own),
        )
    except OSError as error:
        raise ConfigError(
            f"corpus.ray.address: no Ray cluster answers at {config.address!r} ({error}); start one "
            f"(`ray start --head`), correct the address, or remove it to start a cluster on this host"
        ) from error
    try:
        _check_size(ray, config)
        yield _RayTasks(ray, config, num_workers)
    finally:
        ray.shutdown()


class _RayTasks:
    """Runs tasks on the connected cluster; see ``RunTasks``."""

    def __init__(self, ray: Any, config: RayConfig, num_workers: int) -> None:
        self.ray = ray
        self.num_workers = num_workers
        self.config = config
        self.remote = ray.remote(_run_task).options(
            num_cpus=config.cpus_per_task, memory=_task_bytes(config), max_retries=0
        )

    def __call__(
        self, pipeline: Sequence[PipelineStep], *, num_tasks: int, folder: Path, on_done: Callable[[int], None]
    ) -> None:
        """Run tasks; tasks whose process is killed are retried, up to ``MAX_TRIES`` submissions."""
        executor = RayPipelineExecutor(list(pipeline), tasks=num_tasks, logging_dir=str(folder.resolve()))
        ranks = deque(executor.get_incomplete_ranks())
        done = num_tasks - len(ranks)
        on_done(done)
        shared, cwd = self.ray.put(executor), Path.cwd()
        tries: Counter[int] = Counter()
        running: dict[Any, int] = {}
        try:
            while ranks or running:
                while ranks and len(running) < self.num_workers:
                    rank = ranks.popleft()
                    running[self.remote.remote(shared, rank, cwd)] = rank
                ended, _ = self.ray.wait(list(running))
                rank = running.pop(ended[0])
                tries[rank] += 1
                if self._is_through(ended[0], rank, tries[rank]):
                    done += 1
                    on_done(done)
                else:
                    ranks.append(rank)
        finally:
            self._cancel(list(running))

    def _is_through(self, task: Any, rank: int, tries: int) -> bool:
        """Return whether the task completed (False: retry). Raises the task's exception, or ``ClusterError``."""
        exceptions = self.ray.exceptions
        try:
            self.ray.get(task)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError) as error:
            if tries == MAX_TRIES:
                raise ClusterError(
                    f"task {rank}: its process on Ray was killed {tries} times: {error}; if it ran out of memory, "
                    f"raise corpus.ray.memory_per_cpu_gb (now {self.config.memory_per_cpu_gb:g}) or lower "
                    f"corpus.num_workers"
                ) from error
            return False
        return True

    def _cancel(self, tasks: list[Any]) -> None:
        for task in tasks:
            self.ray.cancel(task, force=True)
        if tasks:
            self.ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_SECONDS)


def _run_task(executor: RayPipelineExecutor, rank: int, cwd: Path) -> None:
    logger.disable("datatrove")
    with contextlib.chdir(cwd):  # relative paths of sources
        # not the executor's own method, which keeps the logs of all users and runs in one folder below /tmp
        PipelineExecutor._run_for_rank(executor, rank, NOT_RANK_ZERO)


def _import_ray() -> Any:
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.exceptions")
    except ImportError as error:
        raise ConfigError(
            "corpus.executor: got 'ray', but Ray is not installed; install the extra (`pip install -e '.[ray]'`), "
            "or set 'local'"
        ) from error
    return ray


def _check_address(address: str | None) -> None:
    """Raise ``OSError`` if nothing listens at `host:port`; Ray itself retries for four minutes."""
    if address and "://" not in address and ":" in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _task_bytes(config: RayConfig) -> int:
    return int(config.memory_per_cpu_gb * config.cpus_per_task * 2**30)


def _check_size(ray: Any, config: RayConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = [
        node
        for node in nodes
        if node.get("CPU", 0) >= config.cpus_per_task and node.get("memory", 0) >= _task_bytes(config)
    ]
    if not fitting:
        sizes = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('memory', 0) / 2**30:.1f} GB" for node in nodes)
        raise ConfigError(
            f"corpus.ray: a task needs cpus_per_task = {config.cpus_per_task} and "
            f"{_task_bytes(config) / 2**30:g} GB (memory_per_cpu_gb), but the nodes have {sizes}; lower these settings"
        )
