"""Preferences as tables: pairs of answers to a prompt, and single answers that are desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lilpipe.errors import DataError
from lilpipe.schemas.examples import MESSAGE_TYPE
from lilpipe.schemas.messages import Message
from lilpipe.schemas.tables import read_rows

PairSplit = Literal["train", "heldout"]
PAIRS_FILE = "pairs.arrow"
EXAMPLES_FILE = "examples.arrow"

PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.list_(MESSAGE_TYPE)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("edited", pa.string()),
    ]
)
EXAMPLE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.list_(MESSAGE_TYPE)),
        ("answer", pa.string()),
        ("desirable", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    prompt_id: str
    split: str
    prompt: list[Message]
    chosen: str
    rejected: str
    edited: str | None = None
    """The chosen answer as a person improved it: edited > chosen > rejected (Grattafiori et al. 2024, 4.2.1)."""

    @property
    def ranking(self) -> list[str]:
        """The answers, the best first."""
        return [answer for answer in (self.edited, self.chosen, self.rejected) if answer is not None]

    @property
    def questions(self) -> list[str]:
        """What the user says in the prompt."""
        return _questions(self.prompt)


@dataclass(frozen=True)
class JudgedExample:
    """One answer to a prompt, desirable or not."""

    prompt_id: str
    split: str
    prompt: list[Message]
    answer: str
    desirable: bool

    @property
    def questions(self) -> list[str]:
        """What the user says in the prompt."""
        return _questions(self.prompt)


def _questions(prompt: Sequence[Message]) -> list[str]:
    return [turn["content"] for turn in prompt if turn["role"] == "user"]


def read_pairs(directory: Path, split: PairSplit) -> list[Pair]:
    """The pairs of one split of a Preferences or Prompts artifact, in their order."""
    if not (directory / PAIRS_FILE).exists() and (directory / EXAMPLES_FILE).exists():
        raise DataError(
            f"{directory}: holds single answers ({EXAMPLES_FILE}) and no pairs; only dpo.loss = 'kto' learns from "
            "them: take it, or make pairs (preferences.unpaired = false)"
        )
    return [Pair(**row) for row in read_rows(directory / PAIRS_FILE) if row["split"] == split]


def check_pairs(train: Sequence[Pair], heldout: Sequence[Pair]) -> None:
    """Raise ``DataError`` for answers that are the same, and for prompts that are both learnt from and held out."""
    same = [pair for pair in (*train, *heldout) if len({text.strip() for text in pair.ranking}) < len(pair.ranking)]
    if same:
        raise DataError(
            f"{len(same)} of {len(train) + len(heldout)} pairs hold the same answer twice, expected none; the first is "
            f"{same[0].prompt_id}. Remove them: nothing can be learnt from a preference of a text to itself"
        )
    _check_apart(train, heldout, what="pairs")


def read_examples(directory: Path, split: PairSplit) -> list[JudgedExample]:
    """The single answers of one split of a Preferences or Prompts artifact, in their order."""
    return [JudgedExample(**row) for row in read_rows(directory / EXAMPLES_FILE) if row["split"] == split]


def check_examples(train: Sequence[JudgedExample], heldout: Sequence[JudgedExample]) -> None:
    """Raise ``DataError`` for answers that are called both, and for prompts that are both learnt from and held out."""
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for example in (*train, *heldout):
        verdicts.setdefault((str(example.prompt), example.answer.strip()), set()).add(example.desirable)
    if found := [answer for (_, answer), values in verdicts.items() if len(values) > 1]:
        raise DataError(
            f"{len(found)} of {len(verdicts)} answers are both desirable and undesirable, expected none; the first is "
            f"{found[0]!r}. Decide for one where they are made"
        )
    _check_apart(train, heldout, what="answers")


def _check_apart(train: Sequence[Pair | JudgedExample], heldout: Sequence[Pair | JudgedExample], *, what: str) -> None:
    learnt = {str(item.prompt) for item in train}
    if shared := [item for item in heldout if str(item.prompt) in learnt]:
        raise DataError(
            f"{len(shared)} of {len(heldout)} held-out {what} have a prompt that is trained on, expected none; the "
            f"first is {shared[0].prompt_id}. Split the {what} by prompt: what is measured on them would mean nothing"
        )
