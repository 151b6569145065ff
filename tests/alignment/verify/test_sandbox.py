import subprocess
import sys
import time
from pathlib import Path

import pytest

from lilpipe.alignment.verify import sandbox, sandbox_child
from lilpipe.alignment.verify.sandbox import Limits, find_program, isolation, run_program, run_programs

LIMITS = Limits(cpu_seconds=1)
TESTS = "assert double(2) == 4\nassert double(3) == 6"
RIGHT = "def double(x): return 2 * x\n"

HOSTILE = {
    "a fork bomb": ("import os\nwhile True: os.fork()", "process"),
    "a process by the back door": ("import _posixsubprocess", "process"),
    "another program": ("import subprocess\nsubprocess.run(['true'])", "process"),
    "another interpreter": ("import _xxsubinterpreters", "process"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "process"),
    "a signal to its parent": ("import os\nos.kill(os.getppid() or 1, 9)", "process"),
    "ten gigabytes": ("x = bytearray(10 * 2**30)", "memory"),
    "memory bit by bit": ("x = []\nwhile True: x.append('x' * 10**7 + str(len(x)))", "memory"),
    "a connection": ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "network"),
    "a look-up of a name": ("import socket\nsocket.getaddrinfo('example.org', 80)", "network"),
    "a huge file": ("with open('big', 'wb') as f:\n while True: f.write(bytes(10**6))", "file_size"),
    "very many files": ("for i in range(10**6): open(str(i), 'w')", "file_size"),
    "a file outside": ("print(open('/etc/passwd').read())", "file_access"),
    "a file outside by a link": ("import os\nos.symlink('/etc/passwd', 'x')\nopen('x')", "file_access"),
    "a file outside, hidden": ("try: open('/etc/passwd')\nexcept BaseException: pass\n" + RIGHT, "file_access"),
    "its own tests": ("open('../job').read()", "file_access"),
    "a list of a folder outside": ("import os\nos.listdir('/')", "file_access"),
    "writing outside": ("open('/tmp/planted', 'w')", "file_access"),
    "native code": ("import ctypes\nctypes.string_at(0)", "native_code"),
    "other limits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "limits"),
    "an early end": ("import os\nos._exit(0)", "exited"),
    "a polite early end": ("raise SystemExit(0)", "exited"),
    "a report that cannot be read": ("import os\nos.write(3, b'[' * 60_000)\nos._exit(0)", "exited"),
    "a verdict of its own": ('import os\nos.write(3, b\'{"reason": "passed"}\\n\')\nos._exit(0)', "exited"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_reaches_outside_ends_with_its_name_and_the_parent_lives(name):
    program, reason = HOSTILE[name]
    outcome = run_program(program, "pass", LIMITS)
    assert not outcome.passed
    assert outcome.reason == reason


@pytest.mark.parametrize("program", ["while True: pass", pytest.param("x = 9 ** 9 ** 9", marks=pytest.mark.slow)])
def test_an_endless_program_ends_by_its_time_on_the_processor(program, monkeypatch):
    monkeypatch.setattr(sandbox, "CLOCK_FACTOR", 60)
    assert run_program(program, "pass", LIMITS).reason == "cpu_time"


def test_a_sleeping_program_ends_by_the_clock_and_leaves_no_process_behind(monkeypatch):
    monkeypatch.setattr(sandbox, "CLOCK_FACTOR", 0.5)
    before = time.monotonic()
    assert run_program("import time\ntime.sleep(77.5)", "pass", LIMITS).reason == "clock_time"
    assert time.monotonic() - before < 60
    assert "77.5" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (RIGHT, "passed"),
        ("import math, random, re, json, collections, datetime, decimal\n" + RIGHT, "passed"),
        ("open('mine', 'w').write('2')\ndef double(x): return int(open('mine').read()) * x", "passed"),
        ("def double(x): return x * x", "wrong"),
        ("def double(x): return 2 * y", "raised NameError"),
        ("def double(x): return double(x)", "raised RecursionError"),
        ("def double(x) return 2 * x", "syntax"),
    ],
)
def test_a_program_passes_if_and_only_if_its_tests_do(program, reason):
    outcome = run_program(program, TESTS, LIMITS)
    assert (outcome.passed, outcome.reason) == (reason == "passed", reason)


