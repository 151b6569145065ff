"""Conversations as tokens for fine-tuning: gathered, mixed, encoded, and held against what they must be.

The gates read off the ids again what must be learnt: each answer, whole, with the token that ends its turn, and no
token else.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch

from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Conversation, assert_not_held_out, read_conversations
from lilpipe.schemas.messages import Message
from lilpipe.seeds import derive_seed
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.jinja_template import JinjaTemplate

ROUND_TRIPS = 64
"""Conversations that are rendered again with the tokenizer as it is exported."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as token ids, and for each whether it is supervised."""

    id: str
    ids: list[int]
    mask: list[bool]
    messages: Sequence[Message] = ()
    """What was encoded."""


# --- gathering ----------------------------------------------------------------------------------------------------


def artifacts(inputs: Inputs, role: str) -> tuple[Artifact, ...]:
    """What fills a role: none, one or several artifacts."""
    value = inputs.get(role, ())
    return (value,) if isinstance(value, Artifact) else value


def gather_conversations(inputs: Inputs, *, max_demonstrations: int | None) -> list[Conversation]:
    """Sampled conversations, each once though several rounds may have kept it; then written ones.

    Raises ``DataError`` if there are none, or one is held out.
    """
    prompts = artifacts(inputs, "prompts")
    sampled: list[Conversation] = []
    seen: set[str] = set()
    for source in artifacts(inputs, "conversations"):
        found = [(json.dumps(item.messages), item) for item in read_conversations(source.path)]
        sampled += [item for messages, item in found if messages not in seen]
        seen.update(messages for messages, _ in found)
    written = [item for source in prompts for item in read_conversations(source.path)][:max_demonstrations]
    conversations = sampled + written
    if not conversations:
        raise DataError(
            "sft: got no conversations, expected at least one; give the step an input `conversations` or `prompts`, "
            "and leave sft.max_demonstrations above 0"
        )
    questions = [turn["content"] for item in conversations for turn in item.messages if turn["role"] == "user"]
    for source in prompts:
        assert_not_held_out(questions, source.path)
    return conversations


