"""Conversations to token ids, with the mask of assistant tokens.

Training uses ``render``; ``CHAT_TEMPLATE`` is the same template in Jinja for ``transformers``, vLLM and others. They
give the same ids unless a message contains the text of a special token: ``render`` encodes it as ordinary text;
``transformers``, which renders to a string before tokenization, does not. For an imported tokenizer with its own chat
template, ``render`` uses that (``jinja_template``).
"""

from __future__ import annotations

from collections.abc import Sequence

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.jinja_template import Tool

TOOL_HEADER = "<|reserved_0|>"
"""Header of a tool's turn. A reserved token, so that the ids of all other turns are unchanged."""


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and the mask of tokens with a loss.

    A turn is ``<|role|>content<|end_of_turn|>``; a tool's turn starts with ``TOOL_HEADER``. The mask is True for an
    assistant's content and its end-of-turn token. ``add_generation_prompt`` appends ``<|assistant|>``. ``tools`` are
    JSON schemas of functions, for imported templates. Raises ``DataError`` for an unknown role, or if an imported
    template rejects the conversation.
    """
    if tokenizer.template is not None:
        return tokenizer.template.render(tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt)
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


def render_completion(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None
) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the answer with its end of turn, for a conversation that ends in one.

    Text that a template adds after the end of turn, such as a line break, is left out: the model never generates it.
    Raises ``DataError`` if the template leaves out the answer.
    """
    ids, mask = render(tokenizer, messages, tools=tools)
    if not any(mask):
        raise DataError(
            f"the answer {messages[-1]['content'][:60]!r}: the chat template marks none of its tokens as assistant "
            "tokens, expected those of its text and its end; use another template"
        )
    end = len(mask) - mask[::-1].index(True)
    start = end - [*mask[:end][::-1], False].index(False)
    return ids[:start], ids[start:end]


def _header(tokenizer: Tokenizer, role: str, position: int) -> int:
    """Return the token that starts a message of this role."""
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
            f"message {position}: got role {role!r}, but the vocabulary has no {TOOL_HEADER} to start it; train "
            "the tokenizer with tokenizer.num_reserved above 0"
        )
    return header
