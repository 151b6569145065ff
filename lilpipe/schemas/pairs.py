"""Preference tables: pairs of completions to a prompt, and unpaired completions labelled desirable or undesirable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message, Tools, dump_json, from_rows, message_type, to_rows
from lilpipe.schemas.tables import read_rows, write_rows

PairSplit = Literal["train", "validation"]
PAIRS_FILE = "pairs.arrow"
EXAMPLES_FILE = "examples.arrow"

_COMMON = [("prompt_id", pa.string()), ("split", pa.string()), ("prompt", pa.list_(message_type(())))]
PAIR_SCHEMA = pa.schema([*_COMMON, *((name, pa.string()) for name in ("chosen", "rejected", "edited"))])
EXAMPLE_SCHEMA = pa.schema([*_COMMON, ("completion", pa.string()), ("label", pa.bool_())])
"""Schemas without the optional keys of messages and without tools."""


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected completion to one prompt."""

    prompt_id: str
    split: str
    prompt: list[Message]
    chosen: str
    rejected: str
    edited: str | None = None
    """The chosen completion, improved by a person: edited > chosen > rejected (Grattafiori et al. 2024, 4.2.1)."""
    tools: Tools | None = None
    """Tools that the assistant may call."""

    @property
    def ranking(self) -> list[str]:
        """The completions, best first."""
        return [completion for completion in (self.edited, self.chosen, self.rejected) if completion is not None]

    @property
    def questions(self) -> list[str]:
        """The user messages of the prompt."""
        return _questions(self.prompt)


@dataclass(frozen=True)
class UnpairedExample:
    """One completion to a prompt, with a label: true if desirable."""

    prompt_id: str
    split: str
    prompt: list[Message]
    completion: str
    label: bool
    tools: Tools | None = None
    """Tools that the assistant may call."""

    @property
    def questions(self) -> list[str]:
        """The user messages of the prompt."""
        return _questions(self.prompt)


def _questions(prompt: Sequence[Message]) -> list[str]:
    return [turn["content"] for turn in prompt if turn["role"] == "user"]


def read_pairs(directory: Path, split: PairSplit) -> list[Pair]:
    """Read the pairs of one split of a Preferences or Prompts artifact, in file order."""
    if not (directory / PAIRS_FILE).exists() and (directory / EXAMPLES_FILE).exists():
        raise DataError(
            f"{directory}: got unpaired completions ({EXAMPLES_FILE}), expected pairs; only dpo.loss_type = 'kto' "
            "trains on unpaired completions: set it, or make pairs (preferences.unpaired = false)"
        )
    return [Pair(**_item(row)) for row in read_rows(directory / PAIRS_FILE) if row["split"] == split]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as one Arrow file."""
    _write(path, pairs, PAIR_SCHEMA)


def check_pairs(train: Sequence[Pair], validation: Sequence[Pair]) -> None:
    """Raise ``DataError`` if a pair has identical completions, or a validation prompt is also in the training split."""
    same = [pair for pair in (*train, *validation) if len({text.strip() for text in pair.ranking}) < len(pair.ranking)]
    if same:
        raise DataError(
            f"{len(same)} of {len(train) + len(validation)} pairs have identical completions, expected none; the first "
            f"is {same[0].prompt_id}. Remove them: they express no preference"
        )
    _check_apart(train, validation, what="pairs")


def read_examples(directory: Path, split: PairSplit) -> list[UnpairedExample]:
    """Read the unpaired completions of one split of a Preferences or Prompts artifact, in file order."""
    return [UnpairedExample(**_item(row)) for row in read_rows(directory / EXAMPLES_FILE) if row["split"] == split]


def write_examples(path: Path, examples: Sequence[UnpairedExample]) -> None:
    """Write unpaired completions as one Arrow file."""
    _write(path, examples, EXAMPLE_SCHEMA)


def _item(row: dict[str, Any]) -> dict[str, Any]:
    tools = json.loads(row["tools"]) if row.get("tools") else None
    return row | {"prompt": from_rows(row["prompt"]), "tools": tools}


def _write(path: Path, items: Sequence[Pair | UnpairedExample], schema: pa.Schema) -> None:
    prompt = pa.list_(message_type(message for item in items for message in item.prompt))
    schema = schema.set(schema.get_field_index("prompt"), pa.field("prompt", prompt))
    if any(item.tools for item in items):
        schema = schema.append(pa.field("tools", pa.string()))
    rows = [
        vars(item) | {"prompt": to_rows(item.prompt), "tools": dump_json(item.tools) if item.tools else None}
        for item in items
    ]
    write_rows(path, rows, schema)


def check_examples(train: Sequence[UnpairedExample], validation: Sequence[UnpairedExample]) -> None:
    """Raise ``DataError`` if a completion has both labels, or if a validation prompt is also in the training split."""
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for example in (*train, *validation):
        verdicts.setdefault((str(example.prompt), example.completion.strip()), set()).add(example.label)
    if found := [completion for (_, completion), values in verdicts.items() if len(values) > 1]:
        raise DataError(
            f"{len(found)} of {len(verdicts)} completions are labelled both desirable and undesirable, expected one "
            f"label; the first is {found[0]!r}. Correct the labels in the source"
        )
    _check_apart(train, validation, what="completions")


def _check_apart(
    train: Sequence[Pair | UnpairedExample], validation: Sequence[Pair | UnpairedExample], *, what: str
) -> None:
    learnt = {str(item.prompt) for item in train}
    if shared := [item for item in validation if str(item.prompt) in learnt]:
        raise DataError(
            f"{len(shared)} of {len(validation)} validation {what} have a prompt that is in the training split, "
            f"expected none; the first is {shared[0].prompt_id}. Split the {what} by prompt: metrics on "
            "training prompts mean nothing"
        )
