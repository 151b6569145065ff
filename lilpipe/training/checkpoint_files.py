"""One checkpoint on disk: a directory of safetensors and JSON, never pickle.

    step-00000200/
        index.json                   step, identity of the run; of each tensor its dtype, global shape and chunks; of
                                     each file its size and SHA-256; and the SHA-256 of all this
        record.json                  what the run remembers beside tensors
        model-00000.safetensors      what rank 0 holds of the model, each chunk under the name of its tensor
        optimizer-00000.safetensors  and of the optimizer's state; so that this can be dropped without the model

What each rank writes and reads is planned by torch.distributed.checkpoint (DCP): its save planner shares replicated
tensors out among the ranks, its load planner finds which parts of which chunks make up a tensor of another layout.
DCP's own writers do not serve. The default one pickles its metadata and saves tensors by torch.save. The one for
Hugging Face files keeps no index and no checksum, neither flushes nor commits, and cannot tell an absent file from
one that never was.
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
"""Beside the checkpoints: those that failed verification."""
OPTIMIZER = "optimizer"
"""First part of the names of tensors that only going on with training needs."""


class Chunk(NamedTuple):
    """A box of a tensor, written by one rank."""

    rank: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorEntry(BaseModel):
    """A tensor as a whole and the chunks that it was cut into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


class Index(BaseModel):
    """What a checkpoint holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    identity: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Write it so that a reader sees the old index or this one."""
        content = self.model_dump(mode="json")
        text = json.dumps({**content, "sha256": digest_json(content)}, sort_keys=True)
        write_atomically(directory / INDEX, text)

    @classmethod
    def read(cls, directory: Path) -> Index:
        """Read it. Raises ``OSError`` or ``ValueError`` if it is missing or damaged."""
        content = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("sha256", None) != digest_json(content):
            raise ValueError(f"{INDEX}: its checksum differs")
        return cls.model_validate(content)

    def check_files(self, directory: Path, names: Collection[str]) -> None:
        """Raise ``OSError`` or ``ValueError`` if one of the files is missing or holds other bytes."""
        for name in names:
            if digest_file(directory / name) != self.files[name].sha256:
                raise ValueError(f"{name}: its checksum differs")

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """In what the tensors differ from those of the checkpoint by name or shape; empty if in nothing."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                return f"it has no tensor {name}"
            if self.tensors[name].shape != tuple(tensor.shape):
                return f"{name} has the shape {list(self.tensors[name].shape)} there and {list(tensor.shape)} here"
        return ""

    def metadata(self, names: Collection[str]) -> Metadata:
        """The same for DCP's planner."""
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
    """Who writes what."""

    names: list[str]
    """Tensors of which this rank writes the chunk that it holds."""
    tensors: dict[str, TensorEntry]
    """All tensors of all ranks; known to rank 0 alone."""

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint; known to rank 0 alone."""
        return sum(entry.num_bytes for entry in self.tensors.values())


def plan_writes(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> WritePlan:
    """Share the tensors out among the ranks of ``group``, each chunk to one that holds it. Collective."""
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
    """The list that rank 0 has for this rank."""
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
    """What this rank holds of a tensor, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], *, rank: int) -> dict[str, FileEntry]:
    """Write one rank's chunks, flushed to the disk; gives the files' entries."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        groups[file_name(name, rank)][name] = tensor
    for name, group in groups.items():
        save_file(group, directory / name)
    return {name: flushed(directory / name) for name in groups}


def file_name(tensor: str, rank: int) -> str:
    """The file of the chunk that a rank wrote of a tensor."""
    return f"{tensor.partition('/')[0]}-{rank:05d}.safetensors"


def flushed(path: Path) -> FileEntry:
    """The entry of a file that is now on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(size=path.stat().st_size, sha256=digest_file(path))


def read_tensors(directory: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors of any layout in place, each rank its part."""
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
    """The part of a chunk that is asked for."""
    if not item.lengths:
        return file.get_tensor(item.storage_index.fqn)
    box = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(item.storage_index.fqn)[tuple(slice(start, start + length) for start, length in box)]


def drop_optimizer(directory: Path) -> None:
    """Leave the model alone of a checkpoint. Killed midway and called again, it comes to the same."""
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
    """Delete a checkpoint; at no time is there half of one under its name."""
    doomed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    sync_directory(directory.parent)
    shutil.rmtree(doomed)
