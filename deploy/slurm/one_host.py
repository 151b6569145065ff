"""A Slurm cluster on one host: munged, slurmctld and slurmd on loopback, with all their files in one folder.

For tests of ``corpus.executor = "slurm"`` and ``launch.launcher = "srun"`` without a cluster. Runs as any user;
requires Debian's `slurm-wlm`:

    python deploy/slurm/one_host.py /tmp/slurm      # prints the variable to export; Ctrl-C stops it

No accounting, no cgroups, no system service: the daemons are child processes and end with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "sinfo")
START_SECONDS = 30
STOP_SECONDS = 10
PARTITION = "cpu"
_PR_SET_PDEATHSIG = 1


def find_missing() -> list[str]:
    """Return the programs of Slurm and munge that are not installed on this host."""
    return [name for name in (*DAEMONS, *COMMANDS) if _find(name) is None]


@contextlib.contextmanager
def one_host(folder: Path, *, num_cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start the daemons, stop them at the end, and yield the environment variables for `sbatch`.

    Raises ``RuntimeError`` with the end of the logs if the node is not up after ``START_SECONDS``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    conf = _write_conf(folder, num_cpus)
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in _munge_files(folder).items())],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", _node()],
    ]
    env = {**os.environ, "SLURM_CONF": str(conf)}
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(_daemon(command, folder, env))
            if command[0] == "munged":
                _wait_for(lambda: (folder / "munge.socket").exists(), "munged's socket", folder)
        _wait_for(lambda: "idle" in _run("sinfo", "--noheader", "--format=%T", env=env), "the node", folder)
        try:
            yield {"SLURM_CONF": str(conf)}
        finally:
            _run("scancel", f"--user={getpass.getuser()}", env=env)
            with contextlib.suppress(RuntimeError):
                _wait_for(lambda: not _run("squeue", "--noheader", env=env), "an empty queue", folder)


def _write_conf(folder: Path, num_cpus: int) -> Path:
    """Write munge's key and `slurm.conf`."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    ports = _free_ports(2)
    user = getpass.getuser()
    settings = {
        "ClusterName": "lilpipe",
        "SlurmctldHost": f"{_node()}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1],
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'}",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "KillWait": 2,
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "MailProg": "/bin/true",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    lines.append(f"NodeName={_node()} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory={memory} State=UNKNOWN")
    lines.append(f"PartitionName={PARTITION} Nodes={_node()} Default=YES MaxTime=INFINITE State=UP")
    conf = folder / "slurm.conf"
    conf.write_text("\n".join(lines) + "\n")
    return conf


def _munge_files(folder: Path) -> dict[str, Path]:
    return {
        "socket": folder / "munge.socket",
        "key-file": folder / "munge.key",
        "log-file": folder / "munged.log",
        "pid-file": folder / "munged.pid",
        "seed-file": folder / "munged.seed",
    }


@contextlib.contextmanager
def _daemon(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    path = _find(command[0])
    if path is None:
        raise RuntimeError(f"{command[0]} is not installed; install Debian's slurm-wlm and munge, or your system's")
    with (folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen(
            [path, *command[1:]], stdout=out, stderr=out, env=env, start_new_session=True, preexec_fn=_end_with_parent
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """End the daemon when its parent is killed (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for(condition: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            logs = [*folder.glob("*.log"), *folder.glob("*.out")]
            ends = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1_500:]}" for log in sorted(logs))
            raise RuntimeError(f"{what} is not ready after {START_SECONDS} s; see the logs in {folder}:\n{ends}")
        time.sleep(0.1)


def _run(*command: str, env: dict[str, str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False).stdout


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> int:
    """Run the cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Run a Slurm cluster on this host until Ctrl-C.")
    parser.add_argument("folder", type=Path, help="folder for configuration, state and logs")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="number of CPUs of the node")
    args = parser.parse_args()
    with one_host(args.folder.resolve(), num_cpus=args.cpus) as env:
        print(f"up: partition {PARTITION!r}; in your shell: export SLURM_CONF={env['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
