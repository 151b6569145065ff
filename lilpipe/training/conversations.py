"""Conversations for fine-tuning: gathered, mixed, and checked after they are tokenized.

The checks verify on the token ids that the mask covers each answer completely, with the token that ends its turn, and
no other token. Messages with a weight and history without loss change the weights of tokens, not the mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from lilpipe import page
from lilpipe.artifact import Inputs, all_inputs, write_atomically
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Conversation, check_not_held_out, read_conversations
from lilpipe.schemas.messages import Message
from lilpipe.seeds import derive_seed
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.imported import TEMPLATE_FILE
from lilpipe.tokenizer.jinja_template import JinjaTemplate
from lilpipe.training.conversation_encoding import EncodedConversation, Encoding

ROUND_TRIPS = 64
"""Conversations that are rendered again with the exported tokenizer."""


# --- gathering ----------------------------------------------------------------------------------------------------


def gather_conversations(inputs: Inputs, *, max_demonstrations: int | None) -> list[Conversation]:
    """Return sampled conversations, deduplicated over rounds, followed by written ones.

    Raises ``DataError`` if there are none, or one is held out.
    """
    prompts = all_inputs(inputs, "prompts")
    sampled: list[Conversation] = []
    seen: set[str] = set()
    for source in all_inputs(inputs, "conversations"):
        found = [(json.dumps([item.messages, item.tools, item.text]), item) for item in read_conversations(source.path)]
        sampled += [item for messages, item in found if messages not in seen]
        seen.update(messages for messages, _ in found)
    written = [item for source in prompts for item in read_conversations(source.path)][:max_demonstrations]
    conversations = sampled + written
    if not conversations:
        raise DataError(
            "sft: got no conversations, expected at least one; give the step an input `conversations` or `prompts`, "
            "and set sft.max_demonstrations above 0"
        )
    questions = [turn["content"] for item in conversations for turn in item.messages if turn["role"] == "user"]
    for source in prompts:
        check_not_held_out(questions, source.path)
    return conversations


def mix(conversations: Sequence[Conversation], mixture: dict[str, float], *, seed: int) -> list[Conversation]:
    """Return the conversations of an epoch: each origin as often as ``mixture`` says, by default once.

    For a fractional weight, the seed decides which conversations are included. Raises ``ConfigError`` for an origin
    that does not occur.
    """
    if not mixture:
        return list(conversations)
    by_origin: dict[str, list[Conversation]] = {}
    for item in conversations:
        by_origin.setdefault(item.origin, []).append(item)
    if unknown := mixture.keys() - by_origin.keys():
        raise ConfigError(
            f"sft.mixture: got the origin {min(unknown)!r}, expected an origin of the conversations: "
            f"{', '.join(sorted(by_origin))}"
        )
    chosen: list[Conversation] = []
    for origin, items in by_origin.items():
        whole, part = divmod(mixture.get(origin, 1.0), 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixture", origin))
        drawn = torch.randperm(len(items), generator=generator)[: round(part * len(items))].tolist()
        chosen += items * int(whole) + [items[number] for number in sorted(drawn)]
    if not chosen:
        raise ConfigError(f"sft.mixture: got {mixture}, which selects no conversation; set a weight above 0")
    return chosen


# --- checks ---------------------------------------------------------------------------------------------------------


def check_masks(tokenizer: Tokenizer, examples: Sequence[EncodedConversation], *, min_ratio: float = 0.0) -> float:
    """Check every mask and return the ratio of supervised tokens.

    With our own template, the expected mask follows from the ids: all tokens after an assistant's header up to and
    including the end of that turn, and no others. With another template, each supervised run must end a turn. Raises
    ``DataError`` naming the conversation, or for a ratio below ``min_ratio``.
    """
    for example in examples:
        if tokenizer.template is None:
            _check_turns(tokenizer, example)
        else:
            _check_ends(tokenizer, example)
    return supervised_ratio(examples, min_ratio=min_ratio)


def supervised_ratio(examples: Sequence[EncodedConversation], *, min_ratio: float) -> float:
    """Return the ratio of tokens with a loss. Raises ``DataError`` if it is below ``min_ratio``."""
    share = sum(sum(example.learnt) for example in examples) / sum(len(example.ids) for example in examples)
    if share < min_ratio:
        raise DataError(
            f"sft: {share:.2%} of the tokens are supervised, expected at least sft.min_supervised_ratio = "
            f"{min_ratio:.2%}; check for truncated answers, or lower the setting"
        )
    return share


def _check_turns(tokenizer: Tokenizer, example: EncodedConversation) -> None:
    expected = assistant_turns(tokenizer, example.ids)
    if not any(expected):
        raise DataError(
            f"conversation {example.id}: got no finished assistant answer, expected at least one; remove it"
        )
    if example.mask != expected:
        position = next(i for i, pair in enumerate(zip(example.mask, expected, strict=True)) if pair[0] != pair[1])
        got = "supervised" if example.mask[position] else "not supervised"
        token = tokenizer.decode([example.ids[position]])
        raise DataError(
            f"conversation {example.id}: token {position} ({token!r}) is {got}, expected the opposite: answers and "
            "their end-of-turn tokens alone are supervised; fix the chat template or its mask"
        )


def _check_ends(tokenizer: Tokenizer, example: EncodedConversation) -> None:
    """Tool calls and earlier answers may end in other special tokens than the last answer (gpt-oss)."""
    ends = [run[-1] for run in _supervised_runs(example)]
    special = set(tokenizer.special_ids.values())
    if not ends or not special.issuperset(ends) or (ends[-1] != tokenizer.turn_end_id and _ends_in_text(example)):
        found = [tokenizer.decode([token]) for token in ends]
        expected = tokenizer.decode([tokenizer.turn_end_id])
        raise DataError(
            f"conversation {example.id}: the supervised runs end in {found}, expected one run or more that each end "
            f"in {expected!r}; the chat template must mark end-of-turn tokens too"
        )


def _ends_in_text(example: EncodedConversation) -> bool:
    return not example.messages or "tool_calls" not in example.messages[-1]


def assistant_turns(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """Return for each token whether it belongs to a finished assistant turn, including its end but not its header."""
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
    """Compare the supervised text with the assistant's messages, and the text before each answer with the other
    messages.

    The template may strip whitespace around a turn. Raises ``DataError`` naming the conversation.
    """
    special = set(tokenizer.special_ids.values())
    for example in examples:
        said = [turn for turn in example.messages if turn["role"] == "assistant"]
        learnt = [_texts(tokenizer, run, special) for run in _supervised_runs(example)]
        if len(learnt) != len(said) or not all(map(_says, learnt, said)):
            raise DataError(
                f"conversation {example.id}: {_first_difference(learnt, said)}; answers must be supervised whole, with "
                "no other text; the chat template loses or adds text, or the conversation is truncated"
            )
        _check_others(tokenizer, example, special)


_NO_REASONING = re.compile(r"<think>\s*</think>")
"""Reasoning left empty, which Qwen 3's template writes before an answer without one."""


