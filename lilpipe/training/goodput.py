"""Goodput: the time of a run by cause, over all its attempts.

Goodput is the share of wall time, from the start of the first attempt, in steps that were not done before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lilpipe.artifact import write_atomically

USEFUL = "step"
CAUSES = (USEFUL, "setup", "restart", "replay", "save", "evaluation", "rollback")
"""`setup`: before the first step of the first attempt. `restart`: from the last recorded time of an attempt to the
first step of the next. `replay`: steps that an earlier attempt had done. `rollback`: steps that were undone or left
out."""
WRITE_SECONDS = 1.0


class Goodput:
    """Time accounting of one run, in a file that survives a kill; without a path it is only in memory."""

    def __init__(self, path: Path | None, *, process_started: float) -> None:
        self._path = path
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self.furthest = 0
        """Largest number of steps done by any attempt."""
        self.started = process_started
        self._restarted_from: float | None = None
        if path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            self.seconds |= before["seconds"]
            self.furthest, self.started = before["furthest"], before["started"]
            self._restarted_from = before["time"]
        self._process_started = process_started
        self._written = 0.0

    def first_step(self) -> None:
        """Record the start of this attempt's first step; the time before is setup or restart."""
        if self._restarted_from is None:
            self.seconds["setup"] += time.time() - self._process_started
        else:
            self.seconds["restart"] += time.time() - self._restarted_from

    def step(self, done: int, seconds: float, *, undone: bool = False) -> None:
        """Record step number ``done``."""
        cause = "rollback" if undone else USEFUL if done > self.furthest else "replay"
        self.furthest = max(self.furthest, done)
        self.seconds[cause] += seconds
        if time.time() - self._written > WRITE_SECONDS:
            self.write()

    def undo(self, seconds: float) -> None:
        """Move the time of useful steps undone by a rollback to its cause."""
        self.seconds[USEFUL] -= seconds
        self.seconds["rollback"] += seconds

    @contextmanager
    def measure(self, cause: str) -> Iterator[None]:
        """Add the time in the block to a cause."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[cause] += time.perf_counter() - begun
            self.write()

    @property
    def share(self) -> float:
        """Useful time over wall time."""
        return self.seconds[USEFUL] / max(time.time() - self.started, 1e-9)

    def write(self) -> None:
        """Write the account to disk."""
        self._written = time.time()
        account = {
            "time": self._written,
            "started": self.started,
            "furthest": self.furthest,
            "seconds": self.seconds,
        }
        if self._path is not None:
            write_atomically(self._path, json.dumps(account))
