"""Labelled texts of stage ``classify``, and their validation split.

The split is chosen by a hash of the normalized text, so that equal texts are in the same split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lilpipe.artifact import Inputs, optional_input
from lilpipe.config.reward_model import ClassifyConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import read_prompts


@dataclass(frozen=True)
class LabelledText:
    """A text and its label."""

    text: str
    label: str


def read_texts(config: ClassifyConfig, inputs: Inputs) -> list[LabelledText]:
    """Return the texts of ``classify.path``, or else the questions of the train split with their families as labels."""
    source = optional_input(inputs, "prompts")
    if config.path is not None:
        return read_jsonl(Path(config.path), text_key=config.text_key, label_key=config.label_key)
    if source is None:
        raise ConfigError("classify.path: got none, and the step has no input `prompts`; set one of them")
    return [LabelledText(prompt.question, prompt.family) for prompt in read_prompts(source.path, "train")]


def read_jsonl(path: Path, *, text_key: str, label_key: str) -> list[LabelledText]:
    """Read a text and a label from each line. Raises ``DataError`` naming the line if one of them is missing."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            text, label = row[text_key], row[label_key]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}:{number}: got {line[:80]!r} ({error!r}), expected a JSON object with {text_key!r} and "
                f"{label_key!r}; fix the row, or set classify.text_key and classify.label_key"
            ) from error
        if not isinstance(text, str) or not text.strip() or isinstance(label, dict | list | None):
            raise DataError(
                f"{path}:{number}: got text {str(text)[:80]!r} and label {label!r}, expected a non-empty text "
                "and a label; remove the row"
            )
        found.append(LabelledText(text, str(label)))
    return found


def distinct_texts(texts: Sequence[LabelledText]) -> list[LabelledText]:
    """Remove duplicate texts. Raises ``DataError`` for a text with two labels, or fewer than two labels in total."""
    by_text: dict[str, LabelledText] = {}
    contradictions = []
    for item in texts:
        first = by_text.setdefault(_normalise(item.text), item)
        if first.label != item.label:
            contradictions.append((item.text, first.label, item.label))
    if contradictions:
        text, first, second = contradictions[0]
        raise DataError(
            f"classify: {len(contradictions)} of {len(texts)} texts occur with two labels, expected one; the "
            f"first is {text[:80]!r}: {first!r} and {second!r}; keep one of them"
        )
    labels = sorted({item.label for item in texts})
    if len(labels) < 2:
        raise DataError(f"classify: got the labels {labels} in {len(texts)} texts, expected at least two")
    return list(by_text.values())


def is_validation(text: str, share: float) -> bool:
    """Return whether a text belongs to the validation split; depends only on the text and the ratio."""
    digest = hashlib.sha256(f"classify/{_normalise(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _normalise(text: str) -> str:
    return " ".join(text.split()).casefold()
