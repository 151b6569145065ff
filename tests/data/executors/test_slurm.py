"""Tasks on a real Slurm, whose daemons run on this host for these tests."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.slurm.one_host import find_missing, one_host
from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.executors import on_slurm
from lilpipe.data.executors.executor import open_executor
from lilpipe.errors import ClusterError, ConfigError, DataError, StoreError
from tests.data.executors.task_steps import NUM_TASKS, build_corpus, num_starts, output, run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := find_missing():
        pytest.skip(f"no {missing[0]} on this host; install Debian's slurm-wlm and munge, or your system's")
    with one_host(tmp_path_factory.mktemp("slurm")) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in {**env, "PYTHONPATH": str(ROOT)}.items():  # jobs find the steps of these tests
            patch.setenv(name, value)
        yield


def config(**settings):
    settings = {"memory_per_cpu_gb": 1, "poll_seconds": 0.2, **settings}
    return CorpusConfig.model_validate({"num_workers": 2, "executor": "slurm", "slurm": settings})


def states(folder):
    """The states of all jobs that have been submitted for that folder, in the order of submission."""
    names = subprocess.run(
        ["squeue", "--array", "--states=all", "--noheader", "--format=%F|%T|%j|%Z"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    name = on_slurm._job_name((folder / "log").resolve())
    rows = [line.split("|") for line in names.stdout.splitlines()]
    return [row[1] for row in sorted(rows) if row[2] == name]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_tasks_on_slurm_give_the_bytes_of_local_ones(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "JOBS_PER_WORKER", 1)
    with open_executor(CorpusConfig(num_workers=1)) as run_tasks:
        run(run_tasks, tmp_path / "local", num_tasks=10)
    with open_executor(config()) as run_tasks:
        told = run(run_tasks, tmp_path / "slurm", num_tasks=10)  # in two jobs
        assert run(run_tasks, tmp_path / "slurm", num_tasks=10) == [10]
    assert output(tmp_path / "slurm") == output(tmp_path / "local")
    assert len(output(tmp_path / "slurm")) == 10
    assert (told[0], told[-1]) == (0, 10)
    assert told == sorted(told)
    assert not (tmp_path / "slurm" / "log" / on_slurm.JOB_FILE).exists()


def test_the_corpus_stage_gives_the_bytes_of_a_local_one(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "JOBS_PER_WORKER", 1)
    here = build_corpus(tmp_path / "local", CorpusConfig(num_workers=1))
    assert len(here) > 4
    assert build_corpus(tmp_path / "slurm", config()) == here


def test_a_killed_task_is_run_again_and_it_alone(slurm, tmp_path):
    with open_executor(config()) as run_tasks:
        run(run_tasks, tmp_path, fault="kill", fault_rank=1)
    assert len(output(tmp_path)) == NUM_TASKS
    assert num_starts(tmp_path) == [1, 2, 1]


def test_a_task_that_is_killed_each_time_is_named_with_the_end_of_its_log(slurm, tmp_path):
    with open_executor(config()) as run_tasks, pytest.raises(ClusterError) as error:
        run(run_tasks, tmp_path, fault="kill", once=False, num_tasks=1)
    assert num_starts(tmp_path) == [on_slurm.MAX_TRIES]
    for text in ("task 0 in ", "ended as FAILED", "about to be killed", f"submitted {on_slurm.MAX_TRIES} times"):
        assert text in str(error.value)


def test_what_a_task_raises_arrives_and_ends_its_jobs(slurm, tmp_path):
    with open_executor(config()) as run_tasks, pytest.raises(DataError, match=r"^field: got that, expected this$"):
        run(run_tasks, tmp_path, fault="data")
    wait_until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & set(states(tmp_path)))
    with open_executor(config()) as run_tasks:
        run(run_tasks, tmp_path)
    assert len(output(tmp_path)) == NUM_TASKS


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (StoreError("disk: full"), StoreError),
        (OSError(errno.ENOSPC, "No space left on device", "there"), OSError),
        (MemoryError("1 TB"), MemoryError),
        (KeyError("a bug"), RuntimeError),
    ],
)
def test_an_error_keeps_its_kind_on_the_way_from_a_job(tmp_path, raised, arrives):
    on_slurm._write_failure(tmp_path, 3, raised)
    with pytest.raises(arrives) as error:
        on_slurm._raise_failure(tmp_path)
    assert type(error.value) is arrives
    assert str(raised) in str(error.value)


def test_a_cancelled_job_is_reported_and_not_submitted_again(slurm, tmp_path):
    parent = start_parent(tmp_path)
    wait_until(lambda: parent.poll() is not None or (tmp_path / "out" / "0.starts").exists())
    subprocess.run(["scancel", f"--name={on_slurm._job_name(tmp_path / 'log')}"], check=True)
    _, errors = parent.communicate(timeout=60)
    assert "ClusterError: task " in errors
    assert "ended as CANCELLED" in errors
    assert "run again to resume" in errors
    assert "submitted" not in errors


def test_jobs_of_a_killed_parent_end_before_the_next_run_starts_its_own(slurm, tmp_path):
    parent = start_parent(tmp_path)
    blocked, last = tmp_path / "out" / "0.starts", tmp_path / "log" / "completions" / "00002"
    wait_until(lambda: parent.poll() is not None or (blocked.exists() and last.exists()))
    parent.kill()
    parent.communicate()
    assert "RUNNING" in states(tmp_path)
    with open_executor(CorpusConfig(num_workers=1)) as run_tasks:  # it may even be another executor
        run(run_tasks, tmp_path)
    assert "CANCELLED" in states(tmp_path)
    assert not (tmp_path / "out" / "overlap").exists()
    assert num_starts(tmp_path) == [2, 1, 1]
    assert len(output(tmp_path)) == NUM_TASKS


def test_a_parent_that_is_told_to_end_takes_its_jobs_along(slurm, tmp_path):
    parent = start_parent(tmp_path)
    wait_until(lambda: parent.poll() is not None or (tmp_path / "out" / "0.starts").exists())
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=60)
    wait_until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & set(states(tmp_path)))


def start_parent(folder):
    """A process that runs the pipeline, of which rank 0 blocks."""
    code = (
        "import signal, sys; from pathlib import Path; from tests.data.executors import test_slurm as t, task_steps\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "with t.open_executor(t.config()) as run_tasks:\n"
        f"    task_steps.run(run_tasks, Path({str(folder)!r}), fault='block')\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "nowhere"}, "(?i)invalid partition.*correct partition"),
        ({"memory_per_cpu_gb": 10_000}, "node configuration is not available"),
        ({"sbatch": {"account": "mine", "--no-such": "option"}}, "no-such"),
    ],
)
def test_a_job_that_slurm_does_not_take_is_a_mistake_in_the_settings(slurm, tmp_path, settings, message):
    with open_executor(config(**settings)) as run_tasks, pytest.raises(ConfigError, match=message):
        run(run_tasks, tmp_path)


def test_a_host_without_slurm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_executor(config()) as run_tasks, pytest.raises(ConfigError, match=r"`s[a-z]+` is not found"):
        run(run_tasks, tmp_path)


def test_options_that_would_break_the_tracking_of_jobs_are_refused(tmp_path):
    with (
        open_executor(config(sbatch={"--array": "0-3"})) as run_tasks,
        pytest.raises(ConfigError, match="array are set by lilpipe"),
    ):
        run(run_tasks, tmp_path)


def test_a_controller_that_is_silent_for_a_while_is_asked_again(tmp_path, monkeypatch):
    command = tmp_path / "squeue"
    command.write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/asked ]; then echo '7|0|RUNNING|None'; exit 0; fi\n"
        f"touch {tmp_path}/asked\necho 'Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert on_slurm._jobs("mine") == [on_slurm._Job("7", "0", "RUNNING", "None")]
