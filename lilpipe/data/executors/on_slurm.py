"""datatrove pipelines as job arrays of a Slurm cluster (Yoo, Jette and Grondona 2003), by ``SlurmPipelineExecutor``.

The executor writes the pipeline into the folder of its logs, where the jobs read it: that file (by dill) is
datatrove's own hand-over, from this process to the same user's jobs; we read and write no such file ourselves.
Store, sources and this Python environment must lie on a file system that all nodes see.

A task is done when datatrove's marker says so; Slurm is asked (``squeue``) why one is not. Accounting (``sacct``) is
optional in Slurm and not needed: ``squeue`` lists ended jobs for `MinJobAge` (5 minutes by default).
"""

from __future__ import annotations

import copy
import getpass
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from lilpipe import errors
from lilpipe.artifact import write_atomically
from lilpipe.config import SlurmConfig
from lilpipe.errors import ClusterError, ConfigError, LilpipeError

MAX_TRIES = 3
"""How often the tasks of jobs that were killed, or whose node was lost, are submitted."""
JOBS_PER_WORKER = 4
"""A job does several tasks one after the other, for Python and its libraries take seconds to start; so many jobs for
each worker leave little idle at the end."""
MAX_ARRAY_SIZE = 1000
"""Jobs of an array; Slurm's default limit is 1001."""
CONTROLLER_SECONDS = 300
"""How long a controller that does not answer (it may be restarting) is asked again."""
MARKER_SECONDS = 90
"""How long after a job has ended well its markers may take to be seen: NFS keeps directories for up to 60 s."""
CANCEL_SECONDS = 120
"""How long cancelled jobs may take to end; Slurm's `KillWait` is 30 s by default."""
TAIL_CHARS = 2_000

JOB_FILE = "slurm_job"
"""Holds the name of the jobs that may be at work in a folder."""
OWN_OPTIONS = {"array", "job-name", "output", "error", "export", "dependency"}

ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
}
REMEDIES = {
    "CANCELLED": "it was cancelled; run again to go on",
    "TIMEOUT": "raise corpus.slurm.time",
    "DEADLINE": "raise or remove the deadline in corpus.slurm.sbatch",
    "OUT_OF_MEMORY": "raise corpus.slurm.memory_per_cpu_gb",
}
"""Ends of a job that another try does not mend."""


def run_tasks(
    pipeline: Sequence[PipelineStep],
    *,
    num_tasks: int,
    folder: Path,
    on_done: Callable[[int], None],
    config: SlurmConfig,
    num_workers: int,
) -> None:
    """Run tasks as jobs; see ``RunTasks``.

    Jobs that end without a word (killed, or with their node) are submitted again, up to ``MAX_TRIES`` times. Raises
    ``ConfigError`` if Slurm is not there or refuses the job, and ``ClusterError`` if jobs are cancelled or lost.
    """
    folder = folder.resolve()
    tasks = _executor(pipeline, num_tasks, folder, config, num_workers)
    ranks = tasks.get_incomplete_ranks()
    on_done(num_tasks - len(ranks))
    tries = 0
    while ranks:
        tries += 1
        shutil.rmtree(folder / "failures", ignore_errors=True)
        tasks.tasks_per_job = math.ceil(len(ranks) / min(MAX_ARRAY_SIZE, num_workers * JOBS_PER_WORKER))
        _try_submission(tasks, len(ranks))
        write_atomically(folder / JOB_FILE, tasks.job_name)
        try:
            lost = _run_jobs(tasks, ranks, folder, on_done, config.poll_seconds)
        except BaseException:
            _command("scancel", f"--name={tasks.job_name}", f"--user={getpass.getuser()}")
            raise
        (folder / JOB_FILE).unlink()
        if lost and lost.state in REMEDIES:
            raise ClusterError(f"{lost.describe()}{REMEDIES[lost.state]}")
        if lost and tries == MAX_TRIES:
            raise ClusterError(f"{lost.describe()}it was submitted {tries} times; look for what kills it")
        ranks = tasks.get_incomplete_ranks()