def _texts(tokenizer: Tokenizer, run: Sequence[int], special: set[int]) -> list[str]:
    """Return the texts between the special tokens of a run."""
    parts = groupby(run, key=special.__contains__)
    return [tokenizer.decode(list(part)) for is_special, part in parts if not is_special]


def _says(texts: Sequence[str], turn: Message) -> bool:
    """Return whether supervised texts are an answer; one with tool calls or reasoning must contain their parts.

    The model may also have to name a channel between special tokens, as gpt-oss does, but never its role.
    """
    content = _as_encoded(turn["content"]).strip()
    whole = _NO_REASONING.sub("", "".join(texts))
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    if not calls and not turn.get("reasoning_content"):
        in_channel = "assistant" not in texts and content in [text.strip() for text in texts]
        return whole.strip() == content or in_channel
    words = [word for call in calls for word in (call["name"], *map(str, call["arguments"]))]
    return content in whole and all(word in whole for word in words)


def _check_others(tokenizer: Tokenizer, example: EncodedConversation, special: set[int]) -> None:
    """Some templates omit unknown roles; others write tool results as JSON."""
    before = [""]  # before each answer, and after the last
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
        # Mistral's template puts the system message before the last question.
        place = "".join(before) if turn["role"] == "system" else before[number]
        if said not in place and json.dumps(said, ensure_ascii=False)[1:-1] not in place:
            raise DataError(
                f"conversation {example.id}: the {turn['role']}'s message {position} is not among the "
                "tokens, so the next answer would be trained without it: the chat template omits it; use "
                "another template, or remove such conversations"
            )
    for tool in example.tools or ():
        if (name := tool["function"]["name"]) not in "".join(before):
            raise DataError(
                f"conversation {example.id}: the tool {name!r} is not among the tokens, so its calls would be trained "
                "without it: the chat template omits it; use another template, or remove such conversations"
            )


