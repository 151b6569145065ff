"""Any ``tokenizer.json``, run by Hugging Face's ``tokenizers``, the library that defines the format.

Inside, special tokens have names that no text contains. So a text never becomes a special token, whatever the model is:
a Unigram or word-level vocabulary would find ``</s>`` in a text even if the library is told to split special tokens.
Everything else runs unchanged: normalizer, pre-tokenizer, added tokens that are not special, byte fallback. The
post-processor is left out: it adds tokens around a text, which is up to the caller (``leading_ids``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library

from lilpipe.errors import DataError
from lilpipe.tokenizer.marked import Encoded, names_pattern, split_marked
from lilpipe.tokenizer.vocabulary import CHARACTER_BYTES

PRIVATE = "\ufdd3"
"""Starts the internal name of a special token. In a text this noncharacter becomes U+FFFD."""
PRIVATE_PLANE = 0xF0000
"""An internal name is ``PRIVATE`` and one character from here on."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceEncoder:
    """The content of a ``tokenizer.json``, ready to encode and decode.

    Raises ``ValueError`` if the library rejects it, or gives added tokens other ids than the file states.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        ordinary = _made_by_merges(content["model"])
        added = [
            token
            for token in content.get("added_tokens") or []
            if not (token["special"] and token["content"] in ordinary)
        ]
        content = {**content, "added_tokens": added}
        self.added = {token["content"]: token for token in added}
        special = [name for name, token in self.added.items() if token["special"]]
        self._private = {name: PRIVATE + chr(PRIVATE_PLANE + index) for index, name in enumerate(special)}
        self._public = {private: name for name, private in self._private.items()}
        try:
            self._library = Library.from_str(json.dumps(_renamed(content, self._private)))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"tokenizers cannot read it ({error})") from error
        names = self._library.get_vocab(with_added_tokens=True)
        self.ids = {self._public.get(name, name): number for name, number in names.items()}
        for name, token in self.added.items():
            if token["id"] != self.ids[name]:
                raise ValueError(
                    f"added_tokens: got id {token['id']} for {name!r}, expected {self.ids[name]}, the next id after "
                    "the vocabulary; the file is damaged or edited"
                )
        self.special_ids = dict(sorted(((name, self.ids[name]) for name in special), key=lambda item: item[1]))
        self.size = max(self.ids.values(), default=-1) + 1
        first_found = [name for name, token in self.added.items() if token["special"] or not token["normalized"]]
        self._names = names_pattern(first_found)
        self._decoder = content.get("decoder")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, uint32 [tokens] each, on all cores. Lone surrogates become U+FFFD.

        Raises ``DataError`` for a text that is too much for the library.
        """
        return [np.array(each.ids, dtype=np.uint32) for each in self._run("encode_batch_fast", texts)]

    def encode_marked(self, text: str) -> Encoded:
        """Encode text in which names of special tokens are special tokens, unless they are marked as text."""
        parts, places = [], []
        for piece in split_marked(text, self._names):
            if piece.name and piece.text in self._private:
                parts.append(self._private[piece.text])
                places.append(piece.places[[0, -1]])
            else:
                parts.append(piece.text.replace(PRIVATE, "\ufffd"))
                places.append(piece.places)
        place = np.concatenate([*places, [len(text)]])
        [encoded] = self._run("encode_batch", ["".join(parts)], clean=False)
        spans = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        starts, stops = spans[:, 0], spans[:, 1]
        return Encoded(encoded.ids, place[starts], np.where(stops > starts, place[stops - 1] + 1, place[starts]))

    def _run(self, method: str, texts: Sequence[str], *, clean: bool = True) -> list[Any]:
        if clean:
            texts = [text.replace(PRIVATE, "\ufffd") if PRIVATE in text else text for text in texts]
        encode = getattr(self._library, method)
        try:
            return encode(texts, add_special_tokens=False)
        except TypeError:
            repaired = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
            return encode(repaired, add_special_tokens=False)
        except BaseException as error:  # a panic of Rust code is no Exception
            if type(error).__name__ != "PanicException":
                raise
            if len(texts) > 1:
                return [each for text in texts for each in self._run(method, [text], clean=False)]
            raise DataError(
                f"a text of {len(texts[0]):,} characters that begins with {texts[0][:40]!r}: tokenizers fails on it "
                f"({error}); remove the text, or shorten its runs of white space"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text as the file's decoder does; special tokens appear by name, unknown ids are ignored."""
        text = self._library.decode(list(ids), skip_special_tokens=False)
        if PRIVATE not in text:
            return text
        return re.sub(f"{PRIVATE}.", lambda found: self._public.get(found[0], found[0]), text)

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of each token by id; for special tokens their names, for an id without a token nothing."""
        tokens = [b""] * self.size
        to_bytes = token_decoder(self._decoder)
        for name, number in self.ids.items():
            tokens[number] = name.encode() if name in self.added else to_bytes(name)
        return tokens


def _made_by_merges(model: Mapping[str, Any]) -> set[str]:
    """Return the tokens that text consists of anyway, such as a ``!`` that serves as padding: they are not special."""
    if model["type"] != "BPE":
        return set()
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    single = {name for name in model["vocab"] if len(name) == 1}
    return single.union(*(("".join(pair), *pair) for pair in pairs))


def _renamed(content: Mapping[str, Any], private: Mapping[str, str]) -> dict[str, Any]:
    """Return the content with internal names for special tokens, without post-processor, padding and truncation."""
    model = dict(content["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        model["vocab"] = {private.get(name, name): number for name, number in vocabulary.items()}
    else:
        model["vocab"] = [[private.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in private:
        model["unk_token"] = private[model["unk_token"]]
    added = [{**token, "content": private.get(token["content"], token["content"])} for token in content["added_tokens"]]
    without = dict.fromkeys(("post_processor", "padding", "truncation"))
    return {**content, **without, "model": model, "added_tokens": added}


# --- bytes of tokens ----------------------------------------------------------------------------------------------


def token_decoder(decoder: Mapping[str, Any] | None) -> Any:
    """Return a function from a token's name to its bytes, after the decoder of ``tokenizer.json``.

    ByteLevel names stand for bytes; SentencePiece's have ``▁`` for a space and ``<0x0A>`` for a byte; WordPiece's start
    with ``##`` if no space precedes them.
    """
    steps = _steps(decoder)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    replaced = [
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    replaced += [(step["suffix"], " ") for step in steps if step["type"] == "BPEDecoder"]
    prefixes = [step["prefix"] for step in steps if step["type"] == "WordPiece"]

    def to_bytes(name: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(name)):
            return bytes.fromhex(byte[1])
        for prefix in prefixes:
            name = name.removeprefix(prefix) if name.startswith(prefix) else f" {name}"
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return to_bytes


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return [step for each in decoder["decoders"] for step in _steps(each)] if "decoders" in decoder else [decoder]


def _byte_level(name: str) -> bytes:
    try:
        return bytes(CHARACTER_BYTES[character] for character in name)
    except KeyError:  # not a name of bytes; the library decodes it as text
        return name.encode()


# --- tokens around a text -----------------------------------------------------------------------------------------


def leading_ids(processor: Mapping[str, Any] | None) -> list[int]:
    """Return the ids that a post-processor puts before a text."""
    if processor is None:
        return []
    kind = processor["type"]
    if kind == "Sequence":
        return [number for each in processor["processors"] for number in leading_ids(each)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]]
    ids: list[int] = []
    for item in processor["single"] if kind == "TemplateProcessing" else []:
        if "SpecialToken" not in item:
            break
        ids += processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return ids
