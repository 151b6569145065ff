"""Writes ``tokenizer.json`` as GGUF metadata: tokens, merges, special tokens, and the name of the pre-tokenizer.

llama.cpp has its own implementation of each pre-tokenizer that it knows, selected by name. A tokenizer with another
one is refused, because llama.cpp would split text differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.tokenizer.imported import chat_templates, read_files, stated_settings, token_names
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.vocabulary import TOKENIZER_FILE

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    PATTERNS["gpt2"]: "gpt-2",
    PATTERNS["llama3"]: "llama-bpe",
    PATTERNS["gpt4o"]: "gpt-4o",
    _QWEN2: "qwen2",
}
"""Names in llama.cpp by the regular expression that splits text."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_vocabulary(writer: Any, directory: Path, vocab_size: int) -> None:
    """Write the tokenizer of a checkpoint, padded to the model's ``vocab_size``, and its chat template.

    Raises ``ConfigError`` for a tokenizer that llama.cpp does not have.
    """
    content = check_vocabulary(directory)
    model = content["model"]
    pieces = bool(model.get("byte_fallback"))
    names, kinds = _tokens(content, vocab_size, pieces=pieces)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if _is_gemma(content):
        writer.add_tokenizer_model("gemma4")
        writer.add_token_scores([0.0] * len(names))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    elif pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(names, merges))
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(content))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    _add_special(writer, directory, content)
    files = read_files(directory)
    if template := chat_templates(files, stated_settings(files)).get("default"):
        writer.add_chat_template(template)


def check_vocabulary(directory: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``. Raises ``ConfigError`` for a tokenizer that llama.cpp does not have."""
    content = _read(directory / TOKENIZER_FILE)
    if (kind := content["model"].get("type")) != "BPE":
        raise _refused(f"got a tokenizer model of type {kind!r}, expected BPE")
    if _is_gemma(content):
        return content
    if content["model"].get("byte_fallback"):
        _check_pieces(content)
    else:
        pre_tokenizer_name(content)
    return content


def pre_tokenizer_name(content: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer. Raises ``ConfigError`` if it has none."""
    outer = content.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    if content.get("normalizer") not in (None, {"type": "NFC"}):  # Qwen; llama.cpp leaves NFC out
        raise _refused(f"got the normalizer {content['normalizer']}, expected none")
    match parts:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    raise _refused(
        f"got the pre-tokenizer {json.dumps(outer)[:200]}, expected one that llama.cpp has: "
        f"{', '.join(sorted({*PRE_TOKENIZERS.values(), 'smollm'}))} (for your own: tokenizer.pattern = 'llama3')"
    )


def _tokens(content: Mapping[str, Any], vocab_size: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """Return name and type of each id below ``vocab_size``."""
    by_id = {number: (name, BYTE if pieces and _BYTE.fullmatch(name) else NORMAL) for name, number in _vocab(content)}
    for token in content["added_tokens"]:
        by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if (highest := max(by_id)) >= vocab_size:
        raise ArtifactError(
            f"{TOKENIZER_FILE}: got id {highest}, expected less than the model's vocab_size {vocab_size}"
        )
    rows = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [name for name, _ in rows], [kind for _, kind in rows]


def _vocab(content: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(content["model"]["vocab"].items())


def _scores(names: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece's score of each token: the earlier its merge, the higher."""
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    return [-float(ranks[name]) if name in ranks else -1e6 if len(name) > 1 else 0.0 for name in names]


_LLAMA2_NORMALIZERS = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


_GEMMA_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _is_gemma(content: Mapping[str, Any]) -> bool:
    """Return whether pieces have Gemma's form: merges of the whole text, with ``▁`` for spaces and no prefix."""
    return (
        bool(content["model"].get("byte_fallback"))
        and content.get("normalizer") == _GEMMA_NORMALIZER
        and content.get("pre_tokenizer") in (None, _GEMMA_SPLIT)
    )


def _check_pieces(content: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a SentencePiece vocabulary in another form than Llama 2's.

    Mistral's, with a space before the first piece only, gave other ids in llama.cpp.
    """
    normalizer, found = content.get("normalizer") or {}, content.get("pre_tokenizer")
    added = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if normalizer.get("normalizers") != _LLAMA2_NORMALIZERS or found is not None or added:
        raise _refused(
            f"got SentencePiece pieces with normalizer {normalizer}, pre-tokenizer {found} and ordinary added tokens "
            f"{added[:3]}, expected the form of Llama 2 or Gemma, for which llama.cpp gives the same ids"
        )


def _add_special(writer: Any, directory: Path, content: Mapping[str, Any]) -> None:
    """Write the ids of special tokens. The end of a turn comes from ``generation_config.json`` if it names several."""
    ids = dict(_vocab(content)) | {token["content"]: token["id"] for token in content["added_tokens"]}
    named = {key: ids.get(name) for key, name in token_names(stated_settings(read_files(directory))).items()}
    ends = _read(directory / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    end = ends[0] if ends else named.get("eos_token")
    for add, number in (
        (writer.add_bos_token_id, named.get("bos_token")),
        (writer.add_eos_token_id, end),
        (writer.add_eot_token_id, ends[1] if len(ends) > 1 else None),
        (writer.add_unk_token_id, named.get("unk_token")),
        (writer.add_pad_token_id, named.get("pad_token")),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(_adds_bos(content.get("post_processor")))


def _adds_bos(processor: Any) -> bool:
    """Whether the post-processor puts a special token before a text."""
    if not processor:
        return False
    if processor["type"] == "Sequence":
        return any(_adds_bos(part) for part in processor["processors"])
    return processor["type"] == "TemplateProcessing" and "SpecialToken" in processor["single"][0]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _refused(message: str) -> ConfigError:
    return ConfigError(f"release.gguf: {message}; set release.gguf = []")
