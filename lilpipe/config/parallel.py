"""How a model is cut over processes, and how those are started."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import Operational, Section


class ParallelDims(NamedTuple):
    """Processes along each dimension of the mesh, outermost first."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Parts into which the rows of a batch are divided."""
        return self.replicate * self.shard

    @property
    def seq_len_multiple(self) -> int:
        """Lengths that can be cut: two chunks for each part of a sequence, and those of a part evenly over `tensor`."""
        return math.lcm(2 * self.context, self.context * self.tensor) if self.context > 1 else self.tensor


class ParallelConfig(Section):
    """The device mesh: pipeline x replicate x shard x context x tensor processes.

    All are 1 by default, but `replicate`, which takes what the others leave of num_workers.
    """

    pipeline: PositiveInt = 1
    """Stages of layers (Narayanan et al. 2021)."""
    replicate: PositiveInt | None = None
    """Groups that hold the whole model each: data parallelism (DDP), or with `shard` hybrid sharding (HSDP)."""
    shard: PositiveInt = 1
    """Processes over which parameters, gradients and optimizer state are sharded (FSDP2; Zhao et al. 2023)."""
    context: PositiveInt = 1
    """Parts of a sequence, balanced head and tail; keys and values are gathered (Llama 3, section 3.3.2)."""
    tensor: PositiveInt = 1
    """Parts of each matrix, with the sequence parallel in between (Shoeybi et al. 2019; Korthikanti et al. 2022)."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of the pipeline's forward and backward passes (zero bubble: Qi et al. 2023)."""
    stages_per_worker: PositiveInt = 1
    """Pipeline stages on each worker; `interleaved` and `zero_bubble` take 2 or more."""

    def layout(self, num_workers: int) -> ParallelDims:
        """The mesh of ``num_workers`` processes. Raises ``ValueError`` with the arithmetic if there is none."""
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
    """Options of `srun` for the training stages; the store must lie on a file system that all nodes see."""

    partition: str | None = None
    time: str = "24:00:00"
    """Longest time of the job."""
    cpus_per_task: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    options: dict[str, str] = {}
    """Further options of `srun`, such as `account`."""


class KubernetesLaunchConfig(Section):
    """A PyTorchJob of the Kubernetes training operator; the store must lie on a volume that all pods mount."""

    image: str = "lilpipe:latest"
    namespace: str = "default"
    gpus_per_pod: NonNegativeInt = 0
    volume_claim: str = "lilpipe"
    """Persistent volume claim with the store."""
    mount_path: str = "/store"
    """Where the volume is mounted, here and in the pods."""
    resources: dict[str, Any] = {}
    """Further requests of a pod, such as `{"cpu": "16", "memory": "128Gi"}`."""


class LaunchConfig(Section):
    """How the processes of a training stage are started; nothing here can change an output."""

    launcher: Literal["torchrun", "srun", "kubernetes"] = "torchrun"
    """`torchrun` on this host, `srun` under Slurm, or `kubernetes`, the training operator. The last is experimental: it
    has been tested with a stand-in for `kubectl` only."""
    num_nodes: PositiveInt = 1
    """Hosts; num_workers is divided among them."""
    max_restarts: NonNegativeInt = 3
    """How often all workers are started again, from the last checkpoint, after one of them died."""
    stop_seconds: PositiveInt = 30
    """Longest time to save in after SIGTERM; then workers are killed. Slurm has its own (`KillWait`)."""
    timeout_seconds: PositiveInt = 600
    """Longest wait in a collective before the run ends with an error that names it."""
    slurm: SlurmLaunchConfig = SlurmLaunchConfig()
    kubernetes: KubernetesLaunchConfig = KubernetesLaunchConfig()

    @model_validator(mode="after")
    def _launcher_reaches_the_nodes(self) -> LaunchConfig:
        if self.num_nodes > 1 and self.launcher == "torchrun":
            raise ValueError(
                f"num_nodes {self.num_nodes}: launcher torchrun starts processes on this host alone; take srun or "
                f"kubernetes, or num_nodes 1"
            )
        return self


Launch = Annotated[LaunchConfig, Operational]
