"""A server as a process of its own: started, found again by its recorded process id, and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lilpipe.artifact import write_atomically
from lilpipe.errors import LilpipeError
from lilpipe.launch.processes import die_with_parent

HOST = "127.0.0.1"
START_SECONDS = 180
STOP_SECONDS = 20


class ServerError(LilpipeError):
    """A server cannot be started: its port is in use, or its process exited."""


@dataclass(frozen=True, eq=False)
class Server:
    """A process started by `up` and stopped by `down`."""

    name: str
    command: Sequence[str]
    home: Path
    """The checkout's `.lilpipe` directory."""
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    port_variable: str = ""
    health: str = ""
    """Path of the health check."""
    client_of: str = ""
    """URL of the server that it speaks to; a process that speaks to another one is replaced."""
    dies_with_parent: bool = False
    """Whether the kernel kills it when this process dies for any reason (Linux)."""

    @property
    def record(self) -> Path:
        """File with its process id."""
        return self.home / "servers" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """File with its output."""
        return self.home / "servers" / f"{self.name}.log"

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{HOST}:{self.port}"

    def recorded(self) -> dict[str, Any]:
        """Return what `up` recorded of the process, which may have died; empty after `down`."""
        try:
            found = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def process(self) -> psutil.Process | None:
        """Return the process that `up` started, if it is alive; a new process with the same id does not count."""
        try:
            record = self.recorded()
            process = psutil.Process(record["pid"])
            same = abs(process.create_time() - record["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if same else None
        except (ValueError, KeyError, TypeError, psutil.Error):
            return None

    def start(self) -> None:
        """Start the server unless it runs. Raises ``ServerError`` if another program uses its port."""
        if self.process() is not None:
            if self.recorded().get("client_of", self.client_of) == self.client_of:
                return
            self.stop()
        if self.port is not None and is_taken(self.port):
            raise ServerError(
                f"{self.name}: port {self.port} is used by another program; stop it, or choose a free port: "
                f"{self.port_variable}={self.port + 1} make up"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent() if self.dies_with_parent else None,
            )
        created = psutil.Process(process.pid).create_time()
        record = {"pid": process.pid, "created": created, "port": self.port, "client_of": self.client_of}
        write_atomically(self.record, json.dumps(record))

    def wait(self) -> None:
        """Wait until the server responds. Raises ``ServerError`` if it exits or takes too long."""
        deadline = time.time() + START_SECONDS
        while not answers(self.url + self.health):
            if self.process() is None or time.time() > deadline:
                lines = self.log.read_text(errors="replace").splitlines()[-10:]
                raise ServerError(f"{self.name}: did not start; last lines of {self.log}:\n" + "\n".join(lines))
            time.sleep(0.1)

    def stop(self) -> bool:
        """Stop the process group; returns whether it was running."""
        return bool(stop_all([self]))


def stop_all(started: Sequence[Server]) -> list[str]:
    """Stop servers in parallel, each with its process group; returns the names of those that were running."""
    running = {server: process for server in started if (process := server.process()) is not None}
    for signum in (signal.SIGTERM, signal.SIGKILL):  # SIGKILL for processes of a group that ignored SIGTERM
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
        psutil.wait_procs(list(running.values()), timeout=STOP_SECONDS)
    for server in started:
        server.record.unlink(missing_ok=True)
    return [server.name for server in running]


def is_taken(port: int) -> bool:
    """Return whether a program listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def answers(url: str) -> bool:
    """Return whether a URL currently responds with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
