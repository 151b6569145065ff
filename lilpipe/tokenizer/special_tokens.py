"""Special tokens of tokenizers that are trained here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>")
"""Tokens for conversations."""
NAMED_TOKENS = ("<|end_of_document|>", "<|padding|>", *TURN_TOKENS)
NUM_RESERVED = 2


def special_tokens(num_reserved: int = NUM_RESERVED) -> tuple[str, ...]:
    """Return the names of the special tokens in order of their ids: named tokens, then reserved ones."""
    return (*NAMED_TOKENS, *(f"<|reserved_{index}|>" for index in range(num_reserved)))


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` was trained here: its first special tokens are ours."""
    names = [token["content"] for token in content.get("added_tokens") or []]
    return tuple(names[: len(NAMED_TOKENS)]) == NAMED_TOKENS and content.get("normalizer") is None
