"""The servers of `make up`, and what users do through them; one set of servers for the whole file."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.full_pipeline import full_pipeline
from flows.server_process import Server
from flows.stage import run_one_stage
from tests.flows import toys

pytestmark = pytest.mark.servers

PROJECT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Project:
    """A checkout of its own, with servers on ports of its own."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("pyproject.toml", "flows", "tasks", "lilpipe", "deploy"):
            (folder / name).symlink_to(PROJECT / name)
        self.trouble = folder / "trouble"
        self.trouble.mkdir()
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        self.ports = {"PREFECT_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())}
        self.environment = {
            **outside,
            **self.ports,
            "PYTHONPATH": str(toys.FOLDER),
            "TOY_TROUBLE": str(self.trouble),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command, check=True, **environment):
        done = subprocess.run(
            command, cwd=self.folder, env={**self.environment, **environment}, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def servers(self, command, **options):
        return self.call(sys.executable, "-m", "flows.servers", command, **options)

    def records(self):
        return {path.stem: json.loads(path.read_text()) for path in (self.folder / ".lilpipe/servers").glob("*.json")}

    def api(self, path, body=None):
        url = f"http://127.0.0.1:{self.ports['PREFECT_PORT']}/api{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def start(self, deployment, **parameters):
        """`prefect deployment run`, as a user types it in the project's directory; returns the flow run's id."""
        given = {"config": str(toys.CONFIG), **parameters}
        words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
        output = self.call(PREFECT, "deployment", "run", deployment, *words).stdout
        (flow_run,) = re.findall(r"UUID: (\S+)", output)
        return flow_run

    def end(self, flow_run, *, after=None):
        """The flow run in its final state; ``after`` is the run count of the try before, for a retry."""
        deadline, run = time.time() + 120, {}
        while time.time() < deadline:
            run = self.api(f"/flow_runs/{flow_run}")
            if run["state_type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED") and run["run_count"] != after:
                return run
            time.sleep(0.2)
        raise AssertionError(f"{run.get('state')}\n{(self.folder / '.lilpipe/servers/worker.log').read_text()[-3000:]}")

    def states(self, flow_run):
        """Task to the name of its state; the server hears of the last ones a little after the flow's."""
        time.sleep(1)
        tasks = self.api(
            "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        )
        return {task["name"]: task["state_name"] for task in tasks}

    def logs(self, flow_run):
        entries = self.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
        return "\n".join(entry["message"] for entry in entries)

    def fail(self, *names):
        for path in self.trouble.iterdir():
            path.unlink()
        for name in names:
            (self.trouble / name).touch()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    try:
        output = project.servers("up").stdout
        assert f"http://127.0.0.1:{project.ports['PREFECT_PORT']}" in output
        assert f"http://127.0.0.1:{project.ports['MLFLOW_PORT']}" in output
        yield project
    finally:
        project.servers("down")


@pytest.mark.timeout(400)
def test_a_failed_stage_reruns_alone_in_each_of_the_three_ways(project):
    """By the pipeline's deployment once more, by retrying the flow run, and by the stage's own deployment."""
    project.fail("pretrain")
    first = project.start("full-pipeline")
    assert project.end(first)["name"] == "tiny, seed 0"
    assert project.states(first) == {"corpus": "Completed", "pretrain": "Failed"}

    project.fail("sft")
    again = project.start("full-pipeline/local")
    assert project.end(again)["state_type"] == "FAILED"
    assert project.states(again) == {"corpus": "Cached", "pretrain": "Completed", "sft": "Failed"}
    assert "pretrain: starts at step 5" in project.logs(again)

    project.fail("register")
    project.call(PREFECT, "flow-run", "retry", again)
    assert project.end(again, after=1)["state_type"] == "FAILED"
    cached = {"corpus": "Cached", "pretrain": "Cached"}
    assert project.states(again) == {**cached, "sft": "Completed", "register": "Failed"}
    assert "sft: starts at step 5" in project.logs(again)

    project.fail()
    alone = project.start("stage/local", stage="register")
    assert project.end(alone)["name"] == "register of tiny, seed 0"
    assert project.states(alone) == {"register": "Completed"}
    assert "register: starts at step 5" in project.logs(alone)


def test_cancelling_a_run_ends_the_processes_of_its_stage(project):
    project.fail("pretrain-hangs")
    run = project.start("full-pipeline", seed="1")
    while not (jobs := workers(project, "pretrain")):
        time.sleep(0.2)
    project.call(PREFECT, "flow-run", "cancel", run)
    assert project.end(run)["state_type"] == "CANCELLED"
    jobs[0].wait(timeout=30)
    project.fail()


@pytest.fixture
def here(project, monkeypatch):
    """This process set up as one in the project's directory."""
    monkeypatch.chdir(project.folder)
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    toys.install(monkeypatch, project.trouble)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{project.ports['PREFECT_PORT']}/api"}):
        yield project
    project.fail()


def call(flow: Any, **parameters: Any) -> Any:
    state = flow(config=str(toys.CONFIG), return_state=True, **parameters)
    assert state.message
    return state


def task_runs(project, state):
    time.sleep(1)
    body = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}}
    return {task["name"]: task for task in project.api("/task_runs/filter", body)}


def test_a_step_whose_inputs_are_missing_says_what_to_run(here):
    state = call(run_one_stage, stage="register", seed=2)
    assert state.is_failed()
    assert "sft (after pretrain); run these steps first" in state.message


def test_unknown_settings_and_steps_fail_the_run_with_the_remedy(here):
    assert "sft.epochs" in call(full_pipeline, overrides={"sft.epochs": 4}).message
    assert "known: corpus, pretrain" in call(run_one_stage, stage="sfft").message


def test_a_failure_of_infrastructure_is_retried_and_goes_on_from_the_checkpoint(here):
    here.fail("sft")
    state = call(full_pipeline, seed=3, overrides={"orchestration.retries": 1, "orchestration.retry_delay_seconds": 0})
    assert state.is_completed()
    assert task_runs(here, state)["sft"]["run_count"] == 2


def test_an_error_of_data_is_not_retried_and_its_message_is_the_runs(here):
    here.fail("pretrain-bad-data")
    state = call(full_pipeline, seed=4, overrides={"orchestration.retries": 2})
    assert state.message == "pretrain: docs.jsonl: no documents; name another file"
    assert task_runs(here, state)["pretrain"]["run_count"] == 1


def test_a_timeout_ends_the_processes_of_the_stage(here):
    here.fail("pretrain-hangs")
    state = call(full_pipeline, seed=5, overrides={"orchestration.stage_timeout_seconds.pretrain": 3.0})
    assert task_runs(here, state)["pretrain"]["state_name"] == "TimedOut"
    assert workers(here) == []


def workers(project, stage=""):
    """The stage processes that run in this project, of one stage or of all."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "lilpipe.worker" in words and f"{project.folder}/.lilpipe/work/{stage}" in words[-1]:
            found.append(process)
    return found


def test_without_servers_a_run_has_an_api_of_its_own_which_dies_with_it(tmp_path):
    """Also if it is killed, together with the processes of its stage; the next run goes on from the checkpoint."""
    alone = Project(tmp_path)
    alone.fail("pretrain-hangs")
    command = [sys.executable, "-m", "flows", "--config", str(toys.CONFIG)]
    run = subprocess.Popen(command, cwd=tmp_path, env=alone.environment, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".lilpipe/work/pretrain/*/scratch/checkpoint.json")):
        assert run.poll() is None
        time.sleep(0.2)
    jobs = workers(alone, "pretrain")
    ((_, record),) = alone.records().items()
    api = psutil.Process(record["pid"])
    run.kill()
    run.wait()
    assert jobs
    _, alive = psutil.wait_procs([api, *jobs], timeout=30)
    assert not alive
    alone.fail()
    output = alone.call(*command).stdout
    assert "corpus cached" in output
    assert "pretrain: starts at step 1" in output  # where it hung
    assert alone.records() == {}


def test_up_twice_is_harmless(project):
    before = project.records()
    project.servers("up")
    assert project.records() == before


def test_a_server_that_died_comes_back_where_its_worker_looks_for_it(project):
    before = project.records()
    os.killpg(before["prefect"]["pid"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before["prefect"]["pid"])] if psutil.pid_exists(before["prefect"]["pid"]) else [])
    project.servers("up", PREFECT_PORT="", MLFLOW_PORT="")
    after = project.records()
    assert after["prefect"]["pid"] != before["prefect"]["pid"]
    assert after["prefect"]["port"] == before["prefect"]["port"] == int(project.ports["PREFECT_PORT"])
    assert after["worker"] == before["worker"]
    assert project.api("/health") is True


def test_a_worker_of_another_server_is_replaced(tmp_path):
    first = Server("worker", ["sleep", "60"], tmp_path, client_of="http://127.0.0.1:1")
    second = Server("worker", ["sleep", "60"], tmp_path, client_of="http://127.0.0.1:2")
    try:
        first.start()
        pid = first.recorded()["pid"]
        first.start()
        assert first.recorded()["pid"] == pid
        second.start()
        assert second.recorded()["pid"] != pid
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        second.stop()


def test_a_taken_port_is_named_with_the_variable_that_changes_it(project, tmp_path):
    other = Project(tmp_path)
    done = other.servers("up", check=False, PREFECT_PORT=project.ports["PREFECT_PORT"])
    assert done.returncode == 1
    assert f"port {project.ports['PREFECT_PORT']} is used by another program" in done.stderr
    assert "PREFECT_PORT=" in done.stderr
    assert other.records() == {}


def test_down_does_not_touch_a_process_that_took_over_a_recorded_id(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        server = Server("prefect", ["true"], tmp_path)
        server.record.parent.mkdir()
        server.record.write_text(json.dumps({"pid": bystander.pid, "created": 1.0, "port": 1}))
        assert not server.stop()
        assert bystander.poll() is None
        assert not server.record.exists()
    finally:
        bystander.kill()


def test_down_ends_what_up_started_and_nothing_remains(project):
    groups = [record["pid"] for record in project.records().values()]
    assert len(groups) == 3
    assert "worker" in project.servers("down").stdout
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
    assert not (project.folder / ".lilpipe/profiles.toml").exists()
    assert "nothing was running" in project.servers("down").stdout
