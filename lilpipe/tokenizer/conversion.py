"""Older tokenizer files as ``tokenizer.json``: GPT-2's pair of files, and SentencePiece's ``tokenizer.model``.

A SentencePiece model (Kudo and Richardson 2018) is a protocol buffer; its fields are read here directly. Merges of a
byte-pair model follow from the scores: of all adjacent pieces, those that form the piece of the highest score merge
first.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lilpipe.tokenizer.vocabulary import CHARACTER_BYTES, TOKENIZER_FILE, parse_merges

SPACE = "▁"
"""SentencePiece's character for a space."""

GPT2_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "CodeGenTokenizer", "PreTrainedTokenizer")
"""Tokenizer classes whose pair of files is split by GPT-2's pattern."""


def as_tokenizer_json(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Return ``tokenizer.json``, and ``tokenizer_config.json`` if there is none, for a tokenizer in older files.

    Raises ``FileNotFoundError`` without such files, ``ValueError`` or ``LookupError`` if they are damaged.
    """
    if "vocab.json" in files and "merges.txt" in files:
        kind = str(settings.get("tokenizer_class", GPT2_CLASSES[0])).removesuffix("Fast")
        if kind not in GPT2_CLASSES:
            raise ValueError(
                f"vocab.json: got the class {kind}, whose pattern is not in the files, expected {TOKENIZER_FILE}; "
                "load and save the tokenizer with transformers"
            )
        return {TOKENIZER_FILE: _encoded(_from_gpt2(json.loads(files["vocab.json"]), files["merges.txt"].decode()))}
    if "tokenizer.model" in files:
        content, named = _from_sentencepiece(files["tokenizer.model"])
        named_file = {} if "tokenizer_config.json" in files else {"tokenizer_config.json": _encoded(named)}
        return {TOKENIZER_FILE: _encoded(content), **named_file}
    raise FileNotFoundError(f"{TOKENIZER_FILE}, tokenizer.model, or vocab.json with merges.txt")


def _encoded(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _content(model: Mapping[str, Any], added: Sequence[tuple[int, str, bool]], **parts: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": special} for number, name, special in added
        ],
        **{part: parts.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")},
        "model": model,
    }


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, **settings, "vocab": dict(vocabulary), "merges": [list(m) for m in merges]}


def _from_gpt2(ids: Mapping[str, int], text: str) -> dict[str, Any]:
    merges = parse_merges(text)
    special = set(ids) - set(CHARACTER_BYTES) - {"".join(pair) for pair in merges}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = sorted((ids[name], name, True) for name in special)
    return _content(_bpe(ids, merges), added, pre_tokenizer=step, decoder=step)


# --- SentencePiece ------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of pieces."""
UNIGRAM, BPE = 1, 2
"""Types of models."""


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def _from_sentencepiece(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of ``tokenizer.json`` and ``tokenizer_config.json``."""
    try:
        message = _fields(data)
        pieces = [_piece(_fields(each)) for each in message[1]]
        trainer, normalizer = (_fields(message[number][-1]) for number in (2, 3))
    except (KeyError, IndexError, struct.error, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer.model: got no SentencePiece model ({error!r})") from error
    kind, unknown = _last(trainer, 3, UNIGRAM), _last(trainer, 40, 0)
    if kind not in (UNIGRAM, BPE) or _last(trainer, 24, 0):
        raise ValueError(f"tokenizer.model: got model type {kind}, expected Unigram or BPE with spaces before words")
    byte_fallback = bool(_last(trainer, 35, 0))
    named = _named(
        pieces, {"unk_token": unknown, "bos_token": _last(trainer, 41, 1), "eos_token": _last(trainer, 42, 2)}
    )
    added = [
        (number, piece.text, piece.kind != USER_DEFINED)
        for number, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    if kind == BPE:
        model = _bpe(
            {piece.text: number for number, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        scores = [[piece.text, piece.score] for piece in pieces]
        model = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": byte_fallback}
    begin = named.get("bos_token") if kind == BPE else None
    prefix = bool(_last(normalizer, 3, 1))
    inner = any(piece.kind == USER_DEFINED for piece in pieces)  # a prefix belongs to the first part of a text alone
    content = _content(
        model,
        added,
        normalizer={"type": "Sequence", "normalizers": _normalizers(normalizer, prefix=prefix and not inner)},
        pre_tokenizer=_metaspace() if prefix and inner else None,
        post_processor=begin and _begin(begin, added),
        decoder={"type": "Sequence", "decoders": _decoders(prefix=prefix)},
    )
    return content, named


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, by its score; then by the ids of the parts, lowest first."""
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.kind in (NORMAL, USER_DEFINED)}
    found = []
    for text, number in ids.items():
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        parts = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        found += [(-pieces[number].score, ids[left], ids[right], left, right) for left, right in parts]
    return [(left, right) for *_, left, right in sorted(found)]


def _named(pieces: Sequence[_Piece], ids: Mapping[str, int]) -> dict[str, str]:
    return {name: pieces[number].text for name, number in ids.items() if 0 <= number < len(pieces)}


def _normalizers(spec: Mapping[int, list[Any]], *, prefix: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if table := spec.get(2, [b""])[-1]:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    if _last(spec, 4, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _metaspace() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


def _begin(name: str, added: Sequence[tuple[int, str, bool]]) -> dict[str, Any]:
    """Return a post-processor that puts a token before a text, as Llama, Mistral and Gemma expect."""
    number = next(number for number, text, _ in added if text == name)
    token, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [token, text, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": [token, text], "pair": pair, "special_tokens": special}


def _decoders(*, prefix: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else steps


# --- protocol buffers ---------------------------------------------------------------------------------------------


def _piece(fields: Mapping[int, list[Any]]) -> _Piece:
    score = struct.unpack("<f", fields[2][-1])[0] if 2 in fields else 0.0
    return _Piece(fields[1][-1].decode(), score, _last(fields, 3, NORMAL))


def _last(fields: Mapping[int, list[Any]], number: int, default: int) -> int:
    value = fields.get(number, [default])[-1]
    return value - 2**64 if value >= 2**63 else value


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Return the values of each field of a message: integers, or bytes. Raises ``IndexError`` if it is truncated."""
    found: dict[int, list[Any]] = {}
    for number, value in _read(data):
        found.setdefault(number, []).append(value)
    return found


def _read(data: bytes) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}[key & 7]
        if place + size > len(data):
            raise IndexError("truncated")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
