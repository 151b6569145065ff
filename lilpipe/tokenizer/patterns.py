"""Patterns that cut text into pieces before merging, by name.

Merges never cross the pieces, so a pattern decides what a token may be: whether digits stand alone, whether a word
takes the space before it, how runs of white space are kept. Rust's ``fancy-regex`` reads these when training
(rustbpe) and encoding (tiktoken), Oniguruma in ``transformers``; the presets cut alike in all of them, which a pattern
of your own may not: the three differ in possessive counts such as ``{1,3}+``.
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
"""Digits one by one (the default), and the patterns of GPT-2, of GPT-4 (cl100k), of GPT-4o (o200k) and of Llama 3,
which took GPT-4's."""


def resolve_pattern(pattern: str) -> str:
    """The regular expression of a preset, or ``pattern`` itself where it is one."""
    return PATTERNS.get(pattern, pattern)


def pattern_name(pattern: str) -> str:
    """The first preset that is this regular expression, else the expression."""
    return next((name for name, preset in PATTERNS.items() if preset == pattern), pattern)
