"""Evaluation sets for decontamination: the pipeline's own prompts, and sources that the user names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lilpipe.config.sources import Source
from lilpipe.data.filters.decontamination import EvaluationSet
from lilpipe.data.filters.words import Words
from lilpipe.data.sources.readers import Unreadable, find_parts, read_part
from lilpipe.errors import DataError
from lilpipe.schemas.examples import read_prompts


def prompt_sets(directory: Path, *, min_item_words: int) -> list[EvaluationSet]:
    """Return the validation and test split of a Prompts artifact as evaluation sets.

    An item is the question; if it is shorter than ``min_item_words``, the answer is appended.
    """
    sets = []
    for split in ("validation", "test"):
        items = []
        for prompt in read_prompts(directory, split):
            short = len(Words(prompt.question).hashes) < min_item_words
            items.append((prompt.id, f"{prompt.question} {prompt.answer}" if short else prompt.question))
        sets.append(EvaluationSet(f"prompts-{split}", items))
    return sets


def source_sets(sources: Iterable[Source]) -> list[EvaluationSet]:
    """Return sources as evaluation sets; each text is an item. Raises ``DataError`` if one is empty or unreadable."""
    sets = []
    for source in sources:
        items = []
        for part in find_parts(source):
            for row in read_part(part):
                if isinstance(row, Unreadable):
                    raise DataError(
                        f"evaluation set {source.name!r}: {row.file}:{row.row} {row.error}; expected that every item "
                        f"is readable, because unreadable items cannot be matched; repair the file"
                    )
                items.append((row.id, row.text))
        if not items:
            raise DataError(f"evaluation set {source.name!r}: got no items in {source.path}; correct `path`")
        sets.append(EvaluationSet(source.name, items))
    return sets
