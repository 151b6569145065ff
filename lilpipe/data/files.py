"""Files of a source: found by path, folder, glob or fsspec URL; opened plain or compressed; digested.

zstd streams are read by our own small reader: fsspec's stops without a word at the first frame's end and at a
truncated one.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec
import zstandard
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lilpipe.artifact import digest_file, digest_json
from lilpipe.config import Source
from lilpipe.errors import DataError

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".rst"),
}
COMPRESSIONS = ("", ".gz", ".zst")

BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What a truncated or corrupt compressed file raises."""


@dataclass(frozen=True)
class File:
    """One file of a source."""

    url: str
    name: str
    """Path below the source's folder: what documents and reports carry, the same on every machine."""
    size: int


def find_files(source: Source) -> list[File]:
    """The files of a source, by name. Raises ``DataError`` if there are none."""
    path = source.path or ""
    filesystem, root = _filesystem(source)
    if filesystem.isfile(root):
        return _check_not_empty(source, [_file(filesystem, root, root.rsplit("/", 1)[0])])
    if filesystem.isdir(root):
        paths = [path for path in filesystem.find(root) if _belongs(path[len(root) :], source.kind)]
        expected = ", ".join(SUFFIXES[source.kind])
        missing = f"the folder holds no file that ends in {expected} (or these with .gz, .zst)"
    elif any(sign in path for sign in "*?["):
        found = [str(path) for path in filesystem.glob(root) if filesystem.isfile(path)]
        paths = [path for path in found if not path.rsplit("/", 1)[-1].startswith(".")]
        root = _fixed_part(root)
        missing = "no file matches the pattern"
    else:
        raise DataError(f"source {source.name!r}: path {path} does not exist; correct the path or remove the source")
    if not paths:
        raise DataError(f"source {source.name!r}: path {path}: {missing}; correct `path` or `kind` ({source.kind})")
    return _check_not_empty(source, [_file(filesystem, each, root) for each in sorted(paths)])


def _filesystem(source: Source) -> tuple[Any, str]:
    try:
        filesystem, root = url_to_fs(str(source.path))
    except (ValueError, ImportError) as error:
        raise DataError(f"source {source.name!r}: path {source.path} cannot be opened: {error}") from error
    return filesystem, root.rstrip("/") or root


def _belongs(path: str, kind: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/") if part)
    return not hidden and path.lower().endswith(tuple(s + c for s in SUFFIXES[kind] for c in COMPRESSIONS))


def _fixed_part(pattern: str) -> str:
    """The folders of a glob before its first pattern."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return "/".join(parts[:first])


def _file(filesystem: Any, path: str, root: str) -> File:
    size = filesystem.size(path) or 0
    return File(url=filesystem.unstrip_protocol(path), name=path[len(root) :].lstrip("/"), size=size)


def _check_not_empty(source: Source, files: list[File]) -> list[File]:
    if not any(file.size for file in files):
        raise DataError(f"source {source.name!r}: path {source.path}: all files are empty (0 bytes)")
    return files


def digest_files(files: list[File]) -> str:
    """Digest over names and contents; for remote files the store's own checksum stands for the content."""
    return digest_json([[file.name, _digest(file)] for file in files])


def _digest(file: File) -> str:
    filesystem, path = url_to_fs(file.url)
    if isinstance(filesystem, LocalFileSystem):
        return digest_file(Path(path))
    info = filesystem.info(path)
    for key in ("ETag", "etag", "md5Hash", "content_md5", "crc32c"):
        if info.get(key):
            return f"{key} {info[key]} {file.size}"
    return str(filesystem.ukey(path))


@contextmanager
def open_file(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed by its suffix. Reading raises one of ``BROKEN_STREAM`` where it breaks off."""
    with cast(IO[bytes], fsspec.open(file.url, "rb")) as raw:
        if file.name.lower().endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif file.name.lower().endswith(".zst"):
            yield cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 20))
        else:
            yield cast(BinaryIO, raw)


class _ZstdStream(io.RawIOBase):
    """Decompresses all frames of a stream and raises ``EOFError`` if the last one is not complete."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._chunks = self._decompress(raw)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    @staticmethod
    def _decompress(raw: IO[bytes]) -> Iterator[bytes]:
        frame = None
        while data := raw.read(1 << 18):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("compressed file ended before the end of its last frame")
