"""What a worker says of its own end, from the worker to the launcher. Of several workers the first one stands.

``failure.json`` is final for this launch: an error of the user's would come again, a stage that was pre-empted has
saved, and a hang would cost its timeout again. ``raised.json`` holds any other exception, after which workers may be
started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from lilpipe import errors
from lilpipe.errors import HungCollective, LilpipeError, Preempted

FINAL = "failure.json"
RAISED = "raised.json"


def report(work: Path, error: Exception, *, rank: int) -> None:
    """Tell the launcher of an error, before others follow from it."""
    is_final = isinstance(error, LilpipeError | Preempted | HungCollective)
    told = {
        "type": type(error).__name__,
        "message": str(error),
        "rank": rank,
        "traceback": "".join(traceback.format_exception(error)),
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
    """The error that ends this launch, if a worker reported one."""
    told = _read(work / FINAL)
    return getattr(errors, told["type"])(told["message"]) if told else None


def take_raised(work: Path) -> tuple[str, str] | None:
    """Rank and exception of the worker that failed first, with its trace-back; forgets them."""
    told = _read(work / RAISED)
    forget(work / RAISED)
    return (f"rank {told['rank']}: {told['type']}: {told['message']}", told["traceback"]) if told else None


def forget(path: Path) -> None:
    """Clear away what an earlier try has left."""
    path.unlink(missing_ok=True)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
