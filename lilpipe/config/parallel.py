"""Device mesh of the workers, and how they are launched."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import Operational, Section
from lilpipe.heartbeat import TIMEOUT_SECONDS


class ParallelDims(NamedTuple):
    """Size of each mesh dimension, outermost first."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Degree of data parallelism: number of parts that the rows of a batch are divided into."""
        return self.replicate * self.shard

    @property
    def seq_len_multiple(self) -> int:
        """Sequence lengths must be a multiple of this: two chunks per context part, and each part divided over
        `tensor`.
        """
        return math.lcm(2 * self.context, self.context * self.tensor) if self.context > 1 else self.tensor


class ParallelConfig(Section):
    """The device mesh: pipeline x replicate x shard x context x tensor workers.

    All dimensions are 1 by default except `replicate`, which is num_workers divided by the product of the others.
    """

    pipeline: PositiveInt = 1
    """Degree of pipeline parallelism (Narayanan et al. 2021)."""
    replicate: PositiveInt | None = None
    """Number of model replicas: data parallelism (DDP), or hybrid sharding (HSDP) together with `shard`. If None,
    num_workers divided by the product of the other dimensions."""
    shard: PositiveInt = 1
    """Number of workers that parameters, gradients and optimizer state are sharded over (FSDP2; Zhao et al. 2023)."""
    context: PositiveInt = 1
    """Degree of context parallelism; chunks from head and tail of a sequence balance the load, keys and values are
    all-gathered (Llama 3, section 3.3.2)."""
    tensor: PositiveInt = 1
    """Degree of tensor parallelism, with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022)."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Pipeline schedule: order of forward and backward passes (zero bubble: Qi et al. 2023)."""
    stages_per_worker: PositiveInt = 1
    """Pipeline stages per worker; `interleaved` and `zero_bubble` need 2 or more."""

    def layout(self, num_workers: int) -> ParallelDims:
        """Return the mesh of ``num_workers`` workers.

        Raises ``ValueError`` with the arithmetic if ``num_workers`` does not match the dimensions.
        """
        others = self.pipeline * self.shard * self.context * self.tensor
        product = f"pipeline {self.pipeline} x shard {self.shard} x context {self.context} x tensor {self.tensor}"
        if self.replicate is None and num_workers % others:
            raise ValueError(f"num_workers {num_workers} must be a multiple of {product} = {others}")
        replicate = num_workers // others if self.replicate is None else self.replicate
        if replicate * others != num_workers:
            raise ValueError(
                f"num_workers {num_workers} must be {product} x replicate {replicate} = {replicate * others}"
            )
        return ParallelDims(self.pipeline, replicate, self.shard, self.context, self.tensor)


class SlurmLaunchConfig(Section):
    """Options of `srun` for training stages. The store must be on a file system shared by all nodes."""

    partition: str | None = None
    """Partition; if None, the cluster's default."""
    time: str = "24:00:00"
    """Time limit of the job."""
    cpus_per_task: PositiveInt = 1
    """CPUs per worker."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs per node."""
    options: dict[str, str] = {}
    """Further options of `srun`, such as `account`."""


class KubernetesLaunchConfig(Section):
    """A PyTorchJob of the Kubernetes training operator. The store must be on a volume mounted by all pods."""

    image: str = "lilpipe:latest"
    """Container image."""
    namespace: str = "default"
    """Namespace of the job."""
    gpus_per_pod: NonNegativeInt = 0
    """GPUs per pod."""
    volume_claim: str = "lilpipe"
    """Persistent volume claim of the store."""
    mount_path: str = "/store"
    """Mount path of the volume, here and in the pods."""
    resources: dict[str, Any] = {}
    """Further resource requests of a pod, such as `{"cpu": "16", "memory": "128Gi"}`."""


class LaunchConfig(Section):
    """How the workers of a training stage are launched; this cannot change an output."""

    launcher: Literal["torchrun", "srun", "kubernetes"] = "torchrun"
    """`torchrun` on this host, `srun` under Slurm, or `kubernetes` (training operator). `kubernetes` is
    experimental: tested only with a fake `kubectl`."""
    num_nodes: PositiveInt = 1
    """Number of nodes; num_workers is divided among them."""
    max_restarts: NonNegativeInt = 3
    """Maximum restarts of all workers from the last checkpoint after one of them failed."""
    stop_seconds: PositiveInt = 30
    """Grace period after SIGTERM to save a checkpoint, before workers are killed. Slurm uses its own (`KillWait`)."""
    timeout_seconds: PositiveInt = TIMEOUT_SECONDS
    """Timeout of a collective; the run then fails with an error that names the collective."""
    slurm: SlurmLaunchConfig = SlurmLaunchConfig()
    kubernetes: KubernetesLaunchConfig = KubernetesLaunchConfig()

    @model_validator(mode="after")
    def _launcher_reaches_the_nodes(self) -> LaunchConfig:
        if self.num_nodes > 1 and self.launcher == "torchrun":
            raise ValueError(
                f"num_nodes {self.num_nodes}: launcher torchrun starts workers on this host only; use srun or "
                f"kubernetes, or num_nodes 1"
            )
        return self


Launch = Annotated[LaunchConfig, Operational]
