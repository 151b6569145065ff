"""Workers under a real `srun`, whose daemons run on this host for these tests."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.slurm.one_host import find_missing, one_host
from lilpipe.config.parallel import LaunchConfig
from lilpipe.errors import ClusterError, ConfigError, DataError, Preempted
from lilpipe.launch import srun
from lilpipe.launch.workers import Job
from tests.launch import toy

ROOT = Path(__file__).parents[2]


def job(settings, *, num_workers=4):
    launch = LaunchConfig.model_validate({"launcher": "srun", **settings})
    return Job(
        file=Path("/store/work/pretrain/ab12/job.json"), num_workers=num_workers, environment={}, settings=launch
    )


def test_outside_of_an_allocation_srun_asks_for_one():
    slurm = {
        "partition": "gpu",
        "time": "8:00:00",
        "gpus_per_node": 2,
        "options": {"--account": "mine", "exclusive": ""},
    }
    options = srun.command(job({"num_nodes": 2, "slurm": slurm}), {})
    name = job({}).name
    assert name.startswith("lilpipe-pretrain-")
    assert options == [
        "srun",
        f"--job-name={name}",
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--kill-on-bad-exit=1",
        "--gpus-per-node=2",
        "--time=8:00:00",
        "--partition=gpu",
        "--account=mine",
        "--exclusive",
        *(sys.executable, "-m", "lilpipe.worker", "/store/work/pretrain/ab12/job.json", "srun"),
    ]


def test_inside_of_an_allocation_the_workers_are_a_step_of_it():
    options = srun.command(job({"slurm": {"partition": "gpu"}}), {"SLURM_JOB_ID": "7"})
    assert "--overlap" in options
    assert not [option for option in options if option.startswith(("--time", "--partition"))]


def test_options_that_would_break_the_launch_are_refused():
    with pytest.raises(ConfigError, match=r"launch.slurm.options: ntasks are set by lilpipe"):
        srun.command(job({"slurm": {"options": {"--ntasks": "3"}}}), {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("gpu[07-09,12],big1", "gpu07"),
        ("a1,b2", "a1"),
        ("rack[2-3]node[5,7]", "rack2node5"),
        ("gpu-[1-4].site", "gpu-1.site"),
    ],
)
def test_the_first_host_of_a_list_leads(nodes, first):
    assert srun.first_host(nodes) == first


def test_a_task_finds_its_rank_in_what_slurm_says():
    environment = {
        "SLURM_JOB_ID": "100",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "gpu[3-4]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    }
    told = srun.rank_environment(environment)
    port = int(told.pop("MASTER_PORT"))
    assert told == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu3",
    }
    assert 1024 < port < 32768
    assert int(srun.rank_environment({**environment, "SLURM_STEP_ID": "3"})["MASTER_PORT"]) != port


def test_a_host_without_slurm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"launch.launcher: got 'srun', but `s[a-z]+` is not found"):
        toy.launch_toy(tmp_path, settings={"launcher": "srun"})


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := find_missing():
        pytest.skip(f"no {missing[0]} on this host; install Debian's slurm-wlm and munge, or your system's")
    with one_host(tmp_path_factory.mktemp("slurm")) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in {**env, "PYTHONPATH": str(ROOT)}.items():  # tasks find the stage of these tests
            patch.setenv(name, value)
        yield


def launch_toy(work, **fields):
    settings = {"launcher": "srun", **fields.pop("settings", {})}
    return toy.launch_toy(work, settings=settings, **fields)


def jobs():
    """The state of each job, the newest first."""
    command = ["squeue", "--states=all", "--noheader", "--sort=-i", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slow
def test_when_a_task_is_killed_all_start_again_and_go_on_from_what_was_saved(slurm, tmp_path):
    assert launch_toy(tmp_path, fault="kill") == {"total": toy.expected(), "first": 5.0}
    (restart,) = toy.messages(tmp_path)
    assert re.fullmatch(
        r"task 1 on \S+: Killed \(restart 1 of 3\); all workers restart from the last checkpoint", restart
    )


@pytest.mark.slow
def test_an_error_of_the_users_ends_the_job_without_a_restart(slurm, tmp_path):
    with pytest.raises(DataError, match=r"^field: got that, expected this$"):
        launch_toy(tmp_path, fault="data", once=False)
    assert not toy.messages(tmp_path)


@pytest.mark.slow
def test_a_task_that_gets_sigterm_before_it_is_preempted_lets_all_save(slurm, tmp_path):
    with pytest.raises(Preempted, match=r"^pre-empted after step 6; saved$"):
        launch_toy(tmp_path, fault="term")


@pytest.mark.slow
def test_a_job_that_a_person_cancels_is_not_tried_again(slurm, tmp_path):
    def cancel(event):
        subprocess.run(["scancel", f"--user={os.getuid()}"], check=True)

    with pytest.raises(ClusterError, match="was cancelled; run again to resume"):
        launch_toy(tmp_path, fault="slow", on_event=cancel)


@pytest.mark.slow
def test_cancelling_the_stage_cancels_the_job(slurm, tmp_path):
    class Cancelled(BaseException):
        pass

    def cancel(event):
        raise Cancelled

    with pytest.raises(Cancelled):
        launch_toy(tmp_path, fault="slow", on_event=cancel)
    deadline = time.monotonic() + 30
    while {"RUNNING", "PENDING", "COMPLETING"} & set(jobs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_slurm_does_not_take_is_a_mistake_in_the_settings(slurm, tmp_path):
    with pytest.raises(ConfigError, match=r"(?is)launch.slurm: .*invalid partition.*correct partition"):
        launch_toy(tmp_path, settings={"slurm": {"partition": "nowhere"}})


@pytest.mark.slow
def test_in_an_allocation_the_stage_runs_as_a_step_of_it(slurm, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.launch import toy\n"
        "print(toy.launch_toy(Path(sys.argv[1]), settings={'launcher': 'srun'}))\n"
    )
    before = len(jobs())
    command = ["salloc", "--ntasks=2", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert str({"total": toy.expected(), "first": 0.0}) in done.stdout, done.stderr
    assert len(jobs()) == before + 1
