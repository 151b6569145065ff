"""The manifest of a PyTorchJob, and the following of one, against a stand-in for ``kubectl``: no cluster is at hand."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lilpipe.config.parallel import LaunchConfig
from lilpipe.errors import ClusterError, ConfigError, DataError, StageFailure
from lilpipe.launch import kubernetes
from lilpipe.launch.run_stage import describe
from lilpipe.launch.workers import Job
from tests.launch import toy

ROOT = Path(__file__).parents[2]

STAND_IN = """\
#!{python}
# Keeps its state in this folder: the manifest, and how often it was asked for the job. Runs the stage when told.
import json, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
words = sys.argv[1:]
(folder / "calls").open("a").write(json.dumps(words) + "\\n")
verb, manifest = words[1], folder / "manifest.json"
def conditions():
    asked = folder / "asked"
    number = len(asked.read_text()) if asked.exists() else 0
    asked.write_text("x" * (number + 1))
    return json.loads((folder / "answers.json").read_text())[number]
if verb == "apply":
    manifest.write_text(sys.stdin.read())
    refusal = folder / "refusal"
    if refusal.exists():
        sys.exit(refusal.read_text())
elif verb == "delete":
    manifest.unlink(missing_ok=True)
elif verb == "logs":
    print("[pod/worker-0/pytorch] the last words")
