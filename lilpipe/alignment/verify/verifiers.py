"""The forms of an answer, and whether it is right.

A written answer is ``Answer: X`` after zero or more sentences, on the completion's last line. The verifiers ``answer``
and ``numeric`` accept nothing else, so that what is correct is also well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from lilpipe.alignment.verify.sandbox import Limits, find_program, outcome_of
from lilpipe.schemas.examples import Prompt

_ANSWER = re.compile(r"Answer:[ ]*(\S[^\n]*)\Z")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-+]?\.\d+")
_THINKING = re.compile(r"\A\s*<think>(?P<steps>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*\Z", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def as_text(question: str) -> str:
    """The question as a base model meets it in its pretraining text; the answer follows after a space."""
    return f"Exercise: {question}\nSolution:"


def first_paragraph(text: str) -> str:
    """A base model's answer: what it wrote before the first blank line."""
    return text.split("\n\n")[0].strip()


def is_well_formed(completion: str) -> bool:
    """Whether the completion says ``Answer:`` once and ends, on the same line, in what follows it."""
    return completion.count("Answer:") == 1 and _stated_answer(completion) is not None


def is_thinking(completion: str) -> bool:
    """Whether the completion is ``<think>steps</think><answer>answer</answer>``, each once and neither empty."""
    match = _THINKING.match(completion)
    once = all(completion.count(tag) == 1 for tag in _TAGS)
    return once and match is not None and all(part.strip() for part in match.groups())


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order: with thousands, decimals, a sign and a currency, as ``-$1,234.50``."""
    plain = re.sub(r"[$€£]\s*", "", text.replace("−", "-"))
    return [Decimal(match.replace(",", "")) for match in _NUMBER.findall(plain)]


def stated_number(completion: str, marker: str | None = None) -> Decimal | None:
    """The first number behind the last marker, or the last number if no marker is given; None if there is none."""
    if marker is None:
        return found[-1] if (found := numbers(completion)) else None
    _, separator, rest = completion.rpartition(marker)
    return next(iter(numbers(rest)), None) if separator else None


# --- verifiers ----------------------------------------------------------------------------------------------------


def verify(prompt: Prompt, completion: str) -> bool:
    """Whether the prompt's verifier accepts the completion."""
    return VERIFIERS[prompt.verifier](prompt, completion)


def has_form(prompt: Prompt, completion: str) -> bool:
    """Whether the completion has the form that the prompt's verifier reads an answer from."""
    if prompt.verifier == "program":
        return find_program(completion) is not None
    return bool(completion.strip()) if prompt.verifier == "none" else is_well_formed(completion)


def _verify_words(prompt: Prompt, completion: str) -> bool:
    """Well-formed, and states the prompt's answer up to runs of spaces."""
    return is_well_formed(completion) and _stated_answer(completion) == prompt.answer


def _verify_number(prompt: Prompt, completion: str) -> bool:
    """Well-formed, and the first number stated is that of the prompt's answer."""
    number = stated_number(prompt.answer)
    return is_well_formed(completion) and number is not None and stated_number(completion, "Answer:") == number


def _verify_program(prompt: Prompt, completion: str) -> bool:
    program = find_program(completion)
    return program is not None and outcome_of(program, prompt.answer, Limits()).passed


def _verify_nothing(prompt: Prompt, completion: str) -> bool:  # noqa: ARG001 (the form of a verifier)
    return False


VERIFIERS: dict[str, Callable[[Prompt, str], bool]] = {
    "answer": _verify_words,
    "numeric": _verify_number,
    "program": _verify_program,
    "none": _verify_nothing,
}
"""Every verifier by its name; ``none`` has nothing to compare with and accepts nothing."""


def _stated_answer(completion: str) -> str | None:
    match = _ANSWER.search(completion.strip())
    return " ".join(match[1].split()) if match else None