def cancel_leftovers(folder: Path) -> None:
    """End the jobs that a killed run has left at work in the folder, and wait until they are gone."""
    try:
        name = (folder / JOB_FILE).read_text()
    except FileNotFoundError:
        return
    deadline = time.monotonic() + CANCEL_SECONDS
    while any(job.is_active for job in _jobs(name)):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Slurm jobs {name} of an earlier run do not end; see `squeue --name={name}`, and run again "
                f"when they are gone"
            )
        _command("scancel", f"--name={name}", f"--user={getpass.getuser()}")
        time.sleep(0.5)
    (folder / JOB_FILE).unlink()


@dataclass(frozen=True)
class _Lost:
    """A task that did not come to its end."""

    rank: int
    job: str
    state: str
    log: Path

    def describe(self) -> str:
        tail = self.log.read_text(errors="replace")[-TAIL_CHARS:] if self.log.exists() else "it wrote nothing"
        return f"task {self.rank} in {self.log.parents[1]}: Slurm job {self.job} ended as {self.state}:\n{tail}\n"


@dataclass(frozen=True)
class _Job:
    """A job of an array, as `squeue` tells of it."""

    array_id: str
    index: str
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED

    @property
    def is_stuck(self) -> bool:
        """Whether it waits for what does not come by itself; what a person holds, a person releases."""
        return "requeued held" in self.reason or self.reason in ("BadConstraints", "PartitionTimeLimit")


def _run_jobs(
    tasks: _Tasks, ranks: list[int], folder: Path, on_done: Callable[[int], None], poll_seconds: float
) -> _Lost | None:
    """Submit the tasks of these ranks and wait until all their jobs have ended; returns one that is not done."""
    tasks.job_id = None  # or the new jobs would wait for those of the last try
    tasks.launch_job()
    ended_at = None
    while True:
        jobs = {job.index: job for job in _jobs(tasks.job_name) if job.array_id == tasks.job_id}
        missing = tasks.get_incomplete_ranks()  # after the jobs, so that one that has ended has its marker
        on_done(tasks.tasks - len(missing))
        _raise_failure(folder)
        if not missing:
            return None
        for job in jobs.values():
            if job.is_active and job.is_stuck:
                raise ClusterError(
                    f"Slurm job {job.array_id}_{job.index} waits for ever ({job.reason}); see corpus.slurm"
                )
        if not any(job.is_active for job in jobs.values()):
            ended_at = ended_at or time.monotonic()
            lost = _find_lost(tasks, ranks, missing, jobs, folder)
            if lost.state != "COMPLETED" or time.monotonic() > ended_at + MARKER_SECONDS:
                return lost
        time.sleep(poll_seconds)


