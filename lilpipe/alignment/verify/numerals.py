"""Numbers as people write them: signs, currency, thousands separators, decimals, exponents, fractions, words for scale.

A number is read whole or not at all: "9 500" is never 9, "1/2" never 1, "10²" never 10. What remains ambiguous, such as
"3,5" or "1.234.567", reads as several numbers, so that ``one_number`` rejects it.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

_SEPARATOR = r"[,'’_ \u00a0\u2009\u202f]"
"""Thousands separators; the same one between all groups of a number."""
_MAGNITUDE = rf"\d{{1,3}}(?:(?P<separator>{_SEPARATOR})\d{{3}})(?:(?P=separator)\d{{3}})*(?![\d])|\d+"
_NUMBER = re.compile(
    rf"""
    (?<![\w.])(?P<sign>[-+])?
    (?:(?P<whole>{_MAGNITUDE})(?P<part>\.\d+)?|(?P<only_part>\.\d+))
    (?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?
    (?:\s?/\s?(?P<denominator>\d+)(?![\d.]|\s?/))?
    (?:(?P<kilo>k\b)|\s?(?P<scale>hundred|thousand|million|billion|trillion|dozen)s?\b)?
    (?P<unread>[²³¹⁰⁴-⁹]|\s?[½⅓⅔¼¾⅛]|\.\d|[ex][-+]?[\da-f])?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {
    "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12
}  # fmt: skip
_CURRENCY = "[$€£¥₹₽₩₪₺]"
_LEADING_SIGN = re.compile(rf"(\A[^\w.+-]*|[{{(=:]\s*)([-+])\s+(?={_CURRENCY}?\s?[\d.])")
_LATEX = (
    (re.compile(r"\{,\}|\\[,;:! ]"), ","),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\\\$"), "$"),
)
_MINUS = str.maketrans({"−": "-", "﹣": "-", "－": "-", "＋": "+"})
MAX_DIGITS = 1_000
"""Digits above which a number is not read."""


class Numeral(NamedTuple):
    """A number in a text."""

    text: str
    """Plain form: digits, with a decimal point or a slash."""
    value: Decimal
    """Exact, or for a fraction correctly rounded, so that equal fractions have equal values."""


def numbers(text: str) -> list[Decimal]:
    """Return the numbers in a text in order."""
    return [found.value for found in find_numerals(text) if found]


def one_number(text: str) -> Numeral | None:
    """Return the number that a text states; None if it has none, or several different ones.

    Here a sign may stand apart from its number at the start: "- 5".
    """
    found = find_numerals(_LEADING_SIGN.sub(r"\1\2", text.translate(_MINUS).replace("–", "-", 1)))
    if not found or None in found:
        return None
    first = found[0]
    return first if first and all(other and other.value == first.value for other in found) else None


def find_numerals(text: str) -> list[Numeral | None]:
    """Return the numbers in a text in order, None for each that cannot be read."""
    plain = text.translate(_MINUS)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    plain = re.sub(rf"(?<=\w){_CURRENCY}", " ", plain)
    plain = re.sub(rf"{_CURRENCY}\s*", "", plain)
    return [_read(match) for match in _NUMBER.finditer(plain)]


def _read(match: re.Match[str]) -> Numeral | None:
    digits = re.sub(_SEPARATOR, "", match["whole"] or "") + (match["part"] or match["only_part"] or "")
    if match["unread"] or len(digits) > MAX_DIGITS:
        return None
    sign = "-" if match["sign"] == "-" else ""
    value = Decimal(f"{sign}{digits}e{match['exponent'] or 0}")
    if match["denominator"]:
        try:
            value /= Decimal(match["denominator"])
        except (InvalidOperation, ZeroDivisionError):
            return None
    if scale := 1_000 if match["kilo"] else _SCALES.get((match["scale"] or "").lower()):
        value *= scale
    elif match["denominator"]:
        return Numeral(f"{sign}{digits}/{match['denominator']}", value)
    return Numeral(f"{value:f}", value)
