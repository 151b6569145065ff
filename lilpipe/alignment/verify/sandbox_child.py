"""Child process of the sandbox: restricts itself, then runs a program and its tests.

``sandbox.py`` starts this file as a script that uses only the standard library. It reads the job as JSON from standard
input and writes the verdict as a line of JSON to standard output. The restrictions, from the kernel inwards:

- ``resource`` limits on address space, CPU time, file size, open files, and processes (root is exempt from the last;
  the hook stops it).
- Landlock (Linux 5.13 and later): files outside the directory and the standard library, and TCP (6.7 and later).
- An audit hook that ends the process at the first forbidden action and reports which one it was.

The hook alone is not secure: native code bypasses it, which is why ``ctypes`` is blocked. A program that inspects its
interpreter can find the verdict's file descriptor. The guarantee is that nothing outside is harmed, and that a program
that just exits early does not pass.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

MAX_WRITTEN_FILES = 16

_NETWORK = ("socket.",)
_PROCESS = (
    "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.", "signal.p",
)  # fmt: skip
_NATIVE = ("ctypes.",)
_SETTINGS = ("resource.setrlimit", "resource.prlimit")
_PREFIXES = {_NETWORK: "network", _PROCESS: "process", _NATIVE: "native_code", _SETTINGS: "limits"}
_MODULES = {
    "_posixsubprocess": "process",
    "_xxsubinterpreters": "process",  # another interpreter would have no hook
    "_interpreters": "process",
    "ctypes": "native_code",
    "_ctypes": "native_code",
    "_testcapi": "native_code",
}
_READS = ("os.listdir", "os.scandir", "os.chdir", "glob.glob")
_WRITES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "shutil.rmtree", "os.setxattr",
)  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# --- limits -------------------------------------------------------------------------------------------------------


def limit(job: dict[str, Any]) -> None:
    """Set the resource limits; they can only be lowered afterwards."""
    seconds, memory, file_bytes = job["cpu_seconds"], job["memory_bytes"], job["file_bytes"]
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, 32, 32),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))


# --- Landlock -----------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION = 1
_NO_NEW_PRIVS = 38
_READ_RIGHTS = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a folder
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI version; 16 from version 5


def landlock(readable: Sequence[str], folder: str) -> int:
    """Restrict access to ``folder`` (write) and ``readable`` (read), block TCP; return the version used, 0 for none."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return 0
    rights = (1 << _NUM_RIGHTS.get(version, 16)) - 1
    handled = [rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]
    handled = handled[: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = (ctypes.c_uint64 * len(handled))(*handled)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)), 0)
    for path, allowed in (*((path, _READ_RIGHTS & rights) for path in readable), (folder, rights)):
        if not os.path.isdir(path):  # noqa: PTH112 (importing pathlib would dominate the start-up time)
            allowed &= _FILE_RIGHTS
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH)
            rule = allowed.to_bytes(8, sys.byteorder) + handle.to_bytes(4, sys.byteorder)
            libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
            os.close(handle)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    failed = libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return 0 if failed else version


# --- audit hook ---------------------------------------------------------------------------------------------------


def close_doors(readable: Sequence[str], folder: str, leave: Callable[[str], NoReturn]) -> None:
    """Install the audit hook, which calls ``leave`` with a reason at the first forbidden action."""
    written: set[str] = set()

    def inside(path: Any, roots: Sequence[str]) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path or "."))
        return any(real == root or real.startswith(root + os.sep) for root in roots)

    def open_file(path: Any, flags: int) -> None:
        if isinstance(path, int):
            return
        writes = bool(flags & _WRITE_FLAGS)
        if not inside(path, [folder] if writes else [folder, *readable]):
            leave("file_access")
        if writes:
            written.add(os.fsdecode(path))
            if len(written) > MAX_WRITTEN_FILES:
                leave("file_size")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            open_file(arguments[0], arguments[2] or 0)
        elif event == "import":
            if reason := _MODULES.get(arguments[0]):
                leave(reason)
        elif event in _READS:
            if not inside(arguments[0], [folder, *readable]):
                leave("file_access")
        elif event in _WRITES:
            if not inside(arguments[0], [folder]):
                leave("file_access")
        else:
            for prefixes, reason in _PREFIXES.items():
                if event.startswith(prefixes):
                    leave(reason)

    sys.addaudithook(hook)
    _thread.start_new_thread = lambda *_: leave("process")
    for name in _MODULES:
        sys.modules.pop(name, None)  # so that importing it raises an audit event


# --- run ----------------------------------------------------------------------------------------------------------


def run(program: str, tests: str) -> str:
    """Run program and tests in one namespace; return ``passed`` or the failure."""
    try:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(program, "program", "exec"), namespace)
        exec(compile(tests, "tests", "exec"), namespace)
    except MemoryError:
        return "memory"
    except SyntaxError:
        return "syntax"
    except AssertionError:
        return "wrong"
    except SystemExit:
        return "exited"
    except OSError as error:
        if error.errno == errno.EFBIG:
            return "file_size"
        return "file_access" if isinstance(error, PermissionError) else f"raised {type(error).__name__}"
    except BaseException as error:
        return f"raised {type(error).__name__}"
    return "passed"


def main() -> NoReturn:
    """Read the job, apply the restrictions, run it and report."""
    job = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    version = landlock(job["readable"], job["folder"])

    def leave(reason: str) -> NoReturn:
        line = json.dumps({"token": job["token"], "reason": reason, "landlock": version})
        os.write(channel, b"\n" + line.encode())
        os._exit(0)

    limit(job)
    signal.signal(signal.SIGXCPU, lambda *_: leave("cpu_time"))
    close_doors(job["readable"], job["folder"], leave)
    leave(run(job["program"], job["tests"]))


if __name__ == "__main__":
    main()
