"""Frequent keys of the corpus, as sorted arrays of 64-bit hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lilpipe.schemas.tables import read_table


def frequent_keys(paths: Sequence[Path]) -> np.ndarray:
    """Read the keys that ``MergeCounts`` wrote, sorted, uint64; memory-mapped if they are in one file."""
    parts = [read_table(path)["key"].to_numpy() for path in paths]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint64), *parts])


def contains(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return which of ``wanted`` are in the sorted ``keys``, as booleans."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    places = np.searchsorted(keys, wanted)
    places[places == len(keys)] = 0
    return keys[places] == wanted
