"""Text extraction in a separate process, so that a page that takes too much time or memory ends only that process.

The process limits itself. Its timer kills it even inside a libxml2 call, where a signal handler would have to wait. The
timer counts CPU time, so a busy machine rejects the same pages as an idle one.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import struct
import subprocess
import sys
from typing import IO

CPU_SECONDS = 10.0
"""CPU time limit per page."""
MEMORY_BYTES = 4 * 2**30
"""Address space limit."""

_HEADER = struct.Struct("<?Q")
"""Success flag, and number of bytes that follow."""


class ExtractionFailed(ValueError):
    """Raised for a page without extracted text, with the reason."""


class ExtractionProcess:
    """Extracts the text of pages in a separate process, which starts on demand."""

    def __init__(self, *, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.cpu_seconds = cpu_seconds
        self.memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ExtractionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def extract(self, html: str) -> str:
        """Return the text of a page, empty if it has none. Raises ``ExtractionFailed``."""
        if self._process is None:
            command = [sys.executable, "-m", __name__, str(self.cpu_seconds), str(self.memory_bytes)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, True, html)
            answer = _receive(self._process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise ExtractionFailed(self._why_it_ended())
        good, text = answer
        if not good:
            raise ExtractionFailed(text)
        return text

    def _why_it_ended(self) -> str:
        status = self._end()
        if status == -signal.SIGPROF:
            return f"took more than {self.cpu_seconds:g} s of CPU time to extract"
        return f"ended the extraction process with {f'signal {-status}' if status < 0 else f'exit status {status}'}"

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # ends the process, which waits for input
        process.stdout.close()
        return process.wait()


def _send(stream: IO[bytes], good: bool, text: str) -> None:
    content = text.encode(errors="replace")
    stream.write(_HEADER.pack(good, len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[bool, str] | None:
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    good, size = _HEADER.unpack(header)
    content = stream.read(size)
    return (good, content.decode()) if len(content) == size else None


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Read pages from stdin and write their texts to stdout until the input ends."""
    from lilpipe.data.sources import extraction  # only this process needs it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, most))
    logging.disable(logging.CRITICAL)  # trafilatura's warnings about pages
    while (page := _receive(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            good, text = True, extraction.extract(page[1])
        except MemoryError:
            good, text = False, f"took more than {memory_bytes:,} bytes of memory to extract"
        except Exception as error:  # any error of trafilatura
            good, text = (
                False,
                str(error) if isinstance(error, extraction.Refused) else f"cannot be extracted: {error!r}",
            )
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sys.stdout.buffer, good, text)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
