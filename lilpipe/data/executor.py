"""datatrove pipelines in local processes.

``LocalPipelineExecutor`` runs each task and marks it as completed; the processes are ours, because datatrove's pool
(``multiprocessing.Pool``) waits for ever when one of its processes is killed.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

NOT_RANK_ZERO = 1
"""datatrove prints the log of local rank 0."""


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that are started when needed and end with this one; None for one worker, which is this process.

    They are forked from a server process that has imported what they need (spaCy alone takes two seconds) and has
    started no threads.
    """
    logger.disable("datatrove")
    if num_workers == 1:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lilpipe.data.steps", "lilpipe.data.filters", "spacy"])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_tasks(
    pipeline: Sequence[PipelineStep],
    *,
    num_tasks: int,
    folder: Path,
    pool: ProcessPoolExecutor | None,
    on_done: Callable[[int], None],
) -> None:
    """Run the tasks of a pipeline that are not yet marked as completed in ``folder``.

    ``on_done`` is told how many tasks are done: at the start, and after each.
    """
    executor = LocalPipelineExecutor(list(pipeline), tasks=num_tasks, logging_dir=str(folder))
    ranks = executor.get_incomplete_ranks()
    finished = num_tasks - len(ranks)
    on_done(finished)
    if pool is None:
        for done, rank in enumerate(ranks, finished + 1):
            _run_task(copy.deepcopy(executor), rank)
            on_done(done)
        return
    futures = [pool.submit(_run_task, executor, rank) for rank in ranks]
    for done, future in enumerate(as_completed(futures), finished + 1):
        future.result()
        on_done(done)


def _run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, NOT_RANK_ZERO)


def _start_worker() -> None:
    logger.disable("datatrove")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must leave no process behind that goes on writing beside the next try."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
