"""Execution of data tasks in local processes, on a Slurm cluster or on a Ray cluster.

A pipeline is a list of datatrove steps, and a task is its execution for one rank. datatrove's executor runs the task
and marks it as completed. Completed tasks are not run again, also if another executor completed them.

Local tasks use a process pool of our own, because datatrove's pool (``multiprocessing.Pool``) hangs if one of its
processes is killed.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.executors import on_ray, on_slurm
from lilpipe.data.executors.run_tasks import RunTasks


@contextlib.contextmanager
def open_executor(config: CorpusConfig) -> Iterator[RunTasks]:
    """Open the executor that the config names; on exit, its processes and jobs are stopped.

    Raises ``ConfigError`` if the executor is not available.
    """
    with contextlib.ExitStack() as stack:
        if config.executor == "slurm":
            run: RunTasks = partial(on_slurm.run_tasks, config=config.slurm, num_workers=config.num_workers)
        elif config.executor == "ray":
            run = stack.enter_context(on_ray.open_cluster(config.ray, config.num_workers))
        else:
            run = partial(_run_here, pool=stack.enter_context(_worker_pool(config.num_workers)))

        def run_alone(
            pipeline: Sequence[PipelineStep], *, num_tasks: int, folder: Path, on_done: Callable[[int], None]
        ) -> None:
            on_slurm.cancel_leftovers(folder)
            run(pipeline, num_tasks=num_tasks, folder=folder, on_done=on_done)

        yield run_alone


@contextlib.contextmanager
def _worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Open a pool of processes that start on demand and end with this one; None for one worker, which is this process.

    Processes are forked from a server process that has imported what the steps need and has no Python threads. The
    threads of OpenBLAS and jemalloc, which start at import, survive a fork.
    """
    logger.disable("datatrove")
    if num_workers == 1:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lilpipe.data.corpus"])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _run_here(
    pipeline: Sequence[PipelineStep],
    *,
    num_tasks: int,
    folder: Path,
    pool: ProcessPoolExecutor | None,
    on_done: Callable[[int], None],
) -> None:
    """Run tasks in the pool's processes, or in this process without a pool; see ``RunTasks``."""
    executor = LocalPipelineExecutor(list(pipeline), tasks=num_tasks, logging_dir=str(folder))
    ranks = executor.get_incomplete_ranks()
    finished = num_tasks - len(ranks)
    on_done(finished)
    if pool is None:
        for done, rank in enumerate(ranks, finished + 1):
            _run_task(executor, rank)
            on_done(done)
        return
    futures = [pool.submit(_run_task, executor, rank) for rank in ranks]
    for done, future in enumerate(as_completed(futures), finished + 1):
        future.result()
        on_done(done)


def _run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run a task as datatrove's executor does, but without its log and statistics files, which take 10 ms per task."""
    data = None
    for step in copy.deepcopy(executor.pipeline):
        data = step(data, rank, executor.world_size)  # type: ignore[operator]: a PipelineStep, no other value
    if data is not None:
        deque(data, maxlen=0)
    executor.mark_rank_as_completed(rank)


def _start_worker() -> None:
    logger.disable("datatrove")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent process: an orphan must not write alongside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
