"""Text normalisation for the comparison of documents."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """Return the text without differences in case, white space and Unicode form."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
