"""Runs programs that a model wrote: each in a process of its own that can reach nothing and does not last.

A program gets an empty folder, the standard library, and limits on processor time, the clock, memory and file size;
no network, no further processes, no file outside its folder. Where the kernel lets a user make namespaces
(``unshare`` of util-linux), the process has a network namespace without any interface and a process namespace that
dies with it. Elsewhere Landlock closes TCP and the audit hook of ``sandbox_child.py`` every socket. Each stage that
runs programs logs which of the two is in force. For untrusted code, run the pipeline itself in a container too.
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
"""Seconds by the clock for each second of the processor, so that a busy machine fails no program: what is random must
not enter a reward."""
MAX_REPORT_BYTES = 65_536
TCP_SINCE = 4
"""Version of Landlock from which it closes TCP."""
_CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: float = 5.0
    memory_bytes: int = 256 * 2**20
    """Address space."""
    file_bytes: int = 2**20
    """Size of one file; it may write `sandbox_child.MAX_WRITTEN_FILES`."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """``passed``; ``wrong`` (a test failed), ``raised X``, ``syntax``, ``exited`` before the tests' end; the limit that
    it met: ``memory``, ``cpu_time``, ``clock_time``, ``file_size``; what it tried: ``network``, ``process``,
    ``file_access``, ``native_code``, ``limits``; ``no_program``; or ``crashed N``, by signal N."""


def find_program(completion: str) -> str | None:
    """The last fenced block of Python, or of no language, in a completion."""
    blocks = _CODE_BLOCK.findall(completion)
    return blocks[-1] if blocks else None


@functools.cache
def isolation() -> str:
    """``namespaces`` where the kernel lets this user make them, else ``hook``; logged when first asked."""
    tool = shutil.which("unshare")
    works = tool is not None and subprocess.run([tool, *NAMESPACES, "true"], capture_output=True).returncode == 0
    if works:
        _log.info("programs run in a network namespace without interfaces")
    else:
        _log.warning(
            "this kernel or user cannot make namespaces (`unshare --user --net --pid`): programs run with the network "
            "closed by Landlock, where the kernel has it, and by Python's audit hook alone"
        )
    return "namespaces" if works else "hook"


@functools.cache
def protection() -> str:
    """What keeps programs in on this host, in words, as an empty program found it."""
    entry, status = _execute("", "", Limits())
    if entry is None:
        return f"no program can run in the sandbox of this host: an empty one ended as {_without_verdict(status)!r}"
    version = int(entry["landlock"])
    network = "closed by a network namespace" if isolation() == "namespaces" else "closed by Python's audit hook alone"
    if isolation() != "namespaces" and version >= TCP_SINCE:
        network = "closed by Landlock (TCP) and Python's audit hook"
    files = f"closed by Landlock, version {version}" if version else "closed by Python's audit hook alone"
    return (
        f"programs of answers run with the network {network}, files outside their folder {files}, and limits on "
        "memory, processor time, file size and processes"
    )


def run_program(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Run a program and then its tests, which raise ``AssertionError`` where it is wrong."""
    entry, status = _execute(program, tests, limits or Limits())
    reason = _without_verdict(status) if entry is None else str(entry["reason"])
    return Outcome(reason == "passed", reason)


def _execute(program: str, tests: str, limits: Limits) -> tuple[dict[str, Any] | None, int | None]:
    """What the sandbox reports of a program, if it came to that, and its exit status."""
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
def outcome_of(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """``run_program``, remembered: a verdict, a reward and equal answers of a group ask for the same."""
    return run_program(program, tests, limits)


def run_programs(jobs: Sequence[tuple[str, str]], limits: Limits | None = None) -> list[Outcome]:
    """The outcome of each (program, tests), several of them at a time."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: outcome_of(job[0], job[1], limits), jobs))


def _readable() -> list[str]:
    """Folders of the standard library and of the system's libraries."""
    return [os.path.realpath(path) for path in (*_LIBRARIES, f"{sys.base_prefix}/lib", Path(os.__file__).parent)]


def _run(source: IO[bytes], report: IO[bytes], folder: Path, *, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if the clock ran out. Nothing of it is left alive."""
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
    """The line that bears the token: a program that writes a verdict of its own does not know it."""
    for line in report.splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # the program may have written anything
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("token") == token:
                return entry
    return None


def _without_verdict(status: int | None) -> str:
    if status is None:
        return "clock_time"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):  # the kernel's at the hard limit of processor time
        return "cpu_time"
    return f"crashed {-status}" if status < 0 else "exited"
