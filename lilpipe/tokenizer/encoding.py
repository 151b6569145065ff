"""Byte-level BPE: text to token ids and back.

tiktoken encodes. On disk the vocabulary is Hugging Face's ``tokenizer.json`` and nothing else, so that this
package and ``transformers`` read one file and cannot disagree about a vocabulary; ``tokenizer_config.json`` and
``chat_template.jinja`` beside it are for ``transformers`` alone.

A token's id is its rank: merges of lower rank are applied first. Ids 0 to 255 are the single bytes, then come the
merges, then ``SPECIAL_TOKENS``. Text is never read as a special token: ``"<|user|>"`` in a document encodes as the
eight characters that it is (``transformers`` does so with ``split_special_tokens=True``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from lilpipe.artifact import write_atomically
from lilpipe.errors import ArtifactError
from lilpipe.tokenizer.chat_template import CHAT_TEMPLATE
from lilpipe.tokenizer.patterns import resolve_pattern

SPECIAL_TOKENS = (
    "<|end_of_document|>",
    "<|padding|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end_of_turn|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
)

TOKENIZER_FILE = "tokenizer.json"

Ranks = Mapping[bytes, int]


class Tokenizer:
    """A vocabulary of bytes, merges and special tokens, with tiktoken underneath."""

    def __init__(self, ranks: Ranks, pattern: str) -> None:
        """Make a tokenizer of ``ranks`` (token bytes to id, the 256 bytes among them, ids without gaps).

        ``pattern`` cuts text into pieces before merging: a preset's name or a regular expression.
        """
        pattern = resolve_pattern(pattern)
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = pattern
        assert list(self.ranks.values()) == list(range(len(ranks))), "ranks must be 0, 1, 2, ..."
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self._encoding = tiktoken.Encoding(
            "lilpipe", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids
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
        content = [self.pattern, *SPECIAL_TOKENS, *(token.hex() for token in self.ranks)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

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
            return cls(*_from_hugging_face(json.loads(path.read_text(encoding="utf-8"))))
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: missing; expected a directory that holds a tokenizer") from error
        except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
            raise ArtifactError(
                f"{path}: got something that is no byte-level BPE of this package ({error!r}); "
                "expected the file that the tokenizer stage writes; run that stage again"
            ) from error

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
        write_atomically(directory / TOKENIZER_FILE, _json(_to_hugging_face(self.ranks, self.pattern)))
        write_atomically(directory / "tokenizer_config.json", _json(HUGGING_FACE_CONFIG))
        write_atomically(directory / "chat_template.jinja", CHAT_TEMPLATE)


# --- tokenizer.json -----------------------------------------------------------------------------------------------

HUGGING_FACE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end_of_document|>",
    "pad_token": "<|padding|>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _byte_characters() -> dict[int, str]:
    """GPT-2's name for each byte: printable Latin-1 stands for itself, the rest is moved to U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(moved)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def _to_hugging_face(ranks: Ranks, pattern: str) -> dict[str, Any]:
    def name(token: bytes) -> str:
        return "".join(BYTE_CHARACTERS[byte] for byte in token)

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + index, "content": content, **flags} for index, content in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name(token): rank for token, rank in ranks.items()},
            "merges": [[name(left), name(right)] for left, right in recover_merges(ranks)],
        },
    }


def _from_hugging_face(content: Mapping[str, Any]) -> tuple[dict[bytes, int], str]:
    ranks = {
        bytes(CHARACTER_BYTES[character] for character in name): rank
        for name, rank in content["model"]["vocab"].items()
    }
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    added = [(token["id"], token["content"]) for token in content["added_tokens"]]
    expected = list(enumerate(SPECIAL_TOKENS, start=len(ranks)))
    if added != expected:
        raise ValueError(f"special tokens: got {added}, expected {expected}")
    return ranks, pattern


def recover_merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """The pair that made each token longer than a byte, in order of rank.

    BPE with the merges below a token's rank alone leaves just the pair whose merge made it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge(token, ranks, below=rank)
            if len(parts) != 2:
                raise ValueError(f"token {token!r} (rank {rank}): no pair of tokens before it makes it")
            merges.append((parts[0], parts[1]))
    return merges


def _merge(piece: bytes, ranks: Ranks, *, below: int) -> list[bytes]:
    """Apply to a piece, lowest rank first and leftmost first, the merges whose rank is less than ``below``."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    while len(parts) > 1:
        candidates = [(ranks.get(a + b, below), index) for index, (a, b) in enumerate(pairwise(parts))]
        rank, index = min(candidates)
        if rank >= below:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
