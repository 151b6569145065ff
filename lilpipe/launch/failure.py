"""Reports of worker failures to the launcher. The first report is kept.

``failure.json`` is final: the launch is not retried. A user's error would occur again, a pre-empted stage has saved,
and a hang would take its whole timeout again. ``raised.json`` is any other exception; workers may be restarted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from lilpipe import errors
from lilpipe.credentials import hide_credentials
from lilpipe.errors import HungCollective, LilpipeError, Preempted

FINAL = "failure.json"
RAISED = "raised.json"


def report(work: Path, error: Exception, *, rank: int) -> None:
    """Report an error to the launcher, before the errors that it causes in other workers."""
    is_final = isinstance(error, LilpipeError | Preempted | HungCollective)
    told = {
        "type": type(error).__name__,
        "message": hide_credentials(str(error)),
        "rank": rank,
        "traceback": hide_credentials("".join(traceback.format_exception(error))),
    }
    path = work / (FINAL if is_final else RAISED)
    temporary = work / f".{path.name}.{rank}.tmp"
    temporary.write_text(json.dumps(told), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
        if is_final:
            print(f"{told['type']}: {told['message']}", file=sys.stderr, flush=True)
    temporary.unlink()


def read_final(work: Path) -> Exception | None:
    """Return the error that ends this launch, if a worker reported one."""
    told = _read(work / FINAL)
    return getattr(errors, told["type"])(told["message"]) if told else None


def take_raised(work: Path) -> tuple[str, str] | None:
    """Return rank, exception and traceback of the worker that failed first, and delete the report."""
    told = _read(work / RAISED)
    forget(work / RAISED)
    return (f"rank {told['rank']}: {told['type']}: {told['message']}", told["traceback"]) if told else None


def forget(path: Path) -> None:
    """Delete a file of an earlier attempt."""
    path.unlink(missing_ok=True)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
