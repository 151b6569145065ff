"""Hugging Face data sets: by their name on the hub, streamed, or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilpipe.config.corpus import Source
from lilpipe.data.sources.files import File, digest_files, printable_name
from lilpipe.data.sources.rows import Row, Unreadable, rows_of, to_row, unreadable
from lilpipe.errors import DataError

ROWS_PER_PART = 50_000
ROWS_PER_BATCH = 16
"""In memory at a time, with all their columns."""


def num_parts(source: Source) -> int:
    """Into how many parts the data set is divided. Raises ``DataError`` if it cannot be loaded."""
    dataset = _load(source)
    if hasattr(dataset, "num_rows"):
        return max(1, -(-dataset.num_rows // ROWS_PER_PART))
    return max(1, dataset.num_shards)


def digest(source: Source) -> str:
    """Digest of a folder's content, or the commit that the hub's data set is at."""
    path = Path(str(source.path))
    if not path.exists():
        return f"revision {_hub_revision(source)}"
    names = sorted(each for each in (path, *path.rglob("*")) if each.is_file())
    return digest_files(
        [File(str(each), printable_name(each.relative_to(path).as_posix()), each.stat().st_size) for each in names]
    )


def read(source: Source, index: int, count: int) -> Iterator[Row]:
    """The rows of one part. What a streamed data set's rows are numbered within is the shard, else the split."""
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
    except Exception as error:  # each of the library's file formats has its own for a damaged file
        if not Path(str(source.path)).exists() or (isinstance(error, OSError) and error.errno is not None):
            raise  # the network's or the disk's
        reason = f"data set breaks off after row {number}: {type(error).__name__}: {error}".splitlines()[0]
        yield Unreadable(name, number + 1, reason, breaks_off=True)


def _load(source: Source) -> Any:
    """A saved data set folder memory-mapped; anything else streamed, so that nothing is copied to a cache."""
    import datasets  # takes a second to import

    path = Path(str(source.path))
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        revision = None if path.exists() else _hub_revision(source)
        return datasets.load_dataset(
            str(source.path), source.subset, split=source.split, revision=revision, streaming=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"source {source.name!r}: data set {source.path}, subset {source.subset!r}, split {source.split!r}, cannot "
            f"be loaded: {error}; correct `path`, `subset` or `split`"
        ) from error


def _hub_revision(source: Source) -> str:
    """The commit that the hub's data set is at."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.path)).sha or ""
    except Exception as error:  # which of them a missing network raises differs between versions of the hub's library
        raise DataError(
            f"source {source.name!r}: {source.path} is no local folder, and the Hugging Face hub did not give a data "
            f"set of that name: {error}; correct `path`, or download the data set and name its folder"
        ) from error
