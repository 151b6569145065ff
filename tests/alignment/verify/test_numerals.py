from decimal import Decimal
from fractions import Fraction

import pytest

from lilpipe.alignment.verify.numerals import numbers, one_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 apples and 12 pears", ["7", "12"]),
        ("$1,234,567.50 in all.", ["1234567.50"]),
        ("-3, +4 and −5", ["-3", "4", "-5"]),
        ("-$2 or $-2", ["-2", "-2"]),
        ("9-4=5", ["9", "4", "5"]),
        ("It is 72.", ["72"]),
        ("0.5 and .25", ["0.5", ".25"]),
        ("1,2 and 1, 2", ["1", "2", "1", "2"]),
        ("50%", ["50"]),
        ("none", []),
    ],
)
def test_numbers_are_read_with_signs_thousands_decimals_and_currencies(text, expected):
    assert numbers(text) == [Decimal(each) for each in expected]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1/2", "1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("5 000", "5000"),
        ("5\u202f000", "5000"),
        ("5'000", "5000"),
        ("9{,}500", "9500"),
        ("9\\,500", "9500"),
        ("- 5", "-5"),
        ("$ - 5", "-5"),
        ("\\boxed{- 5}", "-5"),
        ("–5", "-5"),
        ("-¥5", "-5"),
        ("1e5", "100000"),
        ("1.5E-3", "0.0015"),
        ("5K", "5000"),
        ("2 million people", "2000000"),
        ("3 dozen", "36"),
        ("18 dollars.", "18"),
        ("18 (18)", "18"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
    ],
)
def test_a_number_is_read_as_people_write_it(text, plain):
    found = one_number(text)
    assert found is not None
    assert found.text == plain
    assert float(found.value) == pytest.approx(float(Fraction(plain)))


def test_equal_fractions_have_equal_values():
    assert one_number("2/6") != one_number("1/3")
    assert [numbers(text) for text in ("2/6", "-3/4")] == [numbers("1/3"), [Decimal("-0.75")]]


@pytest.mark.parametrize(
    "text",
    [
        "", "five", "3 or 4", "3, 4", "3-4", "5 - 3", "1.234.567", "1,234,56", "3,5", "10²", "1½", "1 1/2", "1/0",
        "12/25/2024", "12:30", "2^5", "6x3", "0x1F", "1e5000", "9" * 2_000,
    ],
)  # fmt: skip
def test_what_is_not_one_number_is_not_read_in_part(text):
    assert one_number(text) is None
