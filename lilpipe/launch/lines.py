"""Follow a file that another process writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


class Lines:
    """Lines appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[str]:
        """Yield the complete lines appended since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._position += len(line)
                yield line.decode("utf-8", errors="replace")
