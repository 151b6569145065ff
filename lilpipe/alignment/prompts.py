"""Stage ``prompts``: verifiable tasks, generated and split once for the whole pipeline.

The artifact holds exercises in plain text for pretraining (``documents.arrow``), conversations with a written
answer for supervised fine-tuning (``demonstrations.arrow``), and questions for sampling and evaluation
(``prompts.arrow``, with splits train, dev and test). Which of the five a task may enter is decided by a hash of its
family and canonical arguments alone: it depends neither on the seed nor on the counts, so that no test question can
have been seen by any model of this pipeline.

A written answer is ``Answer: X`` after zero or more sentences of courtesy. The courtesy is noise as far as the
verifier is concerned; it is what a preference for brevity can act on.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa

from lilpipe.alignment.families import FAMILIES, MAX_EASY_LENGTH, MAX_LENGTH, Task
from lilpipe.alignment.tables import read_table, write_table
from lilpipe.artifact import Inputs
from lilpipe.config import PromptsConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import Message

Split = Literal["train", "dev", "test"]

SPLIT_SHARES = {"test": 0.1, "dev": 0.1, "demonstrations": 0.15, "train": 0.35, "exercises": 0.3}
"""Share of each family's tasks that may enter a split."""

FILLERS = (
    "Sure, I can help with that.",
    "Let me think about it.",
    "That is a good question.",
    "I have read it with care.",
    "It is not hard to do.",
    "Here is what I found.",
    "Thank you for asking me.",
    "I will do it step by step.",
)

PROSE_SHARE = 0.25
"""Share of pretraining's exercises that state their fact in a sentence."""

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

_ANSWER = re.compile(r"Answer:[ ]*(\S[^\n]*)\Z")


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


# --- answers ------------------------------------------------------------------------------------------------------


def as_text(question: str) -> str:
    """The question as a base model meets it in its pretraining text; the answer follows after a space."""
    return f"Exercise: {question}\nSolution:"


def first_paragraph(text: str) -> str:
    """A base model's answer: what it wrote before the first blank line."""
    return text.split("\n\n")[0].strip()


def is_well_formed(response: str) -> bool:
    """Whether the response says ``Answer:`` once and ends, on the same line, in what follows it."""
    return response.count("Answer:") == 1 and _stated_answer(response) is not None


def verify(prompt: Prompt, response: str) -> bool:
    """Whether the response is well-formed and states the prompt's answer, up to runs of spaces."""
    return is_well_formed(response) and _stated_answer(response) == prompt.answer


def _stated_answer(response: str) -> str | None:
    match = _ANSWER.search(response.strip())
    return " ".join(match[1].split()) if match else None


# --- reading ------------------------------------------------------------------------------------------------------


def read_prompts(directory: Path, split: Split) -> list[Prompt]:
    """The prompts of one split of a Prompts artifact, in their order."""
    rows = read_table(directory / "prompts.arrow")
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
    for row in read_table(directory / "documents.arrow"):
        yield row["id"], row["text"]


