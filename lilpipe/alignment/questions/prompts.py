"""Stage ``prompts``: questions and answers, generated or from datasets, split once for the whole pipeline.

The artifact has plain-text exercises for pretraining (``documents.arrow``), conversations with a written answer for SFT
(``demonstrations.arrow``), and questions for sampling and evaluation (``prompts.arrow``, with splits train, validation
and test). A hash of a generated task's family and canonical arguments decides its split. It does not depend on seed or
counts, so that no model of this pipeline can have seen a test question. Datasets (``sources.py``) are split by the hash
of the question; they can add preferences (``pairs.arrow``, ``examples.arrow``). ``quarantine.jsonl`` lists unreadable
rows.

The written answer of a generated task is ``Answer: X`` after zero or more polite sentences. The verifier ignores these
sentences; preferences for brevity remove them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from lilpipe.alignment.questions.families import FAMILIES, Difficulty, Family, Task, find_families
from lilpipe.alignment.questions.prompts_report import build_report
from lilpipe.alignment.questions.sources import Gathered, external, gather
from lilpipe.alignment.verify.verifiers import as_text
from lilpipe.artifact import Inputs, write_atomically
from lilpipe.config.prompts import PromptsConfig
from lilpipe.errors import ConfigError
from lilpipe.schemas.examples import (
    DOCUMENT_SCHEMA,
    PROMPT_SCHEMA,
    Conversation,
    Prompt,
    normalise_question,
    refuse_held_out,
    write_conversations,
)
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import EXAMPLES_FILE, PAIRS_FILE, write_examples, write_pairs
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace

SPLIT_SHARES = {"test": 0.1, "validation": 0.1, "demonstrations": 0.15, "train": 0.35, "exercises": 0.3}
"""Share of each family's keys assigned to each split."""

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

MAX_TOLD = 20
"""Maximum number of quarantined rows in the log; `quarantine.jsonl` lists all."""

PROSE_SHARE = 0.25
"""Share of pretraining exercises that are a declarative sentence."""

# --- generation ---------------------------------------------------------------------------------------------------


