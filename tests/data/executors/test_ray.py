"""Tasks on a real Ray, started on this host for these tests; the extra `ray`."""

import contextlib
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data import corpus
from lilpipe.data.executors import on_ray
from lilpipe.data.executors.executor import open_executor
from lilpipe.errors import ClusterError, ConfigError, DataError
from tests.data.executors.task_steps import NUM_TASKS, build_corpus, num_starts, output, run

ROOT = Path(__file__).parents[3]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; install the extra: pip install -e '.[ray]'"
)


def config(**settings):
    settings = {"memory_per_cpu_gb": 0.5, **settings}
    return CorpusConfig.model_validate({"num_workers": 2, "executor": "ray", "ray": settings})


@pytest.fixture(scope="module")
def run_tasks():
    """An executor on a cluster of its own."""
    with open_executor(config()) as run_tasks:
        yield run_tasks


@needs_ray
def test_tasks_on_ray_give_the_bytes_of_local_ones(run_tasks, tmp_path):
    with open_executor(CorpusConfig(num_workers=1)) as run_here:
        run(run_here, tmp_path / "local", num_tasks=5)
    assert run(run_tasks, tmp_path / "ray", num_tasks=5) == [0, 1, 2, 3, 4, 5]
    assert run(run_tasks, tmp_path / "ray", num_tasks=5) == [5]
    assert output(tmp_path / "ray") == output(tmp_path / "local")
    assert len(output(tmp_path / "ray")) == 5


@needs_ray
def test_the_corpus_stage_gives_the_bytes_of_a_local_one(run_tasks, tmp_path, monkeypatch):
    here = build_corpus(tmp_path / "local", CorpusConfig(num_workers=1))
    monkeypatch.setattr(corpus, "open_executor", lambda config: contextlib.nullcontext(run_tasks))  # no second cluster
    assert len(here) > 4
    assert build_corpus(tmp_path / "ray", config()) == here


@needs_ray
def test_a_killed_task_is_run_again_and_it_alone(run_tasks, tmp_path):
    run(run_tasks, tmp_path, fault="kill", fault_rank=1)
    assert len(output(tmp_path)) == NUM_TASKS
    assert num_starts(tmp_path) == [1, 2, 1]


@needs_ray
def test_a_task_that_is_killed_each_time_is_named(run_tasks, tmp_path):
    with pytest.raises(ClusterError, match=f"task 0: its process on Ray was killed {on_ray.MAX_TRIES} times"):
        run(run_tasks, tmp_path, fault="kill", once=False, num_tasks=1)
    assert num_starts(tmp_path) == [on_ray.MAX_TRIES]


@needs_ray
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [("data", DataError, "^field: got that, expected this$"), ("bug", KeyError, "a bug"), ("disk", OSError, "28")],
)
def test_what_a_task_raises_arrives_and_the_next_run_goes_on(run_tasks, tmp_path, fault, kind, message):
    with pytest.raises(kind, match=message) as error:
        run(run_tasks, tmp_path, fault=fault)
    assert type(error.value) is kind
    run(run_tasks, tmp_path)
    assert not (tmp_path / "out" / "overlap").exists()
    assert len(output(tmp_path)) == NUM_TASKS


@needs_ray
def test_relative_paths_mean_the_same_as_here(run_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(run_tasks, Path("work"))
    assert len(output(tmp_path / "work")) == NUM_TASKS


@needs_ray
@pytest.mark.parametrize(("how", "joins"), [(signal.SIGTERM, True), (signal.SIGKILL, True), (signal.SIGKILL, False)])
def test_a_parent_that_ends_takes_its_tasks_along(run_tasks, tmp_path, how, joins):
    address = sys.modules["ray"].get_runtime_context().gcs_address if joins else None
    code = (
        "import signal, sys; from pathlib import Path; from tests.data.executors import test_ray as t, task_steps\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"with t.open_executor(t.config(address={address!r})) as run_tasks:\n"
        f"    task_steps.run(run_tasks, Path({str(tmp_path)!r}), fault='block')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    blocked, last = tmp_path / "out" / "0.starts", tmp_path / "log" / "completions" / "00002"
    wait_until(lambda: parent.poll() is not None or (blocked.exists() and last.exists()))
    task = int(blocked.read_text())
    parent.send_signal(how)
    parent.wait(60)
    wait_until(lambda: not Path(f"/proc/{task}").exists())
    with open_executor(CorpusConfig(num_workers=1)) as run_here:
        run(run_here, tmp_path)
    assert num_starts(tmp_path) == [2, 1, 1]
    assert not (tmp_path / "out" / "overlap").exists()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs_ray
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_per_cpu_gb": 10_000}, "needs cpus_per_task = 1 and 10000 GB .*nodes have .* CPUs and"),
        ({"cpus_per_task": 1_000}, "needs cpus_per_task = 1000 and"),
    ],
)
def test_a_task_larger_than_any_node_is_a_mistake_in_the_settings(run_tasks, settings, message):
    with pytest.raises(ConfigError, match=message):
        on_ray._check_size(sys.modules["ray"], config(**settings).ray)


@needs_ray
def test_an_address_where_no_cluster_answers_is_a_mistake_in_the_settings():
    with (
        pytest.raises(ConfigError, match=r"no Ray cluster answers at '127.0.0.1:1'.*ray start --head"),
        open_executor(config(address="127.0.0.1:1")),
    ):
        pass


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed; install the extra"), open_executor(config()):
        pass
