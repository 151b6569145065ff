"""Preferences: pairs and single labelled completions, with an explicit or an implicit prompt, as in TRL.

Raises ``Malformed`` with the reason for a row that does not match its format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lilpipe.alignment.questions.columns import ParsedRow, asked, end_with_answer, prompt_of, text_of, tools_of
from lilpipe.alignment.questions.turns import Malformed, read_turns
from lilpipe.config.prompts import PromptColumns
from lilpipe.schemas.messages import Message


def parse_single(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    """Parse one completion with a label."""
    if columns.label not in values:
        raise Malformed(f"missing {columns.label!r}; got {', '.join(map(str, values))}")
    label = values[columns.label]
    label = _BOOLEANS.get(label.strip().lower(), label) if isinstance(label, str) else label
    if label not in (True, False):
        raise Malformed(f"{columns.label!r}: got {label!r}, expected true or false")
    prompt, (answer,) = _prompt_and_answers(values, [columns.completion], columns)
    return ParsedRow(prompt, answer, desirable=bool(label), tools=tools_of(values, columns))


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
"""Labels in CSV files."""


def parse_pair(values: Mapping[str, Any], columns: PromptColumns) -> ParsedRow:
    """Parse a chosen and a rejected completion, optionally with an edited one."""
    names = [columns.chosen, columns.rejected, *([columns.edited] if values.get(columns.edited) else [])]
    prompt, answers = _prompt_and_answers(values, names, columns)
    if len({answer.strip() for answer in answers}) < len(answers):
        raise Malformed(f"two of {', '.join(names)} are equal")
    edited = answers[2] if len(answers) > 2 else None
    return ParsedRow(prompt, answers[0], rejected=answers[1], edited=edited, tools=tools_of(values, columns))


def _prompt_and_answers(
    values: Mapping[str, Any], names: list[str], columns: PromptColumns
) -> tuple[list[Message], list[str]]:
    """Return the common prompt of several answers, and the answers."""
    stated = columns.prompt in values or columns.instruction in values
    if not stated and all(isinstance(values.get(name), str) for name in names):
        return _implicit_prompt([text_of(values, name) for name in names], names)
    prompts, answers = [], []
    for name in names:
        prompt, answer = _answer(values, name)
        answers.append(answer)
        prompts.append(prompt)
    if any(prompt != prompts[0] for prompt in prompts):
        raise Malformed(f"{', '.join(names)} answer different conversations: only their last messages may differ")
    if not stated and not any(turn["role"] == "user" for turn in prompts[0]):
        raise Malformed(f"no question: {names[0]!r} has no user turn, and there is no {columns.prompt!r}")
    return (_joined_prompt(values, prompts[0], names[0], columns) if stated else prompts[0]), answers


def _joined_prompt(
    values: Mapping[str, Any], before: list[Message], name: str, columns: PromptColumns
) -> list[Message]:
    """Return the stated prompt, with the turns before the answers unless these repeat it."""
    prompt = prompt_of(values, columns)
    if all(turn["role"] != "user" for turn in before):  # the first messages of the completions, such as tool calls
        return [*prompt, *before]
    is_text = len(prompt) == 1 and not isinstance(values.get(columns.prompt), list)
    if before != prompt and not (is_text and before[-1] == prompt[0]):
        raise Malformed(f"{columns.prompt!r} differs from the conversation in {name!r}")
    return before


_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
"""Turns of Anthropic's HH-RLHF (Bai et al. 2022)."""


def _implicit_prompt(texts: list[str], names: list[str]) -> tuple[list[Message], list[str]]:
    """Return the prompt that texts start with, and their ends: HH-RLHF transcripts, or TRL's common prefix."""
    if all(_SPEAKER.match(f"\n\n{text}") for text in texts):
        talks = [_transcript(text, name) for text, name in zip(texts, names, strict=True)]
        if any(talk[:-1] != talks[0][:-1] for talk in talks):
            raise Malformed(f"{', '.join(names)} answer different conversations: only their last messages may differ")
        return talks[0][:-1], [talk[-1]["content"] for talk in talks]
    size = next((n for n, signs in enumerate(zip(*texts, strict=False)) if len(set(signs)) > 1), min(map(len, texts)))
    prompt = texts[0][:size]
    size = len(prompt) if prompt.endswith((" ", "\n")) else prompt.rfind(" ") + 1  # not within a word
    ends = [text[size:] for text in texts]
    if not prompt[:size].strip() or not all(end.strip() for end in ends):
        raise Malformed(f"{', '.join(names)} share no prompt, and there is no `prompt`; add one")
    return asked(prompt[:size].strip()), [end.strip() for end in ends]


def _transcript(text: str, name: str) -> list[Message]:
    _, *parts = _SPEAKER.split(f"\n\n{text.lstrip()}")
    turns = [
        {"from": "human" if speaker == "Human" else "gpt", "value": said}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return end_with_answer(read_turns(turns, name), name)


def _answer(values: Mapping[str, Any], name: str) -> tuple[list[Message], str]:
    """Return an answer and the turns before it, if given in the same list."""
    given = values.get(name)
    if not isinstance(given, list):
        return [], text_of(values, name)
    turns = end_with_answer(read_turns(given, name, asked=False), name)
    if "tool_calls" in turns[-1]:
        raise Malformed(f"{name!r} ends with tool calls, expected text: preferences compare texts")
    return turns[:-1], turns[-1]["content"]
