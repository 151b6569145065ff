"""Messages of a conversation."""

from __future__ import annotations

from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant`, or `tool` for the output of a tool call."""
    content: str