def _find_lost(tasks: _Tasks, ranks: list[int], missing: list[int], jobs: dict[str, _Job], folder: Path) -> _Lost:
    """One of the tasks that are missing, of the job that says most about why."""
    lost = []
    for rank in missing:
        index = str(ranks.index(rank) // tasks.tasks_per_job)
        state = jobs[index].state if index in jobs else "unknown"
        log = folder / "slurm_logs" / f"{tasks.job_id}_{index}.out"
        lost.append(_Lost(rank, f"{tasks.job_id}_{index}", state, log))
    return max(lost, key=lambda each: (each.state in REMEDIES, each.state != "COMPLETED"))


class _Tasks(SlurmPipelineExecutor):
    """datatrove's executor; a task that fails says in a file what it raised."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            # a fresh copy of the steps for each of the job's tasks, as in local processes
            return super(_Tasks, copy.deepcopy(self))._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            _write_failure(Path(self.logging_dir.path), rank, error)
            raise

    def launch_merge_stats(self) -> None:
        """No further job: nothing reads datatrove's statistics."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """No second copy of the pipeline."""


def _executor(
    pipeline: Sequence[PipelineStep], num_tasks: int, folder: Path, config: SlurmConfig, num_workers: int
) -> _Tasks:
    if wrong := OWN_OPTIONS & {option.lstrip("-") for option in config.sbatch}:
        raise ConfigError(f"corpus.slurm.sbatch: {', '.join(sorted(wrong))} are set by lilpipe; remove them")
    return _Tasks(
        list(pipeline),
        tasks=num_tasks,
        workers=num_workers,
        time=config.time,
        partition=config.partition,
        cpus_per_task=config.cpus_per_task,
        mem_per_cpu_gb=config.memory_per_cpu_gb,
        sbatch_args={option.lstrip("-"): value for option, value in config.sbatch.items()},
        job_name=_job_name(folder),
        qos="",
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        logging_dir=str(folder),
        max_array_size=MAX_ARRAY_SIZE,
        with_srun=False,  # which stumbles over the SLURM_ variables where this process is itself a job
    )


def _job_name(folder: Path) -> str:
    """The same for each run of the folder, and for no other folder."""
    return f"lilpipe-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _try_submission(tasks: _Tasks, num_ranks: int) -> None:
    """Raise ``ConfigError``, with what `sbatch` says, if Slurm would not take the job."""
    num_jobs = math.ceil(num_ranks / tasks.tasks_per_job)
    script = tasks.get_launch_file_contents(tasks.get_sbatch_args(num_jobs), "true")
    result = _command("sbatch", "--test-only", script=script)
    if result.returncode:
        raise ConfigError(
            f"corpus.slurm: Slurm does not take the job: {result.stderr.strip()}; correct partition, time, "
            f"cpus_per_task, memory_per_cpu_gb or sbatch"
        )


def _jobs(name: str) -> list[_Job]:
    """The jobs of that name that are waiting or running, or ended a while ago."""
    result = _command(
        "squeue",
        f"--name={name}",
        f"--user={getpass.getuser()}",
        "--array",
        "--states=all",
        "--noheader",
        "--format=%F|%K|%T|%r",
    )
    if result.returncode:
        raise ClusterError(f"squeue fails: {result.stderr.strip()}; see that it works in this shell, and run again")
    return [_Job(*line.split("|", 3)) for line in result.stdout.splitlines()]


def _command(*command: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a controller that does not answer is asked again."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            result = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(
                f"corpus.executor: got 'slurm', but `{command[0]}` is not found on this host; "
                f"run where Slurm's commands are, or set 'local'"
            ) from None
        silent = any(sign in result.stderr for sign in ("Unable to contact", "timed out", "Connection refused"))
        if not result.returncode or not silent or time.monotonic() > deadline:
            return result
        time.sleep(1)


def _write_failure(folder: Path, rank: int, error: Exception) -> None:
    failure = {
        "type": type(error).__name__,
        "message": str(error),
        "os_error": [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else None,
        "traceback": "".join(traceback.format_exception(error))[-TAIL_CHARS:],
    }
    (folder / "failures").mkdir(exist_ok=True)
    write_atomically(folder / "failures" / f"{rank:05d}.json", json.dumps(failure, default=os.fspath))


def _raise_failure(folder: Path) -> None:
    """Raise what a task has raised: the user's errors and the system's as such, any other with its trace-back."""
    for path in sorted((folder / "failures").glob("*.json")):
        failure = json.loads(path.read_text())
        kind = getattr(errors, failure["type"], None)
        if isinstance(kind, type) and issubclass(kind, LilpipeError):
            raise kind(failure["message"])
        if failure["os_error"]:
            raise OSError(*failure["os_error"])
        if failure["type"] == "MemoryError":
            raise MemoryError(failure["message"])
        raise RuntimeError(f"task {int(path.stem)} failed on Slurm:\n{failure['traceback']}")
