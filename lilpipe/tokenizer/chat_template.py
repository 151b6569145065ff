"""Conversations to token ids, with the mask of what is supervised.

``render`` is the template that training uses; ``CHAT_TEMPLATE`` is the same in Jinja for ``transformers``, vLLM
and others. They give the same ids except where a message spells out a special token: ``render`` keeps that as
ordinary text, while a Jinja template is a string before it is tokens and cannot. A tokenizer from elsewhere has a
template of its own (``jinja_template``), which ``render`` then follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.encoding import Tokenizer

TOOL_HEADER = "<|reserved_0|>"
"""Begins what a tool says: the token was set aside for roles to come, so other turns have the ids that they had."""


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant is to be trained on it.

    A turn is ``<|role|>content<|end_of_turn|>``; that of a tool begins with the first reserved token. The mask is True
    on an assistant's content and on the end of its turn. ``add_generation_prompt`` adds a last ``<|assistant|>``.
    Raises ``DataError`` for an unknown role, or a conversation that a template from elsewhere refuses.
    """
    if tokenizer.template is not None:
        return tokenizer.template.render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    ids: list[int] = []
    mask: list[bool] = []
    for position, message in enumerate(messages):
        header = _header(tokenizer, message["role"], position)
        turn = [header, *tokenizer.encode(message["content"]), tokenizer.turn_end_id]
        ids += turn
        mask += [False] + [message["role"] == "assistant"] * (len(turn) - 1)
    if add_generation_prompt:
        ids.append(tokenizer.assistant_id)
        mask.append(False)
    return ids, mask


def render_completion(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation that ends in an answer: those before the answer, and the answer's to the end of its
    turn. What a template has behind that, such as a line break, is left out: nothing writes it.

    Raises ``DataError`` where the template leaves the answer out.
    """
    ids, mask = render(tokenizer, messages)
    if not any(mask):
        raise DataError(
            f"the answer {messages[-1]['content'][:60]!r}: the chat template gives no token of it to be learnt, "
            "expected those of its text and of its end; take another template"
        )
    end = len(mask) - mask[::-1].index(True)
    start = end - [*mask[:end][::-1], False].index(False)
    return ids[:start], ids[start:end]


def _header(tokenizer: Tokenizer, role: str, position: int) -> int:
    """The token that begins a message of this role."""
    headers = {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
        "tool": tokenizer.special_ids.get(TOOL_HEADER),
    }
    if role not in headers:
        raise DataError(
            f"message {position}: got role {role!r}, expected one of {', '.join(headers)}; rename it in the data"
        )
    if (header := headers[role]) is None:
        raise DataError(
            f"message {position}: got role {role!r}, but the vocabulary has no {TOOL_HEADER} to begin it with; train "
            "the tokenizer with tokenizer.num_reserved above 0"
        )
    return header
