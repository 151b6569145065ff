"""Conversations and plain texts to token ids, with the weights of tokens in the loss; those that are too long.

Each answer has the weight of its message; tool results, prompts and history without loss have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from lilpipe.errors import DataError
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message, Tools
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation, or a plain text, as token ids with a mask of assistant tokens."""

    id: str
    ids: list[int]
    mask: list[bool]
    messages: Sequence[Message] = ()
    """The encoded messages; none for a plain text."""
    tools: Tools | None = None
    weights: list[float] | None = None
    """Weight of each token in the loss, if not 1 for the mask's tokens."""

    @property
    def learnt(self) -> list[bool]:
        """Whether each token has a loss."""
        return self.mask if self.weights is None else [weight > 0 for weight in self.weights]


class Encoding(NamedTuple):
    """Tokenized conversations by what becomes of them."""

    fitting: list[EncodedConversation]
    """Those for training: whole ones, and parts of split ones."""
    too_long: list[EncodedConversation]
    split: list[tuple[EncodedConversation, int]]
    """Those that were split, with the number of their parts."""
    rejected: list[tuple[str, str]]
    """Ids and reasons of those that cannot be encoded."""


def encode(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_len: int,
    mask_history: bool = False,
    strategy: Literal["drop", "split", "raise"] = "drop",
) -> Encoding:
    """Tokenize conversations; none is truncated. See ``SFTConfig.excess_length_strategy`` for ``strategy``.

    Raises ``DataError`` if none fits in ``max_len``, or for the strategy `raise` if one does not.
    """
    found = Encoding([], [], [], [])
    for item in conversations:
        item = replace(item, messages=without_history(item.messages)) if mask_history else item
        try:
            example = encode_conversation(tokenizer, item)
            is_long = len(example.ids) > max_len
            parts = _parts(tokenizer, item, example, max_len) if is_long and strategy == "split" else []
        except DataError as error:
            found.rejected.append((item.id, str(error)))
            continue
        if not is_long:
            found.fitting.append(example)
        elif all(len(part.ids) > max_len for part in parts):
            found.too_long.append(example)
        else:
            found.split.append((example, len(parts)))
            found.fitting.extend(part for part in parts if len(part.ids) <= max_len)
            found.too_long.extend(part for part in parts if len(part.ids) > max_len)
    if found.too_long and (strategy == "raise" or not found.fitting):
        sizes = [len(example.ids) for example in found.too_long]
        which = "each" if len(sizes) == len(conversations) else f"{len(sizes)}"
        raise DataError(
            f"sft: {which} of the {len(conversations)} conversations is longer than the model's {max_len} tokens (the "
            f"shortest has {min(sizes)}); shorten them, use a model with a longer context, or change "
            "sft.excess_length_strategy"
        )
    return found


def encode_conversation(tokenizer: Tokenizer, item: Conversation) -> EncodedConversation:
    """Tokenize a conversation, or a plain text as a document with its end.

    Raises ``DataError``, naming the conversation, if the chat template rejects it.
    """
    if item.text is not None:
        start = tokenizer.document_start_ids
        learnt = [*tokenizer.encode(item.text), tokenizer.document_end_id]
        return EncodedConversation(item.id, [*start, *learnt], [False] * len(start) + [True] * len(learnt))
    try:
        check_tools(tokenizer, item.messages, item.tools)
        ids, mask = render(tokenizer, item.messages, tools=item.tools)
        weights = _token_weights(item.messages, mask)
    except DataError as error:
        raise DataError(f"conversation {item.id}: {error}") from error
    return EncodedConversation(item.id, ids, mask, item.messages, item.tools, weights)


def check_tools(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None) -> None:
    """Raise ``DataError`` for tools or tool calls under our own chat template, which cannot show them."""
    if tokenizer.template is None and (tools or any("tool_calls" in message for message in messages)):
        raise DataError(
            "got tools or tool calls, which lilpipe's own chat template cannot show; use a model whose tokenizer has a "
            "template for tools, or remove them"
        )


def without_history(messages: Sequence[Message]) -> list[Message]:
    """Return messages of which only the last one of the assistant has a loss."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        {**message, "weight": 0.0} if number in answers[:-1] else message for number, message in enumerate(messages)
    ]


def _token_weights(messages: Sequence[Message], mask: Sequence[bool]) -> list[float] | None:
    """Return the weight of each token; None if all answers have the weight 1."""
    weights = [message.get("weight", 1.0) for message in messages if message["role"] == "assistant"]
    if all(weight == 1 for weight in weights):
        return None
    if not any(weights):
        raise DataError("every answer with a loss has the weight 0, so there is nothing to learn; remove it")
    runs = [(supervised, len(list(run))) for supervised, run in groupby(mask)]
    if sum(supervised for supervised, _ in runs) != len(weights):
        raise DataError(
            f"the chat template marks {sum(supervised for supervised, _ in runs)} answers, expected {len(weights)}, so "
            "their weights cannot be assigned; use another template, or remove the weights"
        )
    left = iter(weights)
    return [weight for supervised, count in runs for weight in [next(left) if supervised else 0.0] * count]


def _parts(
    tokenizer: Tokenizer, item: Conversation, example: EncodedConversation, max_len: int
) -> list[EncodedConversation]:
    """Return the parts of a conversation that is too long, without those that have no loss.

    Pieces of a text share one token, so that each token but the first is predicted.
    """
    if item.text is not None:
        pieces = [example.ids[start : start + max_len] for start in range(0, len(example.ids) - 1, max_len - 1)]
        return [EncodedConversation(f"{item.id}/{number}", ids, [True] * len(ids)) for number, ids in enumerate(pieces)]
    start = next((n for n, message in enumerate(item.messages) if message["role"] != "system"), 0)
    system, turns = item.messages[:start], item.messages[start:]
    places = [n for n, message in enumerate(turns) if message["role"] == "user" or n == 0]
    exchanges = [turns[first:stop] for first, stop in pairwise([*places, len(turns)])]

    def fits(messages: Sequence[Message]) -> bool:
        return len(render(tokenizer, [*system, *messages], tools=item.tools)[0]) <= max_len

    parts: list[list[Message]] = []
    for exchange in exchanges:
        if parts and fits([*parts[-1], *exchange]):
            parts[-1] += exchange
        else:
            parts.append(list(exchange))
    learnt = [part for part in parts if any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in part)]
    return [
        encode_conversation(tokenizer, replace(item, id=f"{item.id}/{number}", messages=[*system, *part]))
        for number, part in enumerate(learnt)
    ]