def read_conversations(directory: Path) -> list[Conversation]:
    """The conversations of a Conversations artifact, or the demonstrations of a Prompts artifact."""
    path = directory / "conversations.arrow"
    rows = read_table(path if path.exists() else directory / "demonstrations.arrow")
    return [Conversation(**row) for row in rows]


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations as one Arrow file."""
    write_table(path, [vars(item) for item in conversations], CONVERSATION_SCHEMA)


def assert_not_held_out(questions: Iterable[str], prompts_directory: Path) -> None:
    """Raise ``DataError`` if a question of the dev or test split is among those a training stage is about to use."""
    held_out = {
        _normalise(prompt.question) for split in ("dev", "test") for prompt in read_prompts(prompts_directory, split)
    }
    _refuse_held_out(questions, held_out, where=str(prompts_directory))


def _refuse_held_out(questions: Iterable[str], held_out: set[str], *, where: str) -> None:
    found = [question for question in questions if _normalise(question) in held_out]
    if found:
        raise DataError(
            f"{where}: {len(found)} training questions occur in the dev or test split, expected none; the first is "
            f"{found[0]!r}. Remove them from the training data: scores on them would mean nothing"
        )


def _normalise(question: str) -> str:
    return " ".join(question.split()).casefold()


# --- generating ---------------------------------------------------------------------------------------------------


def split_of(family: str, key: str) -> str:
    """The split that a task may enter: a pure function of its family and canonical arguments."""
    digest = hashlib.sha256(f"{family}/{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return split
    return "exercises"  # the shares add up to 1 but for rounding


def draw_tasks(family: str, split: str, count: int, *, seed: int) -> list[Task]:
    """``count`` tasks of a family that belong to a split.

    Keys are distinct but for exercises, which may repeat as text does. Raises ``ConfigError`` if the family has too
    few distinct tasks.
    """
    random = Random(f"prompts/{seed}/{family}/{split}")
    max_length = MAX_EASY_LENGTH if split == "exercises" else MAX_LENGTH
    tasks: list[Task] = []
    keys: set[str] = set()
    max_tries = 1_000 + 500 * count
    for _ in range(max_tries):
        if len(tasks) == count:
            break
        task = FAMILIES[family](random, max_length)
        if split_of(family, task.key) == split and (split == "exercises" or task.key not in keys):
            tasks.append(task)
            keys.add(task.key)
    if len(tasks) < count:
        raise ConfigError(
            f"prompts.num_{split}: family {family!r} gave {len(tasks)} distinct tasks for {split!r} in {max_tries:,} "
            f"draws, {count} are needed; lower prompts.num_{split} or name more families in prompts.families"
        )
    return tasks


def write_answer(task: Task, random: Random, *, config: PromptsConfig) -> str:
    """A written response: some courtesy, then ``Answer: X``."""
    count = 0
    if config.max_filler_sentences and random.random() < config.filler_share:
        count = random.randint(1, config.max_filler_sentences)
    return " ".join([*random.sample(FILLERS, count), f"Answer: {task.answer}"])


def _all_tasks(split: str, count: int, *, config: PromptsConfig) -> list[tuple[str, Task]]:
    """Family and task, families in equal parts, in a shuffled order."""
    pairs = []
    for index, family in enumerate(config.families):
        part = count // len(config.families) + (index < count % len(config.families))
        pairs += [(family, task) for task in draw_tasks(family, split, part, seed=config.seed)]
    Random(f"prompts/{config.seed}/order/{split}").shuffle(pairs)
    return pairs


def _exercise(task: Task, random: Random, *, config: PromptsConfig) -> str:
    if random.random() < PROSE_SHARE:
        return task.prose
    return f"{as_text(task.question)} {write_answer(task, random, config=config)}"


def _demonstration(index: int, family: str, task: Task, random: Random, *, config: PromptsConfig) -> Conversation:
    identity = f"demonstrations/{family}/{index:06d}"
    messages: list[Message] = [
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": write_answer(task, random, config=config)},
    ]
    return Conversation(identity, identity, "demonstration", messages)


def run(config: PromptsConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001 (no inputs)
    """Generate every split. Raises ``ConfigError`` if a family is unknown or too small."""
    for family in config.families:
        if family not in FAMILIES:
            raise ConfigError(f"prompts.families: there is no family {family!r}; known: {', '.join(FAMILIES)}")
    counts = {"train": config.num_train, "dev": config.num_dev, "test": config.num_test}
    prompts = {split: _all_tasks(split, count, config=config) for split, count in counts.items()}
    exercises = _all_tasks("exercises", config.num_documents, config=config)
    demonstrations = _all_tasks("demonstrations", config.num_demonstrations, config=config)

    held_out = {_normalise(task.question) for split in ("dev", "test") for _, task in prompts[split]}
    training = (*exercises, *demonstrations, *prompts["train"])
    _refuse_held_out((task.question for _, task in training), held_out, where="prompts")

    random = Random(f"prompts/{config.seed}/answers")
    documents = [
        {"id": f"exercises/{family}/{index:06d}", "text": _exercise(task, random, config=config)}
        for index, (family, task) in enumerate(exercises)
    ]
    conversations = [
        _demonstration(index, family, task, random, config=config)
        for index, (family, task) in enumerate(demonstrations)
    ]
    rows = [
        {
            "id": f"{split}/{family}/{i:06d}",
            "split": split,
            "family": family,
            "question": t.question,
            "answer": t.answer,
            "difficulty": 0,
            "reference": "",
            "verifier": "answer",
        }
        for split, tasks in prompts.items()
        for i, (family, t) in enumerate(tasks)
    ]
    write_table(workspace.output / "documents.arrow", documents, DOCUMENT_SCHEMA)
    write_conversations(workspace.output / "demonstrations.arrow", conversations)
    write_table(workspace.output / "prompts.arrow", rows, PROMPT_SCHEMA)
    sizes = Counter(row["split"] for row in rows)
    return {
        "documents": len(documents),
        "demonstrations": len(conversations),
        **{split: float(size) for split, size in sizes.items()},
    }


STAGE = Stage(name="prompts", output="Prompts", config=PromptsConfig, run=run, main_metric="documents")
