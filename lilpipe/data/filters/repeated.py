"""Removal of repeated text: lines that many documents share, and paragraphs within one document.

Both filters preserve structure. Headings, table borders, closing brackets and the last words of wrapped sentences recur
everywhere, and removing lines from fenced or indented code would break it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from lilpipe.data.filters.chain import Bounds, Document, Rejection
from lilpipe.data.filters.frequent_keys import contains, frequent_keys

MIN_LINE_WORDS = 3
"""Lines with fewer words are neither counted nor removed, except in scripts without spaces between words."""

MIN_LINE_LETTERS = 12
"""Lines with fewer letters and digits are not removed; "Skip to content" has 13."""

MIN_PARAGRAPH_LETTERS = 40
"""Paragraphs with fewer letters and digits may repeat, such as headings and "For example:"."""

_LONG_LINE = re.compile(rf"(?:[\W_]*[^\W_]){{{MIN_LINE_LETTERS}}}")
_LONG_PARAGRAPH = re.compile(rf"(?:[\W_]*[^\W_]){{{MIN_PARAGRAPH_LETTERS}}}")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai ... Chinese
_FENCES = ("```", "~~~")
_FENCE = re.compile(r"\s*(?:```(?!.*```)|~~~)")  # not a fence that closes on its own line
_CODE_OR_HEADING = ("    ", "\t", "#")


class LineFilter:
    """Removes lines that many documents share: navigation, cookie notices, licence texts.

    Llama 3 (Grattafiori et al. 2024, 3.1.1) removes every line seen more than 6 times in a bucket of 30 million
    documents. Here a line counts once per document, because other filters handle repetition within a document; and
    structure is kept. Lines are compared without case and white space.
    """

    stage = "line_dedup"
    bounds = {"removed_lines": Bounds(), "removed_chars": Bounds()}  # noqa: RUF012 (number; share)

    def __init__(self, frequent_lines: Sequence[Path]) -> None:
        """``frequent_lines`` are the survey's results for the shard."""
        self.frequent_lines = frequent_lines
        self._frequent: np.ndarray | None = None

    def __call__(self, document: Document) -> Rejection | None:
        """Remove the lines; reject the document if no letter or digit is left."""
        if self._frequent is None:
            self._frequent = frequent_keys(self.frequent_lines)
        lines = document.text.split("\n")
        places, keys = line_keys(document.text)
        shared = [places[each] for each in np.flatnonzero(contains(self._frequent, keys))]
        cut = [place for place in shared if _LONG_LINE.match(lines[place])]
        document.scores["line_dedup.removed_lines"] = len(cut)
        document.scores["line_dedup.removed_chars"] = _cut_lines(document, lines, cut)
        if cut and not any(map(str.isalnum, document.text)):
            return Rejection("only_repeated_lines")
        return None


def document_line_keys(document: Document) -> np.ndarray:
    """Return the line keys that the survey counts for ``LineFilter``, uint64."""
    return line_keys(document.text)[1]


def line_keys(text: str) -> tuple[list[int], np.ndarray]:
    """Return the positions of lines that may be removed if they have enough letters, and their hashes, uint64."""
    folded = text.casefold().split("\n")  # case folding adds no line breaks
    in_fence = _fenced(text, folded)
    places, keys = [], []
    for place, line in enumerate(folded):
        if len(line) < MIN_LINE_LETTERS or line.startswith(_CODE_OR_HEADING) or (in_fence and in_fence[place]):
            continue
        words = line.split()
        if len(words) >= MIN_LINE_WORDS or _UNSPACED.search(line):
            places.append(place)
            keys.append(xxhash.xxh3_64_intdigest(" ".join(words).encode(errors="surrogatepass")))
    return places, np.array(keys, np.uint64)


class ParagraphFilter:
    """Removes paragraphs, separated by blank lines, that have occurred before in the same document."""

    stage = "paragraph_dedup"
    bounds = {"removed_paragraphs": Bounds(), "removed_chars": Bounds()}  # noqa: RUF012 (number; share)

    def __call__(self, document: Document) -> Rejection | None:
        """Remove repeated paragraphs; the first of each is kept, and no document is rejected."""
        lines = document.text.split("\n")
        seen: set[str] = set()
        cut: list[int] = []
        num_cut = 0
        for paragraph in _paragraphs(document.text, lines):
            text = " ".join(" ".join(lines[place] for place in paragraph).casefold().split())
            if text not in seen:
                seen.add(text)
            elif _LONG_PARAGRAPH.match(text):
                num_cut += 1
                cut += paragraph
        document.scores["paragraph_dedup.removed_paragraphs"] = num_cut
        document.scores["paragraph_dedup.removed_chars"] = _cut_lines(document, lines, cut)
        return None


def _paragraphs(text: str, lines: Sequence[str]) -> Iterator[range]:
    """Yield the line range of each paragraph that is not code."""
    in_fence = _fenced(text, lines)
    first = 0
    for end in range(len(lines) + 1):
        if end == len(lines) or not lines[end].strip():
            if first < end and not any(in_fence[first:end]) and not lines[first].startswith(_CODE_OR_HEADING[:2]):
                yield range(first, end)
            first = end + 1


def _fenced(text: str, lines: Sequence[str]) -> list[bool]:
    """Return which lines are in a Markdown code fence, the fence lines included; empty if there is no fence."""
    if not any(fence in text for fence in _FENCES):
        return []
    fences = [place for place, line in enumerate(lines) if _FENCE.match(line)]
    fenced = [False] * len(lines)
    fences += [len(lines) - 1] * (len(fences) % 2)
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        fenced[first : last + 1] = [True] * (last + 1 - first)
    return fenced


def _cut_lines(document: Document, lines: Sequence[str], cut: Sequence[int]) -> float:
    """Remove lines from a document, and the blank lines that would follow other blank lines; return the removed share
    of its characters.
    """
    if not cut:
        return 0.0
    gone, kept, after_cut = set(cut), [], False
    for place, line in enumerate(lines):
        if place in gone:
            after_cut = True
        elif line.strip():
            kept.append(line)
            after_cut = False
        elif not (after_cut and (not kept or not kept[-1].strip())):
            kept.append(line)
    before, document.text = len(document.text), "\n".join(kept)
    return 1 - len(document.text) / before
