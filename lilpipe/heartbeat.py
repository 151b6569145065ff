"""Where each worker of a stage is, so that the error of a hang can say who did not come.

A step only notes a number in memory. A thread beside it writes that to a small file per rank, at most once an
interval; while nothing moves it adds the stack of the main thread, which tells a worker that waits in a collective
from one that never reached it. Files, for they outlive their worker and are seen by all hosts and by the launcher.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

_COLLECTIVES = "torch/distributed/"
_BENEATH = ("/torch/", "/lilpipe/distributed.py", "<frozen", "<string>")


@dataclass(frozen=True)
class Place:
    """How far one rank has come."""

    rank: int
    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.time)
    """When it came there, in seconds of the wall clock."""
    stack: Sequence[tuple[str, int, str]] = ()
    """File, line and function, innermost first; empty while it moves."""

    @property
    def collective(self) -> str | None:
        """The collective in which it waits for others, if it does."""
        inside = (function for file, _, function in self.stack if _COLLECTIVES in file and function != "wrapper")
        return next(inside, None)

    @property
    def line(self) -> str:
        """The innermost line of the stage: not torch's, nor of what wraps it."""
        for file, line, function in self.stack:
            if not any(part in file for part in _BENEATH):
                return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}"
        return "an unknown line"

    def describe(self, now: float) -> str:
        """One line for people."""
        where = f"rank {self.rank}: step {self.step}, {self.phase}, for {now - self.since:.1f} s"
        waits = f"waits in {self.collective}" if self.collective else "is"
        return f"{where}; {waits} at {self.line}" if self.stack else where


class Heartbeat:
    """Writes the place of this rank into a folder, until it is stopped."""

    def __init__(self, folder: Path, rank: int, *, interval_seconds: float) -> None:
        self._path = folder / f"rank{rank}.json"
        self._place = Place(rank)
        self._interval_seconds = interval_seconds
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write_at_intervals, name="heartbeat", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Note the place; written by the thread."""
        self._place = Place(self._place.rank, step, phase)

    def stop(self) -> None:
        """End the thread; the file stays."""
        self._stopped.set()
        self._thread.join()

    def _write_at_intervals(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk is told of by the stage itself
                self._write()
            if self._stopped.wait(self._interval_seconds):
                return

    def _write(self) -> None:
        place = self._place
        stands = time.time() - place.since >= self._interval_seconds
        stack = _stack(sys._current_frames().get(self._main)) if stands else []
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**asdict(place), "stack": stack}), encoding="utf-8")
        temporary.replace(self._path)


def _stack(frame: FrameType | None) -> list[tuple[str, int, str]]:
    calls = []
    while frame is not None:
        calls.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return calls


def read_places(folder: Path) -> list[Place]:
    """What every rank has written last."""
    places = [Place(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank*.json")]
    return sorted(places, key=lambda place: place.rank)


def describe_hang(folder: Path, *, timeout_seconds: float) -> str:
    """The message of a hang: the collective and step, who came to it and who did not, and where each rank is.

    Gloo waits inside of the call, where the stack shows it. NCCL's calls return at once, and the wait is elsewhere:
    there the places alone are told, and its flight recorder has the rest.
    """
    now = time.time()
    places = read_places(folder)
    lines = [f"  {place.describe(now)}" for place in places]
    limit = f"did not end in launch.timeout_seconds ({timeout_seconds:g})"
    came = [place for place in places if place.collective]
    if not came:
        return "\n".join([f"a collective {limit}; where the workers are:", *lines])
    absent = [place for place in places if not place.collective]
    first = f"{came[0].collective} (step {came[0].step}, {came[0].line}) {limit}"
    return "\n".join([f"{first}: {_ranks(came)} came to it, {_ranks(absent)} did not", *lines])


def _ranks(places: list[Place]) -> str:
    return f"rank {', '.join(str(place.rank) for place in places)}" if places else "none"
