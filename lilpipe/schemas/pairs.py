"""Preferences as tables: pairs of completions to a prompt, and unpaired completions that are desirable or not."""

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

PairSplit = Literal["train", "validation"]
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
        ("completion", pa.string()),
        ("label", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """Two completions to one prompt, the first preferred."""

    prompt_id: str
    split: str
    prompt: list[Message]
    chosen: str
    rejected: str
    edited: str | None = None
    """The chosen completion as a person improved it: edited > chosen > rejected (Grattafiori et al. 2024, 4.2.1)."""

    @property
    def ranking(self) -> list[str]:
        """The completions, the best first."""
        return [completion for completion in (self.edited, self.chosen, self.rejected) if completion is not None]

    @property
    def questions(self) -> list[str]:
        """What the user says in the prompt."""
        return _questions(self.prompt)


@dataclass(frozen=True)
class UnpairedExample:
    """One completion to a prompt, desirable or not."""

    prompt_id: str
    split: str
    prompt: list[Message]
    completion: str
    label: bool

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
            f"{directory}: holds unpaired completions ({EXAMPLES_FILE}) and no pairs; only dpo.loss_type = 'kto' "
            "learns from them: take it, or make pairs (preferences.unpaired = false)"
        )
    return [Pair(**row) for row in read_rows(directory / PAIRS_FILE) if row["split"] == split]


def check_pairs(train: Sequence[Pair], validation: Sequence[Pair]) -> None:
    """Raise ``DataError`` for completions that are the same, and for prompts that are both learnt from and held out."""
    same = [pair for pair in (*train, *validation) if len({text.strip() for text in pair.ranking}) < len(pair.ranking)]
    if same:
        raise DataError(
            f"{len(same)} of {len(train) + len(validation)} pairs hold the same completion twice, expected none; the "
            f"first is {same[0].prompt_id}. Remove them: nothing can be learnt from a preference of a text to itself"
        )
    _check_apart(train, validation, what="pairs")


def read_examples(directory: Path, split: PairSplit) -> list[UnpairedExample]:
    """The unpaired completions of one split of a Preferences or Prompts artifact, in their order."""
    return [UnpairedExample(**row) for row in read_rows(directory / EXAMPLES_FILE) if row["split"] == split]


def check_examples(train: Sequence[UnpairedExample], validation: Sequence[UnpairedExample]) -> None:
    """Raise ``DataError`` for completions that are called both, and for prompts that are both learnt from and held
    out.
    """
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for example in (*train, *validation):
        verdicts.setdefault((str(example.prompt), example.completion.strip()), set()).add(example.label)
    if found := [completion for (_, completion), values in verdicts.items() if len(values) > 1]:
        raise DataError(
            f"{len(found)} of {len(verdicts)} completions are both desirable and undesirable, expected none; the first "
            f"is {found[0]!r}. Decide for one where they are made"
        )
    _check_apart(train, validation, what="completions")


def _check_apart(
    train: Sequence[Pair | UnpairedExample], validation: Sequence[Pair | UnpairedExample], *, what: str
) -> None:
    learnt = {str(item.prompt) for item in train}
    if shared := [item for item in validation if str(item.prompt) in learnt]:
        raise DataError(
            f"{len(shared)} of {len(validation)} held-out {what} have a prompt that is trained on, expected none; the "
            f"first is {shared[0].prompt_id}. Split the {what} by prompt: what is measured on them would mean nothing"
        )
