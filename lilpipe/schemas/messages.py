"""Messages of a conversation, and their form in Arrow files.

Columns of keys that no message of a file has are absent from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import pyarrow as pa


class Message(TypedDict):
    """One turn of a conversation, as in OpenAI's API and in the chat templates of transformers."""

    role: str
    """`system`, `user`, `assistant`, or `tool` for the output of a tool call."""
    content: str
    """Text; may be empty if there are tool calls."""
    name: NotRequired[str]
    """Name of the speaker or the tool."""
    tool_call_id: NotRequired[str]
    """Id of the call that a `tool` message answers."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Calls of an assistant: ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, optional `id`."""
    reasoning_content: NotRequired[str]
    """Reasoning of an assistant before the content, for templates that show it."""
    weight: NotRequired[float]
    """Weight of an assistant's message in the loss, 0 to 1; 0: in the context, without loss. If absent, 1."""


Tools = list[dict[str, Any]]
"""Tools of a conversation as JSON schemas: ``{"type": "function", "function": {"name": ..., "parameters": ...}}``."""

_OPTIONAL = {
    "name": pa.string(),
    "tool_call_id": pa.string(),
    "tool_calls": pa.string(),  # JSON, since arguments have no common schema
    "reasoning_content": pa.string(),
    "weight": pa.float64(),
}


def message_type(messages: Iterable[Message]) -> pa.DataType:
    """Return the Arrow type of messages with the keys that occur."""
    found = {key for message in messages for key in message}
    fields = [("role", pa.string()), ("content", pa.string())]
    return pa.struct([*fields, *((key, kind) for key, kind in _OPTIONAL.items() if key in found)])


def to_rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as values of ``message_type``."""
    return [
        {key: dump_json(value) if key == "tool_calls" else value for key, value in message.items()}
        for message in messages
    ]


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages from values of ``message_type``."""
    return [
        cast(
            Message,
            {
                key: json.loads(value) if key == "tool_calls" else value
                for key, value in row.items()
                if value is not None
            },
        )
        for row in rows
    ]


def dump_json(value: Any) -> str:
    """Return compact JSON that keeps the order of keys, which a chat template writes out."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
