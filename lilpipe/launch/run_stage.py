"""Run a stage in separate processes: plain Python for one, a launcher for several.

A job file describes the stage. The stage appends its progress to ``events.jsonl`` in its workspace, which the parent
reads while it waits. On any exception in the parent (cancelled task, timeout, Ctrl-C) it stops the processes with
SIGTERM, then SIGKILL. If the parent is killed, the kernel sends SIGTERM.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config.parallel import LaunchConfig
from lilpipe.config.section import Section
from lilpipe.errors import ConfigError, StageFailure
from lilpipe.launch.failure import FINAL, RAISED, forget, read_final
from lilpipe.launch.kubernetes import Kubernetes
from lilpipe.launch.lines import Lines
from lilpipe.launch.processes import OneProcess
from lilpipe.launch.srun import Srun
from lilpipe.launch.torchrun import Torchrun
from lilpipe.launch.workers import METRICS, Ended, Job, Restarted, WorkerProcesses
from lilpipe.stage import Metrics, Stage, Workspace

POLL_SECONDS = 0.1
TAIL_LINES = 20
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""For training stages: freed memory stays with the process (glibc). By default large tensors of a step are returned to
the kernel and mapped again, zeroed page by page: 100,000 page faults and 7 % of a step of 5 M parameters on a CPU.
"""
METRICS_SECONDS = 90
"""How long a file of another host may take to be visible here: NFS caches directories for up to 60 s."""
LAUNCHERS: dict[str, Callable[[Job], WorkerProcesses]] = {"torchrun": Torchrun, "srun": Srun, "kubernetes": Kubernetes}


def launch(
    stage: Stage, config: Section, inputs: Inputs, work: Path, *, on_event: Callable[[dict[str, Any]], None]
) -> Metrics:
    """Run the stage in ``work`` and return its metrics. Raises the stage's error, or ``StageFailure``."""
    job = describe(stage, config, inputs, work)
    events = Lines(work / "events.jsonl")
    workers = _start(job) if stage.distributed else OneProcess(job)
    try:
        while not isinstance(state := workers.poll(), Ended):
            if isinstance(state, Restarted):
                Workspace(work).log(f"{state.cause}; all workers restart from the last checkpoint")
            for event in events.read():
                on_event(json.loads(event))
            time.sleep(POLL_SECONDS)
    except BaseException:
        workers.stop()
        raise
    for event in events.read():
        on_event(json.loads(event))
    if state.problem is None:
        return _read_metrics(work / METRICS)
    raise read_final(work) or _failure(job, state)


def _start(job: Job) -> WorkerProcesses:
    settings = job.settings
    if job.num_workers % settings.num_nodes:
        raise ConfigError(f"num_workers {job.num_workers} must be a multiple of launch.num_nodes {settings.num_nodes}")
    if settings.launcher == "torchrun" and job.num_workers == 1:
        return OneProcess(job)
    return LAUNCHERS[settings.launcher](job)


def describe(stage: Stage, config: Section, inputs: Inputs, work: Path) -> Job:
    """Write the job file and delete the result files of an earlier attempt."""
    for stale in (METRICS, FINAL, RAISED):
        forget(work / stale)
    settings = getattr(config, "launch", LaunchConfig())
    environment = dict(os.environ)
    if threads := getattr(config, "threads_per_worker", None):
        environment["OMP_NUM_THREADS"] = str(threads)
        environment = KEEP_MEMORY | environment
    job = Job(
        file=work.absolute() / "job.json",
        num_workers=getattr(config, "num_workers", 1) if stage.distributed else 1,
        environment=environment,
        settings=settings,
    )
    shutil.rmtree(job.heartbeats, ignore_errors=True)
    described = {"module": stage.run.__module__, "config": config.model_dump(), "inputs": _paths(inputs)}
    if stage.extension is not None:
        described["extension"] = {"name": stage.extension.name, "file": stage.extension.file}
    write_atomically(job.file, json.dumps(described), private=True)  # sources' addresses may have credentials
    return job


def _paths(inputs: Inputs) -> dict[str, Any]:
    def entry(artifact: Artifact) -> dict[str, str]:
        return {"uri": artifact.uri, "path": str(artifact.path), "step": artifact.manifest.step}

    return {
        role: entry(value) if isinstance(value, Artifact) else [entry(artifact) for artifact in value]
        for role, value in inputs.items()
    }


def _read_metrics(path: Path) -> Metrics:
    deadline = time.monotonic() + METRICS_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise StageFailure(f"the workers succeeded, but {path} does not exist; all hosts must share this folder")
        time.sleep(POLL_SECONDS)
    return json.loads(path.read_text(encoding="utf-8"))


def _failure(job: Job, ended: Ended) -> StageFailure:
    """Return the retryable error for failed workers."""
    text = ended.trace or job.log.read_text(encoding="utf-8", errors="replace")
    lines = "".join(f"\n  {line}" for line in text.splitlines()[-TAIL_LINES:])
    return StageFailure(f"{ended.problem}; {'from' if ended.trace else 'last lines of'} {job.log}:{lines}")
