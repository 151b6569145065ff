"""The process in which a stage runs: ``python -m lilpipe.worker JOB``, once or under ``torchrun``."""

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

from lilpipe.artifact import Artifact, Inputs, read_manifest, write_atomically
from lilpipe.errors import DataError, LilpipeError, StoreError
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.store import explain_os_error


def main(job_file: Path) -> int:
    """Run the job; rank 0 writes ``metrics.json``, a failing rank ``failure.json``. Returns the exit status."""
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _terminate)
    work = job_file.parent
    rank = int(os.environ.get("RANK", "0"))
    try:
        metrics = run(json.loads(job_file.read_text(encoding="utf-8")), work, rank=rank)
    except LilpipeError as error:
        _report(work, type(error).__name__, str(error))
        return 1
    except OSError as error:
        # A full or read-only disk is the user's to mend; anything else of this kind may pass.
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            _report(work, StoreError.__name__, explain_os_error(work, error))
            return 1
        raise
    except MemoryError:
        _report(work, DataError.__name__, f"stage ran out of memory in {work}; lower its batch size or num_workers")
        return 1
    if rank == 0:
        write_atomically(work / "metrics.json", json.dumps(metrics))
    return 0


def run(job: dict, work: Path, *, rank: int) -> Metrics:
    """Run the stage that the job describes, in this process."""
    stage: Stage = importlib.import_module(job["module"]).STAGE
    config = stage.config.model_validate(job["config"])
    workspace = Workspace(work, rank=rank)
    if rank == 0:  # it alone writes there; a kill in the middle of a write leaves its temporary file
        for leftover in workspace.output.rglob(".*.tmp"):
            leftover.unlink()
    inputs = _inputs(job["inputs"])
    if not stage.distributed:
        return stage.run(config, inputs, workspace)
    import torch

    from lilpipe import distributed

    torch.set_num_threads(getattr(config, "threads_per_worker", 1))
    distributed.init()
    try:
        return stage.run(config, inputs, workspace)
    finally:
        distributed.shutdown()


def _inputs(entries: dict) -> Inputs:
    def artifact(entry: dict[str, str]) -> Artifact:
        path = Path(entry["path"])
        return Artifact(uri=entry["uri"], path=path, manifest=read_manifest(path))

    return {
        role: tuple(artifact(entry) for entry in value) if isinstance(value, list) else artifact(value)
        for role, value in entries.items()
    }


def _report(work: Path, kind: str, message: str) -> None:
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
    write_atomically(work / "failure.json", json.dumps({"type": kind, "message": message}))


def _terminate(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
