"""What makes two texts the same."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """What two texts must share to count as the same: all but case, white space and the Unicode form."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
