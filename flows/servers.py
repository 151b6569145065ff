"""Local servers: `python -m flows.servers up` and `down`, used by `make up` and `make down`.

`up` starts a Prefect server, a worker of the process pool `local` and an MLflow server, all on loopback, waits until
they respond and registers the deployments of `deploy/prefect.yaml`. It records each process with its start time in
`.lilpipe/servers/`, so that `down` stops exactly these processes. The address of the Prefect server is written to a
profile that Prefect reads in this directory (`[tool.prefect]` in `pyproject.toml`).

Without servers, a pipeline run starts its own temporary Prefect API: ``temporary_prefect_api``.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.server_process import HOST, Server, ServerError, stop_all
from lilpipe.artifact import write_atomically
from lilpipe.errors import LilpipeError

POOL = "local"

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
TEMPORARY_API = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
"""Settings that make a temporary API start faster."""


def servers(home: Path) -> tuple[Server, Server, Server]:
    """Return Prefect server, MLflow server and worker, in start order."""
    prefect_port = int(os.environ.get("PREFECT_PORT") or _recorded_port(home, "prefect") or 4200)
    mlflow_port = int(os.environ.get("MLFLOW_PORT") or _recorded_port(home, "mlflow") or 5000)
    prefect_address = f"http://{HOST}:{prefect_port}"
    prefect = Server(
        name="prefect",
        command=[sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)],
        home=home,
        environment={**QUIET, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": f"{prefect_address}/api"},
        port=prefect_port,
        port_variable="PREFECT_PORT",
        health="/api/health",
    )
    mlflow = Server(
        name="mlflow",
        command=_mlflow_command(home, mlflow_port),
        home=home,
        # Job execution would start seven unused processes of 200 MB.
        environment={**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        port=mlflow_port,
        port_variable="MLFLOW_PORT",
        health="/health",
    )
    worker = Server(
        name="worker",
        client_of=prefect_address,
        command=[sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
        home=home,
        environment={
            **QUIET,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"{prefect_address}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", f"http://{HOST}:{mlflow_port}"),
            "LILPIPE_STORE": os.environ.get("LILPIPE_STORE", str(home)),
        },
    )
    return prefect, mlflow, worker


def _mlflow_command(home: Path, port: int) -> list[str]:
    """Return the command of the MLflow server. Artifacts are not proxied: clients on this machine write them directly,
    with or without a server, to the same directory.
    """
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{home / 'mlflow.db'}",
        "--default-artifact-root": (home / "mlartifacts").as_uri(),
    }
    words = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "mlflow", "server", "--no-serve-artifacts", *words]


def _recorded_port(home: Path, name: str) -> int | None:
    """Return the port that `up` gave to a server, so that `up` and `down` find it without being told.

    A server that died keeps its port until `down`: the worker, flow runs and open pages still speak to it.
    """
    return Server(name, (), home).recorded().get("port")


def up(project: Path) -> tuple[str, str]:
    """Start servers that are not running, register the deployments, and return the URLs of Prefect and MLflow."""
    home = project / ".lilpipe"
    prefect, mlflow, worker = servers(home)
    prefect.start()
    mlflow.start()
    prefect.wait()
    os.environ["PREFECT_API_URL"] = f"{prefect.url}/api"
    write_atomically(home / "profiles.toml", PROFILE.format(url=prefect.url))
    register_deployments(project, worker.environment)
    worker.start()
    add_crash_detection()
    mlflow.wait()
    return prefect.url, mlflow.url


def down(project: Path) -> list[str]:
    """Stop what `up` started; returns the names of the servers that were running."""
    home = project / ".lilpipe"
    (home / "profiles.toml").unlink(missing_ok=True)
    return stop_all(servers(home))


PROFILE = """# Written by `make up`, removed by `make down`.
active = "lilpipe"

[profiles.lilpipe]
PREFECT_API_URL = "{url}/api"
"""


def register_deployments(project: Path, environment: Mapping[str, str]) -> None:
    """Run `prefect deploy` for all deployments of `deploy/prefect.yaml`; creates the work pool if it does not exist."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
    options = ["--all", "--prefect-file", "deploy/prefect.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", *options],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerError(f"prefect deploy {' '.join(options)} failed:\n{done.stdout}{done.stderr}")


HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 90
CRASH_DETECTION = "lilpipe: a flow run without heartbeat has crashed"


def add_crash_detection() -> None:
    """Add an automation that marks flow runs as crashed if both their process and the worker were killed.

    Without it they would stay in state `Running`.
    """
    from prefect.automations import Automation, EventTrigger, Posture
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState

    try:
        Automation.read(name=CRASH_DETECTION)  # type: ignore[unused-coroutine]
        return
    except ValueError:
        pass  # it does not exist yet
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ends},
        match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENT_SECONDS,  # type: ignore[arg-type]
    )
    message = f"No heartbeat for {SILENT_SECONDS} seconds"
    crash = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=message, force=False)
    Automation(name=CRASH_DETECTION, trigger=trigger, actions=[crash]).create()


# --- a temporary API ----------------------------------------------------------------------------------------------


def temporary_prefect_api(home: Path) -> Server:
    """Start a Prefect API on a free port that lives as long as this process; call ``wait`` before the first flow.

    Prefect's own ephemeral mode imports its server in this process before it starts it. This function returns at once,
    so the server starts while this process still imports. It also dies with this process, however that ends.
    """
    for left in (home / "servers").glob("prefect-*"):  # left by a killed run
        if Server(left.stem, (), home).process() is None:
            left.unlink()
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", HOST, "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    environment = {**QUIET, **TEMPORARY_API, "PREFECT_HOME": str(home)}
    server = Server(
        f"prefect-{os.getpid()}", command, home, environment, port=port, health="/api/health", dies_with_parent=True
    )
    server.start()
    # Registered before Prefect is imported, so it is called after Prefect has sent its last logs and events.
    atexit.register(_remove, server)
    return server


def _remove(server: Server) -> None:
    server.stop()
    server.log.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Run `up` or `down` in the current directory."""
    project = Path.cwd()
    try:
        if list(arguments) == ["up"]:
            prefect, mlflow = up(project)
            print(f"Prefect  {prefect}\nMLflow   {mlflow}\n\nStart the pipeline: prefect deployment run full-pipeline")
        elif list(arguments) == ["down"]:
            print(f"stopped: {', '.join(down(project)) or 'nothing was running'}")
        else:
            print("usage: python -m flows.servers up|down", file=sys.stderr)
            return 2
    except LilpipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
