import sys

import pytest
from pydantic import ValidationError

from lilpipe.config.parallel import LaunchConfig
from lilpipe.errors import ConfigError, StageFailure
from lilpipe.launch import failure, processes
from lilpipe.launch.workers import Job
from tests.launch import toy


def test_torchrun_on_several_hosts_is_refused_with_what_to_take_instead():
    with pytest.raises(ValidationError, match="num_nodes 2: launcher torchrun starts workers on this host only; use"):
        LaunchConfig(num_nodes=2)


def test_workers_that_cannot_be_shared_out_among_the_nodes_are_refused_before_any_is_started(tmp_path):
    with pytest.raises(ConfigError, match=r"num_workers 3 must be a multiple of launch.num_nodes 2"):
        toy.launch_toy(tmp_path, num_workers=3, settings={"launcher": "srun", "num_nodes": 2})
    assert not (tmp_path / "worker.log").exists()


def test_one_worker_is_one_plain_process_whose_exception_is_told(tmp_path):
    with pytest.raises(StageFailure, match=r"(?s)^rank 0: KeyError: 'a planted bug'; from .*worker.log:.*in fail"):
        toy.launch_toy(tmp_path, num_workers=1, fault="bug", fault_rank=0)
    assert not (tmp_path / "torchrun").exists()
    assert toy.launch_toy(tmp_path, num_workers=1) == {"total": toy.expected(1), "first": 5.0}


def test_of_several_errors_the_first_stands(tmp_path):
    failure.report(tmp_path, KeyError("cause"), rank=2)
    failure.report(tmp_path, RuntimeError("connection closed"), rank=0)
    found = failure.take_raised(tmp_path)
    assert found is not None
    assert found[0] == "rank 2: KeyError: 'cause'"
    assert failure.take_raised(tmp_path) is None
    failure.report(tmp_path, ConfigError("field"), rank=1)
    failure.report(tmp_path, ConfigError("another"), rank=0)
    assert repr(failure.read_final(tmp_path)) == "ConfigError('field')"
    assert [path.name for path in tmp_path.iterdir()] == [failure.FINAL]


def test_a_kill_is_told_as_such_and_not_by_what_other_workers_raised_because_of_it(tmp_path):
    job = Job(file=tmp_path / "job.json", num_workers=2, environment={}, settings=LaunchConfig())
    failure.report(tmp_path, RuntimeError("connection closed"), rank=0)
    assert processes.explain(job, -9, "rank 1: ").problem == "rank 1: killed by SIGKILL"
    assert processes.explain(job, 3, "rank 1: ").problem == "rank 1: exit status 3"


def test_a_process_that_ignores_sigterm_is_killed_after_a_while(tmp_path):
    job = Job(file=tmp_path / "job.json", num_workers=1, environment={}, settings=LaunchConfig())
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    process = processes.start_process([sys.executable, "-c", code], job)
    while "up" not in job.log.read_text():
        assert process.poll() is None
    processes.stop_process(process, seconds=0.1)
    assert process.returncode == -9
