"""Heuristic quality filters of Gopher, C4, FineWeb and Llama 3, which share one tokenization of the document.

The scores of Gopher, C4 and FineWeb are those of datatrove, which built FineWeb. Words are split nearly as by spaCy;
`python -m tests.benchmarks.heuristics` compares the decisions with datatrove's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from datatrove.utils.text import TERMINAL_PUNCTUATION

from lilpipe.config.corpus import QualityConfig
from lilpipe.data.filters.chain import Bounds, Document, Filter
from lilpipe.data.filters.outliers import DirtyWords, Divergence, DuplicateNgramCoverage, Unigrams
from lilpipe.data.filters.repetition import (
    duplicate_ngram_chars,
    duplicates,
    repeated_ngrams,
    split_lines,
    split_paragraphs,
    top_ngram_chars,
)
from lilpipe.data.filters.rules import Heuristic, Rule, Scores, at_least, at_most
from lilpipe.data.filters.words import ALPHABETIC, NON_SYMBOL, PUNCTUATION, SENTENCE_END, STOP_WORDS_FROM_BIT, Words


def heuristic_filters(config: QualityConfig, reference: Unigrams | None = None) -> list[Filter]:
    """Return the enabled heuristics in the order of application.

    C4 comes first because it changes the text. `max_kl_divergence` needs `reference`, the word distribution of the
    corpus.
    """
    filters: list[Filter] = []
    if config.c4:
        filters.append(C4())
    if config.gopher_repetition:
        filters.append(GopherRepetition(config))
    if config.gopher_quality:
        filters.append(GopherQuality(config))
    if config.fineweb:
        filters.append(FineWeb(config))
    if config.max_duplicate_ngram_coverage is not None:
        filters.append(DuplicateNgramCoverage(config.max_duplicate_ngram_coverage, config.coverage_ngram_size))
    if config.max_dirty_words is not None:
        filters.append(DirtyWords(config.max_dirty_words, config.dirty_words))
    if config.max_kl_divergence is not None:
        if reference is None:
            raise ValueError(
                "max_kl_divergence: got no reference, expected the unigrams of the corpus; count them first"
            )
        filters.append(Divergence(config.max_kl_divergence, reference))
    return filters


# --- Gopher -------------------------------------------------------------------------------------------------------


class GopherRepetition(Heuristic):
    """Rae et al. 2021 (Gopher), A1.1 and table A1: shares of lines, paragraphs and characters that are repeated.

    The denominator is all characters of the text, white space included. For the smaller n-gram sizes, the most frequent
    n-gram counts; for the larger ones, all repeated n-grams count, and no word counts twice.
    """

    stage = "gopher_repetition"

    def __init__(self, config: QualityConfig) -> None:
        top, duplicate = config.max_top_ngram_chars, config.max_duplicate_ngram_chars
        super().__init__(
            {
                "duplicate_paragraph_ratio": at_most(config.max_duplicate_paragraph_ratio, "repeated_paragraphs"),
                "duplicate_paragraph_chars": at_most(config.max_duplicate_paragraph_chars, "repeated_paragraph_chars"),
                "duplicate_line_ratio": at_most(config.max_duplicate_line_ratio, "repeated_lines"),
                "duplicate_line_chars": at_most(config.max_duplicate_line_chars, "repeated_line_chars"),
                **{f"top_{n}_gram_chars": at_most(most, f"frequent_{n}_gram") for n, most in top.items()},
                **{f"duplicate_{n}_gram_chars": at_most(most, f"repeated_{n}_grams") for n, most in duplicate.items()},
            }
        )
        self.top_sizes = set(top)
        self.duplicate_sizes = set(duplicate)
        self.sizes = sorted(self.top_sizes | self.duplicate_sizes)

    def scores(self, document: Document) -> Scores:
        """Yield the shares of repeated paragraphs, repeated lines, most frequent n-grams and repeated n-grams."""
        text = document.text
        num_chars = max(len(text), 1)
        paragraphs = split_paragraphs(text)
        num_duplicates, duplicate_chars = duplicates(paragraphs)
        yield "duplicate_paragraph_ratio", num_duplicates / len(paragraphs)
        yield "duplicate_paragraph_chars", duplicate_chars / num_chars

        lines = split_lines(text)
        num_duplicates, duplicate_chars = duplicates(lines)
        yield "duplicate_line_ratio", num_duplicates / len(lines)
        yield "duplicate_line_chars", duplicate_chars / num_chars
        yield from self._ngram_scores(document.words, num_chars)

    def _ngram_scores(self, words: Words, num_chars: int) -> Scores:
        offsets = [0, *words.token_lengths.cumsum().tolist()]
        for repeats in repeated_ngrams(words.token_hashes, self.sizes):
            n = repeats.size
            if n in self.top_sizes and n < len(offsets):
                yield f"top_{n}_gram_chars", top_ngram_chars(repeats, offsets) / num_chars
            if n in self.duplicate_sizes:
                yield f"duplicate_{n}_gram_chars", duplicate_ngram_chars(repeats, offsets) / num_chars


class GopherQuality(Heuristic):
    """Rae et al. 2021 (Gopher), A1.1: number and length of words, and shares of symbols, bullets, ellipses, alphabetic
    words and stop words.

    Words are all tokens, but their number and length exclude punctuation.
    """

    stage = "gopher_quality"

    def __init__(self, config: QualityConfig) -> None:
        super().__init__(
            {
                "num_words": Rule(Bounds(config.min_words, config.max_words), "too_few_words", "too_many_words"),
                "mean_word_length": Rule(
                    Bounds(config.min_mean_word_length, config.max_mean_word_length),
                    "words_too_short",
                    "words_too_long",
                ),
                "hash_word_ratio": at_most(config.max_symbol_word_ratio, "too_many_hashes"),
                "ellipsis_word_ratio": at_most(config.max_symbol_word_ratio, "too_many_ellipses"),
                "bullet_line_ratio": at_most(config.max_bullet_line_ratio, "too_many_bullet_lines"),
                "ellipsis_line_ratio": at_most(config.max_ellipsis_line_ratio, "too_many_ellipsis_lines"),
                "alpha_word_ratio": at_least(config.min_alpha_word_ratio, "too_few_alphabetic_words"),
                "num_stop_words": at_least(config.min_stop_words, "too_few_stop_words"),
            }
        )

    def scores(self, document: Document) -> Scores:
        """Yield the scores of words, symbols, lines, letters and stop words."""
        text, words = document.text, document.words
        num_tokens = max(len(words.marks), 1)
        is_word = (words.marks & NON_SYMBOL) != 0
        num_words = int(np.count_nonzero(is_word))
        yield "num_words", num_words
        yield "mean_word_length", int(words.token_lengths @ is_word) / max(num_words, 1)
        yield "hash_word_ratio", text.count("#") / num_tokens
        num_ellipses = text.count("...") + text.count("…")
        yield "ellipsis_word_ratio", num_ellipses / num_tokens

        lines = text.splitlines()
        num_lines = max(len(lines), 1)
        yield "bullet_line_ratio", sum([line.lstrip().startswith(("•", "-")) for line in lines]) / num_lines
        ends = [line.rstrip().endswith(("...", "…")) for line in lines] if num_ellipses else []
        yield "ellipsis_line_ratio", sum(ends) / num_lines

        yield "alpha_word_ratio", int(np.count_nonzero(words.marks & ALPHABETIC)) / num_tokens
        if document.language in (None, "en"):  # the stop words are English
            stop_words = int(np.bitwise_or.reduce(words.marks, initial=np.uint32(0))) >> STOP_WORDS_FROM_BIT
            yield "num_stop_words", stop_words.bit_count()


# --- FineWeb ------------------------------------------------------------------------------------------------------


class FineWeb(Heuristic):
    """Penedo et al. 2024 (FineWeb), 3.6: shares of lines that end in punctuation, are short, or are repeated, and line
    breaks per word. Blank lines are ignored.
    """

    stage = "fineweb"
    short_line_chars = 30

    def __init__(self, config: QualityConfig) -> None:
        super().__init__(
            {
                "punctuated_line_ratio": at_least(config.min_line_punctuation_ratio, "too_few_punctuated_lines"),
                "short_line_ratio": at_most(config.max_short_line_ratio, "too_many_short_lines"),
                "duplicate_line_chars": at_most(config.max_duplicate_line_char_ratio, "duplicate_line_chars"),
                "line_breaks_per_word": at_most(config.max_line_breaks_per_word, "too_many_line_breaks"),
            }
        )

    def scores(self, document: Document) -> Scores:
        """Yield the scores of line endings, line lengths, repeated lines and line breaks."""
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        num_lines = max(len(lines), 1)
        yield "punctuated_line_ratio", sum([line[-1] in TERMINAL_PUNCTUATION for line in lines]) / num_lines
        yield "short_line_ratio", sum([len(line) <= self.short_line_chars for line in lines]) / num_lines
        num_breaks = text.count("\n")
        yield "duplicate_line_chars", duplicates(lines)[1] / max(len(text) - num_breaks, 1)
        yield "line_breaks_per_word", num_breaks / max(len(document.words.marks), 1)


# --- C4 -----------------------------------------------------------------------------------------------------------

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_UNWANTED = ("javascript", "lorem ipsum", "terms of use", "privacy policy", "cookie")


class C4(Heuristic):
    """Raffel et al. 2020 (T5), 2.2: keeps lines that end in terminal punctuation and have at least three words.

    It removes lines about JavaScript, cookies or terms of use, lines with a word of more than 1,000 characters, and
    citation markers. The remaining text must have at least five sentences, no curly bracket and no "lorem ipsum".
    """

    stage = "c4"
    min_line_words = 3
    max_word_chars = 1000
    min_sentences = 5

    def __init__(self) -> None:
        super().__init__(
            {
                "lorem_ipsum": at_most(0, "lorem_ipsum"),
                "curly_bracket": at_most(0, "curly_bracket"),
                "num_sentences": at_least(self.min_sentences, "too_few_sentences"),
            }
        )

    def scores(self, document: Document) -> Scores:
        """Yield the scores, and replace the text by the kept lines."""
        lines = list(self._kept_lines(document.text))
        text = "\n".join(lines).strip()
        yield "lorem_ipsum", int("lorem ipsum" in text.lower())
        yield "curly_bracket", int("{" in text)
        yield "num_sentences", count_sentences(lines)
        if text != document.text:
            document.text = text

    def _kept_lines(self, text: str) -> Iterator[str]:
        lowered = text.lower()
        suspicious = any(phrase in lowered for phrase in _UNWANTED)
        cited = "[" in text
        for whole in text.splitlines():
            line = whole.strip()
            bare = _CITATION.sub("", line) if cited else line
            if bare[-1:] not in _LINE_ENDS or bare.endswith("..."):
                continue
            words = line.split(None, self.min_line_words - 1)
            if len(words) < self.min_line_words or (len(line) > self.max_word_chars and self._has_long_word(line)):
                continue
            if not suspicious or not self._is_notice(bare.lower()):
                yield bare

    def _has_long_word(self, line: str) -> bool:
        return any(len(word) > self.max_word_chars for word in line.split())

    @staticmethod
    def _is_notice(line: str) -> bool:
        """Return whether the line is removed for its content; "lorem ipsum" and "{" reject the document instead."""
        if "lorem ipsum" in line:
            return False
        return "javascript" in line or ("{" not in line and any(policy in line for policy in _POLICIES))


_LINE_ENDS = frozenset(".?!\"'")


def count_sentences(lines: Sequence[str]) -> int:
    """Count the sentences of lines. A sentence ends at the end of its line, and starts at the first word after `.`,
    `!`, `?` or a similar mark.
    """
    if not lines:
        return 0
    marks = Words(" . ".join(lines)).marks
    ends = (marks[(marks & (SENTENCE_END | PUNCTUATION)) != PUNCTUATION] & SENTENCE_END) != 0
    return 1 + int(np.count_nonzero(ends[:-1] & ~ends[1:]))
