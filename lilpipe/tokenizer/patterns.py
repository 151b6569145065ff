"""Named patterns (regular expressions) that split text into pieces before merging.

Merges never cross pieces, so the pattern decides what a token can be: single digits or groups, words with or without
the space before them, how white space is kept. Rust's ``fancy-regex`` runs the pattern in training (rustbpe) and
encoding (tiktoken), Oniguruma in ``transformers``. The presets split alike in both. Your own pattern may not:
the engines differ in possessive quantifiers such as ``{1,3}+``.
"""

from __future__ import annotations

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PATTERNS = {
    "single_digits": rf"{_WORD}| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}",
    "gpt2": rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    "gpt4": _CL100K,
    "gpt4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    ),
    "llama3": _CL100K,
}
"""Single digits (the default), and the patterns of GPT-2, GPT-4 (cl100k), GPT-4o (o200k) and Llama 3, which uses
GPT-4's."""


def resolve_pattern(pattern: str) -> str:
    """Return the regular expression of a preset, or ``pattern`` itself if it is not a preset's name."""
    return PATTERNS.get(pattern, pattern)


def pattern_name(pattern: str) -> str:
    """Return the name of the first preset with this regular expression, else the expression."""
    return next((name for name, preset in PATTERNS.items() if preset == pattern), pattern)
