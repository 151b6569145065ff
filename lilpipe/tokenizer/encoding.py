"""Text to token ids and back: tokenizers trained here, and imported ones, behind one interface.

``BytePairTokenizer`` is ours: byte-level BPE, encoded by tiktoken. A token's id is its rank: merges of lower rank are
applied first. Ids 0 to 255 are the single bytes (in the base's order if a vocabulary was extended), followed by the
merges and the special tokens. ``ImportedTokenizer`` is any other ``tokenizer.json``, run by Hugging Face's
``tokenizers``, and stored as it came.

On disk both are Hugging Face's files, which ``transformers`` reads; ``.tiktoken`` files are exports for other tools.

Text is never encoded as a special token: ``"<|user|>"`` in a document encodes as ordinary characters (``transformers``
does this with ``split_special_tokens=True``). A document is ``document_start_ids``, its text, and ``document_end_id``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lilpipe.artifact import write_atomically
from lilpipe.errors import ArtifactError, DataError
from lilpipe.tokenizer import imported
from lilpipe.tokenizer.byte_pair import BytePairEncoder
from lilpipe.tokenizer.conversion import as_tokenizer_json
from lilpipe.tokenizer.huggingface import HuggingFaceEncoder
from lilpipe.tokenizer.imported import CONFIG_FILE, DOCUMENT_END_FILE, TEMPLATE_FILE, VERBATIM_FILES, Files
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE, JinjaTemplate
from lilpipe.tokenizer.marked import Encoded, Encoder
from lilpipe.tokenizer.patterns import resolve_pattern
from lilpipe.tokenizer.special_tokens import NAMED_TOKENS, NUM_RESERVED, TURN_TOKENS, is_ours, special_tokens
from lilpipe.tokenizer.vocabulary import (
    TOKENIZER_FILE,
    Merge,
    Ranks,
    Vocabulary,
    exact_vocabulary,
    from_hugging_face,
    hugging_face_config,
    ranks_digest,
    recover_merges,
    to_hugging_face,
    to_tiktoken,
)

TOKENIZER_FILES = (*VERBATIM_FILES, DOCUMENT_END_FILE)
"""Files that ``Tokenizer.save`` may write."""


class Tokenizer(ABC):
    """A vocabulary with special tokens: encodes and decodes."""

    special_ids: dict[str, int]
    """Special tokens by name."""
    vocab_size: int
    """Number of ids: the largest one plus 1. Ids between may have no token."""
    document_end: str
    """Name of the special token that ends a document."""
    document_start_ids: tuple[int, ...] = ()
    """Ids before the text of a document; empty if the model was trained without. Chat templates write their own."""
    template: JinjaTemplate | None = None
    """Chat template of an imported tokenizer."""
    _encoder: Encoder

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Load the tokenizer of a Tokenizer or Checkpoint artifact, or of an imported model.

        Raises ``ArtifactError`` if there is no tokenizer, or its files are damaged.
        """
        try:
            files = imported.read_files(directory)
            if TOKENIZER_FILE not in files:
                files |= as_tokenizer_json(files, imported.stated_settings(files))
            content = imported.read_object(files, TOKENIZER_FILE)
            if is_ours(content):
                return BytePairTokenizer.of(from_hugging_face(content))
            return ImportedTokenizer(files, content, ends=imported.document_ends(directory, content))
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{directory / TOKENIZER_FILE}: missing; expected a directory that contains a tokenizer ({error})"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ArtifactError(
                f"{directory / TOKENIZER_FILE}: got no usable tokenizer ({reason}); expected the file that stage "
                "`tokenizer` writes, or the files of a model as they were published; get them again"
            ) from error

    @property
    def num_needed_ids(self) -> int:
        """Number of ids that a model must have: the largest one of a text or conversation, plus 1."""
        return self.vocab_size

    # --- special tokens -------------------------------------------------------------------------------------------

    @property
    def document_end_id(self) -> int:
        """Id of the token that ends a document."""
        return self.special_ids[self.document_end]

    @property
    def padding_id(self) -> int:
        """Id of the token in place of absent ones."""
        return self.special_ids.get("<|padding|>", self.document_end_id)

    @property
    def has_turns(self) -> bool:
        """Whether the vocabulary has our special tokens for conversations."""
        return set(TURN_TOKENS) <= self.special_ids.keys()

    @property
    def system_id(self) -> int:
        """Id of the token that starts a system message."""
        return self._turn_token("<|system|>")

    @property
    def user_id(self) -> int:
        """Id of the token that starts a user message."""
        return self._turn_token("<|user|>")

    @property
    def assistant_id(self) -> int:
        """Id of the token that starts an assistant message."""
        return self._turn_token("<|assistant|>")

    @cached_property
    def turn_end_id(self) -> int:
        """Id of the token that ends a message."""
        return self._turn_token("<|end_of_turn|>") if self.template is None else self.template.end_of_turn_id(self)

    def _turn_token(self, name: str) -> int:
        if name not in self.special_ids:
            raise DataError(
                f"tokenizer: got an imported vocabulary without {name}, expected one with tokens for conversations; "
                "continue pretraining with a tokenizer that extends this one (tokenizer.base)"
            )
        return self.special_ids[name]

    # --- text and ids ---------------------------------------------------------------------------------------------

    def encode_array(self, text: str) -> np.ndarray:
        """Encode text to ids, uint32 [tokens]; threads can run it in parallel.

        A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD. Raises ``DataError`` for a text that the library
        cannot encode.
        """
        return self._encoder.encode_batch([text])[0]

    def encode(self, text: str) -> list[int]:
        """Encode text to ids; see ``encode_array``."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, an imported tokenizer on all cores; see ``encode_array``."""
        return self._encoder.encode_batch(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the beginning of a document, after ``document_start_ids``, or else the end of a document."""
        return [*(self.document_start_ids or [self.document_end_id]), *self.encode(text)]

    def encode_marked(self, text: str) -> list[int]:
        """Encode text in which names of special tokens are special, unless marked with ``marked.LITERAL``."""
        return self.encode_with_offsets(text).ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """Encode as ``encode_marked``; also return the characters that each token covers."""
        return self._encoder.encode_marked(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens appear by name, invalid UTF-8 as U+FFFD.

        Ids beyond the tokenizer's vocabulary are ignored: a model's embedding may be padded with more rows.
        """
        return self._encoder.decode(ids)

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """Bytes of each token by id: for special tokens their names, for an id without a token nothing."""
        return self._encoder.vocabulary()

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each id; nothing for an id beyond the tokenizer's vocabulary."""
        vocabulary = self.vocabulary
        return [vocabulary[token] if token < len(vocabulary) else b"" for token in ids]

    # --- identity and files ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256; equal only if tokenizers give the same ids."""

    @property
    @abstractmethod
    def text_digest(self) -> str:
        """SHA-256 of what decides the ids of a text: the tokenizer without its special tokens."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the tokenizer's files."""


class BytePairTokenizer(Tokenizer):
    """Bytes, merges and our special tokens. Since all bytes are tokens, no text is unknown."""

    def __init__(self, ranks: Ranks, pattern: str, *, num_reserved: int = NUM_RESERVED) -> None:
        """Create a tokenizer.

        Args:
            ranks: Token bytes to id; contains the 256 bytes, ids without gaps.
            pattern: Splits text into pieces before merging: name of a preset, or a regular expression.
            num_reserved: Number of reserved special tokens.
        """
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = resolve_pattern(pattern)
        assert list(self.ranks.values()) == list(range(len(ranks))), "ranks must be 0, 1, 2, ..."
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(special_tokens(num_reserved))}
        self.vocab_size = len(ranks) + len(self.special_ids)
        self.document_end = NAMED_TOKENS[0]
        self._encoder = BytePairEncoder(self.ranks, self.pattern, self.special_ids)

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> BytePairTokenizer:
        """Create the tokenizer of a vocabulary with our special tokens. Raises ``ValueError`` for other ones."""
        assert vocabulary.pattern is not None
        num_reserved = len(vocabulary.special) - len(NAMED_TOKENS)
        tokenizer = cls(vocabulary.ranks, vocabulary.pattern, num_reserved=num_reserved)
        if (got := {name: number for number, name in vocabulary.special}) != tokenizer.special_ids:
            raise ValueError(f"special tokens: got {got}, expected {tokenizer.special_ids}")
        if vocabulary.merges is not None:
            tokenizer.merges = vocabulary.merges
        return tokenizer

    @cached_property
    def merges(self) -> tuple[Merge, ...]:
        """The pair that forms each token, in order of rank; read from the file if it has merges, else recovered."""
        return tuple(recover_merges(self.ranks))

    @property
    def digest(self) -> str:  # noqa: D102
        content = [self.pattern, *self.special_ids, *(token.hex() for token in self.ranks)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def text_digest(self) -> str:  # noqa: D102
        return ranks_digest(self.ranks, self.pattern)

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
        special = [(number, name) for name, number in self.special_ids.items()]
        content = to_hugging_face(self.ranks, self.pattern, special, self.merges)
        write_atomically(directory / TOKENIZER_FILE, _json(content))
        names = {"eos_token": self.document_end, "pad_token": "<|padding|>"}
        write_atomically(directory / CONFIG_FILE, _json(hugging_face_config(names)))
        write_atomically(directory / TEMPLATE_FILE, CHAT_TEMPLATE)

    def save_tiktoken(self, path: Path) -> None:
        """Write tokens and ranks in tiktoken's format, which stores neither pattern nor special tokens."""
        write_atomically(path, to_tiktoken(self.ranks))


class ImportedTokenizer(Tokenizer):
    """A tokenizer from elsewhere, as its files define it."""

    def __init__(self, files: Files, content: dict[str, Any], *, ends: Sequence[str]) -> None:
        """Create a tokenizer.

        Args:
            files: Contents of its files.
            content: JSON of ``tokenizer.json``.
            ends: Names of tokens that end a text, by the model's settings.

        Raises ``ValueError`` or ``LookupError`` if the files are damaged, ``DataError`` for a damaged chat template.
        """
        self.files = files
        self._stated = imported.stated_settings(files)
        self._encoder = HuggingFaceEncoder(imported.completed(content, self._stated))
        self.special_ids = self._encoder.special_ids
        self.vocab_size = self._encoder.size
        self.document_start_ids = imported.start_ids(content, self._stated, self.special_ids)
        templates = imported.chat_templates(files, self._stated)
        if "default" in templates and not (self.has_turns and templates["default"] == CHAT_TEMPLATE):
            self.template = JinjaTemplate(
                templates["default"], imported.token_names(self._stated), with_tools=templates.get("tool_use")
            )
        self._ends = [
            name for name in (*ends, imported.token_names(self._stated).get("eos_token")) if name in self.special_ids
        ]
        if not self._ends:
            raise ValueError("eos_token: got none in config.json or tokenizer_config.json that is a special token")

    @cached_property
    def document_end(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the token that ends a document: the first that ends a text, other than the end of a turn."""
        if len(self._ends) > 1 and self.template is not None:
            try:
                turn_end = self.turn_end_id
            except DataError:
                turn_end = None
            return next((name for name in self._ends if self.special_ids[name] != turn_end), self._ends[0])
        return self._ends[0]

    @property
    def padding_id(self) -> int:  # noqa: D102
        stated = imported.token_names(self._stated).get("pad_token", "")
        return self.special_ids.get(stated, super().padding_id)

    @property
    def num_needed_ids(self) -> int:
        """See ``Tokenizer``. Special tokens for other modalities may lie beyond a model's vocabulary (Gemma 3)."""
        written = self.template.source if self.template else ""
        needed = {self.document_end_id, self.padding_id, *self.document_start_ids}
        unused = {number for name, number in self.special_ids.items() if number not in needed and name not in written}
        return max(number for number in range(self.vocab_size) if number not in unused) + 1

    @property
    def digest(self) -> str:  # noqa: D102
        others = [self.special_ids, self.document_start_ids, self.document_end]
        return hashlib.sha256(self.files[TOKENIZER_FILE] + json.dumps(others).encode()).hexdigest()

    @property
    def text_digest(self) -> str:  # noqa: D102
        content = imported.without_special_tokens(imported.read_object(self.files, TOKENIZER_FILE), self.special_ids)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def as_ranks(self) -> Vocabulary:
        """Return the vocabulary as tokens with ranks. Raises ``ValueError`` if tiktoken would give other ids."""
        return exact_vocabulary(imported.read_object(self.files, TOKENIZER_FILE))

    def extended(self, names: Sequence[str], *, template: str | None = None) -> ImportedTokenizer:
        """Return this tokenizer with special tokens that it lacks behind, and ``template`` or, if it has none, ours."""
        content = imported.read_object(self.files, TOKENIZER_FILE)
        if missing := [name for name in names if name not in self.special_ids]:
            content = imported.with_special_tokens(content, missing, self.vocab_size)
        source = template or (None if self.template else CHAT_TEMPLATE)
        files = {**self.files, **({TEMPLATE_FILE: source.encode()} if source else {})}
        return ImportedTokenizer({**files, TOKENIZER_FILE: _json(content).encode()}, content, ends=[self.document_end])

    def save(self, directory: Path) -> None:
        """Write the files as they came, and ``document_end.json``."""
        for name, data in self.files.items():
            write_atomically(directory / name, data)
        write_atomically(directory / DOCUMENT_END_FILE, _json({"document_end": self.document_end}))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
