"""Preferences as a table: a prompt with a chosen and a rejected answer, and maybe one that a person has edited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lilpipe.alignment.prompts import MESSAGE_TYPE
from lilpipe.alignment.tables import read_table
from lilpipe.tokenizer.chat_template import Message

PairSplit = Literal["train", "heldout"]
PAIRS_FILE = "pairs.arrow"

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


def read_pairs(directory: Path, split: PairSplit) -> list[Pair]:
    """The pairs of one split of a Preferences or Prompts artifact, in their order."""
    return [Pair(**row) for row in read_table(directory / PAIRS_FILE) if row["split"] == split]
