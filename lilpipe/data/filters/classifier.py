"""A quality classifier: fastText, trained here on texts that the user names as good and bad.

GPT-3 (Brown et al. 2020, appendix A) trained one on curated text against raw web pages; DCLM (Li et al. 2024) found
fastText on bigrams, with a share of the best documents kept, to beat costlier ones. Examples are balanced: of the
class with more of them only as many are taken as the other has, those with the smallest hashes, so that neither their
order nor their files matter. One thread and a fixed seed make the model file the same, to the byte, each time.

The file is fastText's own binary, numbers and strings of known lengths: no pickle, nothing in it is executed.
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
"""Fewest examples of a class to learn from, and to measure on."""

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
MAX_NGRAM_BUCKETS = 2**18
"""Rows for hashed n-grams, 64 MiB of them in 64 dimensions, which each worker holds; fewer where the examples have
fewer words. fastText's own 2 million make half a gigabyte."""
_MARKS = ".,!?;:\"()'`-/="
_M_PERTURB = -6  # malloc.h
_SEED = 0
_SPLIT_SEED, _ORDER_SEED = 1, 2  # of the hashes that choose what is held out, and the order


class AtThreshold(NamedTuple):
    """What the classifier does to the held-out examples, of which half are good, with one threshold."""

    min_score: float
    precision: float | None
    """Share of the kept that are good; None where nothing is kept."""
    recall: float
    """Share of the good that are kept."""
    f1: float


@dataclass(frozen=True)
class ClassifierReport:
    """Examples and held-out quality of a classifier."""

    num_good: int
    """Distinct good examples with words in them, without those that are also bad ones."""
    num_bad: int
    num_in_both: int
    """Texts that were given as good and as bad, and so left out."""
    num_trained: int
    """Of each class, like the next."""
    num_validation: int
    auc: float
    """How often a held-out good example scores above a bad one; ties count half."""
    at_thresholds: tuple[AtThreshold, ...]


class ClassifierFilter:
    """Notes the probability of being good; rejects nothing, since a share to keep means a score that all decide."""

    stage = "classifier"
    bounds: Mapping[str, Bounds] = MappingProxyType({"score": Bounds()})

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path

    def __call__(self, document: Document) -> None:
        """Note the score."""
        document.scores["classifier.score"] = probability(load(self.model_path, FIELD), document.text)


def keep_threshold(scores: np.ndarray, keep_ratio: float, *, counts: np.ndarray | None = None) -> float:
    """The greatest score such that at least ``keep_ratio`` of the documents have it or more; 0 for no documents.

    Args:
        scores: float [n].
        keep_ratio: Above 0, at most 1.
        counts: How many documents have each of the scores; one each if not given. So a histogram may be handed over
            as the lower edges of its bins and their counts.
    """
    counts = np.ones(len(scores), np.int64) if counts is None else counts
    descending = np.argsort(-scores, kind="stable")
    num_kept = np.cumsum(counts[descending])
    if not len(scores) or num_kept[-1] == 0:
        return 0.0
    wanted = math.ceil(keep_ratio * int(num_kept[-1]) - 1e-9)  # 0.1 * 30 is a little above 3
    return float(scores[descending[np.searchsorted(num_kept, wanted)]])


def train_classifier(
    good: Iterable[str], bad: Iterable[str], config: ClassifierConfig, folder: Path
) -> ClassifierReport:
    """Train on examples and measure on those held out; leaves ``MODEL_FILE`` in the folder.

    Raises:
        DataError: A class has too few distinct examples.
        ConfigError: The learning rate is too high to learn anything.
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
    """Makes glibc hand out zeroed memory.

    With one thread, fastText's `DenseMatrix::uniform` draws the first tenth of a matrix alone, and newer builds leave
    the rest as they find it: another model each time, and "Encountered NaN" where the memory happens to hold one. Zeros
    serve as well to start from, since the first tenth has the commonest words. Elsewhere than in glibc nothing is done.
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
    """That a text is good."""
    return _probability(model, features(text))


def _probability(model: _FastText, line: str) -> float:
    for score, label in model.f.predict(line + "\n", 2, 0.0, "strict"):
        if label == LABEL + GOOD:
            return min(float(score), 1.0)  # rounding takes it a little above 1
    return 0.0


def features(text: str) -> str:
    """What fastText sees of a text: on one line lower-case words, the commonest marks apart, and nothing that it would
    take for a label. Joulin et al. 2016 did the same; words and marks by a regular expression take twice the time.
    """
    text = text.encode(errors="replace").decode().lower().replace(LABEL, "label")
    for mark in _MARKS:
        text = text.replace(mark, f" {mark} ")
    return " ".join(text.split())


class _Example(NamedTuple):
    """Where an example is kept, ordered by hash."""

    order: int
    label: str
    start: int
    num_bytes: int


class _Examples:
    """Examples on disk, a line each, balanced and split; memory holds their places alone."""

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
        self.trained = _balance(sides[False], MIN_TRAINED, "to learn from")
        self.held_out = _balance(sides[True], MIN_VALIDATION_EXAMPLES, f"held out (a share of {validation_ratio})")

    def _store(self, label: str, texts: Iterable[str], validation_ratio: float) -> dict[int, tuple[_Example, bool]]:
        """Write down the distinct texts of a class; gives them by their hash, and whether they are held out."""
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
        """Labels and lines of examples."""
        with (self.folder / GOOD).open("rb") as good, (self.folder / BAD).open("rb") as bad:
            files: dict[str, BinaryIO] = {GOOD: good, BAD: bad}
            for example in examples:
                files[example.label].seek(example.start)
                yield example.label, files[example.label].read(example.num_bytes)

    def write(self, path: Path, examples: list[_Example]) -> int:
        """Write the file that fastText trains on; gives the number of its words."""
        num_words = 0
        with path.open("wb") as file:
            for label, line in self.lines(examples):
                file.write(f"{LABEL}{label} ".encode() + line + b"\n")
                num_words += line.count(b" ") + 1
        return num_words


def _balance(classes: dict[str, list[_Example]], least: int, purpose: str) -> list[_Example]:
    """As many of each class, in the order of their hashes, which mixes the classes."""
    num_each = min(map(len, classes.values()))
    if num_each < least:
        got = " and ".join(f"{len(examples)} {label}" for label, examples in classes.items())
        raise DataError(
            f"{FIELD}: got {got} examples {purpose}, expected at least {least} of each; name more, or set another "
            "validation_ratio (examples count once, and not if they are both good and bad)"
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
    """Precision, recall and F1 of keeping scores from ``min_score`` up; as many good as bad scores stand for both."""
    kept_good, kept_bad = int((good >= min_score).sum()), int((bad >= min_score).sum())
    num_kept = kept_good + kept_bad
    return AtThreshold(
        min_score=min_score,
        precision=kept_good / num_kept if num_kept else None,
        recall=kept_good / len(good),
        f1=2 * kept_good / (num_kept + len(good)),
    )


def area_under_curve(good: np.ndarray, bad: np.ndarray) -> float:
    """Area under the ROC curve of two sorted arrays of scores, by ranks (Mann-Whitney)."""
    below, not_above = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + not_above).mean() / 2 / len(bad))
