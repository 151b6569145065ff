"""Hugging Face datasets: streamed from the Hub by name, or read from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilpipe.config.sources import Source
from lilpipe.data.sources.files import File, digest_files, printable_name
from lilpipe.data.sources.raw_documents import Row, Unreadable, rows_of, to_row, unreadable
from lilpipe.errors import DataError

ROWS_PER_PART = 50_000
ROWS_PER_BATCH = 16
"""Number of rows in memory, with all their columns."""


def num_parts(source: Source) -> int:
    """Return the number of parts of the dataset. Raises ``DataError`` if it cannot be loaded."""
    dataset = _load(source)
    if hasattr(dataset, "num_rows"):
        return max(1, -(-dataset.num_rows // ROWS_PER_PART))
    return max(1, dataset.num_shards)


def digest(source: Source) -> str:
    """Return a digest of a folder's content, or the commit of a dataset on the Hub."""
    path = Path(str(source.path))
    if not path.exists():
        return f"revision {_hub_revision(source)}"
    names = sorted(each for each in (path, *path.rglob("*")) if each.is_file())
    return digest_files(
        [File(str(each), printable_name(each.relative_to(path).as_posix()), each.stat().st_size) for each in names]
    )


def read(source: Source, index: int, count: int) -> Iterator[Row]:
    """Yield the rows of one part. Row numbers count within the shard if the dataset is streamed, else in the split."""
    dataset = _load(source)
    name, first = source.split, 1
    if hasattr(dataset, "num_rows"):
        first += index * ROWS_PER_PART
        dataset = dataset.select(range(first - 1, min(first - 1 + ROWS_PER_PART, dataset.num_rows)))
    else:
        name = f"{name}-{index:05d}-of-{count:05d}"
        dataset = dataset.shard(num_shards=count, index=index)
    number = first - 1
    try:
        for table in dataset.with_format("arrow").iter(ROWS_PER_BATCH):
            for values in (values for batch in table.to_batches() for values in rows_of(batch)):
                number += 1
                if isinstance(values, ValueError):
                    yield unreadable(name, number, str(values), "")
                else:
                    yield to_row(values, source, name, number)
    except Exception as error:  # each file format of the library has its own error for damaged files
        if not Path(str(source.path)).exists() or (isinstance(error, OSError) and error.errno is not None):
            raise  # an error of the network or the disk
        reason = f"cannot be read after row {number}: {type(error).__name__}: {error}".splitlines()[0]
        yield Unreadable(name, number + 1, reason, breaks_off=True)


def _load(source: Source) -> Any:
    """Load a saved dataset folder memory-mapped; stream anything else, without a copy in a cache."""
    path = str(source.path)
    try:
        if is_saved(path):
            return load_saved(path, source.split)
        import datasets  # takes a second to import

        revision = None if Path(path).exists() else _hub_revision(source)
        return datasets.load_dataset(path, source.subset, split=source.split, revision=revision, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"source {source.name!r}: dataset {source.path}, subset {source.subset!r}, split {source.split!r}, cannot "
            f"be loaded: {error}; correct `path`, `subset` or `split`"
        ) from error


def is_saved(path: str) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    return any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json"))


def load_saved(path: str, split: str) -> Any:
    """Load a folder written by ``save_to_disk``, memory-mapped. Raises ``KeyError`` if it has no such split."""
    import datasets

    loaded = datasets.load_from_disk(path)
    return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded


def _hub_revision(source: Source) -> str:
    """Return the current commit of the dataset on the Hub."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.path)).sha or ""
    except Exception as error:  # the error of a missing network differs between versions of huggingface_hub
        raise DataError(
            f"source {source.name!r}: {source.path} is not a local folder, and the Hugging Face Hub returned no "
            f"dataset of that name: {error}; correct `path`, or download the dataset and name its folder"
        ) from error
