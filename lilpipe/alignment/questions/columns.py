"""A row in its common form, and the columns that several formats share.

Raises ``Malformed`` with the reason for a column that cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lilpipe.alignment.questions.turns import Malformed, checked_text, read_tools, read_turns
from lilpipe.config.prompts import PromptColumns
from lilpipe.schemas.messages import Message, Tools


@dataclass(frozen=True)
class ParsedRow:
    """Row of a dataset in any format."""

    prompt: list[Message]
    """Turns before the answer; empty for a plain text."""
    reference: str
    """Answer in words; for a preference the chosen completion; empty if there are only tests or tool calls."""
    answer: str = ""
    """Reference answer for the verifier."""
    verifier: str = "none"
    difficulty: int = 0
    rejected: str | None = None
    edited: str | None = None
    desirable: bool | None = None
    """Label of an unpaired completion; None for other rows."""
    last: Message | None = None
    """The answer as a message if it has tool calls, a name or a weight."""
    tools: Tools | None = None
    """Tools that the assistant may call."""
    text: str | None = None
    """Plain text, if the row is one."""

    @property
    def question(self) -> str:
        """First user turn."""
        return next(turn["content"] for turn in self.prompt if turn["role"] == "user")

    @property
    def best_answer(self) -> str:
        """Best answer in words; empty if there is no good one."""
        return "" if self.desirable is False else self.edited or self.reference

    @property
    def messages(self) -> list[Message]:
        """The prompt with the best answer; empty if there is no good answer."""
        if self.last is not None:
            return [*self.prompt, self.last]
        return [*self.prompt, Message(role="assistant", content=self.best_answer)] if self.best_answer else []

    @property
    def is_preference(self) -> bool:
        """Whether the row is a preference."""
        return self.rejected is not None or self.desirable is not None

    @property
    def is_single_question(self) -> bool:
        """Whether the prompt is a single user turn, so that it can be used as a prompt on its own."""
        return len(self.prompt) == 1 and self.last is None and self.tools is None


# --- columns -----------------------------------------------------------------------------------------------------


def asked(question: str) -> list[Message]:
    """Return a question as a prompt."""
    return [{"role": "user", "content": question}]


def answered(text: str) -> Message:
    """Return an answer as a message."""
    return {"role": "assistant", "content": text}


def text_of(values: Mapping[str, Any], name: str) -> str:
    """Return the text of a column."""
    if name not in values:
        raise Malformed(f"missing {name!r}; got {', '.join(map(str, values)) or 'no keys'}")
    return checked_text(values[name], name)


def system_of(values: Mapping[str, Any], columns: PromptColumns) -> list[Message]:
    """Return the system message of a column of its own, if any."""
    text = text_of(values, columns.system) if values.get(columns.system) else ""
    return [{"role": "system", "content": text}] if text else []


def tools_of(values: Mapping[str, Any], columns: PromptColumns) -> Tools | None:
    """Return the tools, if any."""
    return read_tools(values.get(columns.tools), columns.tools)


def instruction_of(values: Mapping[str, Any], columns: PromptColumns) -> str:
    """Return Alpaca's instruction followed by its input, if any (Taori et al. 2023)."""
    instruction = text_of(values, columns.instruction)
    return f"{instruction}\n\n{text_of(values, columns.input)}" if values.get(columns.input) else instruction


def history_of(values: Mapping[str, Any], columns: PromptColumns) -> list[Message]:
    """Return LLaMA-Factory's earlier turns, a list of [question, answer]."""
    turns: list[Message] = []
    for pair in values.get(columns.history) or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Malformed(f"{columns.history!r} is not a list of [question, answer]")
        question, answer = (checked_text(text, columns.history) for text in pair)
        turns += [*asked(question), answered(answer)]
    return turns


def prompt_of(values: Mapping[str, Any], columns: PromptColumns) -> list[Message]:
    """Return the prompt, a text or messages, or else the instruction."""
    if columns.prompt not in values and columns.instruction in values:
        return [*system_of(values, columns), *asked(instruction_of(values, columns))]
    given = values.get(columns.prompt)
    if not isinstance(given, list):
        return [*system_of(values, columns), *asked(text_of(values, columns.prompt))]
    turns = read_turns(given, columns.prompt)
    if turns[-1]["role"] == "assistant":
        raise Malformed(f"{columns.prompt!r} ends with an assistant turn, expected a user turn")
    return turns if turns[0]["role"] == "system" else [*system_of(values, columns), *turns]


def end_with_answer(turns: list[Message], name: str) -> list[Message]:
    """Return messages that end with the assistant's unchanged."""
    if turns[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} ends with a turn of {turns[-1]['role']!r}, expected the assistant's")
    return turns
