"""Reading from file systems that fail for a while: what stalls, is cut off or answers 429 or 5xx is tried again.

A call is tried ``TRIES`` times, with waits between that start at ``FIRST_WAIT_SECONDS`` and double (31 seconds in
all); each try may take ``STALL_SECONDS``. A stream goes on where it was: no byte of it is handed out twice.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

from fsspec.core import url_to_fs
from loguru import logger

TRIES = 6
FIRST_WAIT_SECONDS = 1.0
STALL_SECONDS = 60.0

PASSING_STATUSES = frozenset({408, 425, 429})
"""HTTP statuses below 500 that may be gone at the next try."""

LASTING_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


class SourceUnavailable(Exception):
    """A source that did not answer after all tries; no ``OSError``, so that it is not taken for a damaged file."""


def retried(call: Callable[[], T], what: str) -> T:
    """The result of a call. Raises ``SourceUnavailable`` if all tries fail, other errors at once."""
    wait_seconds = FIRST_WAIT_SECONDS
    for left in reversed(range(TRIES)):
        try:
            return _within(STALL_SECONDS, call)
        except Exception as error:
            if not _is_retryable(error):
                raise
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if not left:
                raise SourceUnavailable(f"{what}: failed {TRIES} times, the last time by {reason}") from error
        logger.warning("{}: {}; next try in {:.0f} s", what, reason, wait_seconds)
        time.sleep(wait_seconds)
        wait_seconds *= 2
    raise AssertionError("unreachable")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that runs in a thread of its own, which is left behind if the call stalls."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return results[0]


def _is_retryable(error: BaseException) -> bool:
    """Whether another try can help; fsspec's HTTP file system hides the cause in a ``FileNotFoundError``."""
    while True:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status in PASSING_STATUSES or status >= 500
        if error.__cause__ is None:
            break
        error = error.__cause__
    if isinstance(error, OSError | EOFError):
        return not isinstance(error, LASTING_ERRORS)
    return type(error).__module__.split(".")[0] in ("aiohttp", "botocore")


class RemoteStream(io.RawIOBase):
    """A file of any fsspec file system, opened again at its position when reading fails."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        """0 if the file system does not say."""
        self._position = 0
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Where the size is known."""
        return self._size > 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; nothing is asked of the file system before the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset != self._position:
            self._position, self._file = start + offset, None
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read what is there, at most the buffer's size."""

        def read() -> tuple[IO[bytes], bytes]:
            file, self._file = self._file, None  # a try that stalls or fails takes it along
            file = file or self._open()
            data = file.read(min(len(buffer), self._size - self._position) if self._size else len(buffer))
            if not data and self._position < self._size:
                raise EOFError(f"connection ended after {self._position:,} of {self._size:,} bytes")
            return file, data

        if self._size and self._position >= self._size:
            return 0
        self._file, data = retried(read, self._url)
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _open(self) -> IO[bytes]:
        filesystem, path = url_to_fs(self._url)
        file = filesystem.open(path, "rb")
        try:
            file.seek(self._position)
        except ValueError:  # a server that does not answer for ranges of bytes
            left = self._position
            while left and (data := file.read(min(left, 1 << 20))):
                left -= len(data)
        return file
