"""Tokens to text while they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from lilpipe.tokenizer.encoding import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token by id; of special tokens their names."""
    return [*tokenizer.ranks, *(name.encode() for name in tokenizer.special_ids)]


class TextStream:
    """The text of one completion, piece by piece.

    A character is held back until its last byte has come, and so is what may turn out to begin a stop string. From a
    stop string on nothing is given, and ``stopped`` is True. The pieces together are what the whole completion decodes
    to, up to the stop string.
    """

    def __init__(self, vocabulary: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._vocabulary = vocabulary
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, tokens: Iterable[int]) -> str:
        """What these tokens let be said. An id of a padded vocabulary, beyond the tokenizer's, says nothing."""
        known = (self._vocabulary[token] for token in tokens if token < len(self._vocabulary))
        return self._release(self._decoder.decode(b"".join(known)))

    def finish(self) -> str:
        """What was held back, once it is known that nothing more comes."""
        said = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            said, self._held = said + self._held, ""
        return said

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop``, short of the whole, that ends ``text``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