def test_a_program_sees_neither_the_environment_nor_the_folder_of_the_parent(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    program = "import os\nassert 'SECRET_OF_THE_PARENT' not in os.environ\nassert os.listdir() == []"
    assert run_program(program, "pass", LIMITS).passed


def test_programs_keep_their_order():
    outcomes = run_programs([(RIGHT, TESTS), ("x = 1", TESTS), (RIGHT, TESTS)], LIMITS)
    assert [outcome.passed for outcome in outcomes] == [True, False, True]


def test_a_program_that_is_asked_for_twice_runs_once(monkeypatch):
    runs = []
    monkeypatch.setattr(sandbox, "run_program", lambda *job: runs.append(job) or sandbox.ProgramResult(True, "passed"))
    for _ in range(2):
        assert run_programs([("once = 1", TESTS), ("once = 2", TESTS)], LIMITS)[1].passed
    sandbox.outcome_of.cache_clear()
    assert sorted(program for program, *_ in runs) == ["once = 1", "once = 2"]


def test_without_namespaces_the_second_best_holds_and_is_told_once(monkeypatch, caplog):
    isolation.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.shutil, "which", lambda _: None)
        for name in ("a connection", "a fork bomb", "a file outside"):
            program, reason = HOSTILE[name]
            assert run_program(program, "pass", LIMITS).reason == reason
        assert run_program(RIGHT, TESTS, LIMITS).passed
    isolation.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot create namespaces" in caplog.text


@pytest.mark.parametrize(
    ("way", "landlock", "said"),
    [
        ("namespaces", 6, ("network blocked by a network namespace", "directory blocked by Landlock, version 6")),
        ("hook", 6, ("network blocked by Landlock (TCP) and Python's audit hook", "blocked by Landlock, version 6")),
        ("hook", 3, ("network blocked only by Python's audit hook", "directory blocked by Landlock, version 3")),
        ("hook", 0, ("network blocked only by Python's audit hook", "directory blocked only by Python's audit hook")),
    ],
)
def test_what_protects_is_put_in_words(monkeypatch, way, landlock, said):
    monkeypatch.setattr(sandbox, "isolation", lambda: way)
    monkeypatch.setattr(sandbox, "_execute", lambda *job: ({"reason": "passed", "landlock": landlock}, 0))
    words = sandbox.protection.__wrapped__()
    assert all(part in words for part in said)
    assert "limits on memory" in words


def test_what_protects_is_found_by_running_an_empty_program(monkeypatch):
    found = sandbox.protection.__wrapped__()
    assert ("network namespace" in found) == (isolation() == "namespaces")
    monkeypatch.setattr(sandbox, "_execute", lambda *job: (None, -6))
    assert "no program can run in the sandbox of this host: an empty program ended as 'crashed 6'" in (
        sandbox.protection.__wrapped__()
    )


def in_a_process(code, *, namespaces=False):
    prefix = ["unshare", *sandbox.NAMESPACES] if namespaces else []
    command = [*prefix, sys.executable, "-S", "-c", code]
    folder = Path(sandbox_child.__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()


def test_a_network_namespace_alone_reaches_no_address():
    if isolation() != "namespaces":
        pytest.skip("this kernel or user cannot make namespaces")
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 5)\nexcept OSError as e: print(e.errno)"
    assert in_a_process(code, namespaces=True) == "101"  # network is unreachable, at once


def test_landlock_alone_closes_files_outside_and_leaves_those_inside(tmp_path):
    code = (
        f"import sandbox_child, os\nprint(sandbox_child.landlock(['/usr/lib'], {str(tmp_path)!r}))\n"
        f"open({str(tmp_path / 'mine')!r}, 'w').write('x')\n"
        "try: open('/etc/passwd')\nexcept PermissionError: print('closed')"
    )
    lines = in_a_process(code).splitlines()
    if lines[0] == "0":
        pytest.skip("this kernel has no Landlock")
    assert lines[1:] == ["closed"]
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First:\n```\nx = 1\n```\nbetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("x = 1", None),
        ("```python\nx = 1", None),
        ("```rust\nlet x;\n```", None),
    ],
)
def test_the_program_is_the_last_block_of_python(completion, program):
    assert find_program(completion) == program
