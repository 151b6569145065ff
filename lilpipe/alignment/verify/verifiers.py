"""Answer formats and verifiers.

A final answer is ``Answer: X`` on the last line, after zero or more sentences. The verifiers ``answer`` and ``numeric``
accept no other format, so a correct completion is also well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from lilpipe.alignment.verify.numerals import numbers, one_number
from lilpipe.alignment.verify.sandbox import Limits, find_program, outcome_of
from lilpipe.schemas.examples import Prompt

_ANSWER = re.compile(r"Answer:[ ]*(\S[^\n]*)\Z")
_THINKING = re.compile(r"\A\s*<think>(?P<steps>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*\Z", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def as_text(question: str) -> str:
    """Return the question as in pretraining text for a base model; the answer follows after a space."""
    return f"Exercise: {question}\nSolution:"


def first_paragraph(text: str) -> str:
    """Return a base model's completion: the text before the first blank line."""
    return text.split("\n\n")[0].strip()


def is_well_formed(completion: str) -> bool:
    """Return whether ``Answer:`` occurs exactly once, on the last line, followed by text."""
    return completion.count("Answer:") == 1 and _stated_answer(completion) is not None


def is_thinking(completion: str) -> bool:
    """Return whether the completion is ``<think>steps</think><answer>answer</answer>``, without empty parts."""
    match = _THINKING.match(completion)
    once = all(completion.count(tag) == 1 for tag in _TAGS)
    return once and match is not None and all(part.strip() for part in match.groups())


def stated_number(completion: str, marker: str | None = None) -> Decimal | None:
    """Return the number on the line after the last marker, or the last number without a marker; None if there is none.

    What is stated ends with the line, or at a closing tag. Several different numbers state none: "3 or 4" is not 3.
    """
    if marker is None:
        return found[-1] if (found := numbers(completion)) else None
    _, separator, rest = completion.rpartition(marker)
    lines = rest.partition("</")[0].strip().splitlines()
    stated = one_number(lines[0]) if separator and lines else None
    return stated.value if stated else None


# --- verifiers ----------------------------------------------------------------------------------------------------


def verify(prompt: Prompt, completion: str) -> bool:
    """Return whether the prompt's verifier accepts the completion."""
    return VERIFIERS[prompt.verifier](prompt, completion)


def has_form(prompt: Prompt, completion: str) -> bool:
    """Return whether the completion has the answer format of the prompt's verifier."""
    if prompt.verifier == "program":
        return find_program(completion) is not None
    return bool(completion.strip()) if prompt.verifier == "none" else is_well_formed(completion)


def _verify_words(prompt: Prompt, completion: str) -> bool:
    """Return whether the completion is well-formed and its answer equals the prompt's up to spaces."""
    return is_well_formed(completion) and _stated_answer(completion) == prompt.answer


def _verify_number(prompt: Prompt, completion: str) -> bool:
    """Return whether the completion is well-formed and the number that it states equals the prompt's answer."""
    number = one_number(prompt.answer)
    return is_well_formed(completion) and number is not None and stated_number(completion, "Answer:") == number.value


def _verify_program(prompt: Prompt, completion: str) -> bool:
    program = find_program(completion)
    return program is not None and outcome_of(program, prompt.answer, Limits()).passed


def _verify_nothing(prompt: Prompt, completion: str) -> bool:  # noqa: ARG001 (signature of a verifier)
    return False


VERIFIERS: dict[str, Callable[[Prompt, str], bool]] = {
    "answer": _verify_words,
    "numeric": _verify_number,
    "program": _verify_program,
    "none": _verify_nothing,
}
"""Verifiers by name; ``none`` has no reference answer and rejects all completions."""


def _stated_answer(completion: str) -> str | None:
    match = _ANSWER.search(completion.strip())
    return " ".join(match[1].split()) if match else None
