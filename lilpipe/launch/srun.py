"""Processes on the nodes of a Slurm cluster (Yoo, Jette and Grondona 2003), by ``srun``.

Inside of an allocation (``salloc``, ``sbatch``) they are a step of it; elsewhere ``srun`` asks for an allocation of its
own, and waits for it. Each task is a worker. When one dies Slurm ends the others, and all are started again here.
Store and Python environment must lie on a file system that all nodes see.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import sys
import time
from collections.abc import Mapping

from lilpipe.errors import ClusterError, ConfigError
from lilpipe.launch.failure import read_final
from lilpipe.launch.lines import Lines
from lilpipe.launch.processes import explain, start_process, stop_process, worker_command
from lilpipe.launch.workers import Ended, Job, Restarted

CONTROLLER_SECONDS = 300
"""How long a controller that does not answer (it may be restarting) is asked again."""
CANCEL_SECONDS = 120
"""How long cancelled jobs may take to end; Slurm's `KillWait` is 30 s by default."""
OWN_OPTIONS = {"job-name", "nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit", "output", "error", "test-only"}
_TASK_ENDED = re.compile(r"^srun: error: (?P<host>\S+): tasks? (?P<task>[\d,-]+): (?P<how>.+?)\s*$")
"""What `srun` says of tasks that did not end well."""
_PORTS = range(15_000, 30_000)
"""Below those that Linux gives to outgoing connections."""


def command(job: Job, environment: Mapping[str, str]) -> list[str]:
    """The `srun` command line."""
    slurm = job.settings.slurm
    options = {
        "job-name": job.name,
        "nodes": str(job.settings.num_nodes),
        "ntasks": str(job.num_workers),
        "ntasks-per-node": str(job.workers_per_node),
        "cpus-per-task": str(slurm.cpus_per_task),
        "kill-on-bad-exit": "1",
    }
    if slurm.gpus_per_node:
        options["gpus-per-node"] = str(slurm.gpus_per_node)
    if "SLURM_JOB_ID" in environment:
        options["overlap"] = ""  # an interactive shell in the allocation is itself a step that holds its processors
    else:
        options["time"] = slurm.time
        if slurm.partition:
            options["partition"] = slurm.partition
    further = {name.lstrip("-"): value for name, value in slurm.options.items()}
    if wrong := OWN_OPTIONS & further.keys():
        raise ConfigError(f"launch.slurm.options: {', '.join(sorted(wrong))} are set by lilpipe; remove them")
    flags = [f"--{name}={value}" if value else f"--{name}" for name, value in {**options, **further}.items()]
    return ["srun", *flags, sys.executable, *worker_command(job.file), "srun"]


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch asks of the environment, from what Slurm gives to each task of a step."""
    alone = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    step = 131 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
        "MASTER_ADDR": "127.0.0.1" if alone else first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[step % len(_PORTS)]),  # another for each step: the last one's may be in use still
    }


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``gpu[07-09,12],big1`` begins with ``gpu07``."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


class Srun:
    """Workers under `srun`; see ``Workers``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lines = Lines(job.log)
        self._command = command(job, job.environment)
        self._restarts = 0
        _cancel(job.name)  # what a parent that was killed may have left at work in this folder
        if "SLURM_JOB_ID" not in job.environment:
            _try_submission(self._command)
        self._process = start_process(self._command, job)

    def poll(self) -> Restarted | Ended | None:
        """Whether the step has ended; starts another if that may help."""
        status = self._process.poll()
        if status is None:
            return None
        state = _state(self._job.name)
        if state in ("RUNNING", "COMPLETING"):  # Slurm has still to say how
            return None
        if state == "CANCELLED":  # even where the exit status is 0
            raise ClusterError(f"Slurm job {self._job.name} was cancelled; run again to go on")
        if status == 0:
            return Ended(None)
        ended = self._explain(128 - status if status > 128 else status)
        if read_final(self._job.work) or self._restarts == self._job.settings.max_restarts:
            return ended
        self._restarts += 1
        self._process = start_process(self._command, self._job)
        return Restarted(f"{ended.problem} (restart {self._restarts} of {self._job.settings.max_restarts})")

    def _explain(self, status: int) -> Ended:
        """How the first task ended that did: the status is that of all, the highest."""
        ends = [match for line in self._lines.read() if (match := _TASK_ENDED.search(line))]
        if ends and not ends[0]["how"].startswith("Exited"):
            return Ended(f"task {ends[0]['task']} on {ends[0]['host']}: {ends[0]['how']}")
        return explain(self._job, status, "srun: ")

    def stop(self) -> None:
        """Tell `srun`, which passes SIGTERM on; what does not end then is cancelled."""
        stop_process(self._process, seconds=self._job.settings.stop_seconds)
        _cancel(self._job.name)


def _try_submission(srun: list[str]) -> None:
    """Raise ``ConfigError``, with what `srun` says, if Slurm would not take the job."""
    result = _run(srun[0], "--test-only", *srun[1:])
    if result.returncode:
        raise ConfigError(
            f"launch.slurm: Slurm does not take the job: {result.stderr.strip()}; correct partition, time, "
            f"cpus_per_task, gpus_per_node or options, or launch.num_nodes"
        )


def _cancel(name: str) -> None:
    """End the jobs and steps of that name, and wait until they are gone."""
    deadline = time.monotonic() + CANCEL_SECONDS
    while ids := _active(name):
        if time.monotonic() > deadline:
            raise ClusterError(f"Slurm job {', '.join(ids)} does not end; see `squeue`, and run again when it has")
        _run("scancel", *ids)
        time.sleep(0.5)


def _active(name: str) -> list[str]:
    """Numbers of the jobs and steps of that name that have not ended."""
    user = f"--user={getpass.getuser()}"
    jobs = _run("squeue", f"--name={name}", user, "--noheader", "--format=%A").stdout.split()
    steps = [
        line.split("|", 1) for line in _run("squeue", "--steps", user, "--noheader", "--format=%i|%j").stdout.split()
    ]
    return jobs or [number for number, step in steps if step == name]


def _state(name: str) -> str:
    """The state of the last job of that name; nothing for a step, or where Slurm has forgotten it."""
    lines = _run("squeue", f"--name={name}", "--states=all", "--noheader", "--sort=-i", "--format=%T").stdout.split()
    return lines[0] if lines else ""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a controller that does not answer is asked again."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            result = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(
                f"launch.launcher: got 'srun', but `{words[0]}` is not found on this host; run where Slurm's commands "
                f"are, or set 'torchrun'"
            ) from None
        silent = any(sign in result.stderr for sign in ("Unable to contact", "timed out", "Connection refused"))
        if not result.returncode or not silent or time.monotonic() > deadline:
            return result
        time.sleep(1)
