"""Byte-level BPE by tiktoken, with special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import regex
import tiktoken

from lilpipe.errors import DataError
from lilpipe.tokenizer.marked import Encoded, names_pattern, split_marked
from lilpipe.tokenizer.vocabulary import Ranks

WHOLE = r"[\s\S]+"
"""A pattern that does not split text."""


class BytePairEncoder:
    """Tokens with ranks, a pattern that splits text into pieces before merging, and special tokens."""

    def __init__(self, ranks: Ranks, pattern: str, special_ids: Mapping[str, int]) -> None:
        self._ranks, self._pattern, self._special_ids = dict(ranks), pattern, special_ids
        self._encoding = tiktoken.Encoding(
            "lilpipe", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=dict(special_ids)
        )
        self._names = names_pattern(special_ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, uint32 [tokens] each, without a Python object per id."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # the stack of fancy-regex is full, such as after a million spaces
            return self._encode_pieces(text)

    def _encode_pieces(self, text: str) -> np.ndarray:
        """Encode text that ``regex`` splits into pieces, which has no limit; text between pieces is dropped."""
        try:
            pieces = [found[0] for found in regex.finditer(self._pattern, text)]
        except regex.error as error:
            raise DataError(
                f"a text of {len(text):,} characters that begins with {text[:40]!r}: the pattern {self._pattern!r} "
                f"fails on it ({error}); remove the text, or use another tokenizer.pattern"
            ) from error
        whole = tiktoken.Encoding("whole", pat_str=WHOLE, mergeable_ranks=self._ranks, special_tokens={})
        ids = [whole.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate([np.zeros(0, dtype=np.uint32), *ids])

    def encode_marked(self, text: str) -> Encoded:
        """Encode text in which names of special tokens are special tokens, unless they are marked as text."""
        ids: list[int] = []
        pieces = split_marked(text, self._names)
        for piece in pieces:
            ids += [self._special_ids[piece.text]] if piece.name else self._encode(piece.text).tolist()
        # Bytes to characters: a byte belongs to the last character that starts at or before it.
        data = np.frombuffer("".join(piece.text for piece in pieces).encode(), dtype=np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1
        places = np.concatenate([piece.places for piece in pieces])
        stops = np.cumsum([len(token) for token in self._encoding.decode_tokens_bytes(ids)], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1]])[: len(ids)]
        return Encoded(ids, places[character[starts]], places[character[stops - 1]] + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens appear by name, unknown ids are ignored."""
        size = self._encoding.n_vocab
        return self._encoding.decode([token for token in ids if token < size])

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of each token by id; for special tokens their names."""
        return [*self._ranks, *(name.encode() for name in self._special_ids)]