def mix(conversations: Sequence[Conversation], mixture: dict[str, float], *, seed: int) -> list[Conversation]:
    """What an epoch shows: each origin's conversations as often as ``mixture`` says, once where it says nothing.

    Of a part of an origin, which conversations it holds is drawn from the seed. Raises ``ConfigError`` for an origin
    that does not occur.
    """
    if not mixture:
        return list(conversations)
    by_origin: dict[str, list[Conversation]] = {}
    for item in conversations:
        by_origin.setdefault(item.origin, []).append(item)
    if unknown := mixture.keys() - by_origin.keys():
        raise ConfigError(
            f"sft.mixture: got the origin {min(unknown)!r}, expected one of the conversations': "
            f"{', '.join(sorted(by_origin))}"
        )
    chosen: list[Conversation] = []
    for origin, items in by_origin.items():
        whole, part = divmod(mixture.get(origin, 1.0), 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixture", origin))
        drawn = torch.randperm(len(items), generator=generator)[: round(part * len(items))].tolist()
        chosen += items * int(whole) + [items[number] for number in sorted(drawn)]
    if not chosen:
        raise ConfigError(f"sft.mixture: got {mixture}, which leaves no conversation; raise a weight above 0")
    return chosen


# --- encoding -----------------------------------------------------------------------------------------------------


def encode(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, max_len: int
) -> tuple[list[EncodedConversation], list[EncodedConversation]]:
    """Conversations as tokens: those that fit in ``max_len``, and those that do not. None is ever cut.

    Raises ``DataError`` naming a conversation that the chat template refuses, or if none fits.
    """
    examples = [_encode(tokenizer, item) for item in conversations]
    fitting = [example for example in examples if len(example.ids) <= max_len]
    if not fitting:
        shortest = min(len(example.ids) for example in examples)
        raise DataError(
            f"sft: each of the {len(examples)} conversations is longer than the model's {max_len} tokens (the shortest "
            f"has {shortest}); shorten them, or pretrain with a larger model.max_seq_len"
        )
    return fitting, [example for example in examples if len(example.ids) > max_len]


def _encode(tokenizer: Tokenizer, conversation: Conversation) -> EncodedConversation:
    try:
        return EncodedConversation(conversation.id, *render(tokenizer, conversation.messages), conversation.messages)
    except DataError as error:
        raise DataError(f"conversation {conversation.id}: {error}") from error


# --- gates --------------------------------------------------------------------------------------------------------


def check_masks(tokenizer: Tokenizer, examples: Sequence[EncodedConversation], *, min_ratio: float = 0.0) -> float:
    """The share of supervised tokens, once every mask is found right.

    Under our own template, what must be supervised is read off the ids again: all that follows an assistant's header,
    up to and with the end of that turn, and nothing else. Under another, each supervised run must end a turn. Raises
    ``DataError`` naming the conversation, or for a share below ``min_ratio``.
    """
    for example in examples:
        if tokenizer.has_turns:
            _check_turns(tokenizer, example)
        else:
            _check_ends(tokenizer, example)
    share = sum(sum(example.mask) for example in examples) / sum(len(example.ids) for example in examples)
    if share < min_ratio:
        raise DataError(
            f"sft: {share:.2%} of the tokens are supervised, expected at least sft.min_supervised_ratio = "
            f"{min_ratio:.2%}; look at report.html whether answers are cut short, or lower the setting"
        )
    return share


def _check_turns(tokenizer: Tokenizer, example: EncodedConversation) -> None:
    expected = assistant_turns(tokenizer, example.ids)
    if not any(expected):
        raise DataError(f"conversation {example.id}: has no finished answer of the assistant; remove it")
    if example.mask != expected:
        position = next(i for i, pair in enumerate(zip(example.mask, expected, strict=True)) if pair[0] != pair[1])
        got = "supervised" if example.mask[position] else "not supervised"
        token = tokenizer.decode([example.ids[position]])
        raise DataError(
            f"conversation {example.id}: token {position} ({token!r}) is {got}, expected the opposite: answers and "
            "their ends are learnt, prompts are not; the chat template and its mask disagree"
        )


def _check_ends(tokenizer: Tokenizer, example: EncodedConversation) -> None:
    found = [tokenizer.decode(run[-1:]) for run in _supervised_runs(example)]
    if set(found) != {expected := tokenizer.decode([tokenizer.turn_end_id])}:
        raise DataError(
            f"conversation {example.id}: what is supervised ends in {found}, expected an answer or more that each end "
            f"in {expected!r}; the chat template leaves ends out of what it marks"
        )


def assistant_turns(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """For each token, whether it belongs to an assistant's finished turn, its end included and its header not."""
    mask = [False] * len(ids)
    start = None
    for position, token in enumerate(ids):
        if token == tokenizer.assistant_id:
            start = position + 1
        elif token == tokenizer.turn_end_id and start is not None:
            mask[start : position + 1] = [True] * (position + 1 - start)
            start = None
    return mask


def check_answers(tokenizer: Tokenizer, examples: Sequence[EncodedConversation]) -> None:
    """Hold what is learnt against what the assistant said, every answer whole and nothing beside it, and what stands
    before each answer against what others said.

    White space around a turn is the template's to trim. Raises ``DataError`` naming the conversation.
    """
    special = set(tokenizer.special_ids.values())
    for example in examples:
        said = [turn["content"] for turn in example.messages if turn["role"] == "assistant"]
        learnt = [
            tokenizer.decode([token for token in run if token not in special]) for run in _supervised_runs(example)
        ]
        if [text.strip() for text in learnt] != [_as_encoded(text).strip() for text in said]:
            raise DataError(
                f"conversation {example.id}: {_first_difference(learnt, said)}; an answer must be learnt whole and "
                "alone: the chat template loses or adds text, or the conversation was cut"
            )
        _check_others(tokenizer, example, special)


def _check_others(tokenizer: Tokenizer, example: EncodedConversation, special: set[int]) -> None:
    """Some templates pass over roles that they do not know; JSON is how others write what tools say."""
    before = [""]  # each answer, and behind the last
    for supervised, run in groupby(zip(example.ids, example.mask, strict=True), key=itemgetter(1)):
        if supervised:
            before.append("")
        else:
            before[-1] += tokenizer.decode([token for token, _ in run if token not in special])
    number = 0
    for position, turn in enumerate(example.messages):
        if turn["role"] == "assistant":
            number += 1
            continue
        said = _as_encoded(turn["content"]).strip()
        if said not in before[number] and json.dumps(said, ensure_ascii=False)[1:-1] not in before[number]:
            raise DataError(
                f"conversation {example.id}: what the {turn['role']} says in message {position} is not among the "
                "tokens, so that the next answer would be learnt out of nothing: the chat template leaves it out; take "
                "another template, or remove such conversations"
            )


def check_export(tokenizer: Tokenizer, examples: Sequence[EncodedConversation], directory: Path) -> None:
    """Render the first conversations again with nothing but the tokenizer's files, as ``transformers`` will.

    Those that spell out a special token are passed over: a template in Jinja cannot keep it as text. Raises
    ``DataError`` if other ids or masks come out than are trained on.
    """
    tokenizer.save(directory)
    exported = Tokenizer.load(directory)
    source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    template = JinjaTemplate(source, exported.template.names if exported.template else {})
    for example in examples[:ROUND_TRIPS]:
        if any(name in turn["content"] for turn in example.messages for name in exported.special_ids):
            continue
        ids, mask = template.render(exported, example.messages)
        if (ids, mask) != (example.ids, example.mask):
            place = next((i for i, pair in enumerate(zip(ids, example.ids, strict=False)) if pair[0] != pair[1]), None)
            what = "other masks" if place is None and ids == example.ids else f"other ids from token {place or 0} on"
            raise DataError(
                f"conversation {example.id}: the exported tokenizer gives {what} than are trained on; "
                f"{directory / 'chat_template.jinja'} and the tokenizer do not belong together"
            )


def _supervised_runs(example: EncodedConversation) -> list[list[int]]:
    runs = groupby(zip(example.ids, example.mask, strict=True), key=itemgetter(1))
    return [[token for token, _ in run] for supervised, run in runs if supervised]


def _as_encoded(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first_difference(learnt: Sequence[str], said: Sequence[str]) -> str:
    for number, (got, expected) in enumerate(zip(learnt, said, strict=False)):
        if got.strip() != expected.strip():
            return f"of answer {number} {got[-60:]!r} is learnt, expected {expected[-60:]!r}"
    return f"{len(learnt)} answers are learnt, expected {len(said)}"


# --- report -------------------------------------------------------------------------------------------------------


def quarantine(too_long: Sequence[EncodedConversation], workspace: Workspace, *, max_len: int) -> None:
    """List the conversations that were left out, in ``report/too_long.jsonl``, and say so."""
    if too_long:
        workspace.log(f"skipped {len(too_long)} conversations of more than {max_len} tokens (report/too_long.jsonl)")
        lines = [json.dumps({"id": example.id, "tokens": len(example.ids), "max": max_len}) for example in too_long]
        write_atomically(workspace.report / "too_long.jsonl", "\n".join(lines) + "\n")


def show(tokenizer: Tokenizer, example: EncodedConversation) -> str:
    """A conversation as HTML, the supervised tokens on a coloured ground."""
    parts = []
    for supervised, run in groupby(zip(example.ids, example.mask, strict=True), key=itemgetter(1)):
        text = html.escape(tokenizer.decode([token for token, _ in run]))
        parts.append(f'<mark style="background:#d5e8d4">{text}</mark>' if supervised else text)
    return f"<pre>{''.join(parts)}</pre>"
