"""Messages as data sets write them: OpenAI's and ShareGPT's keys and roles, content in parts, tool calls, tools.

Raises ``Malformed`` with the reason for what cannot be read without loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lilpipe.schemas.messages import Message, Tools, dump_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Roles by the names that OpenAI, ShareGPT, LLaMA-Factory and the chat templates of models use."""


class Malformed(Exception):
    """A row that does not match its format; ``excerpt`` is its beginning if it could not be parsed."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def read_turns(given: Any, name: str, *, asked: bool = True) -> list[Message]:
    """Return the messages of a list, or of its JSON. ``asked`` requires a user turn."""
    given = _parsed(given, name)
    if not isinstance(given, list) or not given:
        raise Malformed(f"{name!r} is not a list of messages")
    turns = [_turn(turn, f"{name}.{position}", position, name) for position, turn in enumerate(given)]
    if asked and all(turn["role"] != "user" for turn in turns):
        raise Malformed(f"{name!r} has no user turn")
    return turns


def read_tools(given: Any, name: str) -> Tools | None:
    """Return tools in OpenAI's form from a list of them, or of bare functions, or from its JSON; None if empty."""
    given = _parsed(given, name)
    if given is None or given == [] or given == "":
        return None
    tools = []
    for tool in given if isinstance(given, list) else [given]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Malformed(f"{name!r} is not a list of tools, each a function with a name and parameters")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(function)})
    return _storable(tools, name)


def checked_text(value: Any, name: str, *, empty: bool = False) -> str:
    """Return a text without white space around it."""
    if not isinstance(value, str):
        raise Malformed(f"{name!r}: got {type(value).__name__}, expected a string")
    if not empty and not value.strip():
        raise Malformed(f"{name!r} is empty")
    if re.search("[\0\ud800-\udfff]", value):
        raise Malformed(f"{name!r} contains a NUL or an unpaired surrogate, expected valid text")
    return value.strip()


# --- one message --------------------------------------------------------------------------------------------------


def _turn(turn: Any, where: str, position: int, name: str) -> Message:
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    said = given.get("role", given.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Malformed(
            f"{name!r}: message {position} has no valid role, expected one of "
            f"{', '.join(dict.fromkeys(ROLES.values()))}"
        )
    content = given.get("content", given.get("value"))
    calls = _calls(given, content if said == "function_call" else None, where)
    if calls and role != "assistant":
        raise Malformed(f"'{where}' has tool calls and role {said!r}, expected the assistant's")
    if calls and (content is None or said == "function_call"):
        content = ""
    message = Message(
        role=role,
        content=checked_text(_joined(content, where), f"{where}.content", empty=bool(calls) or role == "tool"),
    )
    if "name" in given:
        message["name"] = checked_text(given["name"], f"{where}.name")
    if "tool_call_id" in given:
        message["tool_call_id"] = checked_text(given["tool_call_id"], f"{where}.tool_call_id")
    if "reasoning_content" in given:
        message["reasoning_content"] = checked_text(given["reasoning_content"], f"{where}.reasoning_content")
    if calls:
        message["tool_calls"] = calls
    if "weight" in given:
        message["weight"] = _weight(given["weight"], f"{where}.weight")
    return message


def _joined(content: Any, where: str) -> Any:
    """Return the text of a list of text parts; other content unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "str") or not isinstance(text, str):
            raise Malformed(f"'{where}.content' has a part of type {kind!r}, expected text only")
        texts.append(text)
    return "".join(texts)


def _calls(given: Mapping[str, Any], written: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message: `tool_calls`, OpenAI's older `function_call`, or ``written`` as JSON."""
    calls = given.get("tool_calls") or given.get("function_call") or (_parsed(written, where) if written else None)
    if not calls:
        return []
    return [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Malformed(f"'{where}' has a tool call without a function's name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = _parsed(arguments, where) if arguments not in (None, "") else {}
    if not isinstance(arguments, Mapping):
        raise Malformed(f"'{where}': the arguments of {function['name']!r} are not a JSON object")
    found: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        found["id"] = call["id"]
    found["function"] = {"name": function["name"], "arguments": dict(arguments)}
    return _storable(found, where)


def _weight(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Malformed(f"{name!r}: got {value!r}, expected a number from 0 to 1")
    return float(value)


def _parsed(value: Any, name: str) -> Any:
    """Return the value of a JSON text; other values unchanged."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{name!r} is not JSON: {error}", value[:200]) from error


def _storable(value: Any, name: str) -> Any:
    """Return a JSON value unchanged."""
    try:
        json.dumps(value, allow_nan=False)
        dump_json(value).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"{name!r} cannot be stored as JSON: {error}") from error
    return value
