"""Files of a source: found by path, folder, glob or fsspec URL; opened plain or compressed; digested.

Decompression is our own: the readers of fsspec and of the standard library differ in how they handle multiple frames,
truncated frames and trailing bytes.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lilpipe.artifact import digest_json
from lilpipe.config.sources import Source
from lilpipe.credentials import hide_credentials
from lilpipe.data.sources.remote import RemoteStream, retried
from lilpipe.digests import digest_file
from lilpipe.errors import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".markdown", ".rst"),
    "warc": (".warc", ".wet"),
}
CHECKSUMS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "crc32c", "sha256", "blob_id")
"""Names under which fsspec file systems report a checksum of the content."""

READ_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 9
"""Number of compressed bytes that are decompressed at a time."""
MAX_WINDOW_BYTES = 1 << 31
"""Maximum memory of the decompression window (zstd's `--long=31`)."""
MAX_EXPANSION = 1_000
EXPANSION_FROM_BYTES = 1 << 27
"""A file that expands to more than this and more than ``MAX_EXPANSION`` times its size is a decompression bomb."""


class BrokenStream(Exception):
    """A compressed file that is truncated, corrupt, or a decompression bomb."""


class Expansion:
    """Counts the bytes that a file expands to. Raises ``BrokenStream`` if they are out of proportion to its size."""

    def __init__(self, file_bytes: int) -> None:
        self.file_bytes = file_bytes
        self._given_bytes = 0

    def add(self, given_bytes: int) -> None:
        """Add expanded bytes."""
        self._given_bytes += given_bytes
        if self._given_bytes > max(EXPANSION_FROM_BYTES, MAX_EXPANSION * self.file_bytes):
            raise BrokenStream(
                f"it expands to over {self._given_bytes:,} bytes, more than {MAX_EXPANSION:,} times its size"
            )


@dataclass(frozen=True)
class File:
    """One file of a source."""

    url: str
    name: str
    """Path relative to the source's folder, the same on every machine; used in documents and reports."""
    size: int
    defect: str = ""
    """Why the file cannot be read, such as a broken link; its only row is an ``Unreadable`` with this error."""


@dataclass(frozen=True)
class FilePart:
    """A part of a large file, read by a separate task."""

    start: int
    """First byte, or first row group."""
    stop: int
    first_row: int
    """Number of its first line or row, counted from 1."""


def find_files(source: Source, suffixes: Sequence[str] = ()) -> list[File]:
    """Return the files of a source, sorted by name; of a folder those with the suffixes, by default of its kind.

    Raises ``DataError`` if there are none.
    """
    suffixes = suffixes or SUFFIXES[source.kind]
    path = source.path or ""
    filesystem, root = _filesystem(source)
    filesystem.invalidate_cache()
    kind, missing = _type_of(source, filesystem, root), "it is not a file"
    if kind == "directory":
        found = _find(filesystem, root)
        found = {each: info for each, info in found.items() if _belongs(each[len(root) :], suffixes)}
        missing = f"no file in the folder ends in {', '.join(suffixes)}"
        missing += "" if set(suffixes) <= {".parquet"} else f" (or these with {', '.join(COMPRESSIONS)})"
    elif kind is not None:
        found = {root: retried(lambda: filesystem.info(root), path)}
        root = root.rsplit("/", 1)[0]
    elif any(sign in path for sign in "*?["):
        found = cast(dict[str, Any], retried(lambda: filesystem.glob(root, detail=True), path))
        found = {each: info for each, info in found.items() if not each.rsplit("/", 1)[-1].startswith(".")}
        root = _fixed_part(root)
        missing = "no file matches the pattern"
    else:
        raise DataError(
            f"source {source.name!r}: path {path} does not exist{_seen_from(path)}; correct the path, or "
            "remove the source"
        )
    files = [file for each, info in sorted(found.items()) if (file := _file(filesystem, each, root, info))]
    if not files:
        raise DataError(f"source {source.name!r}: path {path}: {missing}; correct `path` or `kind` ({source.kind})")
    return _check_not_empty(source, files)


def _type_of(source: Source, filesystem: Any, root: str) -> str | None:
    try:
        return str(retried(lambda: filesystem.info(root), str(source.path))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise DataError(f"source {source.name!r}: path {source.path} is not readable: {error}") from error
    except OSError as error:  # a permanent error, such as a loop of links
        raise DataError(
            f"source {source.name!r}: path {source.path} cannot be read: {error}; correct `path`"
        ) from error


def _find(filesystem: Any, root: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return all files below a folder, following symbolic links to folders except those that form a loop."""
    found: dict[str, Any] = retried(lambda: filesystem.find(root, detail=True), root)
    if not isinstance(filesystem, LocalFileSystem):
        return found
    above = (*above, os.path.realpath(root))
    for path in [path for path, info in found.items() if info["islink"] and Path(path).is_dir()]:
        target, parent = os.path.realpath(path), os.path.realpath(os.path.dirname(path))  # noqa: PTH120
        del found[path]
        if not any(f"{each}/".startswith(f"{target}/") for each in (*above, parent)):
            found |= _find(filesystem, path, above)
    return found


def _filesystem(source: Source) -> tuple[Any, str]:
    try:
        filesystem, root = url_to_fs(str(source.path))
    except (ValueError, ImportError) as error:
        raise DataError(f"source {source.name!r}: path {source.path} cannot be opened: {error}") from error
    return filesystem, root.rstrip("/") or root


def _belongs(path: str, suffixes: Sequence[str]) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/") if part)
    compressed = tuple(each + c for each in suffixes if each != ".parquet" for c in COMPRESSIONS)
    return not hidden and path.lower().endswith((*suffixes, *compressed))


def _fixed_part(pattern: str) -> str:
    """Return the leading folders of a glob without wildcards."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return "/".join(parts[:first])


def _file(filesystem: Any, path: str, root: str, info: dict[str, Any]) -> File | None:
    """Return the file, with links resolved; None for a folder."""
    defect = ""
    if info["type"] == "other":  # fsspec's type of links, too
        try:
            info = retried(lambda: filesystem.info(path), path)
            defect = "" if info["type"] == "file" else "is not a regular file"
        except OSError as error:
            defect = f"is a link that cannot be followed: {error.strerror or 'its target does not exist'}"
    if info["type"] == "directory":
        return None
    name = printable_name(path[len(root) :].lstrip("/"))
    return File(filesystem.unstrip_protocol(path), name, 0 if defect else info.get("size") or 0, defect)


def printable_name(name: str) -> str:
    """Return the name without credentials, and with bytes that are not UTF-8 escaped: reports and tables are UTF-8."""
    return hide_credentials(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _check_not_empty(source: Source, files: list[File]) -> list[File]:
    defect = next((f"{file.name} {file.defect}" for file in files if file.defect), "")
    if not any(file.size for file in files) and defect:
        raise DataError(f"source {source.name!r}: path {source.path}: no file is readable: {defect}")
    if not any(file.size for file in files):
        raise DataError(f"source {source.name!r}: path {source.path}: all files are empty (0 bytes)")
    return files


def _seen_from(path: str) -> str:
    """Return the directory that a relative path is taken from, for messages."""
    return "" if "://" in path or Path(path).is_absolute() else f" in {Path.cwd()}, where the command runs"


def digest_files(files: list[File]) -> str:
    """Return a digest of names and contents; for remote files, the store's checksum is used if there is one."""
    return digest_json([[file.name, file.defect or _digest(file)] for file in files])


def _digest(file: File) -> str:
    path = local_path(file)
    if path is not None:
        return digest_file(path)
    filesystem, name = url_to_fs(file.url)
    info = retried(lambda: filesystem.info(name), file.url)
    for key in CHECKSUMS:
        if info.get(key):
            return f"{key} {info[key]} {file.size}"
    digest = hashlib.sha256()
    with _open_raw(file) as raw:
        while block := raw.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def local_path(file: File) -> Path | None:
    """Return the path of a local file, None if it is remote."""
    filesystem, path = url_to_fs(file.url)
    return Path(path) if isinstance(filesystem, LocalFileSystem) else None


def compression(file: File) -> str:
    """Return the suffix of a compressed file, or an empty string; the query of a signed URL is no part of the name."""
    name = file.name.lower()
    names = (name, name.partition("?")[0])
    return next((suffix for suffix in COMPRESSIONS if any(each.endswith(suffix) for each in names)), "")


@contextmanager
def open_file(file: File) -> Iterator[BinaryIO]:
    """Open the file, decompressed by its suffix. Reading raises ``BrokenStream`` if the file is truncated or
    damaged.
    """
    with _open_raw(file) as raw:
        suffix = compression(file)
        if suffix:
            yield cast(BinaryIO, io.BufferedReader(_Decompressed(raw, suffix), buffer_size=READ_BYTES))
        else:
            yield raw


def _open_raw(file: File) -> BinaryIO:
    path = local_path(file)
    if path is not None:
        return path.open("rb", buffering=READ_BYTES)
    return cast(BinaryIO, io.BufferedReader(RemoteStream(file.url, file.size), buffer_size=READ_BYTES))


_NEW_FRAME: dict[str, Callable[[], Any]] = {  # decompressor of one frame, member or stream
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES),
}


class _Decompressed(io.RawIOBase):
    """Decompressed data of all frames of a stream; zero padding between frames is ignored."""

    def __init__(self, raw: BinaryIO, suffix: str) -> None:
        self._chunks = _decompress(raw, _NEW_FRAME[suffix])
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _pieces(frame: Any, data: bytes) -> Iterator[bytes]:
    """Yield decompressed data. In the worst case, a byte expands to 1 KiB (gzip), 32 KiB (zstd) or 1 MiB (bzip2)."""
    if not isinstance(frame, bz2.BZ2Decompressor | lzma.LZMADecompressor):
        yield frame.decompress(data)
        return
    yield frame.decompress(data, READ_BYTES)
    while not (frame.eof or frame.needs_input):
        yield frame.decompress(b"", READ_BYTES)


def _decompress(raw: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    frame: Any = None
    expansion = Expansion(0)
    while data := raw.read(COMPRESSED_BYTES):
        expansion.file_bytes += len(data)
        while data := data if frame else data.lstrip(b"\0"):
            frame = frame or new_frame()
            try:
                for piece in _pieces(frame, data):
                    yield piece
                    expansion.add(len(piece))
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                raise BrokenStream(str(error) or type(error).__name__) from error
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise BrokenStream("compressed file is truncated in its last frame")
