"""Small tables as Arrow IPC files: written whole and atomically, read as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from lilpipe.data import documents
from lilpipe.errors import DataError

write_table = documents.write_rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of an Arrow IPC file. Raises ``DataError`` if it is missing or damaged."""
    try:
        return documents.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: cannot be read as an Arrow file ({error}); run the stage that wrote it again"
        ) from error
