"""Vocabulary files: Hugging Face's ``tokenizer.json``, tiktoken's ``.tiktoken`` and GPT-2's pair of files.

A vocabulary has tiktoken's semantics: tokens with ranks. Of all adjacent pairs in a piece that form a token, the one of
the lowest rank merges first; a piece that is a token as a whole becomes that token. Hugging Face's format lists merges
instead of ranks; ``recover_merges`` computes them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lilpipe.errors import DataError
from lilpipe.tokenizer.patterns import PATTERNS

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tokenizer.tiktoken"
SENTENCEPIECE_FILE = "tokenizer.model"
GPT2_FILES = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}
"""Files of ids, and the files of merges next to them, as OpenAI and Hugging Face name them."""

Ranks = Mapping[bytes, int]
Merge = tuple[bytes, bytes]

NEVER = 2**32
"""Above every rank: tiktoken's ranks have 32 bits."""


@dataclass(frozen=True)
class Vocabulary:
    """The contents of a tokenizer file."""

    ranks: dict[bytes, int]
    """Token to id, sorted by id; lower ids merge first."""
    pattern: str | None = None
    """Regular expression that splits text into pieces; ``None`` if the file has none."""
    special: tuple[tuple[int, str], ...] = ()
    """Ids and names of special tokens."""
    merges: tuple[Merge, ...] | None = None
    """Pairs in merge order; ``None`` if the file has none, in which case the ranks determine them."""


def vocabulary_file(path: Path) -> Path:
    """Return the vocabulary file at ``path``, a file or a folder. Raises ``DataError`` if there is none."""
    names = (TOKENIZER_FILE, *GPT2_FILES, SENTENCEPIECE_FILE)
    found = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    if not found:
        raise DataError(
            f"{path}: got no vocabulary there, expected a .tiktoken file, a {TOKENIZER_FILE}, or a folder with one of "
            f"{', '.join(names)}; check the path"
        )
    return found[0]


def read_vocabulary(path: Path) -> Vocabulary:
    """Read the byte-level BPE vocabulary of a file or folder. Raises ``DataError`` if it is not one."""
    path = vocabulary_file(path)
    try:
        if path.name in GPT2_FILES:
            vocabulary = _read_gpt2(path)
        elif path.suffix == ".json":
            vocabulary = exact_vocabulary(json.loads(path.read_text(encoding="utf-8")))
        else:
            vocabulary = Vocabulary(_read_tiktoken(path))
        _check(vocabulary.ranks)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: got something that cannot be read as byte-level BPE ({error!r}); "
            f"expected a .tiktoken file, a {TOKENIZER_FILE} or GPT-2's files"
        ) from error
    return vocabulary


def _check(ranks: Ranks) -> None:
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 bytes are missing, first {missing[0]}")
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("two tokens have the same id")


# --- .tiktoken ----------------------------------------------------------------------------------------------------


def to_tiktoken(ranks: Ranks) -> str:
    """Return the content of a ``.tiktoken`` file: a line per token, sorted by rank, with its base64 and rank."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _by_rank(ranks))


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number}: got {line[:60]!r}, expected base64 and a number") from error
    return dict(_by_rank(ranks))


def _by_rank(ranks: Ranks) -> list[tuple[bytes, int]]:
    return sorted(ranks.items(), key=lambda item: item[1])


# --- GPT-2's names for bytes --------------------------------------------------------------------------------------


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's character for each byte: printable Latin-1 is itself, other bytes are moved to U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(moved)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def _name(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def _token(name: str) -> bytes:
    return bytes(CHARACTER_BYTES[character] for character in name)


def _named_ranks(ids: Mapping[str, int], merges: Iterable[Sequence[str]], leave_out: set[str]) -> dict[bytes, int]:
    """Return tokens sorted by id. Raises ``ValueError`` if the ids of merges do not ascend: then they are not ranks."""
    made = [ids["".join(pair)] for pair in merges]
    if any(before > after for before, after in pairwise(made)):
        raise ValueError("ids are not in the order of the merges, which tiktoken merges by")
    return dict(_by_rank({_token(name): rank for name, rank in ids.items() if name not in leave_out}))


def _token_pairs(pairs: Iterable[Sequence[str]]) -> tuple[Merge, ...]:
    return tuple((_token(left), _token(right)) for left, right in pairs)


def parse_merges(text: str) -> list[list[str]]:
    """Return the pairs in GPT-2's file of merges."""
    return [line.split(" ") for line in text.splitlines() if line and not line.startswith("#version")]


