"""Weights in safetensors: in one file, or in shards with an index, read and written a tensor at a time.

The layout of files is Hugging Face's. Pickles (``pytorch_model.bin``), which can run code when they are read, are
refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilpipe.artifact import sync_directory, write_atomically
from lilpipe.errors import ArtifactError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as in transformers before version 5; a larger tensor has a file of its own."""

KEPT_IN_FLOAT32 = "e_score_correction_bias"
"""End of the name of tensors that are written in float32 in any case."""

NamedTensors = Iterable[tuple[str, Tensor]]


def weight_files(directory: Path) -> list[str]:
    """Names of the files that hold the weights, the index among them. Raises ``ArtifactError`` if there are none."""
    if (directory / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (directory / INDEX_FILE).exists():
        return [INDEX_FILE, *sorted(set(_read_index(directory / INDEX_FILE).values()))]
    if pickled := sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth")):
        raise ArtifactError(
            f"{directory / pickled[0]}: got pickled weights, which can run code when they are read, expected "
            f"{WEIGHTS_FILE} or {INDEX_FILE}; take the checkpoint's safetensors, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers writes them"
        )
    raise ArtifactError(f"{directory}: got no weights, expected {WEIGHTS_FILE} or {INDEX_FILE}; check the path")


def stored_tensors(directory: Path, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name that the files give it, one by one, mapped from the disk on the CPU.

    Memory is taken where a tensor is read. With ``shapes_only`` they are on the meta device, in float32. Raises
    ``ArtifactError`` for a file that is missing, damaged, or not what the index says.
    """
    files = weight_files(directory)
    index = _read_index(directory / INDEX_FILE) if files[0] == INDEX_FILE else None
    for name in files[1:] if index else files:
        expected = {tensor for tensor, file in index.items() if file == name} if index else None
        yield from _tensors_of(directory / name, expected, shapes_only=shapes_only)


def _tensors_of(path: Path, expected: set[str] | None, *, shapes_only: bool) -> Iterator[tuple[str, Tensor]]:
    if not path.exists():
        raise ArtifactError(f"{path}: missing, though {INDEX_FILE} names it; copy all of the checkpoint's files")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if expected is not None and (wrong := expected.symmetric_difference(names)):
                raise ArtifactError(
                    f"{path}: {min(wrong)} is in this file or in {INDEX_FILE}, expected in both; "
                    "copy all of the checkpoint's files from one place"
                )
            for name in names:
                if shapes_only:
                    yield name, torch.empty(file.get_slice(name).get_shape(), device="meta")
                else:
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: cannot be read as safetensors ({error}); it is damaged or was not copied whole: copy it again, "
            "or run the stage again that made it"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    """Tensor to file."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not files or any(Path(file).name != file for file in files.values()):
            raise ValueError("weight_map: expected names of tensors, and of files beside this one")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: cannot be read as an index of shards ({error!r}); copy it again") from error
    return files


def write_tensors(
    tensors: NamedTensors, directory: Path, *, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors in their order, cast to ``dtype``, with one file's worth of them in memory at a time.

    The same tensors give the same bytes. Files take their names when all are whole, and the index is written after
    them; weights that lay there before are gone afterwards.
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
    (directory / INDEX_FILE).unlink(missing_ok=True)  # or a kill between two files would leave a mixture
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
    """A file in the making. The next try after a kill writes it anew, so that none is left behind."""
    return directory / f".{WEIGHTS_FILE}.{number}.tmp"


def _shards(tensors: NamedTensors, *, dtype: torch.dtype, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors as they are stored, as many together as go into a file."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        # The router's correction stays as it is: which experts a token goes to hangs on its last digits.
        stored = tensor.detach().to("cpu", torch.float32 if name.endswith(KEPT_IN_FLOAT32) else dtype).contiguous()
        if shard and num_bytes + stored.nbytes > max_shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = stored
        num_bytes += stored.nbytes
    yield shard