def check_export(tokenizer: Tokenizer, examples: Sequence[EncodedConversation], directory: Path) -> None:
    """Render the first conversations again with only the tokenizer's files, as ``transformers`` will.

    Raises ``DataError`` if ids or masks differ from those in training.
    """
    tokenizer.save(directory)
    exported = Tokenizer.load(directory)
    template = exported.template or JinjaTemplate((directory / TEMPLATE_FILE).read_text(encoding="utf-8"), {})
    for example in [example for example in examples if example.messages][:ROUND_TRIPS]:
        ids, mask = template.render(exported, example.messages, tools=example.tools)
        if (ids, mask) != (example.ids, example.mask):
            place = next((i for i, pair in enumerate(zip(ids, example.ids, strict=False)) if pair[0] != pair[1]), None)
            what = "other masks" if place is None and ids == example.ids else f"other ids from token {place or 0} on"
            raise DataError(
                f"conversation {example.id}: the exported tokenizer gives {what} than in training; "
                f"{directory / TEMPLATE_FILE} does not match the tokenizer"
            )


def _supervised_runs(example: EncodedConversation) -> list[list[int]]:
    runs = groupby(zip(example.ids, example.mask, strict=True), key=itemgetter(1))
    return [[token for token, _ in run] for supervised, run in runs if supervised]


def _as_encoded(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first_difference(learnt: Sequence[Sequence[str]], said: Sequence[Message]) -> str:
    for number, (texts, expected) in enumerate(zip(learnt, said, strict=False)):
        if not _says(texts, expected):
            got = "".join(texts)
            calls = [call["function"]["name"] for call in expected.get("tool_calls", ())]
            wanted = f"{expected['content'][-60:]!r}" + (f" and calls of {', '.join(calls)}" if calls else "")
            return f"answer {number}: {got[-60:]!r} is supervised, expected {wanted}"
    return f"{len(learnt)} answers are supervised, expected {len(said)}"


def keep_checked(
    tokenizer: Tokenizer, examples: Sequence[EncodedConversation]
) -> tuple[list[EncodedConversation], list[tuple[str, str]]]:
    """Return the conversations that pass the checks, and ids and reasons of the others."""
    kept, rejected = [], []
    for example in examples:
        try:
            if example.messages:
                check_masks(tokenizer, [example])
                check_answers(tokenizer, [example])
        except DataError as error:
            rejected.append((example.id, str(error)))
        else:
            kept.append(example)
    return kept, rejected


def check_rejected(rejected: Sequence[tuple[str, str]], num_conversations: int, *, max_ratio: float) -> None:
    """Raise ``DataError`` if more than ``max_ratio`` of the conversations are rejected, or all of them."""
    if len(rejected) > max_ratio * num_conversations or len(rejected) == num_conversations:
        raise DataError(
            f"sft: {len(rejected)} of {num_conversations} conversations cannot be used, expected at most "
            f"sft.max_malformed_ratio = {max_ratio:.2%}; the first: {rejected[0][1]}"
        )


# --- report -------------------------------------------------------------------------------------------------------


def quarantine(encoding: Encoding, rejected: Sequence[tuple[str, str]], workspace: Workspace, *, max_len: int) -> None:
    """List conversations that were left out or split in files of the report, and log their numbers."""
    files: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "too_long": (
            f"skipped {len(encoding.too_long)} conversations of more than {max_len} tokens",
            [{"id": example.id, "tokens": len(example.ids), "max": max_len} for example in encoding.too_long],
        ),
        "split": (
            f"split {len(encoding.split)} conversations of more than {max_len} tokens",
            [{"id": example.id, "tokens": len(example.ids), "parts": parts} for example, parts in encoding.split],
        ),
        "rejected": (
            f"left out {len(rejected)} conversations that cannot be used",
            [{"id": name, "error": error} for name, error in rejected],
        ),
    }
    for name, (message, entries) in files.items():
        if entries:
            workspace.log(f"{message} (report/{name}.jsonl)")
            lines = [f"{json.dumps(entry, ensure_ascii=True)}\n" for entry in entries]
            write_atomically(workspace.report / f"{name}.jsonl", "".join(lines))


def show(tokenizer: Tokenizer, example: EncodedConversation) -> page.Fragment:
    """Render a conversation with highlighted supervised tokens."""
    runs = groupby(zip(example.ids, example.learnt, strict=True), key=itemgetter(1))
    return page.highlighted([(tokenizer.decode([token for token, _ in run]), bool(mask)) for mask, run in runs])
