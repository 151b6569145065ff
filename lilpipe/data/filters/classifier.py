"""Quality classifier: fastText, trained on texts that the user provides as good and bad examples.

GPT-3 (Brown et al. 2020, appendix A) used a classifier of curated text against raw web pages. DCLM (Li et al. 2024)
found that fastText on bigrams, keeping a share of the best documents, beats more expensive classifiers. Classes are
balanced: the larger class is reduced to the examples with the smallest hashes, so the order of examples and files does
not matter. With one thread and a fixed seed, the model file is the same to the byte.

The model file is fastText's binary format, numbers and strings of known lengths: no pickle, no code.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from fasttext.FastText import _FastText, train_supervised

from lilpipe.config.corpus import ClassifierConfig
from lilpipe.data.filters.chain import Bounds, Document
from lilpipe.data.filters.fasttext_model import LABEL, load
from lilpipe.errors import ConfigError, DataError

FIELD = "corpus.classifier"
MODEL_FILE = "classifier.bin"
GOOD, BAD = "good", "bad"

MIN_TRAINED, MIN_VALIDATION_EXAMPLES = 20, 5
"""Minimum number of examples per class for training and for validation."""

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
MAX_NGRAM_BUCKETS = 2**18
"""Maximum number of embedding rows for hashed n-grams: 64 MiB with 64 dimensions, in each worker. It is lower if the
examples have fewer words. fastText's default of 2 million needs half a gigabyte."""
_MARKS = ".,!?;:\"()'`-/="
_M_PERTURB = -6  # malloc.h
_SEED = 0
_SPLIT_SEED, _ORDER_SEED = 1, 2  # seeds of the hashes for the validation split and for the order


class AtThreshold(NamedTuple):
    """Classifier quality on validation examples, half of them good, at one threshold."""

    min_score: float
    precision: float | None
    """Share of good examples among the kept ones; None if none is kept."""
    recall: float
    """Share of the good examples that are kept."""
    f1: float


@dataclass(frozen=True)
class ClassifierReport:
    """Number of examples, and quality on the validation examples."""

    num_good: int
    """Distinct non-empty good examples that are not also bad examples."""
    num_bad: int
    num_in_both: int
    """Texts in both classes, which are left out."""
    num_trained: int
    """Training examples per class."""
    num_validation: int
    """Validation examples per class."""
    auc: float
    """Probability that a good validation example scores above a bad one; ties count half."""
    at_thresholds: tuple[AtThreshold, ...]


class ClassifierFilter:
    """Records the probability of being good. It rejects nothing: a share to keep needs the scores of all documents."""

    stage = "classifier"
    bounds: Mapping[str, Bounds] = MappingProxyType({"score": Bounds()})

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path

    def __call__(self, document: Document) -> None:
        """Record the score."""
        document.scores["classifier.score"] = probability(load(self.model_path, FIELD), document.text)


def keep_threshold(scores: np.ndarray, keep_ratio: float, *, counts: np.ndarray | None = None) -> float:
    """Return the largest score that at least ``keep_ratio`` of the documents reach; 0 without documents.

    Args:
        scores: float [n].
        keep_ratio: Above 0, at most 1.
        counts: Number of documents with each score; 1 each if None. A histogram can be passed as the lower edges of its
            bins and their counts.
    """
    counts = np.ones(len(scores), np.int64) if counts is None else counts
    descending = np.argsort(-scores, kind="stable")
    num_kept = np.cumsum(counts[descending])
    if not len(scores) or num_kept[-1] == 0:
        return 0.0
    wanted = math.ceil(keep_ratio * int(num_kept[-1]) - 1e-9)  # 0.1 * 30 is slightly above 3
    return float(scores[descending[np.searchsorted(num_kept, wanted)]])


