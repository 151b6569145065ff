"""Weights in safetensors, in one file or in shards with an index, read and written one tensor at a time.

Files have Hugging Face's layout. Pickles (``pytorch_model.bin``) are rejected, because reading one can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lilpipe.artifact import sync_directory, write_atomically
from lilpipe.errors import ArtifactError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Maximum bytes of a weights file, as in transformers before version 5; a larger tensor gets its own file."""

KEPT_IN_FLOAT32 = "e_score_correction_bias"
"""Suffix of tensor names that are always written in float32."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "I32": torch.int32},
}
"""Names of dtypes in safetensors; others count as uint8."""

NamedTensors = Iterable[tuple[str, Tensor]]


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by name; those that share memory once."""
    saved = module.state_dict().keys()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in saved:
            yield name, tensor.detach()


def weight_files(directory: Path) -> list[str]:
    """Return the names of the weight files, including the index. Raises ``ArtifactError`` if there are none."""
    if (directory / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (directory / INDEX_FILE).exists():
        return [INDEX_FILE, *sorted(set(_read_index(directory / INDEX_FILE).values()))]
    if pickled := sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth")):
        raise ArtifactError(
            f"{directory / pickled[0]}: got pickled weights, which can run code when read, expected "
            f"{WEIGHTS_FILE} or {INDEX_FILE}; use the checkpoint's safetensors, or convert it if you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) in transformers writes safetensors"
        )
    raise ArtifactError(f"{directory}: got no weights, expected {WEIGHTS_FILE} or {INDEX_FILE}; check the path")


def stored_tensors(
    directory: Path, *, only: Collection[str] | None = None, shapes_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, or those named in ``only``, by its name in the files, memory-mapped on the CPU.

    Pages that were read count as memory of the process until all tensors of the call are gone. With ``shapes_only``,
    tensors are on the meta device. Raises ``ArtifactError`` for a file that is
    missing, damaged or inconsistent with the index.
    """
    files = weight_files(directory)
    index = _read_index(directory / INDEX_FILE) if files[0] == INDEX_FILE else None
    for name in files[1:] if index else files:
        expected = {tensor for tensor, file in index.items() if file == name} if index else None
        if expected is None or only is None or not expected.isdisjoint(only):
            yield from _tensors_of(directory / name, expected, only, shapes_only=shapes_only)


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the data type of the first matrix in the files."""
    return next(tensor.dtype for _, tensor in stored_tensors(directory) if tensor.dim() == 2)


def _tensors_of(
    path: Path, expected: set[str] | None, only: Collection[str] | None, *, shapes_only: bool
) -> Iterator[tuple[str, Tensor]]:
    if not path.exists():
        raise ArtifactError(f"{path}: missing, but {INDEX_FILE} names it; copy all of the checkpoint's files")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if expected is not None and (wrong := expected.symmetric_difference(names)):
                raise ArtifactError(
                    f"{path}: {min(wrong)} is only in this file or only in {INDEX_FILE}, expected in both; "
                    "copy all files from the same checkpoint"
                )
            for name in names if only is None else (name for name in names if name in only):
                if shapes_only:
                    held = file.get_slice(name)
                    dtype = _DTYPES.get(held.get_dtype(), torch.uint8)
                    yield name, torch.empty(held.get_shape(), device="meta", dtype=dtype)
                else:
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: cannot be read as safetensors ({error}); it is damaged or incomplete: copy it again, "
            "or rerun the stage that produced it"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name to file."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not files or any(Path(file).name != file for file in files.values()):
            raise ValueError("weight_map: expected tensor names to names of files in this directory")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read as a safetensors index ({error!r}); copy it again") from error
    return files


def write_tensors(
    tensors: NamedTensors, directory: Path, *, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors in order, cast to ``dtype``; memory holds one file's tensors.

    Equal tensors give equal bytes. Files are renamed after all are complete, then the index is written; older weights
    in the directory are deleted.
    """
    held: list[list[str]] = []
    num_bytes = 0
    for number, shard in enumerate(_shards(tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)):
        save_file(shard, _temporary(directory, number), metadata={"format": "pt"})
        with _temporary(directory, number).open("rb") as file:
            os.fsync(file.fileno())
        held.append(sorted(shard))
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
    names = [f"model-{number + 1:05}-of-{len(held):05}.safetensors" for number in range(len(held))]
    names = names if len(held) > 1 else [WEIGHTS_FILE]
    before = {path.name for path in directory.glob("model*.safetensors")}
    (directory / INDEX_FILE).unlink(missing_ok=True)  # otherwise a kill between two renames would leave mixed files
    for number, name in enumerate(names):
        _temporary(directory, number).replace(directory / name)
    if len(names) > 1:
        files = {tensor: name for tensors_of_file, name in zip(held, names, strict=True) for tensor in tensors_of_file}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
        write_atomically(directory / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name in before - set(names):
        (directory / name).unlink()
    sync_directory(directory)


def _temporary(directory: Path, number: int) -> Path:
    """Return the path of a temporary file. A retry after a kill overwrites it."""
    return directory / f".{WEIGHTS_FILE}.{number}.tmp"


def _shards(tensors: NamedTensors, *, dtype: torch.dtype, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors, as stored, into files."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        # The router's bias stays in float32: its last digits decide which experts are chosen.
        stored = tensor.detach().to("cpu", torch.float32 if name.endswith(KEPT_IN_FLOAT32) else dtype).contiguous()
        if shard and num_bytes + stored.nbytes > max_shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = stored
        num_bytes += stored.nbytes
    yield shard
