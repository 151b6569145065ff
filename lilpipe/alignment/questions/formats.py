"""Dataset formats of questions and answers, parsed into a common form.

Raises ``Malformed`` with the reason for a row that does not match its format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lilpipe.alignment.verify.numerals import one_number
from lilpipe.config.prompts import PromptColumns
from lilpipe.schemas.messages import Message

ROLES = ("system", "user", "assistant", "tool")

_CALCULATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations, which are removed."""


class Malformed(Exception):
    """A row that does not match its format; ``excerpt`` is its beginning if it could not be parsed."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


@dataclass(frozen=True)
class ParsedRow:
    """Row of a dataset in any format."""

    prompt: list[Message]
    """Turns before the answer."""
    reference: str
    """Answer in words; for a preference the chosen completion; empty if there are only tests."""
    answer: str = ""
    """Reference answer for the verifier."""
    verifier: str = "none"
    difficulty: int = 0
    rejected: str | None = None
    edited: str | None = None
    desirable: bool | None = None
    """Label of an unpaired completion; None for other rows."""

    @property
    def question(self) -> str:
        """First user turn."""
        return next(turn["content"] for turn in self.prompt if turn["role"] == "user")

    @property
    def best_answer(self) -> str:
        """Best answer in words; empty if there is no good one."""
        return "" if self.desirable is False else self.edited or self.reference

    @property
    def is_preference(self) -> bool:
        """Whether the row is a preference."""
        return self.rejected is not None or self.desirable is not None

    @property
    def is_single_question(self) -> bool:
        """Whether the prompt is a single user turn, so that it can be used as a prompt on its own."""
        return len(self.prompt) == 1


def parse(kind: str, values: Any, columns: PromptColumns) -> ParsedRow:
    """Parse a row. Raises ``Malformed``."""
    if not isinstance(values, Mapping):
        raise Malformed(f"got {type(values).__name__}, expected an object")
    return _KINDS[kind](values, columns)


# --- formats ------------------------------------------------------------------------------------------------------


def _gsm8k(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    question = _text(values, columns.question)
    steps, marker, end = _CALCULATION.sub("", _text(values, columns.answer)).rpartition("####")
    number = one_number(end) if marker else None
    if number is None:
        raise Malformed(f"{columns.answer!r} does not end in `#### N`; got {end.strip()[:40]!r}")
    lines = [line.strip() for line in steps.strip().splitlines() if line.strip()]
    reference = "\n".join([*lines, f"Answer: {number.text}"])
    return ParsedRow(_asked(question), reference, number.text, "numeric", difficulty=len(lines))


def _instruction(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    if columns.messages in values:
        prompt, answer = _conversation(values[columns.messages], columns.messages)
        return ParsedRow(prompt, answer)
    if columns.instruction in values:
        return ParsedRow(_asked(_instruction_text(values, columns)), _text(values, columns.output))
    return ParsedRow(_prompt(values, columns), _text(values, columns.response))


def _program(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    reference = _text(values, columns.response) if values.get(columns.response) else ""
    return ParsedRow(_prompt(values, columns), reference, _text(values, columns.tests), "program")


def _preference(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    is_single = columns.label in values and columns.chosen not in values
    return (_single if is_single else _pair)(values, columns)


def _single(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    label = values[columns.label]
    if label not in (True, False):
        raise Malformed(f"{columns.label!r}: got {label!r}, expected true or false")
    prompt, (answer,) = _prompt_and_answers(values, [columns.completion], columns)
    return ParsedRow(prompt, answer, desirable=bool(label))


def _pair(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    names = [columns.chosen, columns.rejected, *([columns.edited] if values.get(columns.edited) else [])]
    prompt, answers = _prompt_and_answers(values, names, columns)
    if len({answer.strip() for answer in answers}) < len(answers):
        raise Malformed(f"two of {', '.join(names)} are equal")
    return ParsedRow(prompt, answers[0], rejected=answers[1], edited=answers[2] if len(answers) > 2 else None)


def _prompt_and_answers(
    values: Mapping[str, Any], names: list[str], columns: PromptColumns
) -> tuple[list[Message], list[str]]:
    """Return the common prompt of several answers, and the answers."""
    prompts, answers = [], []
    for name in names:
        prompt, answer = _answer(values, name)
        answers.append(answer)
        prompts.append(prompt)
    if any(prompt != prompts[0] for prompt in prompts):
        raise Malformed(f"{', '.join(names)} answer different conversations")
    stated = columns.prompt in values or columns.instruction in values
    prompt = _prompt(values, columns) if stated or not prompts[0] else prompts[0]
    if stated and prompts[0] and prompts[0] != prompt:
        raise Malformed(f"{columns.prompt!r} differs from the conversation in {names[0]!r}")
    return prompt, answers


_KINDS: dict[str, Callable[[Mapping[str, Any], PromptColumns], ParsedRow]] = {
    "gsm8k": _gsm8k,
    "instructions": _instruction,
    "programs": _program,
    "preferences": _preference,
}

# --- parts --------------------------------------------------------------------------------------------------------


def _asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def _text(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        raise Malformed(f"missing {name!r}; got {', '.join(map(str, values)) or 'no keys'}")
    return _checked(values[name], name)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{name!r}: got {type(value).__name__}, expected a string")
    if not value.strip():
        raise Malformed(f"{name!r} is empty")
    if re.search("[\0\ud800-\udfff]", value):
        raise Malformed(f"{name!r} contains a NUL or an unpaired surrogate, expected valid text")
    return value.strip()


def _instruction_text(values: Mapping[str, Any], columns: PromptColumns) -> str:
    """Return Alpaca's instruction followed by its input, if any (Taori et al. 2023)."""
    instruction = _text(values, columns.instruction)
    return f"{instruction}\n\n{_text(values, columns.input)}" if values.get(columns.input) else instruction


def _prompt(values: Mapping[str, Any], columns: PromptColumns) -> list[Message]:
    if columns.prompt not in values and columns.instruction in values:
        return _asked(_instruction_text(values, columns))
    given = values.get(columns.prompt)
    if not isinstance(given, list):
        return _asked(_text(values, columns.prompt))
    turns = _turns(given, columns.prompt)
    if turns[-1]["role"] == "assistant":
        raise Malformed(f"{columns.prompt!r} ends with an assistant turn, expected a user turn")
    return turns


def _answer(values: Mapping[str, Any], name: str) -> tuple[list[Message], str]:
    """Return an answer and the turns before it, if given in the same list."""
    given = values.get(name)
    if not isinstance(given, list):
        return [], _text(values, name)
    turns = _turns(given, name, asked=False)
    if turns[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} ends with a turn of {turns[-1]['role']!r}, expected the assistant's")
    return turns[:-1], turns[-1]["content"]


def _conversation(given: Any, name: str) -> tuple[list[Message], str]:
    turns = _turns(given, name)
    if turns[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} ends with a turn of {turns[-1]['role']!r}, expected the assistant's")
    return turns[:-1], turns[-1]["content"]


def _turns(given: Any, name: str, *, asked: bool = True) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise Malformed(f"{name!r} is not a list of messages")
    turns: list[Message] = []
    for position, turn in enumerate(given):
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise Malformed(f"{name!r}: message {position} has no valid role, expected one of {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": _checked(turn.get("content"), f"{name}.{position}.content")})
    if asked and all(turn["role"] != "user" for turn in turns):
        raise Malformed(f"{name!r} has no user turn")
    return turns
