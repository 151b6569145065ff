"""Resumable training state on disk.

A checkpoint is a directory ``step-00000200/`` with ``tensors.safetensors`` (parameters and optimizer state by name)
and ``state.json`` (step, identity of the run, SHA-256 of the tensors). It is written under a temporary name, flushed,
and renamed: the rename is the commit, so a directory with a final name is whole unless the disk damages it, and then
the checksum tells. There are no random states: every draw of a run is a function of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lilpipe.artifact import digest_file, sync_directory
from lilpipe.errors import ArtifactError, StoreError

TENSORS = "tensors.safetensors"
STATE = "state.json"
KEEP = 2
"""Checkpoints kept: the last one, and the one before in case that the last is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """Training state after ``step`` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]


def save(directory: Path, checkpoint: Checkpoint, *, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint and drop all but the last ``KEEP``. Raises ``StoreError`` if the disk refuses."""
    final = directory / f"step-{checkpoint.step:08d}"
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(checkpoint.tensors, temporary / TENSORS)
        _flush(temporary / TENSORS)
        state = {"step": checkpoint.step, "sha256": digest_file(temporary / TENSORS), "identity": dict(identity)}
        (temporary / STATE).write_text(json.dumps(state, sort_keys=True, indent=1), encoding="utf-8")
        _flush(temporary / STATE)
        sync_directory(temporary)
        if final.exists():  # damaged, else the run would have gone on from it
            shutil.rmtree(final)
        temporary.rename(final)
        sync_directory(directory)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{final}: the checkpoint cannot be written ({error}); check space and permissions") from error
    for old in _finished(directory)[KEEP:]:
        shutil.rmtree(old)


def load_latest(directory: Path, *, identity: Mapping[str, Any], log: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint that is whole, or none.

    A damaged one is passed over for the one before, and ``log`` is told. Raises ``ArtifactError`` if a checkpoint
    belongs to a run of another identity.
    """
    for path in _finished(directory):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if digest_file(path / TENSORS) != state["sha256"]:
                raise ValueError("checksum differs")
            checkpoint = Checkpoint(step=int(state["step"]), tensors=load_file(path / TENSORS))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log(f"checkpoint {path.name} is damaged ({error}); going back to the one before it")
            continue
        _check_identity(path, got=state.get("identity"), expected=json.loads(json.dumps(dict(identity))))
        return checkpoint
    return None


def _check_identity(path: Path, *, got: Any, expected: dict[str, Any]) -> None:
    if got != expected:
        got = got if isinstance(got, dict) else {}
        names = [name for name in sorted(got.keys() | expected.keys()) if got.get(name) != expected.get(name)]
        changes = ", ".join(f"{name} was {got.get(name)!r} and is {expected.get(name)!r}" for name in names)
        raise ArtifactError(
            f"{path}: belongs to another run ({changes}); go back to those settings, or delete {path.parent} to "
            "start anew"
        )


def _finished(directory: Path) -> list[Path]:
    """Committed checkpoints, the last first."""
    return sorted(directory.glob("step-*"), reverse=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
