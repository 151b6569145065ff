"""Rendered conversations: names of special tokens in them are special tokens, unless marked as literal text.

A chat template writes special tokens by name, and so might a message. ``escape`` marks names in what people wrote with
``LITERAL``, a noncharacter of Unicode; a name with a mark stays text, and the mark is removed before encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

LITERAL = "\ufdd2"
"""Stands before each character of a name that is text. Documents do not contain noncharacters."""


class Encoded(NamedTuple):
    """Token ids of a marked text, with the characters of the text that each one covers."""

    ids: list[int]
    starts: np.ndarray
    """First character of each token, int64 [ids]."""
    ends: np.ndarray
    """Character after the last one of each token, int64 [ids]."""


class Encoder(Protocol):
    """Text to ids and back, by tiktoken or by ``tokenizers``."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, uint32 [tokens] each; names of special tokens are text."""
        ...

    def encode_marked(self, text: str) -> Encoded:
        """Encode text in which names of special tokens are special tokens, unless they are marked as text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens appear by name."""
        ...

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of each token by id; for special tokens their names, for an id without a token nothing."""
        ...


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches names without a mark, the longest one at each place, as its only group."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile(f"(?<!{LITERAL})({'|'.join(map(re.escape, ordered))})" if ordered else "((?!))")


def escape(value: Any, names: re.Pattern[str]) -> Any:
    """Mark names of special tokens in all strings of a JSON-like value."""
    if isinstance(value, str):
        return names.sub(lambda found: "".join(LITERAL + character for character in found[0]), value)
    if isinstance(value, Mapping):
        return {escape(key, names): escape(item, names) for key, item in value.items()}
    return [escape(item, names) for item in value] if isinstance(value, list | tuple) else value


def contains(value: Any, names: re.Pattern[str]) -> bool:
    """Whether a string of a JSON-like value contains a name or a mark."""
    if isinstance(value, str):
        return LITERAL in value or names.search(value) is not None
    if isinstance(value, Mapping):
        return any(contains(key, names) or contains(item, names) for key, item in value.items())
    return isinstance(value, list | tuple) and any(contains(item, names) for item in value)


def strip_marks(value: Any) -> Any:
    """Remove ``LITERAL`` from all strings of a JSON-like value."""
    if isinstance(value, str):
        return value.replace(LITERAL, "")
    if isinstance(value, Mapping):
        return {strip_marks(key): strip_marks(item) for key, item in value.items()}
    return [strip_marks(item) for item in value] if isinstance(value, list | tuple) else value


class Piece(NamedTuple):
    """A part of a marked text."""

    text: str
    """Without marks."""
    name: bool
    """Whether it is the name of a special token."""
    places: np.ndarray
    """Place of each character in the marked text, int64 [characters]."""


def split_marked(text: str, names: re.Pattern[str]) -> list[Piece]:
    """Split a marked text at names of special tokens."""
    pieces, place = [], 0
    for index, part in enumerate(names.split(text)):
        places = np.arange(place, place + len(part))
        if LITERAL in part:
            kept = [position for position, character in enumerate(part) if character != LITERAL]
            places, stripped = places[kept], part.replace(LITERAL, "")
        else:
            stripped = part
        pieces.append(Piece(stripped, index % 2 == 1, places))
        place += len(part)
    return pieces
