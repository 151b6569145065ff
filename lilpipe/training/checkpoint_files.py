"""One checkpoint on disk: a directory of safetensors and JSON, never pickle.

    step-00000200/
        index.json                   step, identity of the run; dtype, global shape and chunks of each tensor; size and
                                     SHA-256 of each file; and the SHA-256 of all this
        record.json                  training state other than tensors
        model-00000.safetensors      rank 0's chunks of the model, each under the name of its tensor
        optimizer-00000.safetensors  rank 0's chunks of the optimizer state; separate, so that it can be deleted

torch.distributed.checkpoint (DCP) plans what each rank writes and reads: its save planner divides replicated tensors
among the ranks, its load planner finds the chunks of a tensor of another layout. DCP's own writers are not used. The
default one pickles its metadata and saves tensors by torch.save. The one for Hugging Face files has no index and no
checksums, neither flushes nor commits, and cannot detect a missing file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.tensor import DTensor

from lilpipe.artifact import FileEntry, digest_json, sync_directory, write_atomically
from lilpipe.digests import digest_file

INDEX = "index.json"
RECORD = "record.json"
DAMAGED = "damaged"
"""Subdirectory for checkpoints that failed verification."""
OPTIMIZER = "optimizer"
"""First part of the names of tensors that only resuming needs."""


class Chunk(NamedTuple):
    """A box of a tensor, written by one rank."""

    rank: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorEntry(BaseModel):
    """Dtype and global shape of a tensor, and its chunks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


class Index(BaseModel):
    """Index of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    identity: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Write the index atomically."""
        content = self.model_dump(mode="json")
        text = json.dumps({**content, "sha256": digest_json(content)}, sort_keys=True)
        write_atomically(directory / INDEX, text)

    @classmethod
    def read(cls, directory: Path) -> Index:
        """Read the index. Raises ``OSError`` or ``ValueError`` if it is missing or damaged."""
        content = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("sha256", None) != digest_json(content):
            raise ValueError(f"{INDEX}: checksum mismatch")
        return cls.model_validate(content)

    def check_files(self, directory: Path, names: Collection[str]) -> None:
        """Raise ``OSError`` or ``ValueError`` if a file is missing or its checksum differs."""
        for name in names:
            if digest_file(directory / name) != self.files[name].sha256:
                raise ValueError(f"{name}: checksum mismatch")

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Return how the tensors differ from the checkpoint's in name or shape; empty if they match."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                return f"tensor {name} is missing"
            if self.tensors[name].shape != tuple(tensor.shape):
                return f"{name}: got shape {list(self.tensors[name].shape)}, expected {list(tensor.shape)}"
        return ""

    def metadata(self, names: Collection[str]) -> Metadata:
        """Return the metadata for DCP's planner."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, self.tensors[name].dtype)),
                    torch.Size(self.tensors[name].shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
                        for chunk in self.tensors[name].chunks
                    ],
                )
                for name in names
            }
        )


@dataclass(frozen=True)
class WritePlan:
    """Which rank writes which chunk."""

    names: list[str]
    """Tensors whose local chunk this rank writes."""
    tensors: dict[str, TensorEntry]
    """All tensors of all ranks; only on rank 0."""

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint; only on rank 0."""
        return sum(entry.num_bytes for entry in self.tensors.values())


def plan_writes(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> WritePlan:
    """Divide the tensors among the ranks of ``group``, each chunk to one rank that holds it. Collective."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=group is None or dist.get_rank(group) == 0)
    plan = planner.create_local_plan()
    if group is None:
        plans, _ = planner.create_global_plan([plan])
        return WritePlan([item.index.fqn for item in plans[0].items], _entries(plans))
    if dist.get_rank(group) > 0:
        dist.gather_object(plan, group=group, group_dst=0)
        return WritePlan(_scattered(None, group), {})
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(plan, gathered, group=group, group_dst=0)
    plans, _ = planner.create_global_plan(gathered)
    return WritePlan(_scattered([[item.index.fqn for item in plan.items] for plan in plans], group), _entries(plans))


def _scattered(names: list[list[str]] | None, group: dist.ProcessGroup) -> list[str]:
    """Return rank 0's list for this rank."""
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, names, group=group, group_src=0)
    return mine[0]


def _entries(plans: Sequence[SavePlan]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data, name = item.tensor_data, item.index.fqn
            assert data is not None
            chunks[name].append(Chunk(rank, tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
            dtype = str(data.properties.dtype).removeprefix("torch.")
            entries[name] = TensorEntry(dtype=dtype, shape=tuple(data.size), chunks=())
    return {name: entry.model_copy(update={"chunks": tuple(chunks[name])}) for name, entry in entries.items()}


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], *, rank: int) -> dict[str, FileEntry]:
    """Write one rank's chunks and flush them to disk; returns the entries of the files."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        groups[file_name(name, rank)][name] = tensor
    for name, group in groups.items():
        save_file(group, directory / name)
    return {name: flushed(directory / name) for name in groups}


def file_name(tensor: str, rank: int) -> str:
    """Return the name of the file for a rank's chunk of a tensor."""
    return f"{tensor.partition('/')[0]}-{rank:05d}.safetensors"


def flushed(path: Path) -> FileEntry:
    """Flush a file to disk and return its entry."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(size=path.stat().st_size, sha256=digest_file(path))


def read_tensors(directory: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors of any layout in place, each rank its shards."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), index.metadata(tensors.keys()))
    items: dict[str, list[ReadItem]] = defaultdict(list)
    for item in planner.create_local_plan().items:
        name, chunk = item.storage_index.fqn, item.storage_index.index
        assert chunk is not None
        items[file_name(name, index.tensors[name].chunks[chunk].rank)].append(item)
    for name in sorted(items):
        with safe_open(directory / name, framework="pt") as file, torch.no_grad():
            for item in items[name]:
                planner.resolve_tensor(item).copy_(_read(file, item))


def _read(file: safe_open, item: ReadItem) -> Tensor:
    """Return the requested part of a chunk."""
    if not item.lengths:
        return file.get_tensor(item.storage_index.fqn)
    box = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(item.storage_index.fqn)[tuple(slice(start, start + length) for start, length in box)]


def drop_optimizer(directory: Path) -> None:
    """Delete the optimizer state of a checkpoint. Can be repeated after a kill."""
    superfluous = [*directory.glob(f"{OPTIMIZER}-*"), *directory.glob(f".{INDEX}.*")]
    if not superfluous:
        return
    index = Index.read(directory)
    tensors = {name: entry for name, entry in index.tensors.items() if not name.startswith(f"{OPTIMIZER}/")}
    files = {name: entry for name, entry in index.files.items() if not name.startswith(f"{OPTIMIZER}-")}
    index.model_copy(update={"tensors": tensors, "files": files}).write(directory)
    for path in superfluous:
        path.unlink()


def set_aside(directory: Path) -> None:
    """Move a damaged checkpoint to ``damaged/``."""
    number = 0
    while (target := directory.parent / DAMAGED / f"{directory.name}.{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    directory.rename(target)
    sync_directory(directory.parent)


def discard(directory: Path) -> None:
    """Delete a checkpoint atomically: it is renamed first."""
    doomed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    sync_directory(directory.parent)
    shutil.rmtree(doomed)
