"""datatrove pipelines as job arrays of a Slurm cluster (Yoo, Jette and Grondona 2003), by ``SlurmPipelineExecutor``.

The executor pickles the pipeline (with dill) into its log folder, where the jobs of the same user read it; lilpipe
itself reads and writes no pickle file. The store, the sources and this Python environment must be on a file system that
all nodes see.

A task is completed if datatrove's marker exists; if not, ``squeue`` tells why. Accounting (``sacct``) is optional in
Slurm and not needed: ``squeue`` lists ended jobs for `MinJobAge` (5 minutes by default).
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
from lilpipe.config.executors import SlurmConfig
from lilpipe.errors import ClusterError, ConfigError, LilpipeError

MAX_TRIES = 3
"""Maximum number of submissions of tasks whose job was killed or whose node was lost."""
JOBS_PER_WORKER = 4
"""Number of jobs per worker. A job runs several tasks one after the other, because starting Python takes seconds; with
this many jobs per worker, few workers are idle at the end."""
MAX_ARRAY_SIZE = 1000
"""Maximum number of jobs in an array; Slurm's default limit is 1001."""
CONTROLLER_SECONDS = 300
"""Time to retry commands while the controller does not answer; it may be restarting."""
MARKER_SECONDS = 90
"""Time that markers may take to become visible after a successful job: NFS caches directories for up to 60 s."""
CANCEL_SECONDS = 120
"""Time that cancelled jobs may take to end; Slurm's `KillWait` is 30 s by default."""
TAIL_CHARS = 2_000

JOB_FILE = "slurm_job"
"""File with the name of the jobs that may be active in a folder."""
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
    "CANCELLED": "it was cancelled; run again to resume",
    "TIMEOUT": "raise corpus.slurm.time",
    "DEADLINE": "raise or remove the deadline in corpus.slurm.sbatch",
    "OUT_OF_MEMORY": "raise corpus.slurm.memory_per_cpu_gb",
}
"""Final states of a job that a retry does not fix."""


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

    Jobs that end without an exception (killed, or their node was lost) are submitted again, up to ``MAX_TRIES`` times.
    Raises ``ConfigError`` if Slurm is missing or refuses the job, and ``ClusterError`` if jobs are cancelled or lost.
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
            raise ClusterError(f"{lost.describe()}it was submitted {tries} times; find out what kills it")
        ranks = tasks.get_incomplete_ranks()


def cancel_leftovers(folder: Path) -> None:
    """Cancel the jobs that a killed run left active in the folder, and wait until they have ended."""
    try:
        name = (folder / JOB_FILE).read_text()
    except FileNotFoundError:
        return
    deadline = time.monotonic() + CANCEL_SECONDS
    while any(job.is_active for job in _jobs(name)):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Slurm jobs {name} of an earlier run do not end; check `squeue --name={name}`, and run again "
                f"when they have ended"
            )
        _command("scancel", f"--name={name}", f"--user={getpass.getuser()}")
        time.sleep(0.5)
    (folder / JOB_FILE).unlink()


@dataclass(frozen=True)
class _Lost:
    """A task that did not complete."""

    rank: int
    job: str
    state: str
    log: Path

    def describe(self) -> str:
        tail = self.log.read_text(errors="replace")[-TAIL_CHARS:] if self.log.exists() else "no log was written"
        return f"task {self.rank} in {self.log.parents[1]}: Slurm job {self.job} ended as {self.state}:\n{tail}\n"


@dataclass(frozen=True)
class _Job:
    """A job of an array, as listed by `squeue`."""

    array_id: str
    index: str
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED

    @property
    def is_stuck(self) -> bool:
        """Whether the job is pending for a reason that does not resolve itself; user holds do not count."""
        return "requeued held" in self.reason or self.reason in ("BadConstraints", "PartitionTimeLimit")


def _run_jobs(
    tasks: _Tasks, ranks: list[int], folder: Path, on_done: Callable[[int], None], poll_seconds: float
) -> _Lost | None:
    """Submit the tasks of ``ranks`` and wait until their jobs end; return an incomplete task, or None."""
    tasks.job_id = None  # else the new jobs would depend on those of the previous submission
    tasks.launch_job()
    ended_at = None
    while True:
        jobs = {job.index: job for job in _jobs(tasks.job_name) if job.array_id == tasks.job_id}
        missing = tasks.get_incomplete_ranks()  # after the jobs, so that markers of ended jobs are seen
        on_done(tasks.tasks - len(missing))
        _raise_failure(folder)
        if not missing:
            return None
        for job in jobs.values():
            if job.is_active and job.is_stuck:
                raise ClusterError(
                    f"Slurm job {job.array_id}_{job.index} can never start ({job.reason}); check corpus.slurm"
                )
        if not any(job.is_active for job in jobs.values()):
            ended_at = ended_at or time.monotonic()
            lost = _find_lost(tasks, ranks, missing, jobs, folder)
            if lost.state != "COMPLETED" or time.monotonic() > ended_at + MARKER_SECONDS:
                return lost
        time.sleep(poll_seconds)


def _find_lost(tasks: _Tasks, ranks: list[int], missing: list[int], jobs: dict[str, _Job], folder: Path) -> _Lost:
    """Return the missing task whose job state is the most informative."""
    lost = []
    for rank in missing:
        index = str(ranks.index(rank) // tasks.tasks_per_job)
        state = jobs[index].state if index in jobs else "unknown"
        log = folder / "slurm_logs" / f"{tasks.job_id}_{index}.out"
        lost.append(_Lost(rank, f"{tasks.job_id}_{index}", state, log))
    return max(lost, key=lambda each: (each.state in REMEDIES, each.state != "COMPLETED"))


class _Tasks(SlurmPipelineExecutor):
    """datatrove's executor; a task that fails writes its exception to a file."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            # a fresh copy of the steps for each task of the job, as in local processes
            return super(_Tasks, copy.deepcopy(self))._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            _write_failure(Path(self.logging_dir.path), rank, error)
            raise

    def launch_merge_stats(self) -> None:
        """Do nothing: datatrove's statistics are not used."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Do nothing: the second copy of the pipeline is not used."""


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
        with_srun=False,  # srun fails with inherited SLURM_ variables if this process is itself a job
    )


def _job_name(folder: Path) -> str:
    """Return a job name that is unique to the folder and the same in each run."""
    return f"lilpipe-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _try_submission(tasks: _Tasks, num_ranks: int) -> None:
    """Raise ``ConfigError`` with the message of `sbatch --test-only` if Slurm would refuse the job."""
    num_jobs = math.ceil(num_ranks / tasks.tasks_per_job)
    script = tasks.get_launch_file_contents(tasks.get_sbatch_args(num_jobs), "true")
    result = _command("sbatch", "--test-only", script=script)
    if result.returncode:
        raise ConfigError(
            f"corpus.slurm: Slurm refuses the job: {result.stderr.strip()}; correct partition, time, "
            f"cpus_per_task, memory_per_cpu_gb or sbatch"
        )


def _jobs(name: str) -> list[_Job]:
    """Return the jobs with that name that are pending, running or recently ended."""
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
        raise ClusterError(f"squeue failed: {result.stderr.strip()}; check that it works in this shell, and run again")
    return [_Job(*line.split("|", 3)) for line in result.stdout.splitlines()]


def _command(*command: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; it is retried while the controller does not answer."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            result = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(
                f"corpus.executor: got 'slurm', but `{command[0]}` is not found on this host; "
                f"run on a host with Slurm's commands, or set 'local'"
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
    """Raise a task's exception: errors of lilpipe and of the system with their type, others with their traceback."""
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
