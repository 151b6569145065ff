"""How a model is cut over processes, and how those are started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import Operational, Section

if TYPE_CHECKING:
    from lilpipe.config.model import ModelConfig
    from lilpipe.config.training import ParallelSection, PretrainConfig


class Layout(NamedTuple):
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

    def layout(self, num_workers: int) -> Layout:
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
        return Layout(self.pipeline, replicate, self.shard, self.context, self.tensor)


def check_layout(config: PretrainConfig) -> None:
    """Raise ``ValueError``, with the arithmetic, for a layout in which the model or its batches cannot be cut."""
    for problem in _problems(config):
        raise ValueError(problem)


def check_vocabulary(layout: Layout, vocab_size: int) -> None:
    """Raise ``ValueError`` for a vocabulary that tensor parallelism cannot divide."""
    if vocab_size % layout.tensor:
        raise ValueError(
            f"parallel.tensor {layout.tensor} must divide the vocabulary of {vocab_size}, of which "
            f"{vocab_size % layout.tensor} are left over; take tokenizer.vocab_size "
            f"{vocab_size - vocab_size % layout.tensor} or {vocab_size - vocab_size % layout.tensor + layout.tensor}"
        )


def check_model(section: ParallelSection, model: ModelConfig) -> None:
    """Raise ``ValueError`` for a layout in which a model, whose sequences are to be any, cannot be cut."""
    for problem in (
        *_model_problems(section, model),
        *_schedule_problems(section.parallel, "accumulation_steps", section.accumulation_steps),
    ):
        raise ValueError(problem)


def _model_problems(section: ParallelSection, model: ModelConfig) -> Iterator[str]:
    layout = section.layout
    if section.parallel.schedule == "zero_bubble" and section.activation_checkpointing == "selective":
        yield (
            "activation_checkpointing selective does not go with parallel.schedule zero_bubble, which goes through a "
            "block's graph twice; take full or none, or the schedule interleaved"
        )
    yield from _stage_problems(section.parallel, model.num_layers)
    for name, size in _divided_by_tensor(model).items():
        if size % layout.tensor:
            yield f"parallel.tensor {layout.tensor} must divide model.{name} {size}"


def _problems(config: PretrainConfig) -> Iterator[str]:
    parallel, layout = config.parallel, config.layout
    yield from _model_problems(config, config.model)
    for phase in config.resolved_phases:
        if phase.seq_len % layout.seq_len_multiple:
            yield (
                f"{phase.setting('seq_len')} {phase.seq_len} must be a multiple of {layout.seq_len_multiple}, so that "
                f"2 x parallel.context {layout.context} chunks, and the tokens of each context part over "
                f"parallel.tensor {layout.tensor}, come out even"
            )
        yield from _schedule_problems(parallel, phase.setting("accumulation_steps"), phase.accumulation_steps)


def _stage_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    per_worker, schedule = parallel.stages_per_worker, parallel.schedule
    num_stages = parallel.pipeline * per_worker
    if parallel.pipeline == 1 and (per_worker > 1 or schedule != "1f1b"):
        yield (
            f"parallel.schedule {schedule} and stages_per_worker {per_worker} would be ignored by pipeline 1; leave "
            "them out, or take pipeline 2 or more"
        )
    if schedule == "1f1b" and per_worker > 1:
        yield f"parallel.stages_per_worker {per_worker} must be 1 for schedule 1f1b; or take interleaved"
    if schedule != "1f1b" and per_worker < 2:
        yield f"parallel.stages_per_worker {per_worker} must be 2 or more for schedule {schedule}; or take 1f1b"
    if num_layers < num_stages:
        yield (
            f"model.num_layers {num_layers} must be at least parallel.pipeline x stages_per_worker = "
            f"{parallel.pipeline} x {per_worker} = {num_stages} stages"
        )


def _schedule_problems(parallel: ParallelConfig, setting: str, micro_batches: int) -> Iterator[str]:
    if parallel.schedule == "1f1b" and micro_batches < parallel.pipeline:
        yield (
            f"{setting} {micro_batches} must be at least parallel.pipeline {parallel.pipeline}: with fewer "
            "micro-batches than stages some stages never work"
        )
    if parallel.schedule != "1f1b" and micro_batches % parallel.pipeline:
        yield (
            f"{setting} {micro_batches} must be a multiple of parallel.pipeline {parallel.pipeline} for schedule "
            f"{parallel.schedule}"
        )


def _divided_by_tensor(model: ModelConfig) -> dict[str, int]:
    """Sizes of the model of which each process of tensor parallelism has a part."""
    sizes = {"num_heads": model.num_heads}
    if model.mla is None:
        sizes["num_kv_heads"] = model.num_kv_heads
    if model.moe is None or model.moe.first_dense_layers > 0:
        sizes["intermediate_size"] = model.intermediate_size
    return sizes


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
    """`torchrun` on this host, `srun` under Slurm, or the Kubernetes training operator."""
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
