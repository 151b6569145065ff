"""Position of each worker, so that the error of a hung collective can name the workers that did not reach it.

A training step only records its number in memory. A background thread writes it to a small file per rank, at most once
per interval. If the position does not change, the file also has the stack of the main thread, which tells whether the
worker waits in a collective or never reached it. Files survive their worker and are visible to all hosts and to the
launcher.
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

TIMEOUT_SECONDS = 600
"""Default of ``launch.timeout_seconds``; also that of stages without the section, which do not load it."""

_COLLECTIVES = "torch/distributed/"
_BENEATH = ("/torch/", "/lilpipe/distributed.py", "<frozen", "<string>")


@dataclass(frozen=True)
class Place:
    """Position of one rank."""

    rank: int
    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.time)
    """Time at which the rank reached this position, in seconds since the epoch."""
    stack: Sequence[tuple[str, int, str]] = ()
    """File, line and function, innermost first; empty while the rank makes progress."""

    @property
    def collective(self) -> str | None:
        """Collective in which the rank waits, if any."""
        inside = (function for file, _, function in self.stack if _COLLECTIVES in file and function != "wrapper")
        return next(inside, None)

    @property
    def line(self) -> str:
        """Innermost line of the stage's own code, skipping torch and wrappers."""
        for file, line, function in self.stack:
            if not any(part in file for part in _BENEATH):
                return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}"
        return "an unknown line"

    def describe(self, now: float) -> str:
        """Return a one-line description."""
        where = f"rank {self.rank}: step {self.step}, {self.phase}, for {now - self.since:.1f} s"
        waits = f"waits in {self.collective}" if self.collective else "is"
        return f"{where}; {waits} at {self.line}" if self.stack else where


class Heartbeat:
    """Writes the position of this rank to a folder until it is stopped."""

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
        """Record the position; the background thread writes it."""
        self._place = Place(self._place.rank, step, phase)

    def stop(self) -> None:
        """Stop the thread; the file remains."""
        self._stopped.set()
        self._thread.join()

    def _write_at_intervals(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # the stage itself reports a full disk
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
    """Return the last position of each rank."""
    places = [Place(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank*.json")]
    return sorted(places, key=lambda place: place.rank)


def describe_hang(folder: Path, *, timeout_seconds: float) -> str:
    """Return the error message of a hung collective: its name and step, which ranks reached it, and where each rank is.

    Gloo blocks inside the call, so the stack shows the collective. NCCL's calls return at once and block later: then
    the message has only the positions, and NCCL's flight recorder has the rest.
    """
    now = time.time()
    places = read_places(folder)
    lines = [f"  {place.describe(now)}" for place in places]
    limit = f"did not end in launch.timeout_seconds ({timeout_seconds:g})"
    came = [place for place in places if place.collective]
    if not came:
        return "\n".join([f"a collective {limit}; positions of the workers:", *lines])
    absent = [place for place in places if not place.collective]
    first = f"{came[0].collective} (step {came[0].step}, {came[0].line}) {limit}"
    return "\n".join([f"{first}: {_ranks(came)} reached it, {_ranks(absent)} did not", *lines])


def _ranks(places: list[Place]) -> str:
    return f"rank {', '.join(str(place.rank) for place in places)}" if places else "none"
