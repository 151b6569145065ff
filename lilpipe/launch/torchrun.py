"""Several processes on this host with ``torchrun``, whose agent restarts all workers when one fails.

The agent restarts after any failure. A final error (``failure.json``) must not be retried, so this module watches for
it and stops the agent.
"""

from __future__ import annotations

import re
import signal
import sys
import time

from lilpipe.errors import HungCollective, Preempted
from lilpipe.heartbeat import describe_hang, read_places
from lilpipe.launch.failure import read_final, report
from lilpipe.launch.lines import Lines
from lilpipe.launch.processes import explain, start_process, stop_process, worker_command
from lilpipe.launch.workers import Ended, Job, Restarted

MONITOR_SECONDS = 0.2
"""Interval at which the agent checks its workers."""
AGENT_SECONDS = 5
"""Time for the agent to stop its workers; added to the workers' own limit if they save a checkpoint."""
AGENT_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Otherwise the agent's TCPStore keeps the addresses of dead workers, and new workers try to connect to them."""
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
"""The agent's log line on the worker that failed first, written after it has stopped the others."""


def agent_command(job: Job, *rendezvous: str) -> list[str]:
    """Return the ``torchrun`` command line of one host, without the Python interpreter."""
    return [
        *("-m", "torch.distributed.run", *rendezvous),
        f"--nproc-per-node={job.workers_per_node}",
        f"--max-restarts={job.settings.max_restarts}",
        f"--monitor-interval={MONITOR_SECONDS}",
        f"--shutdown-timeout={job.settings.stop_seconds}",
        f"--log-dir={job.work / 'torchrun'}",
        *worker_command(job.file),
    ]


class Torchrun:
    """Workers started by torchrun; see ``WorkerProcesses``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lines = Lines(job.log)
        self._restarts = 0
        self._failed: Ended | None = None
        self._preempted_at: float | None = None
        job.environment.update(AGENT_ENVIRONMENT)
        self._process = start_process([sys.executable, *agent_command(job, "--standalone")], job)

    def poll(self) -> Restarted | Ended | None:
        """Return whether a worker has failed or all have ended."""
        status = self._process.poll()
        newly_failed = self._find_failure()
        if status is not None:
            return (self._failed or explain(self._job, status, "torchrun: ")) if status else Ended(None)
        if self._is_final(newly_failed):
            stop_process(self._process, seconds=AGENT_SECONDS)  # hanging workers die with it: see lilpipe.worker
            return self._failed or Ended("a worker failed")
        max_restarts = self._job.settings.max_restarts
        if newly_failed and self._failed and self._restarts < max_restarts:
            self._restarts += 1
            return Restarted(f"{self._failed.problem} (restart {self._restarts} of {max_restarts})")
        return None

    def stop(self) -> None:
        """Stop the agent, which forwards SIGTERM to its workers and waits for them."""
        stop_process(self._process, seconds=self._job.settings.stop_seconds + AGENT_SECONDS)

    def _find_failure(self) -> bool:
        """Whether the agent has reported a failed worker since the last call."""
        found = [match for line in self._lines.read() if (match := _FAILED.search(line))]
        for match in found:
            status = int(match[1])
            self._failed = explain(self._job, status, f"rank {match[2]}: ")
            if status == -signal.SIGABRT:
                self._report_abort(rank=int(match[2]))
        return bool(found)

    def _report_abort(self, rank: int) -> None:
        """Report a hang. NCCL aborts a process whose collective timed out, so the worker cannot report it."""
        timeout_seconds = self._job.settings.timeout_seconds
        places = read_places(self._job.heartbeats)
        if places and all(time.time() - place.since >= timeout_seconds for place in places):
            message = describe_hang(self._job.heartbeats, timeout_seconds=timeout_seconds)
            report(self._job.work, HungCollective(message), rank=rank)

    def _is_final(self, newly_failed: bool) -> bool:
        """Whether a worker's report ends the agent now. Pre-empted workers may still be saving."""
        final = read_final(self._job.work)
        if isinstance(final, Preempted):
            self._preempted_at = self._preempted_at or time.monotonic()
            return newly_failed or time.monotonic() - self._preempted_at > self._job.settings.stop_seconds
        return final is not None
