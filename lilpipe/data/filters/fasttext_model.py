"""fastText model files, checked before they are loaded (Joulin et al. 2016, "Bag of Tricks"; "FastText.zip").

fastText reads whatever it is given: from a file cut off in the middle it loads nonsense, never returns, or crashes the
process. So the lengths that the file itself states are added up first. The format is fastText's own: numbers and
strings of known lengths, no pickle, nothing that is executed.
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
_NUM_CENTROIDS = 256  # of each sub-vector in a quantised matrix


def load(path: Path, field: str) -> _FastText:
    """A supervised model, loaded once by each process, and again when its file has changed.

    Raises:
        ConfigError: There is no such file; ``field`` is the setting that names it.
        DataError: It is no fastText model, is cut off, or has no labels.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(
            f"{field}: got {str(path)!r}, where there is no file; name a fastText model (.bin or .ftz)"
        ) from error
    return _load(path, field, modified)


@functools.lru_cache(maxsize=4)
def _load(path: Path, field: str, _modified: int) -> _FastText:
    try:
        expected, got = stated_size(path), path.stat().st_size
    except (ValueError, OSError, struct.error) as error:
        raise DataError(f"{field}: {path} is no complete fastText model ({error}); fetch or train it again") from error
    if expected != got:
        raise DataError(f"{field}: {path} has {got} bytes, expected {expected}; it is damaged, fetch or train it again")
    model = _FastText(str(path))
    if not all(str(label).startswith(LABEL) for label in model.get_labels()):  # its words, if it is no classifier
        raise DataError(f"{field}: {path} has no labels {LABEL}...; name a supervised fastText model")
    return model


def codes(model: _FastText) -> set[str]:
    """The labels that a model tells apart, without fastText's prefix."""
    return {str(label).removeprefix(LABEL) for label in model.get_labels()}


def best_label(model: _FastText, text: str) -> tuple[str, float]:
    """The most likely label and its probability; ("", 0) where the model has nothing to go by.

    A call on the bare binding, which spares fastText's wrapper; a lone surrogate would stop it.
    """
    line = " ".join(text.encode(errors="replace").decode().split()) + "\n"
    scored = model.f.predict(line, 1, 0.0, "strict")
    if not scored:
        return "", 0.0
    score, label = scored[0]
    return label.removeprefix(LABEL), min(float(score), 1.0)  # rounding takes it a little above 1


def stated_size(path: Path) -> int:
    """The bytes that a complete model file has by what stands in it.

    Raises:
        ValueError: It does not start like a model, or is too short to tell.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.take("ii") not in [(MAGIC, version) for version in VERSIONS]:
            raise ValueError("it does not start as one does")
        reader.skip(12 * 4 + 8)  # arguments of the training
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
    """A position in the file that moves past what has been read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def skip(self, num_bytes: int) -> None:
        if num_bytes < 0:
            raise ValueError(f"a negative length at byte {self.position}")
        self.position += num_bytes

    def skip_entry(self) -> None:
        """A word or label: its letters, a zero, its count and its kind."""
        end = self.data.find(b"\0", self.position)
        if end < 0:
            raise ValueError("it breaks off in its vocabulary")
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
