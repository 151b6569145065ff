"""Systems that take turns on one machine, each in a process of its own.

A system is set up, takes some steps when it is its turn and waits while the others have theirs: all meet the same
load, and none the other's allocator, threads or caches.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Finished(Exception):
    """There are no more turns."""


class Turns:
    """The system's side: call it before each step."""

    def __init__(self, steps_per_turn: int) -> None:
        self._steps_per_turn = steps_per_turn
        self._begun: float | None = None
        self._faults = 0

    def __call__(self, step: int) -> None:
        """Wait for the next turn where one has ended. The first turn is the first step alone. Raises ``Finished``."""
        if (step - 1) % self._steps_per_turn and step:
            return
        if self._begun is not None:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults
            self.tell(seconds=time.perf_counter() - self._begun, faults=faults)
        if sys.stdin.readline() != "go\n":
            raise Finished
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._begun = time.perf_counter()

    def tell(self, **values: float) -> None:
        """Give numbers to the parent."""
        print(json.dumps(values), flush=True)


@dataclass
class System:
    """The parent's side."""

    name: str
    arguments: Sequence[str]
    """Of ``python -m``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    first_seconds: float = 0.0
    """Of the first step."""
    seconds: list[float] = field(default_factory=list)
    """Of each turn."""
    faults: list[float] = field(default_factory=list)
    """Pages that the kernel had to fetch in each turn."""
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Set the system up with empty compiler caches, and take the first step."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.arguments],
            env={**os.environ, **caches, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first_seconds = self.turn()["seconds"]

    def turn(self) -> dict[str, Any]:
        """Let it take a turn."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):  # other lines are the system's own
                return json.loads(line)
        raise RuntimeError(f"{self.name} has ended with status {self.process.wait()}")

    def finish(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(systems: Sequence[System], *, rounds: int) -> None:
    """Start all, warm them up by a turn, and measure ``rounds`` turns of each."""
    for system in systems:
        system.start()
        system.turn()
    for _ in range(rounds):
        for system in systems:
            told = system.turn()
            system.seconds.append(told["seconds"])
            system.faults.append(told["faults"])
    for system in systems:
        system.finish()
