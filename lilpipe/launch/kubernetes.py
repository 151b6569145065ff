"""Workers in pods of a Kubernetes cluster, as a PyTorchJob of the Kubeflow training operator (kubeflow.org/v1).

Each pod runs ``torchrun``. The operator configures the rendezvous and replaces lost pods. The store is on a volume that
this host and all pods mount at the same path. The cluster is accessed with ``kubectl`` in its current context.

Not tested on a cluster: only against a fake ``kubectl``, and the manifest against the operator's types (v1).
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from lilpipe.errors import ClusterError, ConfigError, Preempted, StageFailure
from lilpipe.launch.failure import read_final, take_raised
from lilpipe.launch.torchrun import AGENT_ENVIRONMENT, AGENT_SECONDS, agent_command
from lilpipe.launch.workers import Ended, Job

POLL_SECONDS = 5.0
API_SECONDS = 300
"""How long requests to an API server that does not respond are retried."""
RETRY_SECONDS = 1.0
FORWARDED = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Environment variables that are passed to the pods."""
_KIND = "pytorchjobs.kubeflow.org"
_JOB_LABEL = "training.kubeflow.org/job-name"


def pytorch_job(job: Job) -> dict[str, Any]:
    """Return the manifest. Raises ``ConfigError`` if the job's folder is not on the pods' volume."""
    settings, num_nodes = job.settings.kubernetes, job.settings.num_nodes
    if not job.work.is_relative_to(settings.mount_path):
        raise ConfigError(
            f"launch.kubernetes.mount_path: got {settings.mount_path}, but the stage's workspace {job.work} is not "
            f"below it; set LILPIPE_STORE to a folder on the volume"
        )
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, "namespace": settings.namespace, "labels": {"app": "lilpipe"}},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None"},  # logs are read at the end, then all pods are deleted
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "minReplicas": num_nodes,
                "maxReplicas": num_nodes,
                "maxRestarts": job.settings.max_restarts,
            },
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": num_nodes,
                    "restartPolicy": "ExitCode",  # replaces killed pods (exit code 128 and above), not failed ones
                    "template": {"spec": _pod(job)},
                }
            },
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    settings = job.settings.kubernetes
    resources: dict[str, str] = {name: str(value) for name, value in settings.resources.items()}
    if settings.gpus_per_pod:
        resources["nvidia.com/gpu"] = str(settings.gpus_per_pod)
    environment = AGENT_ENVIRONMENT | {name: job.environment[name] for name in FORWARDED if name in job.environment}
    container = {
        "name": "pytorch",  # the operator requires this name
        "image": settings.image,
        "command": [
            "python",
            *agent_command(job),
        ],  # the operator sets rendezvous and number of pods in PET_* variables
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [
            {"name": "store", "mountPath": settings.mount_path},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # NCCL needs more than a pod's default of 64 MiB
        ],
    }
    return {
        "terminationGracePeriodSeconds": job.settings.stop_seconds + AGENT_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "store", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


class Kubernetes:
    """Workers in pods; see ``WorkerProcesses``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._namespace = f"--namespace={job.settings.kubernetes.namespace}"
        manifest = json.dumps(pytorch_job(job))
        self.stop()  # a killed parent may have left pods running in this workspace
        result = self._kubectl("apply", "--filename=-", text=manifest)
        if result.returncode:
            raise ConfigError(
                f"launch.kubernetes: the cluster rejects the job: {result.stderr.strip()}; correct the settings, "
                f"or install the training operator"
            )
        self._next_poll = 0.0
        self._preempted_at: float | None = None

    def poll(self) -> Ended | None:
        """Return whether the job has ended or a worker's report ends it. Workers log restarts themselves."""
        if time.monotonic() < self._next_poll:
            return None
        self._next_poll = time.monotonic() + POLL_SECONDS
        ended = self._ended()
        if ended is None and self._is_final():
            ended = Ended("a worker failed")
        if ended is not None:
            self._keep_logs()
            self.stop()
        return ended

    def stop(self) -> None:
        """Delete the job and its pods, which get SIGTERM and time to save."""
        self._kubectl("delete", _KIND, self._job.name, "--ignore-not-found", "--cascade=foreground", "--wait")

    def _ended(self) -> Ended | None:
        result = self._kubectl("get", _KIND, self._job.name, "--output=json")
        if result.returncode:
            if "NotFound" in result.stderr:
                raise ClusterError(f"PyTorchJob {self._job.name} was deleted; run again to resume")
            raise StageFailure(f"kubectl get failed: {result.stderr.strip()}")
        conditions = json.loads(result.stdout).get("status", {}).get("conditions", [])
        messages = {each["type"]: each.get("message", "") for each in conditions if each["status"] == "True"}
        if "Succeeded" in messages:
            return Ended(None)
        if "Failed" not in messages:
            return None
        return Ended(*(take_raised(self._job.work) or (f"PyTorchJob {self._job.name}: {messages['Failed']}",)))

    def _is_final(self) -> bool:
        """Whether a worker's report ends the job now. Pre-empted workers may still be saving."""
        final = read_final(self._job.work)
        if isinstance(final, Preempted):
            self._preempted_at = self._preempted_at or time.monotonic()
            return time.monotonic() - self._preempted_at > self._job.settings.stop_seconds
        return final is not None

    def _keep_logs(self) -> None:
        """Append the pods' logs to the job's log."""
        result = self._kubectl("logs", f"--selector={_JOB_LABEL}={self._job.name}", "--prefix", "--tail=-1")
        with self._job.log.open("a", encoding="utf-8") as log:
            log.write(result.stdout)

    def _kubectl(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``kubectl``; retry while the API server does not respond."""
        deadline = time.monotonic() + API_SECONDS
        while True:
            try:
                command = ["kubectl", self._namespace, *words]
                result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                raise ConfigError(
                    "launch.launcher: got 'kubernetes', but `kubectl` is not found on this host; install it, or set "
                    "'torchrun'"
                ) from None
            silent = any(sign in result.stderr for sign in ("connection refused", "timeout", "was refused", "no route"))
            if not result.returncode or not silent or time.monotonic() > deadline:
                return result
            time.sleep(RETRY_SECONDS)
