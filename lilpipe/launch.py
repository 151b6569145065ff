"""Run one stage in processes of its own: plain Python for one, ``torchrun`` for several.

The stage is described by a job file; it records its progress in ``events.jsonl`` of its workspace, which the parent
follows while it waits. The parent owns the processes: on any exception here (a cancelled task, a timeout, Ctrl-C)
the whole group gets SIGTERM, then SIGKILL, and if the parent itself is killed the kernel sends the SIGTERM.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lilpipe import errors
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config import Section
from lilpipe.errors import StageFailure
from lilpipe.stage import Metrics, Stage

POLL_SECONDS = 0.1
TERM_SECONDS = 20
_PR_SET_PDEATHSIG = 1


def launch(
    stage: Stage, config: Section, inputs: Inputs, work: Path, *, on_event: Callable[[dict[str, Any]], None]
) -> Metrics:
    """Run the stage in ``work`` and return its metrics. Raises what the stage raised, or ``StageFailure``."""
    job = work / "job.json"
    for stale in ("metrics.json", "failure.json"):
        (work / stale).unlink(missing_ok=True)
    described = {"module": stage.run.__module__, "config": config.model_dump(), "inputs": _paths(inputs)}
    write_atomically(job, json.dumps(described))
    num_processes = getattr(config, "num_workers", 1) if stage.distributed else 1
    environment = dict(os.environ)
    if threads := getattr(config, "threads_per_worker", None):
        environment["OMP_NUM_THREADS"] = str(threads)
    log = work / "worker.log"
    events = _Follower(work / "events.jsonl")
    with log.open("ab") as output:
        process = _start(_command(job, num_processes), environment, output)
        try:
            while process.poll() is None:
                for event in events.read():
                    on_event(event)
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(process)
            raise
    for event in events.read():
        on_event(event)
    if process.returncode == 0:
        return json.loads((work / "metrics.json").read_text(encoding="utf-8"))
    raise _failure(work, process.returncode)


def _paths(inputs: Inputs) -> dict[str, Any]:
    def entry(artifact: Artifact) -> dict[str, str]:
        return {"uri": artifact.uri, "path": str(artifact.path)}

    return {
        role: entry(value) if isinstance(value, Artifact) else [entry(artifact) for artifact in value]
        for role, value in inputs.items()
    }


def _command(job: Path, num_processes: int) -> list[str]:
    worker = ["-m", "lilpipe.worker", str(job)]
    if num_processes == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.2"]
    return [sys.executable, *torchrun, f"--nproc-per-node={num_processes}", *worker]


def _start(command: list[str], environment: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


def die_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` by which Linux sends the child SIGTERM when the thread that started it ends."""
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

    return prepare


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group: first with a chance to save, then without."""
    for signum, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, TERM_SECONDS)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _failure(work: Path, returncode: int) -> Exception:
    """What the workers reported, or what can be told from the exit status and the log."""
    report = work / "failure.json"
    if report.exists():
        failure = json.loads(report.read_text(encoding="utf-8"))
        kind = getattr(errors, failure["type"], None)
        if kind is not None:
            return kind(failure["message"])
        reason = f"{failure['type']}: {failure['message']}"
    elif returncode < 0:
        reason = f"killed by {signal.Signals(-returncode).name}"
    else:
        reason = f"exit status {returncode}"
    lines = (work / "worker.log").read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    return StageFailure(f"{reason}; last lines of {work / 'worker.log'}:\n" + "\n".join(f"  {line}" for line in lines))


class _Follower:
    """Reads the lines that have been added to a file since the last time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self.position += len(line)
                yield json.loads(line)
