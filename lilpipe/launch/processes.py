"""Processes of this host: started in a session of their own, ended as a group, and never left behind."""

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
"""How long a process may take to go after SIGKILL."""
_PR_SET_PDEATHSIG = 1


def start_process(command: list[str], job: Job) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to the job's log."""
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
    """End the process group: after SIGTERM it has so many seconds, then comes SIGKILL."""
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
    """A ``preexec_fn`` by which Linux sends the child SIGTERM when the thread that started it ends."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

    return prepare


def be_killed_with_parent() -> None:
    """Let Linux kill this process when its parent ends, who had no time to do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def describe_status(status: int) -> str:
    """An exit status in words; negative for a signal, as Python has it."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def explain(job: Job, status: int, who: str) -> Ended:
    """How workers ended: a kill as such, for what others raise then follows from it; else what was raised first."""
    raised = take_raised(job.work)
    return Ended(*raised) if raised and status > 0 else Ended(f"{who}{describe_status(status)}")


def worker_command(job_file: Path) -> list[str]:
    """The module, with its argument, in which each worker runs."""
    return ["-m", "lilpipe.worker", str(job_file)]


class OneProcess:
    """A stage in one plain process; see ``Workers``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._process = start_process([sys.executable, *worker_command(job.file)], job)

    def poll(self) -> Ended | None:
        """Whether it has ended."""
        status = self._process.poll()
        if status is None:
            return None
        return explain(self._job, status, "") if status else Ended(None)

    def stop(self) -> None:
        """End it."""
        stop_process(self._process, seconds=self._job.settings.stop_seconds)
