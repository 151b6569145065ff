"""fastText model files, validated before loading (Joulin et al. 2016, "Bag of Tricks"; "FastText.zip").

fastText does not validate its input: a truncated file loads as garbage, hangs, or crashes the process. So the expected
size is computed first, from the lengths in the file. The format is fastText's own: numbers and strings of known
lengths, no pickle, no code.
"""

from __future__ import annotations

import functools
import mmap
import struct
from pathlib import Path

from fasttext.FastText import _FastText

from lilpipe.errors import ConfigError, DataError

LABEL = "__label__"
MAGIC, VERSIONS = 793712314, (11, 12)
_NUM_CENTROIDS = 256  # per sub-vector of a quantised matrix


def load(path: Path, field: str) -> _FastText:
    """Load a supervised model. It is cached in each process, and loaded again if the file has changed.

    Raises:
        ConfigError: The file does not exist; ``field`` is the setting that names it.
        DataError: The file is not a fastText model, is truncated, or has no labels.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(
            f"{field}: got {str(path)!r}, which does not exist; name a fastText model (.bin or .ftz)"
        ) from error
    return _load(path, field, modified)


@functools.lru_cache(maxsize=4)
def _load(path: Path, field: str, _modified: int) -> _FastText:
    try:
        expected, got = stated_size(path), path.stat().st_size
    except (ValueError, OSError, struct.error) as error:
        raise DataError(
            f"{field}: {path} is not a complete fastText model ({error}); download or train it again"
        ) from error
    if expected != got:
        raise DataError(
            f"{field}: {path} has {got} bytes, expected {expected}; it is damaged, download or train it again"
        )
    model = _FastText(str(path))
    if not all(str(label).startswith(LABEL) for label in model.get_labels()):  # an unsupervised model returns its words
        raise DataError(f"{field}: {path} has no labels {LABEL}...; name a supervised fastText model")
    return model


def codes(model: _FastText) -> set[str]:
    """Return the labels of a model, without fastText's prefix."""
    return {str(label).removeprefix(LABEL) for label in model.get_labels()}


def best_label(model: _FastText, text: str) -> tuple[str, float]:
    """Return the most likely label and its probability; ("", 0) if the text has no known feature.

    It calls the bare binding, which is faster than fastText's wrapper. Lone surrogates are replaced because they fail.
    """
    line = " ".join(text.encode(errors="replace").decode().split()) + "\n"
    scored = model.f.predict(line, 1, 0.0, "strict")
    if not scored:
        return "", 0.0
    score, label = scored[0]
    return label.removeprefix(LABEL), min(float(score), 1.0)  # rounding makes it slightly larger than 1


def stated_size(path: Path) -> int:
    """Return the size in bytes of the complete model file, computed from the lengths in the file.

    Raises:
        ValueError: The file does not start like a fastText model, or is too short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.take("ii") not in [(MAGIC, version) for version in VERSIONS]:
            raise ValueError("wrong magic number or version")
        reader.skip(12 * 4 + 8)  # training arguments
        num_entries, _, _, _, num_pruned = reader.take("iiiqq")
        for _ in range(num_entries):
            reader.skip_entry()
        reader.skip(8 * max(num_pruned, 0))
        quantised = reader.take("?")[0]
        reader.skip_matrix(quantised=quantised)
        quantised_output = reader.take("?")[0]
        reader.skip_matrix(quantised=quantised and quantised_output)
        return reader.position


class _Reader:
    """Reader with a position in the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def skip(self, num_bytes: int) -> None:
        if num_bytes < 0:
            raise ValueError(f"negative length at byte {self.position}")
        self.position += num_bytes

    def skip_entry(self) -> None:
        """Skip a word or label: its characters, a zero byte, its count and its type."""
        end = self.data.find(b"\0", self.position)
        if end < 0:
            raise ValueError("the vocabulary is truncated")
        self.position = end + 1 + 8 + 1

    def skip_matrix(self, *, quantised: bool) -> None:
        if not quantised:
            rows, columns = self.take("qq")
            self.skip(rows * columns * 4)
            return
        with_norms, rows, _, num_codes = self.take("?qqi")
        self.skip(num_codes)
        self._skip_quantiser()
        if with_norms:
            self.skip(rows)
            self._skip_quantiser()

    def _skip_quantiser(self) -> None:
        dimension, *_ = self.take("iiii")
        self.skip(dimension * _NUM_CENTROIDS * 4)
