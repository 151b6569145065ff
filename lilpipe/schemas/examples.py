"""Prompts and conversations for post-training, their files, and the check that held-out prompts are not trained on.

Questions that differ only in case, white space, Unicode form or punctuation are the same. A training stage raises an
error if its data contains a question of the validation or test split.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message, Tools, dump_json, from_rows, message_type, to_rows
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

Verifier = Literal["answer", "numeric", "program", "none"]


@dataclass(frozen=True)
class Prompt:
    """A question with its reference answer and verifier."""

    id: str
    family: str
    question: str
    answer: str
    """Expected answer that the verifier compares with; for ``program``, the tests."""
    difficulty: int = 0
    """Number of items or steps of a generated task; 0 if unknown."""
    reference: str = ""
    """Full-text answer, written by a person or by the task's author."""
    verifier: str = "answer"
    """How a response is checked, a ``Verifier``: exact match of the stated answer (`answer`), its number (`numeric`), a
    program's tests (`program`), or not at all (`none`: open-ended instructions)."""


@dataclass(frozen=True)
class Conversation:
    """Messages, or a plain text to learn as it is; ``origin`` names the author of the answers."""

    id: str
    prompt_id: str
    origin: str
    messages: list[Message]
    tools: Tools | None = None
    """Tools that the assistant may call."""
    text: str | None = None
    """Plain text; there are no messages then."""


# --- files --------------------------------------------------------------------------------------------------------


def read_prompts(directory: Path, split: Split) -> list[Prompt]:
    """Read the prompts of one split of a Prompts artifact, in file order."""
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
    """Yield the id and text of each plain-text exercise of a Prompts artifact."""
    for row in read_rows(directory / "documents.arrow"):
        yield row["id"], row["text"]


def read_conversations(directory: Path) -> list[Conversation]:
    """Read the conversations of a Conversations artifact, or the demonstrations of a Prompts artifact."""
    path = directory / "conversations.arrow"
    rows = read_rows(path if path.exists() else directory / "demonstrations.arrow")
    return [_conversation(row) for row in rows]


def _conversation(row: dict[str, Any]) -> Conversation:
    tools = json.loads(row["tools"]) if row.get("tools") else None
    return Conversation(
        row["id"], row["prompt_id"], row["origin"], from_rows(row["messages"]), tools=tools, text=row.get("text")
    )


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations as one Arrow file; columns of tools and texts only if there are any."""
    fields: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in ("id", "prompt_id", "origin")]
    kind = message_type(message for item in conversations for message in item.messages)
    fields.append(("messages", pa.list_(kind)))
    fields += [
        (name, pa.string())
        for name in ("tools", "text")
        if any(getattr(item, name) is not None for item in conversations)
    ]
    rows = [
        vars(item) | {"messages": to_rows(item.messages), "tools": dump_json(item.tools) if item.tools else None}
        for item in conversations
    ]
    write_rows(path, rows, pa.schema(fields))


# --- held out -----------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"[,;:!?\"'“”„‘’«»`…¿¡]|\.(?!\d)")
"""Punctuation that does not change a task. Signs, brackets and decimal points are kept."""


def normalise_question(question: str) -> str:
    """Normalise a question for comparison: case, white space, Unicode form, punctuation, thousands separators."""
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", question).casefold())
    return " ".join(_PUNCTUATION.sub(" ", text).split())


def check_not_held_out(questions: Iterable[str], prompts_directory: Path) -> None:
    """Raise ``DataError`` if a training question is in the validation or test split of the Prompts artifact."""
    splits: tuple[Split, ...] = ("validation", "test")
    held_out = {
        normalise_question(prompt.question) for split in splits for prompt in read_prompts(prompts_directory, split)
    }
    refuse_held_out(questions, held_out, where=str(prompts_directory))


def refuse_held_out(questions: Iterable[str], held_out: set[str], *, where: str) -> None:
    """Raise ``DataError`` if a question is in ``held_out``, a set of normalised questions."""
    found = [question for question in questions if normalise_question(question) in held_out]
    if found:
        raise DataError(
            f"{where}: {len(found)} training questions occur in the validation or test split, expected none; the first "
            f"is {found[0]!r}. Remove them from the training data: they make evaluation scores meaningless"
        )
