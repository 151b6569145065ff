"""The chain of filters in the order of application, and the simplest filters.

Cheap filters come first, then filters that change the text, so that all later filters judge the final text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lilpipe.config.corpus import CorpusConfig, FilterConfig, PIIConfig
from lilpipe.data.filters.chain import Bounds, Document, Filter, Rejection
from lilpipe.data.filters.classifier import ClassifierFilter
from lilpipe.data.filters.decontamination import DecontaminationFilter
from lilpipe.data.filters.heuristics import heuristic_filters
from lilpipe.data.filters.language import LanguageFilter
from lilpipe.data.filters.normalise import normalise
from lilpipe.data.filters.pii import PIIFilter
from lilpipe.data.filters.repeated import LineFilter, ParagraphFilter
from lilpipe.data.filters.url import UrlFilter
from lilpipe.data.learn import Learnt
from lilpipe.data.survey import dropped_pages, merged_files
from lilpipe.errors import ConfigError
from lilpipe.extensions import load


def build_filters(config: CorpusConfig, learnt: Learnt, shard: int) -> list[Filter]:
    """Return the filters that the config enables, for one shard."""
    filters: list[Filter] = []
    if config.url.blocked_domains or config.url.blocked_words:
        filters.append(UrlFilter(config.url))
    if learnt.pages is not None:
        filters.append(UrlDuplicateFilter(dropped_pages(learnt.pages, shard)))
    filters.append(LengthFilter(config.min_chars))
    if config.exact_dedup.documents:
        filters.append(ExactDuplicateFilter())
    by_source = {source.name: source.languages for source in config.sources if source.languages is not None}
    filters.append(LanguageFilter(config.language, config.languages, by_source))
    if learnt.lines is not None:
        filters.append(LineFilter(merged_files(learnt.lines, shard)))
    if config.exact_dedup.paragraphs:
        filters.append(ParagraphFilter())
    filters += heuristic_filters(config.quality, learnt.unigrams())
    filters += [_own(each) for each in config.filters]
    if config.pii != OFF:
        filters.append(PIIFilter(config.pii))
    if learnt.evaluation is not None:
        common = merged_files(learnt.ngrams, shard)
        filters.append(DecontaminationFilter(config.decontamination, learnt.evaluation, common))
    if learnt.classifier is not None:
        filters.append(ClassifierFilter(learnt.classifier))
    return filters


def _own(config: FilterConfig) -> Filter:
    """Return a custom filter: an instance of its class, created with its options."""
    extension = config.extension()
    assert extension is not None
    made = load(extension)(**config.options)
    if missing := [name for name in ("stage", "bounds", "__call__") if not hasattr(made, name)]:
        raise ConfigError(
            f"{extension}: got a {type(made).__name__} without {', '.join(missing)}; expected a filter with the "
            "attributes of lilpipe.data.filters.chain.Filter"
        )
    return made


OFF = PIIConfig(emails=False, ip_addresses=False, phone_numbers=False, secrets=False)


class UrlDuplicateFilter:
    """Rejects pages that another page with the same URL replaces; the survey has found them."""

    stage = "url_dedup"
    bounds: Mapping[str, Bounds] = MappingProxyType({})

    def __init__(self, dropped: Mapping[int, str]) -> None:
        """``dropped`` maps the position of each duplicate page in the shard to the id of the kept page."""
        self.dropped = dropped

    def __call__(self, document: Document) -> Rejection | None:
        """Return None, or a rejection with the id of the page that replaces this one."""
        kept = self.dropped.get(document.place)
        return None if kept is None else Rejection("duplicate_url", kept)


class LengthFilter:
    """Rejects short documents, and documents without any letter or digit, for which ratios are undefined."""

    stage = "length"

    def __init__(self, min_chars: int) -> None:
        self.min_chars = min_chars
        self.bounds = {"chars": Bounds(least=min_chars)}

    def __call__(self, document: Document) -> Rejection | None:
        """Return None or the reason for rejection."""
        chars = len(document.text.strip())
        document.scores["length.chars"] = chars
        if chars < self.min_chars:
            return Rejection("too_few_chars")
        return None if any(map(str.isalnum, document.text)) else Rejection("no_words")


class ExactDuplicateFilter:
    """Keeps the first document of each normalised text. Duplicates must be adjacent.

    They are: documents are sorted by the hash of the normalised text, and all documents of one hash are in one task.
    """

    stage = "exact_dedup"
    bounds: Mapping[str, Bounds] = MappingProxyType({})

    def __init__(self) -> None:
        self._key: int | None = None
        self._kept: list[tuple[str, str]] = []

    def __call__(self, document: Document) -> Rejection | None:
        """Return None, or a rejection with the id of the kept document."""
        if document.key != self._key:  # nearly always; then no text is normalised
            self._key, self._kept = document.key, []
        for text, kept_id in self._kept:
            if normalise(text) == normalise(document.text):
                return Rejection("exact_duplicate", kept_id)
        self._kept.append((document.text, document.id))
        return None
