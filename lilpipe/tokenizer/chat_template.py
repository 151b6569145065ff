"""Conversations to token ids, with the mask of what is supervised.

``render`` is the template that training uses; ``CHAT_TEMPLATE`` is the same in Jinja for ``transformers``, vLLM
and others. They give the same ids except where a message spells out a special token: ``render`` keeps that as
ordinary text, while a Jinja template is a string before it is tokens and cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from lilpipe.errors import DataError

if TYPE_CHECKING:
    from lilpipe.tokenizer.encoding import Tokenizer

# `generation` is a tag of transformers': it marks what `return_assistant_tokens_mask` reports.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] + '<|end_of_turn|>' }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end_of_turn|>' }}
    {%- else %}
        {{- raise_exception('role ' + message['role'] + ': expected system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant is to be trained on it.

    A turn is ``<|role|>content<|end_of_turn|>``. The mask is True on an assistant's content and on the end of its
    turn. ``add_generation_prompt`` adds a last ``<|assistant|>``. Raises ``DataError`` for an unknown role.
    """
    headers = {"system": tokenizer.system_id, "user": tokenizer.user_id, "assistant": tokenizer.assistant_id}
    ids: list[int] = []
    mask: list[bool] = []
    for position, message in enumerate(messages):
        if (role := message["role"]) not in headers:
            raise DataError(
                f"message {position}: got role {role!r}, expected one of {', '.join(headers)}; rename it in the data"
            )
        turn = [headers[role], *tokenizer.encode(message["content"]), tokenizer.turn_end_id]
        ids += turn
        mask += [False] + [role == "assistant"] * (len(turn) - 1)
    if add_generation_prompt:
        ids.append(tokenizer.assistant_id)
        mask.append(False)
    return ids, mask
