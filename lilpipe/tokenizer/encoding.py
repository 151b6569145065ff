"""Byte-level BPE: text to token ids and back.

tiktoken encodes. On disk the vocabulary is Hugging Face's ``tokenizer.json``, so that this package and
``transformers`` read one file and cannot disagree about a vocabulary; ``tokenizer_config.json`` and
``chat_template.jinja`` beside it are for ``transformers`` alone, and a ``.tiktoken`` file is an export for others.

A token's id is its rank: merges of lower rank are applied first. Ids 0 to 255 are the single bytes (in an order of
their own where a vocabulary was extended), then come the merges, then the special tokens. All bytes are there, so no
text is unknown. Text is never read as a special token: ``"<|user|>"`` in a document encodes as the eight characters
that it is (``transformers`` does so with ``split_special_tokens=True``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from lilpipe.artifact import write_atomically
from lilpipe.errors import ArtifactError, DataError
from lilpipe.tokenizer.chat_template import CHAT_TEMPLATE
from lilpipe.tokenizer.patterns import resolve_pattern
from lilpipe.tokenizer.vocabulary import (
    TOKENIZER_FILE,
    Ranks,
    from_hugging_face,
    read_vocabulary,
    to_hugging_face,
    to_tiktoken,
)

NAMED_TOKENS = (
    "<|end_of_document|>",
    "<|padding|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end_of_turn|>",
)
NUM_RESERVED = 2


def special_tokens(num_reserved: int = NUM_RESERVED) -> tuple[str, ...]:
    """Names of the special tokens in order of their ids: those with a meaning, then those that are reserved."""
    return (*NAMED_TOKENS, *(f"<|reserved_{index}|>" for index in range(num_reserved)))


class Tokenizer:
    """A vocabulary of bytes, merges and special tokens, with tiktoken underneath."""

    def __init__(self, ranks: Ranks, pattern: str, *, num_reserved: int = NUM_RESERVED) -> None:
        """Make a tokenizer of ``ranks`` (token bytes to id, the 256 bytes among them, ids without gaps).

        ``pattern`` cuts text into pieces before merging: a preset's name or a regular expression.
        """
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = resolve_pattern(pattern)
        assert list(self.ranks.values()) == list(range(len(ranks))), "ranks must be 0, 1, 2, ..."
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(special_tokens(num_reserved))}
        self.vocab_size = len(ranks) + len(self.special_ids)
        self._encoding = tiktoken.Encoding(
            "lilpipe", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )
        self.document_end_id = self.special_ids["<|end_of_document|>"]
        self.padding_id = self.special_ids["<|padding|>"]
        self.system_id = self.special_ids["<|system|>"]
        self.user_id = self.special_ids["<|user|>"]
        self.assistant_id = self.special_ids["<|assistant|>"]
        self.turn_end_id = self.special_ids["<|end_of_turn|>"]

    @property
    def digest(self) -> str:
        """SHA-256 over pattern, tokens and special tokens: equal exactly for tokenizers that give the same ids."""
        content = [self.pattern, *self.special_ids, *(token.hex() for token in self.ranks)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def special(self) -> tuple[tuple[int, str], ...]:
        """Ids and names of the special tokens."""
        return tuple((number, name) for name, number in self.special_ids.items())

    # --- text and ids ---------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of the text. A lone surrogate, which no UTF-8 can hold, counts as U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of the text as uint32, without a Python object for each; threads can do this side by side."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which `encode` replaces
            return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens show by name, and bytes that are no UTF-8 as U+FFFD."""
        return self._encoding.decode(list(ids))

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a Tokenizer or Checkpoint artifact. Raises ``ArtifactError``."""
        path = directory / TOKENIZER_FILE
        try:
            vocabulary = from_hugging_face(json.loads(path.read_text(encoding="utf-8")))
            assert vocabulary.pattern is not None
            num_reserved = len(vocabulary.special) - len(NAMED_TOKENS)
            tokenizer = cls(vocabulary.ranks, vocabulary.pattern, num_reserved=num_reserved)
            if vocabulary.special != tokenizer.special:
                raise ValueError(f"special tokens: got {vocabulary.special}, expected {tokenizer.special}")
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: missing; expected a directory that holds a tokenizer") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise ArtifactError(
                f"{path}: got something that is no byte-level BPE of this package ({error!r}); "
                "expected the file that the tokenizer stage writes; run that stage again"
            ) from error
        return tokenizer

    @classmethod
    def load_tiktoken(cls, path: Path, pattern: str, *, num_reserved: int = NUM_RESERVED) -> Tokenizer:
        """Read a ``.tiktoken`` file, which holds no pattern, and add the special tokens. Raises ``DataError``."""
        ranks = read_vocabulary(path).ranks
        if list(ranks.values()) != list(range(len(ranks))):
            raise DataError(f"{path}: got ids with gaps, expected 0 to {len(ranks) - 1}; another vocabulary is needed")
        return cls(ranks, pattern, num_reserved=num_reserved)

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
        content = to_hugging_face(self.ranks, self.pattern, self.special)
        write_atomically(directory / TOKENIZER_FILE, _json(content))
        write_atomically(directory / "tokenizer_config.json", _json(HUGGING_FACE_CONFIG))
        write_atomically(directory / "chat_template.jinja", CHAT_TEMPLATE)

    def save_tiktoken(self, path: Path) -> None:
        """Write tokens and ranks in tiktoken's format; pattern and special tokens have no place in it."""
        write_atomically(path, to_tiktoken(self.ranks))


TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")
"""What ``Tokenizer.save`` writes."""

HUGGING_FACE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end_of_document|>",
    "pad_token": "<|padding|>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
