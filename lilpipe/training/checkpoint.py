"""Checkpoints of a run: sharded, asynchronous, atomic, and loadable in another parallel layout.

`Checkpoints.save` copies this rank's chunks to host memory and returns. A thread writes the files (`checkpoint_files`)
under a temporary name and waits until all ranks are done. Rank 0 then renames the directory and replaces ``LATEST``,
which names it: this is the commit. A kill at any time leaves the old checkpoint or the new one. Random states are not
saved: every random draw is a function of (seed, step).

Single processes and process groups use the same code; all ranks must share the directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lilpipe import distributed
from lilpipe.artifact import sync_directory, write_atomically
from lilpipe.errors import ArtifactError, StoreError
from lilpipe.training import checkpoint_files as files
from lilpipe.training.checkpoint_files import Index, WritePlan

T = TypeVar("T")
LATEST = "LATEST"
TIMEOUT = timedelta(hours=1)
"""How long the ranks wait for the slowest one to write its files."""


class Checkpoints:
    """The checkpoints of one run in one directory.

    ``identity``: settings that identify the run, as nested mappings of JSON. A checkpoint that differs in a setting is
    rejected, unless ``safe`` holds its dotted name or a prefix of it. ``keep_last``: number of checkpoints kept for
    resuming. ``keep_every``: checkpoints at multiples of this step are kept forever, without the optimizer state. All
    methods are collective: every rank calls them in the same order.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        safe: Collection[str],
        keep_last: int,
        keep_every: int | None,
        log: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._identity = json.loads(json.dumps(dict(identity)))
        self._safe = safe
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._log = log
        # Stored because the default group may be destroyed before the thread ends.
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        # Its own group: collectives of the thread on the default group would mix with those of training.
        self._group = _new_group() if dist.is_initialized() else None
        self._plan: WritePlan | None = None
        self._staged: dict[str, Tensor] = {}
        self._pending: Future[None] | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        steps = sorted(int(path.name.removeprefix("step-")) for path in self._directory.glob("step-*"))
        latest = self._latest()
        return steps if latest is None else [step for step in steps if step <= latest]

    def check_space(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``StoreError`` if the disk has no room for ``keep_last`` checkpoints and one more."""
        plan = self._planned(tensors)
        copies = max(1, self._keep_last + 1 - len(self.steps))
        self._together(lambda: check_space(self._directory, plan.num_bytes, copies) if self._rank == 0 else None)

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Save the state after ``step`` steps. Returns once it is copied, and writes it in the background.

        ``tensors``: whole tensors (equal on each rank that has them) or DTensors, named ``model/<parameter>`` and
        ``optimizer/<parameter>/<key>``; the same names in each call. ``record``: further JSON, taken from rank 0. Waits
        for the previous save; raises ``StoreError`` if it failed.
        """
        self.wait()
        plan = self._planned(tensors)
        self._stage(plan, tensors)
        text = json.dumps(dict(record)) if self._rank == 0 else ""
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = executor.submit(self._write, step, plan, text)
        executor.shutdown(wait=False)  # the thread ends with its task

    def wait(self) -> None:
        """Wait for the current save. Raises ``StoreError`` if it failed."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def load_latest(self, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
        """Load the last complete checkpoint into the tensors, in place. Returns its step and record, or None.

        A damaged one is moved to ``damaged/`` and logged, and the one before it is loaded. Raises ``ArtifactError`` if
        the checkpoint belongs to another run or model.
        """
        self.wait()
        for step in self._gather(self.steps[::-1])[0]:
            index, problem = self._whole(step)
            if index and _without_optimizer(index, tensors):
                problem = "it was kept without optimizer state"
            if problem:
                self._log(f"checkpoint {_name(step)} cannot be resumed ({problem}); trying the previous one")
                if index is None:
                    self._set_aside(step)
            elif index:
                return step, self._read(index, tensors)
        return None

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Load the checkpoint after ``step`` steps into the tensors, in place. Returns its record.

        Raises ``ArtifactError`` if it is missing, damaged, or belongs to another run or model.
        """
        self.wait()
        index, problem = self._whole(step)
        if index is None:
            raise ArtifactError(f"{self._directory / _name(step)}: {problem}; available steps: {self.steps}")
        return self._read(index, tensors)

    def _planned(self, tensors: Mapping[str, Tensor]) -> WritePlan:
        """Return the write plan, made once because the layout does not change during a run."""
        if self._plan is None:
            self._plan = files.plan_writes(tensors, self._group)
        return self._plan

    def _stage(self, plan: WritePlan, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's chunks to host memory, which is reused by later saves."""
        for name in plan.names:
            tensor = files.local(tensors[name])
            if name not in self._staged:
                self._staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._staged[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _write(self, step: int, plan: WritePlan, record: str) -> None:
        """Write and commit a checkpoint; runs in the thread."""
        main, rank = self._rank == 0, self._rank
        temporary = self._directory / f".{_name(step)}.tmp"
        self._together(lambda: self._prepare(temporary, plan.num_bytes) if main else None)
        entries = self._together(lambda: files.write_tensors(temporary, self._staged, rank=rank))
        self._together(lambda: self._commit(step, temporary, plan, entries, record) if main else None)

    def _prepare(self, temporary: Path, num_bytes: int) -> None:
        """Delete the remains of a killed save, and check the free space."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(".step-*"):
            shutil.rmtree(path)
        for path in self._directory.glob(f".{LATEST}.*"):
            path.unlink()
        latest = self._latest()
        for path in self._directory.glob("step-*"):
            if latest is not None and path.name > _name(latest):  # not committed, or undone by a rollback
                files.discard(path)
        check_space(self._directory, num_bytes, 1)
        temporary.mkdir()

    def _commit(self, step: int, temporary: Path, plan: WritePlan, entries: list[dict[str, Any]], record: str) -> None:
        final = self._directory / _name(step)
        (temporary / files.RECORD).write_text(record, encoding="utf-8")
        merged = {name: entry for part in entries for name, entry in part.items()}
        merged[files.RECORD] = files.flushed(temporary / files.RECORD)
        Index(step=step, identity=self._identity, tensors=plan.tensors, files=merged).write(temporary)
        if final.exists():  # left from before an older checkpoint was resumed
            files.discard(final)
        temporary.rename(final)
        sync_directory(self._directory)
        write_atomically(self._directory / LATEST, final.name)
        self._prune()

    def _prune(self) -> None:
        for step in self.steps[: -self._keep_last]:
            path = self._directory / _name(step)
            if not self._keep_every or step % self._keep_every:
                files.discard(path)
                continue
            try:
                files.drop_optimizer(path)
            except ValueError as error:
                self._log(f"checkpoint {path.name} is damaged ({error}); moved to {files.DAMAGED}/")
                files.set_aside(path)

    def _set_aside(self, step: int) -> None:
        """Move a damaged checkpoint to ``damaged/``. Collective."""
        path = self._directory / _name(step)
        self._together(lambda: files.set_aside(path) if self._rank == 0 else None)

    def _latest(self) -> int | None:
        """Return the step that ``LATEST`` names, or None if it is missing or invalid; then all checkpoints count."""
        try:
            return int((self._directory / LATEST).read_text(encoding="utf-8").removeprefix("step-"))
        except (FileNotFoundError, ValueError):
            return None

    def _whole(self, step: int) -> tuple[Index | None, str]:
        """Return the index of a checkpoint, or what is damaged. Each rank verifies its share of the files."""
        path, index, problem = self._directory / _name(step), None, ""
        try:
            index = Index.read(path)
            index.check_files(path, sorted(index.files)[self._rank :: self._world_size])
        except (OSError, ValueError) as error:
            problem = str(error)
        problems = [problem for problem in self._gather(problem) if problem]
        return (None, "; ".join(problems)) if problems else (index, "")

    def _read(self, index: Index, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        path = self._directory / _name(index.step)
        self._check_identity(path, index.identity)
        problems = [problem for problem in self._gather(index.mismatch(tensors)) if problem]
        if problems:
            raise ArtifactError(f"{path}: belongs to another model: {problems[0]}; check the model's settings")
        files.read_tensors(path, index, tensors)
        return json.loads((path / files.RECORD).read_text(encoding="utf-8"))

    def _check_identity(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Log safe changes. Raises ``ArtifactError`` that lists the others."""
        was, now = dict(_fields(identity)), dict(_fields(self._identity))
        changed = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        said = {name: f"{name} was {was.get(name)!r} and is now {now.get(name)!r}" for name in changed}
        unsafe = [text for name, text in said.items() if not self._is_safe(name)]
        if unsafe:
            raise ArtifactError(
                f"{path}: belongs to another run: {', '.join(unsafe)}; restore them, or delete {path.parent} to "
                f"start over (safe to change: {', '.join(sorted(self._safe)) or 'nothing'})"
            )
        if said:
            self._log(f"resuming {path.name} with changed settings: {', '.join(said.values())}")

    def _is_safe(self, name: str) -> bool:
        return any(name == safe or name.startswith(f"{safe}.") for safe in self._safe)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Return the results of all ranks. Raises ``StoreError`` on all ranks if one fails."""
        result, failure, problem = None, None, ""
        try:
            result = work()
        except StoreError as error:
            failure, problem = error, str(error)
        except Exception as error:  # any error: the other ranks must not wait for this one
            failure, problem = (
                error,
                (
                    f"{self._directory}: rank {self._rank} cannot write a checkpoint "
                    f"({type(error).__name__}: {error}); check space and permissions"
                ),
            )
        outcomes = self._gather((result, problem))
        for _, problem in outcomes:
            if problem:
                raise StoreError(problem) from failure
        return [cast(T, result) for result, _ in outcomes]

    def _gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def check_space(directory: Path, num_bytes: int, copies: int) -> None:
    """Raise ``StoreError`` if the disk has no room for ``copies`` checkpoints of ``num_bytes``."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes * copies > free:
        raise StoreError(
            f"{directory}: {copies} x {num_bytes:,} = {num_bytes * copies:,} bytes are needed for checkpoints and "
            f"{free:,} are free; free some space, reduce keep_last, or move the store to a larger disk"
        )


def _new_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks. Collective."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _without_optimizer(index: Index, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors include optimizer state that the checkpoint does not have."""
    prefix = f"{files.OPTIMIZER}/"
    return any(n.startswith(prefix) for n in tensors) and not any(n.startswith(prefix) for n in index.tensors)


def _fields(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested mappings by dotted name."""
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from _fields(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part
