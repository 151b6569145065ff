"""What the stages behind pretraining learn from and are measured by: prompts, conversations, and their files.

Questions are the same if they differ by case, white space, the Unicode form or punctuation alone; a training stage that
meets one of the validation or test split refuses to go on.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.schemas.tables import read_rows, write_rows

Split = Literal["train", "validation", "test"]

PROMPT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "split", "family", "question", "answer")),
        ("difficulty", pa.int32()),
        ("reference", pa.string()),
        ("verifier", pa.string()),
    ]
)
DOCUMENT_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])
MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
CONVERSATION_SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt_id", pa.string()), ("origin", pa.string()), ("messages", pa.list_(MESSAGE_TYPE))]
)

Verifier = Literal["answer", "numeric", "program", "none"]


@dataclass(frozen=True)
class Prompt:
    """A question, and what is known of its answer."""

    id: str
    family: str
    question: str
    answer: str
    """What the verifier compares with; the tests for ``program``."""
    difficulty: int = 0
    """Items or steps of a generated task; 0 where it is not known."""
    reference: str = ""
    """An answer in words, by a person or by the task's author."""
    verifier: str = "answer"
    """What decides whether a response is correct, a ``Verifier``: the stated answer word for word, its number, a
    program's tests, or nothing (an instruction that has many good answers)."""


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content; ``origin`` says who wrote the answers."""

    id: str
    prompt_id: str
    origin: str
    messages: list[Message]


# --- files --------------------------------------------------------------------------------------------------------


def read_prompts(directory: Path, split: Split) -> list[Prompt]:
    """The prompts of one split of a Prompts artifact, in their order."""
    rows = read_rows(directory / "prompts.arrow")
    return [
        Prompt(
            row["id"],
            row["family"],
            row["question"],
            row["answer"],
            difficulty=row.get("difficulty") or 0,
            reference=row.get("reference") or "",
            verifier=row.get("verifier") or "answer",
        )
        for row in rows
        if row["split"] == split
    ]


def read_exercises(directory: Path) -> Iterator[tuple[str, str]]:
    """Id and text of each plain-text exercise of a Prompts artifact."""
    for row in read_rows(directory / "documents.arrow"):
        yield row["id"], row["text"]


def read_conversations(directory: Path) -> list[Conversation]:
    """The conversations of a Conversations artifact, or the demonstrations of a Prompts artifact."""
    path = directory / "conversations.arrow"
    rows = read_rows(path if path.exists() else directory / "demonstrations.arrow")
    return [Conversation(**row) for row in rows]


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations as one Arrow file."""
    write_rows(path, [vars(item) for item in conversations], CONVERSATION_SCHEMA)


# --- held out -----------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"[,;:!?\"'“”„‘’«»`…¿¡]|\.(?!\d)")
"""Marks that change no task: signs, brackets and decimal points stay."""


def normalise_question(question: str) -> str:
    """What two questions must share to count as the same."""
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", question).casefold())
    return " ".join(_PUNCTUATION.sub(" ", text).split())


def assert_not_held_out(questions: Iterable[str], prompts_directory: Path) -> None:
    """Raise ``DataError`` if a question of the validation or test split is among those a training stage is about to
    use.
    """
    splits: tuple[Split, ...] = ("validation", "test")
    held_out = {
        normalise_question(prompt.question) for split in splits for prompt in read_prompts(prompts_directory, split)
    }
    refuse_held_out(questions, held_out, where=str(prompts_directory))


def refuse_held_out(questions: Iterable[str], held_out: set[str], *, where: str) -> None:
    """Raise ``DataError`` if a question is among those held out, which are normalised."""
    found = [question for question in questions if normalise_question(question) in held_out]
    if found:
        raise DataError(
            f"{where}: {len(found)} training questions occur in the validation or test split, expected none; the first "
            f"is {found[0]!r}. Remove them from the training data: scores on them would mean nothing"
        )