def split_of(family: str, key: str) -> str:
    """Return the split of a task, a pure function of its family and canonical arguments."""
    digest = hashlib.sha256(f"{family}/{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return split
    return "exercises"  # the shares sum to 1 up to rounding


def draw_tasks(
    family: str,
    split: str,
    count: int,
    *,
    seed: int,
    difficulty: Difficulty | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> list[Task]:
    """Generate ``count`` tasks of a family for a split.

    Keys are distinct except in exercises. Raises ``ConfigError`` if the family has too few distinct tasks.
    """
    random = Random(f"prompts/{seed}/{family}/{split}")
    difficulty = difficulty or families[family].default
    difficulty = difficulty.easy if split == "exercises" else difficulty
    tasks: list[Task] = []
    keys: set[str] = set()
    max_tries = 1_000 + 500 * count
    for _ in range(max_tries):
        if len(tasks) == count:
            break
        task = families[family].draw(random, difficulty)
        if split_of(family, task.key) == split and (split == "exercises" or task.key not in keys):
            tasks.append(task)
            keys.add(task.key)
    if len(tasks) < count:
        raise ConfigError(
            f"prompts.num_{split}: family {family!r} gave {len(tasks)} distinct tasks for {split!r} in {max_tries:,} "
            f"draws, {count} are needed; lower prompts.num_{split}, add families to prompts.families, or widen "
            f"prompts.difficulty"
        )
    return tasks


def write_answer(task: Task, random: Random, *, config: PromptsConfig) -> str:
    """Return a written completion: optional polite sentences, then ``Answer: X``."""
    count = 0
    if config.max_filler_sentences and random.random() < config.filler_ratio:
        count = random.randint(1, config.max_filler_sentences)
    return " ".join([*random.sample(FILLERS, count), f"Answer: {task.answer}"])


def _all_tasks(
    split: str, count: int, *, config: PromptsConfig, families: Mapping[str, Family]
) -> list[tuple[str, Task]]:
    """Return shuffled (family, task) pairs, the same number of each family."""
    pairs = []
    for index, family in enumerate(config.families):
        part = count // len(config.families) + (index < count % len(config.families))
        range_ = Difficulty(*config.difficulty.get(family, families[family].default))
        tasks = draw_tasks(family, split, part, seed=config.seed, difficulty=range_, families=families)
        pairs += [(family, task) for task in tasks]
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


@dataclass
class Generated:
    """Generated tasks of each split, with their families."""

    prompts: dict[str, list[tuple[str, Task]]]
    exercises: list[tuple[str, Task]]
    demonstrations: list[tuple[str, Task]]


def _generate(config: PromptsConfig) -> Generated:
    families = find_families(config)
    for family, known in families.items():
        least = config.difficulty.get(family, known.default)[0]
        if least < known.least:
            raise ConfigError(
                f"prompts.difficulty.{family}: starts at {least} {known.unit}, expected {known.least} or more"
            )
    counts = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
    return Generated(
        {split: _all_tasks(split, count, config=config, families=families) for split, count in counts.items()},
        _all_tasks("exercises", config.num_documents, config=config, families=families),
        _all_tasks("demonstrations", config.num_demonstrations, config=config, families=families),
    )


def _refuse_leaks(generated: Generated, gathered: Gathered) -> None:
    """Raise ``DataError`` if training data contains a question of the validation or test split."""
    held_out = {
        normalise_question(task.question) for split in ("validation", "test") for _, task in generated.prompts[split]
    }
    held_out |= {
        normalise_question(prompt.question) for split in ("validation", "test") for prompt in gathered.prompts[split]
    }
    tasks = (*generated.exercises, *generated.demonstrations, *generated.prompts["train"])
    refuse_held_out((task.question for _, task in tasks), held_out, where="prompts")
    for name, questions in gathered.learnt_questions.items():
        refuse_held_out(questions, held_out, where=f"prompts.sources: {name!r}")


def _row(split: str, prompt: Prompt) -> dict[str, Any]:
    return {"split": split, **vars(prompt)}


def _as_prompt(split: str, index: int, family: str, task: Task) -> Prompt:
    identity = f"{split}/{family}/{index:06d}"
    return Prompt(identity, family, task.question, task.answer, difficulty=task.difficulty)


def run(config: PromptsConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001 (no inputs)
    """Generate and read all splits.

    Raises:
        ConfigError: A family cannot be imported or has too few tasks.
        DataError: A source cannot be read, or training data contains a held-out question.
    """
    generated, gathered = _generate(config), gather(config)
    _refuse_leaks(generated, gathered)
    random = Random(f"prompts/{config.seed}/answers")
    documents = [
        {"id": f"exercises/{family}/{index:06d}", "text": _exercise(task, random, config=config)}
        for index, (family, task) in enumerate(generated.exercises)
    ]
    conversations = [
        _demonstration(index, family, task, random, config=config)
        for index, (family, task) in enumerate(generated.demonstrations)
    ]
    rows = [
        _row(split, prompt)
        for split, tasks in generated.prompts.items()
        for prompt in (*(_as_prompt(split, i, *pair) for i, pair in enumerate(tasks)), *gathered.prompts[split])
    ]
    documents += gathered.documents
    conversations += gathered.demonstrations
    write_rows(workspace.output / "documents.arrow", documents, DOCUMENT_SCHEMA)
    write_conversations(workspace.output / "demonstrations.arrow", conversations)
    write_rows(workspace.output / "prompts.arrow", rows, PROMPT_SCHEMA)
    write_atomically(workspace.report / "report.html", build_report(rows, conversations, gathered.quarantine))
    sizes = Counter(row["split"] for row in rows)
    metrics = {
        "documents": float(len(documents)),
        "demonstrations": float(len(conversations)),
        **{split: float(size) for split, size in sizes.items()},
    }
    return metrics | (_write_gathered(gathered, workspace) if config.sources else {})


def _write_gathered(gathered: Gathered, workspace: Workspace) -> Metrics:
    """Write the preferences and quarantined rows of sources."""
    write_pairs(workspace.output / PAIRS_FILE, gathered.pairs)
    if gathered.examples:
        write_examples(workspace.output / EXAMPLES_FILE, gathered.examples)
    lines = [json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n" for entry in gathered.quarantine]
    write_atomically(workspace.output / "quarantine.jsonl", "".join(lines))
    for name, formats in gathered.formats.items():
        num_left_out = sum(entry["source"] == name for entry in gathered.quarantine)
        found = ", ".join(f"{count:,} {form}" for form, count in formats.most_common()) or "none"
        workspace.log(f"source {name!r}: recognised rows: {found}; quarantined rows: {num_left_out:,}")
        if unused := gathered.unused_columns[name]:
            columns = ", ".join(f"{column} ({count:,} rows)" for column, count in unused.most_common(MAX_TOLD))
            workspace.log(f"source {name!r}: columns without a use: {columns}")
    for entry in gathered.quarantine[:MAX_TOLD]:
        workspace.log(f"quarantined {entry['source']} {entry['file']}:{entry['row']}: {entry['error']}")
    if gathered.num_repeated:
        workspace.log(f"{gathered.num_repeated} rows repeat a question: each question has one prompt")
    formats = sum(gathered.formats.values(), Counter[str]())
    return {
        **{f"format/{form}": float(count) for form, count in sorted(formats.items())},
        "pairs": len(gathered.pairs),
        **({"unpaired_examples": len(gathered.examples)} if gathered.examples else {}),
        "quarantined": len(gathered.quarantine),
        "repeated": gathered.num_repeated,
    }


STAGE = Stage(
    name="prompts", output="Prompts", config=PromptsConfig, run=run, external=external, main_metric="documents"
)