def _read_gpt2(path: Path) -> Vocabulary:
    ids: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    merges = parse_merges(path.with_name(GPT2_FILES[path.name]).read_text(encoding="utf-8"))
    special = set(ids) - set(CHARACTER_BYTES) - {"".join(pair) for pair in merges}
    ranks = _named_ranks(ids, merges, special)
    return Vocabulary(
        ranks, PATTERNS["gpt2"], tuple((ids[name], name) for name in sorted(special)), _token_pairs(merges)
    )


# --- tokenizer.json -----------------------------------------------------------------------------------------------


def to_hugging_face(
    ranks: Ranks, pattern: str, special: Sequence[tuple[int, str]], merges: Sequence[Merge] | None = None
) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``, for which ``transformers`` gives the same ids as tiktoken.

    ``merges`` are those of ``recover_merges``, if known.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    merges = recover_merges(ranks) if merges is None else merges
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": content, **flags} for number, content in special],
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
            # A token without a merge is only found as a whole piece; tiktoken always looks for whole pieces.
            "ignore_merges": len(merges) + 256 < len(ranks),
            "vocab": {_name(token): rank for token, rank in ranks.items()},
            "merges": [[_name(left), _name(right)] for left, right in merges],
        },
    }


def hugging_face_config(names: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json`` with named special tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }


def from_hugging_face(content: Mapping[str, Any]) -> Vocabulary:
    """Read ``tokenizer.json``. Raises ``ValueError`` or ``LookupError`` if it is not plain byte-level BPE."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer") is not None:
        raise ValueError(f"got model {model.get('type')!r}, normalizer {content.get('normalizer')}, expected BPE, none")
    special = tuple((token["id"], token["content"]) for token in content["added_tokens"])
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks = _named_ranks(model["vocab"], pairs, {name for _, name in special})
    return Vocabulary(ranks, _pattern_of(content["pre_tokenizer"]), special, _token_pairs(pairs))


def exact_vocabulary(content: Mapping[str, Any]) -> Vocabulary:
    """Read ``tokenizer.json``. Raises ``ValueError`` or ``LookupError`` if tiktoken would give other ids.

    tiktoken applies exactly the merges of ``recover_merges``, so a file gives the same ids if it contains these in
    order of rank. A token without a merge is only found as a whole piece, which ``ignore_merges`` enables.
    """
    vocabulary = from_hugging_face(content)
    for token in content["added_tokens"]:
        if not token["special"] or any(token[flag] for flag in ("single_word", "lstrip", "rstrip")):
            raise ValueError(f"added_tokens: got {token['content']!r} that is not special or is stripped")
    merges = recover_merges(vocabulary.ranks)
    if absent := set(merges) - set(vocabulary.merges or ()):
        raise ValueError(f"merges: got none of {min(absent)}, by which tiktoken would merge")
    if not content["model"].get("ignore_merges") and len(merges) + 256 < len(vocabulary.ranks):
        raise ValueError("ignore_merges: got false and tokens that no merge forms, expected true or no such token")
    return replace(vocabulary, merges=tuple(merges))


def ranks_digest(ranks: Ranks, pattern: str) -> str:
    """Return a SHA-256 of what decides the ids of a text."""
    content = [pattern, *(token.hex() for token, _ in _by_rank(ranks))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _pattern_of(pre_tokenizer: Mapping[str, Any]) -> str:
    """Return the pattern of a byte-level pre-tokenizer; ``ByteLevel`` alone means GPT-2's."""
    *splits, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        raise ValueError(f"pre_tokenizer: got {pre_tokenizer}, expected ByteLevel after at most one Split")
    return splits[0]["pattern"]["Regex"] if splits else PATTERNS["gpt2"]


def recover_merges(ranks: Ranks) -> list[Merge]:
    """Return the pair that forms each token longer than a byte, in order of rank; skip tokens that no merge forms.

    Merges inside a piece do not depend on the surrounding bytes until one crosses the piece's border. So whenever
    merging forms a token, it takes the same steps, and the same last pair, as merging the token's bytes alone.
    """
    found = (_last_pair(token, ranks) for token, _ in _by_rank(ranks) if len(token) > 1)
    return [pair for pair in found if pair is not None]


def _last_pair(token: bytes, ranks: Ranks) -> Merge | None:
    """Merge a token's bytes by rank, leftmost first, until two parts are left; ``None`` if more remain."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        rank, index = min((ranks.get(a + b, NEVER), index) for index, (a, b) in enumerate(pairwise(parts)))
        if rank == NEVER:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]
