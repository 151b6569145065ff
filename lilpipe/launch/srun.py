"""Workers on the nodes of a Slurm cluster (Yoo, Jette and Grondona 2003), started by ``srun``.

Inside an allocation (``salloc``, ``sbatch``) they are a job step of it. Otherwise ``srun`` requests an allocation and
waits for it. Each task is a worker. When one fails Slurm ends the others, and this module restarts all of them. Store
and Python environment must be on a file system that all nodes share.
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
"""How long requests to a Slurm controller that does not respond (it may be restarting) are retried."""
CANCEL_SECONDS = 120
"""Time for cancelled jobs to end; Slurm's `KillWait` is 30 s by default."""
OWN_OPTIONS = {"job-name", "nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit", "output", "error", "test-only"}
_TASK_ENDED = re.compile(r"^srun: error: (?P<host>\S+): tasks? (?P<task>[\d,-]+): (?P<how>.+?)\s*$")
"""`srun`'s message on tasks that failed."""
_PORTS = range(15_000, 30_000)
"""Below Linux's ephemeral ports."""


def command(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Return the `srun` command line."""
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
        options["overlap"] = ""  # an interactive shell in the allocation is itself a step that holds its CPUs
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
    """Return the environment variables of torch.distributed, from Slurm's variables of a task."""
    alone = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    step = 131 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
        "MASTER_ADDR": "127.0.0.1" if alone else first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[step % len(_PORTS)]),  # differs per step: the last port may still be in use
    }


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm host list: ``gpu[07-09,12],big1`` gives ``gpu07``."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


class Srun:
    """Workers started by `srun`; see ``WorkerProcesses``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lines = Lines(job.log)
        self._command = command(job, job.environment)
        self._restarts = 0
        _cancel(job.name)  # a killed parent may have left processes running in this workspace
        if "SLURM_JOB_ID" not in job.environment:
            _try_submission(self._command)
        self._process = start_process(self._command, job)

    def poll(self) -> Restarted | Ended | None:
        """Return whether the step has ended; restarts it if the failure is retryable."""
        status = self._process.poll()
        if status is None:
            return None
        state = _state(self._job.name)
        if state in ("RUNNING", "COMPLETING"):  # the final state is not known yet
            return None
        if state == "CANCELLED":  # even where the exit status is 0
            raise ClusterError(f"Slurm job {self._job.name} was cancelled; run again to resume")
        if status == 0:
            return Ended(None)
        ended = self._explain(128 - status if status > 128 else status)
        if read_final(self._job.work) or self._restarts == self._job.settings.max_restarts:
            return ended
        self._restarts += 1
        self._process = start_process(self._command, self._job)
        return Restarted(f"{ended.problem} (restart {self._restarts} of {self._job.settings.max_restarts})")

    def _explain(self, status: int) -> Ended:
        """Return how the first failed task ended; ``status`` is the highest exit status of all tasks."""
        ends = [match for line in self._lines.read() if (match := _TASK_ENDED.search(line))]
        if ends and not ends[0]["how"].startswith("Exited"):
            return Ended(f"task {ends[0]['task']} on {ends[0]['host']}: {ends[0]['how']}")
        return explain(self._job, status, "srun: ")

    def stop(self) -> None:
        """Stop `srun`, which forwards SIGTERM, then cancel what still runs."""
        stop_process(self._process, seconds=self._job.settings.stop_seconds)
        _cancel(self._job.name)


def _try_submission(srun: list[str]) -> None:
    """Raise ``ConfigError`` with `srun`'s message if Slurm would reject the job."""
    result = _run(srun[0], "--test-only", *srun[1:])
    if result.returncode:
        raise ConfigError(
            f"launch.slurm: Slurm rejects the job: {result.stderr.strip()}; correct partition, time, "
            f"cpus_per_task, gpus_per_node or options, or launch.num_nodes"
        )


def _cancel(name: str) -> None:
    """Cancel the jobs and steps of that name and wait until they end."""
    deadline = time.monotonic() + CANCEL_SECONDS
    while ids := _active(name):
        if time.monotonic() > deadline:
            raise ClusterError(f"Slurm job {', '.join(ids)} does not end; see `squeue`, then run again after its end")
        _run("scancel", *ids)
        time.sleep(0.5)


def _active(name: str) -> list[str]:
    """Return the ids of the jobs and steps of that name that have not ended."""
    user = f"--user={getpass.getuser()}"
    jobs = _run("squeue", f"--name={name}", user, "--noheader", "--format=%A").stdout.split()
    steps = [
        line.split("|", 1) for line in _run("squeue", "--steps", user, "--noheader", "--format=%i|%j").stdout.split()
    ]
    return jobs or [number for number, step in steps if step == name]


def _state(name: str) -> str:
    """Return the state of the last job of that name; empty for a step, or if Slurm no longer lists it."""
    lines = _run("squeue", f"--name={name}", "--states=all", "--noheader", "--sort=-i", "--format=%T").stdout.split()
    return lines[0] if lines else ""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; retry while the controller does not respond."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            result = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(
                f"launch.launcher: got 'srun', but `{words[0]}` is not found on this host; run where Slurm's commands "
                f"are installed, or set 'torchrun'"
            ) from None
        silent = any(sign in result.stderr for sign in ("Unable to contact", "timed out", "Connection refused"))
        if not result.returncode or not silent or time.monotonic() > deadline:
            return result
        time.sleep(1)
