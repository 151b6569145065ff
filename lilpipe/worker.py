"""Process that runs a stage: ``python -m lilpipe.worker JOB``, started directly or by a launcher.

Exit status 0: success. 1: failure. 75 (EX_TEMPFAIL): stopped by SIGTERM after saving a checkpoint. Exceptions are
reported in two files; see ``lilpipe.launch.failure``.
"""

from __future__ import annotations

import errno
import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lilpipe.artifact import Artifact, Inputs, read_manifest, write_atomically
from lilpipe.errors import DataError, HungCollective, LilpipeError, Preempted, StoreError
from lilpipe.heartbeat import TIMEOUT_SECONDS
from lilpipe.launch.failure import RAISED, forget, report
from lilpipe.launch.processes import be_killed_with_parent
from lilpipe.launch.srun import rank_environment
from lilpipe.launch.workers import HEARTBEATS, METRICS
from lilpipe.stage import Metrics, Stage, Workspace, get_stage
from lilpipe.store import explain_os_error

EX_TEMPFAIL = 75


def main(job_file: Path) -> int:
    """Run the job and return the exit status. Rank 0 writes ``metrics.json``; a failing rank reports its error."""
    work = job_file.parent
    rank = int(os.environ.get("RANK", "0"))
    try:
        metrics = run(json.loads(job_file.read_text(encoding="utf-8")), work, rank=rank)
    except Exception as error:
        told = _for_users(error, work)
        report(work, told, rank=rank)
        if isinstance(told, Preempted):
            return EX_TEMPFAIL
        if isinstance(told, LilpipeError | HungCollective):
            return 1
        raise
    if rank == 0:
        write_atomically(work / METRICS, json.dumps(metrics))
    return 0


def _for_users(error: Exception, work: Path) -> Exception:
    """Convert errors that the user must fix into a ``LilpipeError``: a full or read-only disk, too little memory."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        return StoreError(explain_os_error(work, error))
    if isinstance(error, MemoryError):
        return DataError(f"stage ran out of memory in {work}; lower its batch size or num_workers")
    return error


def run(job: dict, work: Path, *, rank: int) -> Metrics:
    """Run the stage described by a job in this process."""
    own = job.get("extension")
    stage: Stage = get_stage(**own) if own else importlib.import_module(job["module"]).STAGE
    config = stage.config.model_validate(job["config"])
    workspace = Workspace(work, rank=rank)
    if rank == 0:  # only rank 0 writes there; a kill during a write leaves a temporary file
        for leftover in workspace.output.rglob(".*.tmp"):
            leftover.unlink()
    inputs = _inputs(job["inputs"])
    if not stage.distributed:
        return stage.run(config, inputs, workspace)
    return _run_distributed(stage, config, inputs, workspace)


def _run_distributed(stage: Stage, config: Any, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Run a training stage as one of several workers, or alone."""
    import torch

    from lilpipe import distributed

    torch.set_num_threads(getattr(config, "threads_per_worker", 1))
    settings: Any = getattr(config, "launch", None)
    timeout_seconds: int = settings.timeout_seconds if settings else TIMEOUT_SECONDS
    heartbeats = workspace.root / HEARTBEATS
    if settings and settings.launcher == "kubernetes" and workspace.rank == 0 and any(heartbeats.glob("*.json")):
        workspace.log("all workers restart from the last checkpoint")  # other launchers report restarts themselves
        forget(workspace.root / RAISED)
    try:
        distributed.init(timeout_seconds=timeout_seconds, folder=heartbeats)
        return stage.run(config, inputs, workspace)
    except Exception as error:
        told = distributed.hang(error, heartbeats, timeout_seconds=timeout_seconds) or _for_users(error, workspace.root)
        report(workspace.root, told, rank=workspace.rank)  # before this worker exits and makes the others fail
        if told is error:
            raise
        raise told from error
    finally:
        distributed.shutdown()


def _inputs(entries: dict) -> Inputs:
    def artifact(entry: dict[str, str]) -> Artifact:
        path = Path(entry["path"])
        manifest = read_manifest(path).model_copy(update={"step": entry["step"]})
        return Artifact(uri=entry["uri"], path=path, manifest=manifest)

    return {
        role: tuple(artifact(entry) for entry in value) if isinstance(value, list) else artifact(value)
        for role, value in entries.items()
    }


def _terminate(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _main(arguments: list[str]) -> int:
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _terminate)
    job_file, launcher = Path(arguments[0]), arguments[1:]
    if launcher == ["srun"]:
        os.environ.update(rank_environment(os.environ))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        be_killed_with_parent()
    return main(job_file)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
