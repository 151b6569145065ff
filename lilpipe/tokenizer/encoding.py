"""Byte-level BPE: text to token ids and back.

tiktoken encodes. On disk the vocabulary is Hugging Face's ``tokenizer.json``, which this package and ``transformers``
both read. ``tokenizer_config.json`` and ``chat_template.jinja`` are for ``transformers``; ``.tiktoken`` files are
exports for other tools.

A token's id is its rank: merges of lower rank are applied first. Ids 0 to 255 are the single bytes (in the base's
order if a vocabulary was extended), followed by the merges and the special tokens. Since all bytes are tokens, no
text is unknown. Text is never encoded as a special token: ``"<|user|>"`` in a document encodes as eight ordinary
characters (``transformers`` does this with ``split_special_tokens=True``).

An imported vocabulary keeps its own special tokens. One of them ends a document; it may have no tokens for turns of a
conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from lilpipe.artifact import write_atomically
from lilpipe.errors import ArtifactError, DataError
from lilpipe.tokenizer.imported import chat_template, check_added_tokens, document_end, exact_merges
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE, JinjaTemplate
from lilpipe.tokenizer.patterns import resolve_pattern
from lilpipe.tokenizer.vocabulary import (
    TOKENIZER_FILE,
    Merge,
    Ranks,
    Vocabulary,
    from_hugging_face,
    read_vocabulary,
    recover_merges,
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
    """Return the names of the special tokens in order of their ids: named tokens, then reserved ones."""
    return (*NAMED_TOKENS, *(f"<|reserved_{index}|>" for index in range(num_reserved)))


class Tokenizer:
    """A vocabulary of bytes, merges and special tokens; encodes with tiktoken."""

    def __init__(
        self,
        ranks: Ranks,
        pattern: str,
        *,
        num_reserved: int = NUM_RESERVED,
        special: Sequence[str] | None = None,
        document_end: str = NAMED_TOKENS[0],
        template: JinjaTemplate | None = None,
    ) -> None:
        """Create a tokenizer.

        Args:
            ranks: Token bytes to id; contains the 256 bytes, ids without gaps.
            pattern: Splits text into pieces before merging: name of a preset, or a regular expression.
            num_reserved: Number of reserved special tokens.
            special: Names of an imported vocabulary's special tokens; ``None`` means ours.
            document_end: Name of the special token that ends a document.
            template: Chat template of an imported tokenizer.
        """
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = resolve_pattern(pattern)
        assert list(self.ranks.values()) == list(range(len(ranks))), "ranks must be 0, 1, 2, ..."
        names = special_tokens(num_reserved) if special is None else special
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(names)}
        self.vocab_size = len(ranks) + len(self.special_ids)
        self._encoding = tiktoken.Encoding(
            "lilpipe", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )
        self.document_end = document_end
        self.document_end_id = self.special_ids[document_end]
        self.padding_id = self.special_ids.get("<|padding|>", self.document_end_id)
        self.template = template

    @property
    def has_turns(self) -> bool:
        """Whether the vocabulary has our special tokens for conversations."""
        return set(NAMED_TOKENS) <= self.special_ids.keys()

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

    @cached_property
    def merges(self) -> tuple[Merge, ...]:
        """The pair that forms each token, in order of rank; read from the file if it has merges, else recovered."""
        return tuple(recover_merges(self.ranks))

    @property
    def digest(self) -> str:
        """SHA-256 over pattern, tokens and special tokens; equal if and only if tokenizers give the same ids."""
        content = [self.pattern, *self.special_ids, *(token.hex() for token in self.ranks)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def special(self) -> tuple[tuple[int, str], ...]:
        """Ids and names of the special tokens."""
        return tuple((number, name) for name, number in self.special_ids.items())

    # --- text and ids ---------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Encode text to ids. A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def encode_marked(self, text: str) -> list[int]:
        """Encode text in which names of special tokens are special tokens, such as a rendered conversation."""
        return self._encoding.encode(text, allowed_special="all")

    def encode_array(self, text: str) -> np.ndarray:
        """Encode text to ids as uint32, without a Python object per id; threads can run it in parallel."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which `encode` replaces
            return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens appear by name, invalid UTF-8 as U+FFFD."""
        return self._encoding.decode(list(ids))

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each id."""
        return self._encoding.decode_tokens_bytes(list(ids))

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Load the tokenizer of a Tokenizer or Checkpoint artifact, or of an imported model.

        Raises ``ArtifactError`` if there is no tokenizer, or if tiktoken would give other ids.
        """
        path = directory / TOKENIZER_FILE
        if not path.exists() and (directory / "vocab.json").exists():
            path = directory / "vocab.json"
        try:
            if path.name == TOKENIZER_FILE:
                content = json.loads(path.read_text(encoding="utf-8"))
                vocabulary = from_hugging_face(content)
                check_added_tokens(content["added_tokens"])
                ignore_merges = bool(content["model"].get("ignore_merges"))
            else:
                vocabulary, ignore_merges = read_vocabulary(path), False
            return cls._of(vocabulary, directory, ignore_merges=ignore_merges)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: missing; expected a directory that contains a tokenizer") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise ArtifactError(
                f"{path}: got something other than byte-level BPE ({error!r}); expected the file that "
                "stage `tokenizer` writes, or an imported one that tiktoken supports; run that stage again"
            ) from error

    @classmethod
    def _of(cls, vocabulary: Vocabulary, directory: Path, *, ignore_merges: bool) -> Tokenizer:
        """Create the tokenizer of a vocabulary that was read from ``directory``."""
        assert vocabulary.pattern is not None
        special = dict(sorted(vocabulary.special))
        names = tuple(special.values())
        if NAMED_TOKENS[0] in names:
            tokenizer = cls(vocabulary.ranks, vocabulary.pattern, num_reserved=len(names) - len(NAMED_TOKENS))
            merges = vocabulary.merges
        else:
            merges = exact_merges(vocabulary, ignore_merges=ignore_merges)
            end = document_end(directory, special)
            found = chat_template(directory)
            template = found and JinjaTemplate(*found)
            tokenizer = cls(vocabulary.ranks, vocabulary.pattern, special=names, document_end=end, template=template)
        if tuple(special.items()) != tokenizer.special:
            raise ValueError(f"special tokens: got {vocabulary.special}, expected {tokenizer.special}")
        if merges is not None:
            tokenizer.merges = merges
        return tokenizer

    @classmethod
    def load_tiktoken(cls, path: Path, pattern: str, *, num_reserved: int = NUM_RESERVED) -> Tokenizer:
        """Read a ``.tiktoken`` file, which has no pattern, and add our special tokens.

        Raises ``DataError`` if it is not a vocabulary or its ids have gaps.
        """
        ranks = read_vocabulary(path).ranks
        if list(ranks.values()) != list(range(len(ranks))):
            raise DataError(f"{path}: got ids with gaps, expected 0 to {len(ranks) - 1}; use another vocabulary")
        return cls(ranks, pattern, num_reserved=num_reserved)

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if there is a template, ``chat_template.jinja``."""
        content = to_hugging_face(self.ranks, self.pattern, self.special, self.merges)
        write_atomically(directory / TOKENIZER_FILE, _json(content))
        names = {"eos_token": self.document_end, "pad_token": "<|padding|>" if self.has_turns else self.document_end}
        names |= self.template.names if self.template else {}
        write_atomically(directory / "tokenizer_config.json", _json({**HUGGING_FACE_CONFIG, **names}))
        if self.template or self.has_turns:
            source = self.template.source if self.template else CHAT_TEMPLATE
            write_atomically(directory / "chat_template.jinja", source)

    def save_tiktoken(self, path: Path) -> None:
        """Write tokens and ranks in tiktoken's format, which stores neither pattern nor special tokens."""
        write_atomically(path, to_tiktoken(self.ranks))


TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")
"""Files that ``Tokenizer.save`` writes, the last one only if the tokenizer has a chat template."""

HUGGING_FACE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