elif verb == "get":
    if not manifest.exists():
        sys.exit('Error from server (NotFound): pytorchjobs.kubeflow.org "x" not found')
    answer = conditions()
    if isinstance(answer, str):
        sys.exit(answer)
    for name, text in answer.pop("writes", {{}}).items():
        pathlib.Path(name).write_text(text)
    listed = [dict(type=kind, status="True", message=text) for kind, text in answer.items()]
    print(json.dumps({{"status": {{"conditions": listed}}}}))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Answers with the conditions of each poll in turn; the second result are the words of each call."""
    folder = tmp_path / "kubectl"
    folder.mkdir()
    script = folder / "kubectl"
    script.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(kubernetes, "POLL_SECONDS", 0.0)
    return folder


def run(cluster, *answers, on_event=None):
    (cluster / "answers.json").write_text(json.dumps(answers))
    settings = {"launcher": "kubernetes", "kubernetes": {"mount_path": str(cluster.parent), "namespace": "lab"}}
    return toy.launch_toy(work(cluster), settings=settings, on_event=on_event)


def work(cluster):
    return cluster.parent / "store" / "pretrain" / "ab12"


def verbs(cluster):
    return [json.loads(line)[1] for line in (cluster / "calls").read_text().splitlines()]


def test_the_manifest_is_what_the_operator_takes():
    settings = {
        "launcher": "kubernetes",
        "num_nodes": 2,
        "max_restarts": 5,
        "stop_seconds": 60,
        "kubernetes": {
            "image": "registry/lilpipe:1",
            "namespace": "lab",
            "gpus_per_pod": 4,
            "volume_claim": "claim",
            "resources": {"cpu": 16, "memory": "128Gi"},
        },
    }
    file = Path("/store/work/pretrain/ab12/job.json")
    environment = {"OMP_NUM_THREADS": "1", "HOME": "/root", "HF_HUB_OFFLINE": "1"}
    job = Job(file=file, num_workers=8, environment=environment, settings=LaunchConfig.model_validate(settings))
    resources = {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "4"}
    assert kubernetes.pytorch_job(job) == {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, "namespace": "lab", "labels": {"app": "lilpipe"}},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None"},
            "elasticPolicy": {"rdzvBackend": "c10d", "minReplicas": 2, "maxReplicas": 2, "maxRestarts": 5},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": 2,
                    "restartPolicy": "ExitCode",
                    "template": {
                        "spec": {
                            "terminationGracePeriodSeconds": 65,
                            "containers": [
                                {
                                    "name": "pytorch",
                                    "image": "registry/lilpipe:1",
                                    "command": [
                                        *("python", "-m", "torch.distributed.run", "--nproc-per-node=4"),
                                        *("--max-restarts=5", "--monitor-interval=0.2", "--shutdown-timeout=60"),
                                        "--log-dir=/store/work/pretrain/ab12/torchrun",
                                        *("-m", "lilpipe.worker", "/store/work/pretrain/ab12/job.json"),
                                    ],
                                    "env": [
                                        {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
                                        {"name": "HF_HUB_OFFLINE", "value": "1"},
                                        {"name": "OMP_NUM_THREADS", "value": "1"},
                                    ],
                                    "resources": {"requests": resources, "limits": resources},
                                    "volumeMounts": [
                                        {"name": "store", "mountPath": "/store"},
                                        {"name": "shared-memory", "mountPath": "/dev/shm"},
                                    ],
                                }
                            ],
                            "volumes": [
                                {"name": "store", "persistentVolumeClaim": {"claimName": "claim"}},
                                {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
                            ],
                        }
                    },
                }
            },
        },
    }


def test_a_job_has_a_name_that_a_pod_can_bear():
    for stage in ("pretrain", "a_stage_with_a_very_long_name_indeed"):
        job = Job(file=Path(f"/store/work/{stage}/ab/job.json"), num_workers=1, environment={}, settings=LaunchConfig())
        name = f"{job.name}-worker-127"
        assert len(name) <= 63
        assert all(letter.isalnum() or letter == "-" for letter in name)
        assert name == name.lower()


def test_a_job_that_succeeds_gives_its_metrics_and_is_deleted(cluster):
    metrics = {"writes": {str(work(cluster) / "metrics.json"): '{"loss": 1.0}'}}
    assert run(cluster, {"Created": ""}, {"Running": "", **metrics}, {"Running": "", "Succeeded": ""}) == {"loss": 1.0}
    assert verbs(cluster) == ["delete", "apply", "get", "get", "get", "logs", "delete"]
    assert not (cluster / "manifest.json").exists()
    assert "the last words" in (work(cluster) / "worker.log").read_text()


def test_a_job_that_fails_may_be_tried_again_and_its_pods_last_words_are_told(cluster):
    with pytest.raises(StageFailure, match=r"(?s)PyTorchJob lilpipe-pretrain-\w+: 1 Worker replica.*the last words"):
        run(cluster, {"Running": ""}, {"Failed": "1 Worker replica(s) failed"})
    assert not (cluster / "manifest.json").exists()


def test_an_error_of_the_users_ends_the_job_before_its_pods_are_started_again(cluster):
    failure = json.dumps({"type": "DataError", "message": "field: got that", "rank": 1, "traceback": ""})
    with pytest.raises(DataError, match="field: got that"):
        run(cluster, {"Running": ""}, {"Running": "", "writes": {str(work(cluster) / "failure.json"): failure}})
    assert not (cluster / "manifest.json").exists()


def test_cancelling_the_stage_deletes_the_job(cluster):
    class Cancelled(BaseException):
        pass

    def cancel(event):
        raise Cancelled

    event = {"writes": {str(work(cluster) / "events.jsonl"): '{"message": "it runs"}\n'}}
    with pytest.raises(Cancelled):
        run(cluster, {"Running": "", **event}, on_event=cancel)
    assert verbs(cluster)[-1] == "delete"


def test_a_job_that_a_person_deletes_is_not_tried_again(cluster):
    with pytest.raises(ClusterError, match="was deleted; run again to resume"):
        run(cluster, {"Running": ""}, "Error from server (NotFound): pytorchjobs.kubeflow.org")


def test_an_api_server_that_is_silent_for_a_while_is_asked_again(cluster, monkeypatch):
    monkeypatch.setattr(kubernetes, "RETRY_SECONDS", 0.0)
    refused = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
    with pytest.raises(StageFailure, match="Worker failed"):
        run(cluster, refused, refused, {"Failed": "Worker failed"})


def test_a_cluster_that_does_not_take_the_job_is_a_mistake_in_the_settings(cluster):
    (cluster / "refusal").write_text('no matches for kind "PyTorchJob" in version "kubeflow.org/v1"')
    with pytest.raises(ConfigError, match=r"no matches for kind.*or install the training operator"):
        run(cluster)


def test_a_store_that_the_pods_do_not_see_is_refused_before_anything_is_asked_of_the_cluster(cluster):
    with pytest.raises(ConfigError, match=r"launch.kubernetes.mount_path: got /store, but the stage's workspace"):
        toy.launch_toy(work(cluster), settings={"launcher": "kubernetes"})
    assert not (cluster / "calls").exists()


def test_a_host_without_kubectl_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = {"launcher": "kubernetes", "kubernetes": {"mount_path": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"`kubectl` is not found on this host"):
        toy.launch_toy(tmp_path, settings=settings)


@pytest.mark.distributed
def test_the_pods_command_finds_the_others_by_what_the_operator_says_and_all_start_again_after_a_kill(tmp_path):
    kubernetes_settings = {"mount_path": str(tmp_path)}
    settings = {"launcher": "kubernetes", "num_nodes": 2, "kubernetes": kubernetes_settings}
    config = toy.ToyConfig(fault="kill", launch=LaunchConfig.model_validate(settings))
    job = describe(toy.STAGE, config, {}, tmp_path)
    (container,) = kubernetes.pytorch_job(job)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"][
        "containers"
    ]
    operator = {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_NNODES": "2:2",
        "PET_MAX_RESTARTS": "3",
    }
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    environment = {**os.environ, **own, **operator, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *container["command"][1:]]
    pods = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(2)]
    assert [pod.wait(200) for pod in pods] == [0, 0]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"total": toy.expected(), "first": 5.0}
    # An agent that sees the other's workers go starts its own again, and may do so once more when the other has joined.
    assert set(toy.messages(tmp_path)) == {"all workers restart from the last checkpoint"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
