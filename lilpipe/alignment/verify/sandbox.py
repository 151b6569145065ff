"""Runs programs written by a model in a sandbox: one process per program, isolated and short-lived.

A program gets an empty directory, the standard library, and limits on CPU time, wall time, memory and file size. It has
no network, cannot start processes, and cannot open files outside its directory. With user namespaces (``unshare`` of
util-linux), the process has a network namespace without interfaces and a PID namespace that is killed with it.
Otherwise Landlock blocks TCP and the audit hook of ``sandbox_child.py`` blocks all sockets. Each stage that runs
programs logs which of the two applies. For untrusted code, run the pipeline itself in a container too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lilpipe.alignment.verify import sandbox_child

NAMESPACES = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL")
CLOCK_FACTOR = 10
"""Wall time limit per second of CPU time, so that no program fails because the machine is busy: rewards must be
deterministic."""
MAX_REPORT_BYTES = 65_536
TCP_SINCE = 4
"""First Landlock version that can block TCP."""
_CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program."""

    cpu_seconds: float = 5.0
    memory_bytes: int = 256 * 2**20
    """Address space."""
    file_bytes: int = 2**20
    """Size of one file; a program may write `sandbox_child.MAX_WRITTEN_FILES` files."""


@dataclass(frozen=True)
class ProgramResult:
    """Result of running a program."""

    passed: bool
    reason: str
    """``passed``; ``wrong`` (a test failed), ``raised X``, ``syntax``, ``exited`` before the end of the tests. A limit:
    ``memory``, ``cpu_time``, ``clock_time``, ``file_size``. A forbidden action: ``network``, ``process``,
    ``file_access``, ``native_code``, ``limits``. Or ``no_program``; or ``crashed N``, by signal N."""


def find_program(completion: str) -> str | None:
    """Return the last fenced code block in Python or without a language; None if there is none."""
    blocks = _CODE_BLOCK.findall(completion)
    return blocks[-1] if blocks else None


@functools.cache
def isolation() -> str:
    """Return ``namespaces`` if the kernel lets this user create them, else ``hook``; log it on first use."""
    tool = shutil.which("unshare")
    works = tool is not None and subprocess.run([tool, *NAMESPACES, "true"], capture_output=True).returncode == 0
    if works:
        _log.info("programs run in a network namespace without interfaces")
    else:
        _log.warning(
            "this kernel or user cannot create namespaces (`unshare --user --net --pid`): only Landlock, if the kernel "
            "has it, and Python's audit hook block the network for programs"
        )
    return "namespaces" if works else "hook"


@functools.cache
def protection() -> str:
    """Describe the isolation on this host, as reported by an empty program."""
    entry, status = _execute("", "", Limits())
    if entry is None:
        return f"no program can run in the sandbox of this host: an empty program ended as {_without_verdict(status)!r}"
    version = int(entry["landlock"])
    network = "blocked by a network namespace" if isolation() == "namespaces" else "blocked only by Python's audit hook"
    if isolation() != "namespaces" and version >= TCP_SINCE:
        network = "blocked by Landlock (TCP) and Python's audit hook"
    files = f"blocked by Landlock, version {version}" if version else "blocked only by Python's audit hook"
    return (
        f"programs in completions run with the network {network}, files outside their directory {files}, and limits "
        "on memory, CPU time, file size and processes"
    )


def run_program(program: str, tests: str, limits: Limits | None = None) -> ProgramResult:
    """Run a program, then its tests, which raise ``AssertionError`` on failure."""
    entry, status = _execute(program, tests, limits or Limits())
    reason = _without_verdict(status) if entry is None else str(entry["reason"])
    return ProgramResult(reason == "passed", reason)


def _execute(program: str, tests: str, limits: Limits) -> tuple[dict[str, Any] | None, int | None]:
    """Return the sandbox's report, None if there is none, and the exit status."""
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as root:
        folder = Path(root).resolve() / "folder"
        folder.mkdir()
        token = secrets.token_hex(16)
        job = {
            "program": program,
            "tests": tests,
            "token": token,
            "folder": str(folder),
            "readable": _readable(),
            "cpu_seconds": max(1, round(limits.cpu_seconds)),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
        }
        (Path(root) / "job").write_text(json.dumps(job))
        with (Path(root) / "job").open("rb") as source, (Path(root) / "report").open("w+b") as report:
            status = _run(source, report, folder, seconds=limits.cpu_seconds * CLOCK_FACTOR)
            report.seek(0)
            return _entry(report.read(MAX_REPORT_BYTES), token), status


@functools.lru_cache(maxsize=4096)
def outcome_of(program: str, tests: str, limits: Limits | None = None) -> ProgramResult:
    """Run a program with a cache: the verdict, a reward and equal completions of a group run the same program."""
    return run_program(program, tests, limits)


def run_programs(jobs: Sequence[tuple[str, str]], limits: Limits | None = None) -> list[ProgramResult]:
    """Run (program, tests) pairs in parallel and return their outcomes in order."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: outcome_of(job[0], job[1], limits), jobs))


def _readable() -> list[str]:
    """Return the directories of the standard library and of system libraries."""
    return [os.path.realpath(path) for path in (*_LIBRARIES, f"{sys.base_prefix}/lib", Path(os.__file__).parent)]


def _run(source: IO[bytes], report: IO[bytes], folder: Path, *, seconds: float) -> int | None:
    """Return the exit status, negative for a signal, None on timeout. Kills all processes of the session."""
    command = [sys.executable, "-S", "-s", "-P", "-B", str(sandbox_child.__file__)]
    if isolation() == "namespaces":
        command = ["unshare", *NAMESPACES, *command]
    process = subprocess.Popen(
        command,
        stdin=source,
        stdout=report,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _entry(report: bytes, token: str) -> dict[str, Any] | None:
    """Return the report line that has the secret token, so that a program cannot forge its verdict."""
    for line in report.splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # the program can write anything
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("token") == token:
                return entry
    return None


def _without_verdict(status: int | None) -> str:
    if status is None:
        return "clock_time"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):  # sent by the kernel at the soft and hard limits of CPU time
        return "cpu_time"
    return f"crashed {-status}" if status < 0 else "exited"
