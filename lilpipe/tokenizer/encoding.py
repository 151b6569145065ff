"""Byte-level BPE: text to token ids and back.

tiktoken encodes. On disk the vocabulary is Hugging Face's ``tokenizer.json``, so that this package and
``transformers`` read one file and cannot disagree about a vocabulary; ``tokenizer_config.json`` and
``chat_template.jinja`` beside it are for ``transformers`` alone, and a ``.tiktoken`` file is an export for others.

A token's id is its rank: merges of lower rank are applied first. Ids 0 to 255 are the single bytes (in an order of
their own where a vocabulary was extended), then come the merges, then the special tokens. All bytes are there, so no
text is unknown. Text is never read as a special token: ``"<|user|>"`` in a document encodes as the eight characters
that it is (``transformers`` does so with ``split_special_tokens=True``).

A vocabulary from elsewhere keeps its own special tokens. One of them ends a document; tokens for turns of a
conversation it may lack.
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
    """Names of the special tokens in order of their ids: those with a meaning, then those that are reserved."""
    return (*NAMED_TOKENS, *(f"<|reserved_{index}|>" for index in range(num_reserved)))


class Tokenizer:
    """A vocabulary of bytes, merges and special tokens, with tiktoken underneath."""

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
        """Make a tokenizer of ``ranks`` (token bytes to id, the 256 bytes among them, ids without gaps).

        ``pattern`` cuts text into pieces before merging: a preset's name or a regular expression. ``special`` are the
        names of other special tokens than ours, of which ``document_end`` ends a document, and ``template`` is how
        they put a conversation.
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
        """Whether there are our tokens for a conversation."""
        return set(NAMED_TOKENS) <= self.special_ids.keys()

    @property
    def system_id(self) -> int:
        """Begins a system message."""
        return self._turn_token("<|system|>")

    @property
    def user_id(self) -> int:
        """Begins a user's message."""
        return self._turn_token("<|user|>")

    @property
    def assistant_id(self) -> int:
        """Begins the model's answer."""
        return self._turn_token("<|assistant|>")

    @cached_property
    def turn_end_id(self) -> int:
        """Ends a message."""
        return self._turn_token("<|end_of_turn|>") if self.template is None else self.template.end_of_turn_id(self)

    def _turn_token(self, name: str) -> int:
        if name not in self.special_ids:
            raise DataError(
                f"tokenizer: got a vocabulary from elsewhere without {name}, expected one with tokens for "
                "conversations; train the model on with a tokenizer that extends this one (tokenizer.base)"
            )
        return self.special_ids[name]

    @cached_property
    def merges(self) -> tuple[Merge, ...]:
        """The pair that makes each token, in order of rank; known from the file where there is one."""
        return tuple(recover_merges(self.ranks))

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

    def encode_marked(self, text: str) -> list[int]:
        """Ids of text in which the name of a special token stands for it, such as a conversation put in writing."""
        return self._encoding.encode(text, allowed_special="all")

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

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """What each id stands for."""
        return self._encoding.decode_tokens_bytes(list(ids))

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a Tokenizer or Checkpoint artifact, or of a model from elsewhere.

        Raises ``ArtifactError`` for what is none, and for one whose ids tiktoken would not give.
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
            raise ArtifactError(f"{path}: missing; expected a directory that holds a tokenizer") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise ArtifactError(
                f"{path}: got something that is no byte-level BPE of this package ({error!r}); expected the file that "
                "the tokenizer stage writes, or one from elsewhere that tiktoken can follow; run that stage again"
            ) from error

    @classmethod
    def _of(cls, vocabulary: Vocabulary, directory: Path, *, ignore_merges: bool) -> Tokenizer:
        """The tokenizer of a vocabulary that was read there."""
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
        """Read a ``.tiktoken`` file, which holds no pattern, and add the special tokens. Raises ``DataError``."""
        ranks = read_vocabulary(path).ranks
        if list(ranks.values()) != list(range(len(ranks))):
            raise DataError(f"{path}: got ids with gaps, expected 0 to {len(ranks) - 1}; another vocabulary is needed")
        return cls(ranks, pattern, num_reserved=num_reserved)

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and, for conversations, ``chat_template.jinja``."""
        content = to_hugging_face(self.ranks, self.pattern, self.special, self.merges)
        write_atomically(directory / TOKENIZER_FILE, _json(content))
        names = {"eos_token": self.document_end, "pad_token": "<|padding|>" if self.has_turns else self.document_end}
        names |= self.template.names if self.template else {}
        write_atomically(directory / "tokenizer_config.json", _json({**HUGGING_FACE_CONFIG, **names}))
        if self.template or self.has_turns:
            source = self.template.source if self.template else CHAT_TEMPLATE
            write_atomically(directory / "chat_template.jinja", source)

    def save_tiktoken(self, path: Path) -> None:
        """Write tokens and ranks in tiktoken's format; pattern and special tokens have no place in it."""
        write_atomically(path, to_tiktoken(self.ranks))


TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")
"""What ``Tokenizer.save`` writes, the last where there are tokens for conversations."""

HUGGING_FACE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