def train_classifier(
    good: Iterable[str], bad: Iterable[str], config: ClassifierConfig, folder: Path
) -> ClassifierReport:
    """Train on examples, measure quality on validation examples, and write ``MODEL_FILE`` to the folder.

    Raises:
        DataError: A class has too few distinct examples.
        ConfigError: Training diverged; the learning rate is too high.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        examples = _Examples(scratch, good, bad, config.validation_ratio)
        lines = scratch / "train.txt"
        num_words = examples.write(lines, examples.trained)
        try:
            with _zeroed_memory():
                model = train_supervised(
                    str(lines),
                    lr=config.learning_rate,
                    epoch=config.num_epochs,
                    dim=config.dimension,
                    wordNgrams=config.word_ngrams,
                    bucket=min(MAX_NGRAM_BUCKETS, num_words),
                    seed=_SEED,
                    thread=1,
                    verbose=0,
                )
        except RuntimeError as error:  # "Encountered NaN."
            raise ConfigError(
                f"{FIELD}.learning_rate: got {config.learning_rate}, and training diverged ({error}); lower it"
            ) from error
        report = _measure(model, examples, config)
        model.save_model(str(scratch / MODEL_FILE))
        (scratch / MODEL_FILE).replace(folder / MODEL_FILE)
    return report


@contextlib.contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Make glibc return zeroed memory.

    With one thread, fastText's `DenseMatrix::uniform` initialises only the first tenth of a matrix; newer builds leave
    the rest uninitialised. Then the model differs between runs, and training fails with "Encountered NaN" if the memory
    holds a NaN. Zeros are a good initial value too, because the first tenth has the most frequent words. Without glibc,
    this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, 0xFF)  # memory is filled with the complement
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def probability(model: _FastText, text: str) -> float:
    """Return the probability that a text is good."""
    return _probability(model, features(text))


def _probability(model: _FastText, line: str) -> float:
    for score, label in model.f.predict(line + "\n", 2, 0.0, "strict"):
        if label == LABEL + GOOD:
            return min(float(score), 1.0)  # rounding makes it slightly larger than 1
    return 0.0


def features(text: str) -> str:
    """Return the text as fastText input: one line of lower-case words, with frequent punctuation marks separated, and
    nothing that fastText would parse as a label. Joulin et al. 2016 did the same. Splitting by a regular expression
    takes twice the time.
    """
    text = text.encode(errors="replace").decode().lower().replace(LABEL, "label")
    for mark in _MARKS:
        text = text.replace(mark, f" {mark} ")
    return " ".join(text.split())


class _Example(NamedTuple):
    """Position of an example on disk; sorts by hash."""

    order: int
    label: str
    start: int
    num_bytes: int


class _Examples:
    """Examples on disk, one per line, balanced and split; only their positions are in memory."""

    def __init__(self, folder: Path, good: Iterable[str], bad: Iterable[str], validation_ratio: float) -> None:
        self.folder = folder
        found = {GOOD: self._store(GOOD, good, validation_ratio), BAD: self._store(BAD, bad, validation_ratio)}
        in_both = found[GOOD].keys() & found[BAD].keys()
        sides: dict[bool, dict[str, list[_Example]]] = {side: {GOOD: [], BAD: []} for side in (False, True)}
        for label, by_text in found.items():
            for text_hash in by_text.keys() - in_both:
                example, is_validation = by_text[text_hash]
                sides[is_validation][label].append(example)
        self.num_in_both = len(in_both)
        self.num_good, self.num_bad = (len(found[label]) - len(in_both) for label in (GOOD, BAD))
        self.trained = _balance(sides[False], MIN_TRAINED, "for training")
        self.held_out = _balance(
            sides[True], MIN_VALIDATION_EXAMPLES, f"for validation (a share of {validation_ratio})"
        )

    def _store(self, label: str, texts: Iterable[str], validation_ratio: float) -> dict[int, tuple[_Example, bool]]:
        """Write the distinct texts of a class; return the examples by hash, with whether they are for validation."""
        found: dict[int, tuple[_Example, bool]] = {}
        with (self.folder / label).open("wb") as file:
            for text in texts:
                line = features(text).encode()
                text_hash = xxhash.xxh3_64_intdigest(line)
                if line and text_hash not in found:
                    is_validation = xxhash.xxh3_64_intdigest(line, _SPLIT_SEED) < validation_ratio * 2**64
                    order = xxhash.xxh3_64_intdigest(line, _ORDER_SEED)
                    found[text_hash] = _Example(order, label, file.tell(), len(line)), is_validation
                    file.write(line)
        return found

    def lines(self, examples: list[_Example]) -> Iterable[tuple[str, bytes]]:
        """Yield the labels and lines of examples."""
        with (self.folder / GOOD).open("rb") as good, (self.folder / BAD).open("rb") as bad:
            files: dict[str, BinaryIO] = {GOOD: good, BAD: bad}
            for example in examples:
                files[example.label].seek(example.start)
                yield example.label, files[example.label].read(example.num_bytes)

    def write(self, path: Path, examples: list[_Example]) -> int:
        """Write the training file for fastText; return its number of words."""
        num_words = 0
        with path.open("wb") as file:
            for label, line in self.lines(examples):
                file.write(f"{LABEL}{label} ".encode() + line + b"\n")
                num_words += line.count(b" ") + 1
        return num_words


def _balance(classes: dict[str, list[_Example]], least: int, purpose: str) -> list[_Example]:
    """Return equally many examples per class, sorted by hash, which mixes the classes."""
    num_each = min(map(len, classes.values()))
    if num_each < least:
        got = " and ".join(f"{len(examples)} {label}" for label, examples in classes.items())
        raise DataError(
            f"{FIELD}: got {got} examples {purpose}, expected at least {least} of each; add examples, or change "
            "validation_ratio (duplicates count once; examples that are both good and bad do not count)"
        )
    return sorted(example for examples in classes.values() for example in sorted(examples)[:num_each])


def _measure(model: _FastText, examples: _Examples, config: ClassifierConfig) -> ClassifierReport:
    scores: dict[str, list[float]] = {GOOD: [], BAD: []}
    for label, line in examples.lines(examples.held_out):
        scores[label].append(_probability(model, line.decode()))
    good, bad = np.sort(scores[GOOD]), np.sort(scores[BAD])
    thresholds = {*THRESHOLDS, *([] if config.min_score is None else [config.min_score])}
    return ClassifierReport(
        num_good=examples.num_good,
        num_bad=examples.num_bad,
        num_in_both=examples.num_in_both,
        num_trained=len(examples.trained) // 2,
        num_validation=len(good),
        auc=area_under_curve(good, bad),
        at_thresholds=tuple(at_threshold(good, bad, each) for each in sorted(thresholds)),
    )


def at_threshold(good: np.ndarray, bad: np.ndarray, min_score: float) -> AtThreshold:
    """Return precision, recall and F1 of keeping scores of at least ``min_score``, for equally many good and bad
    ones.
    """
    kept_good, kept_bad = int((good >= min_score).sum()), int((bad >= min_score).sum())
    num_kept = kept_good + kept_bad
    return AtThreshold(
        min_score=min_score,
        precision=kept_good / num_kept if num_kept else None,
        recall=kept_good / len(good),
        f1=2 * kept_good / (num_kept + len(good)),
    )


def area_under_curve(good: np.ndarray, bad: np.ndarray) -> float:
    """Return the area under the ROC curve of two sorted arrays of scores, by ranks (Mann-Whitney U)."""
    below, not_above = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + not_above).mean() / 2 / len(bad))
