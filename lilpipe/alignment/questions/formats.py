"""Formats of rows: recognised by their columns, and parsed into a common form.

One recogniser serves demonstrations, questions and preferences. Raises ``Malformed`` with the reason for a row that
does not match its format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lilpipe.alignment.questions.columns import (
    ParsedRow,
    answered,
    asked,
    end_with_answer,
    history_of,
    instruction_of,
    prompt_of,
    system_of,
    text_of,
    tools_of,
)
from lilpipe.alignment.questions.comparisons import parse_pair, parse_single
from lilpipe.alignment.questions.turns import Malformed, checked_text, read_turns
from lilpipe.alignment.verify.numerals import one_number
from lilpipe.config.prompts import PromptColumns
from lilpipe.schemas.messages import Message

_CALCULATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations, which are removed."""


@dataclass(frozen=True)
class Format:
    """A format of rows."""

    name: str
    needs: tuple[str, ...]
    """Columns, by their names in ``PromptColumns``, without which a row is not of this format."""
    parse: Callable[[Mapping[str, Any], PromptColumns], ParsedRow]
    optional: tuple[str, ...] = ()
    accepts: Callable[[Mapping[str, Any], PromptColumns], bool] | None = None
    """Further condition, if the columns do not suffice to tell formats apart."""


def without_none(values: Any) -> dict[str, Any]:
    """Return the columns of a row that have a value; `datasets` fills absent ones with None."""
    if not isinstance(values, Mapping):
        raise Malformed(f"got {type(values).__name__}, expected an object")
    return {key: value for key, value in values.items() if value is not None}


def recognise(kind: str, values: Mapping[str, Any], columns: PromptColumns) -> Format:
    """Return the format of a row among those of a kind; if none matches, the closest."""
    formats = KINDS[kind]
    for form in formats:
        is_whole = all(getattr(columns, name) in values for name in form.needs)
        if is_whole and (form.accepts is None or form.accepts(values, columns)):
            return form
    present = [sum(getattr(columns, name) in values for name in form.needs) / len(form.needs) for form in formats]
    if kind == "auto" and not any(present):
        raise Malformed(
            f"is in no known format: its columns are {', '.join(map(str, values)) or 'none'}; expected, for example, "
            "messages, conversations, instruction and output, prompt and completion, or text; or set `columns`"
        )
    closest = [form for form, ratio in zip(formats, present, strict=True) if ratio == max(present)]
    return closest[-1 if any(present) else 0]


def parse(kind: str, values: Any, columns: PromptColumns) -> ParsedRow:
    """Parse a row of a kind. Raises ``Malformed``."""
    values = without_none(values)
    return recognise(kind, values, columns).parse(values, columns)


# --- questions with answers ---------------------------------------------------------------------------------------


def _gsm8k(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    question = text_of(values, columns.question)
    steps, marker, end = _CALCULATION.sub("", text_of(values, columns.answer)).rpartition("####")
    number = one_number(end) if marker else None
    if number is None:
        raise Malformed(f"{columns.answer!r} does not end in `#### N`; got {end.strip()[:40]!r}")
    lines = [line.strip() for line in steps.strip().splitlines() if line.strip()]
    reference = "\n".join([*lines, f"Answer: {number.text}"])
    return ParsedRow(asked(question), reference, number.text, "numeric", difficulty=len(lines))


def _ends_in_number(values: Mapping[str, Any], columns: PromptColumns) -> bool:
    return "####" in str(values[columns.answer])


def _question_answer(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    prompt = [*system_of(values, columns), *asked(text_of(values, columns.question))]
    return ParsedRow(prompt, text_of(values, columns.answer))


def _program(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    reference = text_of(values, columns.response) if values.get(columns.response) else ""
    return ParsedRow(prompt_of(values, columns), reference, text_of(values, columns.tests), "program")


# --- conversations ------------------------------------------------------------------------------------------------


def _messages(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    return _conversation(values, columns, columns.messages)


def _sharegpt(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    return _conversation(values, columns, columns.conversations)


def _conversation(values: Mapping[str, Any], columns: PromptColumns, name: str) -> ParsedRow:
    if name not in values:
        text_of(values, name)
    turns = read_turns(values[name], name)
    system = system_of(values, columns)
    return _of_turns([*system, *turns] if turns[0]["role"] != "system" else turns, values, columns, name)


def _alpaca(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    prompt = [*system_of(values, columns), *history_of(values, columns), *asked(instruction_of(values, columns))]
    return ParsedRow(prompt, text_of(values, columns.output), tools=tools_of(values, columns))


def _completion(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    return _prompt_completion(values, columns, columns.completion)


def _response(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    return _prompt_completion(values, columns, columns.response)


def _prompt_completion(values: Mapping[str, Any], columns: PromptColumns, name: str) -> ParsedRow:
    """As in TRL the loss is on the completion only: answers in the prompt get the weight 0."""
    prompt: list[Message] = [
        {**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in prompt_of(values, columns)
    ]
    given = values.get(name)
    completion = read_turns(given, name, asked=False) if isinstance(given, list) else [answered(text_of(values, name))]
    return _of_turns([*prompt, *completion], values, columns, name)


def _plain_text(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    checked_text(values[columns.text], columns.text)
    return ParsedRow([], "", text=values[columns.text])


def _of_turns(turns: list[Message], values: Mapping[str, Any], columns: PromptColumns, name: str) -> ParsedRow:
    end_with_answer(turns, name)
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise Malformed(f"{name!r}: every assistant message has the weight 0, so there is nothing to learn")
    last = turns[-1] if turns[-1].keys() - {"role", "content"} else None
    return ParsedRow(turns[:-1], turns[-1]["content"], last=last, tools=tools_of(values, columns))


# --- the formats --------------------------------------------------------------------------------------------------

_GSM8K = Format("gsm8k", ("question", "answer"), _gsm8k)
_PROGRAMS = Format("programs", ("prompt", "tests"), _program, ("response",))
_PREFERENCES = (
    Format(
        "preferences",
        ("chosen", "rejected"),
        parse_pair,
        ("prompt", "instruction", "input", "edited", "system", "tools"),
    ),
    Format("unpaired", ("completion", "label"), parse_single, ("prompt", "instruction", "input", "system", "tools")),
)
_INSTRUCTIONS = (
    Format("messages", ("messages",), _messages, ("system", "tools")),
    Format("sharegpt", ("conversations",), _sharegpt, ("system", "tools")),
    Format("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history", "tools")),
    Format("prompt_completion", ("prompt", "response"), _response, ("system", "tools")),
    Format("prompt_completion", ("prompt", "completion"), _completion, ("system", "tools")),
)
KINDS: dict[str, tuple[Format, ...]] = {
    "auto": (
        _PROGRAMS,
        *_PREFERENCES,
        *_INSTRUCTIONS,
        Format("gsm8k", ("question", "answer"), _gsm8k, accepts=_ends_in_number),
        Format("question_answer", ("question", "answer"), _question_answer, ("system",)),
        Format("text", ("text",), _plain_text),
    ),
    "gsm8k": (_GSM8K,),
    "instructions": _INSTRUCTIONS,
    "programs": (_PROGRAMS,),
    "preferences": _PREFERENCES,
}
"""Formats of each kind of source, in the order in which a row is compared with them."""
