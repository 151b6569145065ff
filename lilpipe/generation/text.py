"""Incremental detokenization, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from lilpipe.tokenizer.encoding import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each token by id; for special tokens, their names."""
    return tokenizer.vocabulary


class TextStream:
    """Decodes one completion incrementally.

    Incomplete UTF-8 characters, and text that may be the start of a stop string, are held back. After a stop string
    ``stopped`` is True and no more text is returned. The pieces concatenate to the decoded completion up to the stop
    string. A space at the start, which the decoder of a SentencePiece vocabulary drops, is kept: it separates the
    completion from the prompt.
    """

    def __init__(self, vocabulary: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._vocabulary = vocabulary
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, tokens: Iterable[int]) -> str:
        """Add tokens and return the text that is now complete. Ids beyond the tokenizer's vocabulary (padding) are
        ignored.
        """
        known = (self._vocabulary[token] for token in tokens if token < len(self._vocabulary))
        return self._release(self._decoder.decode(b"".join(known)))

    def finish(self) -> str:
        """Return the held-back text at the end of the completion."""
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
    """Return the length of the longest proper prefix of ``stop`` that is a suffix of ``text``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
