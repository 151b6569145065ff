"""Processes on this host: each starts in its own session, is stopped as a process group, and ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lilpipe.launch.failure import take_raised
from lilpipe.launch.workers import Ended, Job

KILL_SECONDS = 20
"""Time for a process to end after SIGKILL."""
_PR_SET_PDEATHSIG = 1


def start_process(command: list[str], job: Job) -> subprocess.Popen[bytes]:
    """Start a command with its output in the job's log."""
    with job.log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=job.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )


def stop_process(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    """Stop the process group: SIGTERM, then SIGKILL after ``seconds``."""
    for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, KILL_SECONDS)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def die_with_parent() -> Callable[[], None]:
    """Return a ``preexec_fn`` that makes Linux send the child SIGTERM when the thread that started it ends."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent died before the call above
                os._exit(1)

    return prepare


def be_killed_with_parent() -> None:
    """Make Linux kill this process (SIGKILL) when its parent ends, even if the parent itself was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def describe_status(status: int) -> str:
    """Describe an exit status; negative for a signal, as in ``subprocess``."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def explain(job: Job, status: int, who: str) -> Ended:
    """Return how workers ended.

    A kill is reported as such, because other workers' exceptions follow from it; otherwise the first exception.
    """
    raised = take_raised(job.work)
    return Ended(*raised) if raised and status > 0 else Ended(f"{who}{describe_status(status)}")


def worker_command(job_file: Path) -> list[str]:
    """Return the Python arguments that start a worker."""
    return ["-m", "lilpipe.worker", str(job_file)]


class OneProcess:
    """A stage in one process; see ``WorkerProcesses``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._process = start_process([sys.executable, *worker_command(job.file)], job)

    def poll(self) -> Ended | None:
        """Return whether the process has ended."""
        status = self._process.poll()
        if status is None:
            return None
        return explain(self._job, status, "") if status else Ended(None)

    def stop(self) -> None:
        """Stop the process."""
        stop_process(self._process, seconds=self._job.settings.stop_seconds)
