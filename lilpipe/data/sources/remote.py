"""Reading from remote file systems, with retries of transient errors: stalls, lost connections, HTTP 429 and 5xx.

A call is tried ``TRIES`` times by tenacity, with exponential backoff from ``FIRST_WAIT_SECONDS`` (31 seconds in all).
Each try may take ``STALL_SECONDS``. A stream resumes at its position, so no byte is returned twice.
"""

from __future__ import annotations

import errno
import io
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import tenacity
from fsspec.core import url_to_fs
from loguru import logger

from lilpipe.credentials import hide_credentials

TRIES = 6
FIRST_WAIT_SECONDS = 1.0
STALL_SECONDS = 60.0

TRANSIENT_STATUSES = frozenset({408, 425, 429})
"""HTTP statuses below 500 that are retried."""
PERMANENT_STATUSES = frozenset({501, 505})
"""HTTP statuses from 500 that are not retried: the server does not support the method or the version."""
TRANSIENT_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EPIPE, errno.ENOTCONN}
    | {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EREMOTEIO}
)
"""Errors of the network and of network file systems; others, such as a loop of symbolic links, are permanent."""
TRANSIENT_TYPES = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "ResponseStreamingError"),
    "http.client": ("IncompleteRead", "RemoteDisconnected"),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3.exceptions": ("TimeoutError", "ProtocolError", "NewConnectionError"),
}
"""Transient errors of the libraries behind fsspec; a library that is not imported has raised none."""
PERMANENT_TYPES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Permanent subclasses of ``OSError``, which file systems also raise without an errno."""

T = TypeVar("T")


class SourceUnavailable(Exception):
    """Raised if a source fails after all tries; not an ``OSError``, so that it is not taken for a damaged file."""


def retried(call: Callable[[], T], what: str) -> T:
    """Return the result of a call, with retries. Raises ``SourceUnavailable`` after all tries; permanent errors at
    once.
    """

    def warn(state: tenacity.RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0.0
        reason = hide_credentials(f"{what}: {_reason(state)}")
        logger.warning("{}; retrying in {:.0f} s", reason, seconds)

    def give_up(state: tenacity.RetryCallState) -> T:
        cause = state.outcome.exception() if state.outcome else None
        raise SourceUnavailable(f"{what}: failed {TRIES} times, last error: {_reason(state)}") from cause

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_SECONDS),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=warn,
        retry_error_callback=give_up,
    )
    return retrying(_within, STALL_SECONDS, call)


def _reason(state: tenacity.RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call in a separate thread, which is abandoned if the call stalls."""
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


def is_transient(error: BaseException) -> bool:
    """Return whether a retry can help, by the type, HTTP status or errno of the error or its innermost cause.

    fsspec's HTTP file system hides the cause in a ``FileNotFoundError``.
    """
    *_, innermost = causes = list(_causes(error))
    for each in causes:
        if isinstance(each, socket.gaierror):
            return each.errno == socket.EAI_AGAIN
        if isinstance(each, ssl.SSLCertVerificationError):
            return False
    transient_types = tuple(_imported_types())
    if any(isinstance(each, transient_types) for each in causes):
        return True
    if statuses := [status for status in map(_status, causes) if status is not None]:
        return statuses[0] in TRANSIENT_STATUSES or (statuses[0] >= 500 and statuses[0] not in PERMANENT_STATUSES)
    if isinstance(innermost, OSError):
        return not isinstance(innermost, PERMANENT_TYPES) and innermost.errno in (None, *TRANSIENT_ERRNOS)
    return isinstance(innermost, EOFError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, requests, huggingface_hub, gcsfs or botocore."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(error, "status", None), getattr(response, "status_code", None), getattr(error, "code", None))
    return next((status for status in found if isinstance(status, int) and 100 <= status < 600), None)


def _imported_types() -> Iterator[type[BaseException]]:
    for module, names in TRANSIENT_TYPES.items():
        if module in sys.modules:
            yield from (getattr(sys.modules[module], name) for name in names)


class RemoteStream(io.RawIOBase):
    """A file of any fsspec file system, reopened at its position when reading fails."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        """0 if unknown."""
        self._position = 0
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return whether the size is known."""
        return self._size > 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; the file system is accessed only on the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset != self._position:
            self._position, self._file = start + offset, None
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read available bytes, at most the buffer's size."""

        def read() -> tuple[IO[bytes], bytes]:
            file, self._file = self._file, None  # discarded if this try stalls or fails
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
        except ValueError:  # a server without support for byte ranges
            left = self._position
            while left and (data := file.read(min(left, 1 << 20))):
                left -= len(data)
        return file
