"""Data sets of questions, conversations, texts and preferences: read, recognised, and split.

The hash of the normalised question decides the split, for any source: two sources with the same question put it in the
same split if their shares for `test` and `validation` are equal. Rows that cannot be used are quarantined with file,
line and reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lilpipe.alignment.questions.columns import ParsedRow
from lilpipe.alignment.questions.formats import Format, recognise, without_none
from lilpipe.alignment.questions.reading import Located, digest, read_rows
from lilpipe.alignment.questions.turns import Malformed
from lilpipe.alignment.verify.verifiers import as_text
from lilpipe.config.prompts import PromptsConfig, PromptSource
from lilpipe.data.sources.raw_documents import EXCERPT_CHARS
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Conversation, Prompt, normalise_question
from lilpipe.schemas.pairs import Pair, PairSplit, UnpairedExample


@dataclass
class Gathered:
    """Rows of all sources by use."""

    prompts: dict[str, list[Prompt]] = field(default_factory=lambda: {"train": [], "validation": [], "test": []})
    documents: list[dict[str, str]] = field(default_factory=list)
    demonstrations: list[Conversation] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    examples: list[UnpairedExample] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    """Quarantined rows with source, file, row, error and excerpt."""
    learnt_questions: dict[str, list[str]] = field(default_factory=dict)
    """Questions used in training, by source."""
    conversations: list[tuple[PromptSource, str, int, ParsedRow, str]] = field(default_factory=list)
    """Rows of several turns with source, file, row number and split, to be placed when all questions are known."""
    formats: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of rows of each format, by source."""
    unused_columns: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of rows that have a value in a column that their format does not use, by source."""
    num_repeated: int = 0
    """Number of rows with a repeated question, which add no prompt."""
    _ids: dict[tuple[str, str], str] = field(default_factory=dict)

    def add_to_quarantine(self, source: PromptSource, file: str, row: int, error: str, excerpt: str) -> None:
        """Quarantine a row with its error."""
        texts = {"source": source.name, "file": file, "error": error, "excerpt": excerpt}
        # An unpaired surrogate cannot be written.
        entry = {key: text.encode(errors="replace").decode() for key, text in texts.items()}
        self.quarantine.append(entry | {"row": row})

    def ask(self, example: ParsedRow, split: str, name: str) -> str:
        """Add the question to a split unless it is a conversation or already there; return the prompt's id."""
        question = normalise_question(example.question)
        identity = f"{split}/{name}/{len(self.prompts[split]):06d}"
        if not example.is_single_question:
            return f"conversation/{name}/{len(self.pairs) + len(self.examples):06d}"
        if (known := self._ids.setdefault((split, question), identity)) != identity:
            self.num_repeated += 1
            return known
        self.prompts[split].append(
            Prompt(
                identity,
                name,
                example.question,
                example.answer,
                difficulty=example.difficulty,
                reference=example.best_answer,
                verifier=example.verifier,
            )
        )
        return identity

    def prefer(self, example: ParsedRow, identity: str, side: PairSplit) -> None:
        """Add the preference of an example, if any."""
        if example.rejected is not None:
            texts = (example.reference, example.rejected, example.edited)
            self.pairs.append(Pair(identity, side, example.prompt, *texts, tools=example.tools))
        if example.desirable is not None:
            judged = (example.reference, example.desirable)
            self.examples.append(UnpairedExample(identity, side, example.prompt, *judged, tools=example.tools))


def external(config: PromptsConfig) -> dict[str, str]:
    """Return digests of the sources' contents.

    Raises ``DataError`` if a source does not exist, ``ConfigError`` if there is neither a source nor a family.
    """
    if not config.families and not config.sources:
        raise ConfigError(
            "prompts: families and sources are both empty, expected your data or a generated family; set "
            'prompts.sources = ["mine.jsonl"]'
        )
    return {f"source {source.name}": digest(source) for source in config.sources}


# --- splitting ----------------------------------------------------------------------------------------------------


def position(question: str) -> float:
    """Return a hash of the normalised question, uniform in [0, 1)."""
    digest = hashlib.sha256(f"question/{normalise_question(question)}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of_row(example: ParsedRow, source: PromptSource) -> str:
    """Return `test`, `validation`, `documents`, `demonstrations` or `train`, by the hash of the question."""
    shares = source.shares
    if source.kind == "auto" and source.demonstrations_ratio is None:
        usable = 0.4 if example.verifier != "none" else 1.0
        shares["demonstrations"] = 0.0 if example.is_preference else usable
    if example.text is not None:  # it asks nothing that could be held out
        is_document = source.documents_ratio > 0 and position(example.text) < source.documents_ratio
        return "documents" if is_document else "demonstrations"
    place = position(example.question)
    for split, share in shares.items():
        place -= share
        if place < 0:
            return split
    return "train"


def gather(config: PromptsConfig) -> Gathered:
    """Read and split all sources. Raises ``DataError`` if one is missing, empty or has too many malformed rows."""
    gathered = Gathered()
    for source in config.sources:
        gathered.formats[source.name], gathered.unused_columns[source.name] = Counter(), Counter()
        num_rows = num_malformed = 0
        last: dict[str, Any] = {}
        for official_test in (False, True) if source.has_official_test else (False,):
            rows = read_rows(source, official_test=official_test)
            for row in rows if official_test else itertools.islice(rows, source.max_rows):
                num_rows += 1
                if not _take(row, source, gathered, official_test=official_test):
                    num_malformed, last = num_malformed + 1, gathered.quarantine[-1]
        _check_rows(source, num_rows, num_malformed, last)
    _place_conversations(gathered)
    return gathered


def _count(form: Format, values: dict[str, Any], source: PromptSource, gathered: Gathered) -> None:
    gathered.formats[source.name][form.name] += 1
    used = {getattr(source.columns, name) for name in (*form.needs, *form.optional)}
    gathered.unused_columns[source.name].update(name for name in values if name not in used)


def _check_rows(source: PromptSource, num_rows: int, num_malformed: int, last: dict[str, Any]) -> None:
    if not num_rows:
        raise DataError(f"source {source.name!r}: {source.path or source.hub} has no rows; correct the path")
    if num_malformed > source.max_malformed_ratio * num_rows:
        raise DataError(
            f"source {source.name!r}: {num_malformed} of {num_rows} rows are not valid {source.kind}, expected at most "
            f"{source.max_malformed_ratio:.1%}; the last is {last['file']}:{last['row']}: {last['error']}. Correct the "
            "file, or set its keys in `columns`"
        )


def _take(row: Located, source: PromptSource, gathered: Gathered, *, official_test: bool) -> bool:
    """Add a row to its split; return False if it is malformed."""
    file, number, values = row
    try:
        if isinstance(values, Malformed):
            raise values
        columns = without_none(values)
        form = recognise(source.kind, columns, source.columns)
        example = form.parse(columns, source.columns)
    except Malformed as error:
        excerpt = error.excerpt or ("" if values is error else _excerpt(values))
        gathered.add_to_quarantine(source, file, number, str(error), excerpt)
        return False
    _count(form, columns, source, gathered)
    if official_test and example.text is not None:
        gathered.add_to_quarantine(source, file, number, "plain text in the test split", example.text[:EXCERPT_CHARS])
        return True
    split = "test" if official_test else split_of_row(example, source)
    is_validation = split == "validation" and example.is_preference
    is_alone = example.is_single_question or example.text is not None
    if source.kind == "auto" and not (is_alone or is_validation or official_test):
        gathered.conversations.append((source, file, number, example, "train" if split == "test" else split))
        return True
    if split in ("validation", "test") and not example.is_single_question and not is_validation:
        reason = f"conversation whose first question is in the {split!r} split, which takes single questions only"
        gathered.add_to_quarantine(source, file, number, reason, example.question[:EXCERPT_CHARS])
        return True
    _place(example, split, source.name, gathered)
    return True


def _excerpt(values: Any) -> str:
    try:
        return json.dumps(values, default=str)[:EXCERPT_CHARS]
    except (ValueError, RecursionError):
        return ""


def _place_conversations(gathered: Gathered) -> None:
    """Place the conversations of several turns, except those that ask a held-out question."""
    held_out = {
        normalise_question(prompt.question) for split in ("validation", "test") for prompt in gathered.prompts[split]
    }
    for source, file, number, example, split in gathered.conversations:
        questions = [turn["content"] for turn in example.prompt if turn["role"] == "user"]
        if found := [question for question in questions if normalise_question(question) in held_out]:
            reason = "conversation that asks a question of the validation or test split"
            gathered.add_to_quarantine(source, file, number, reason, found[0][:EXCERPT_CHARS])
        else:
            _place(example, split if example.is_preference else "demonstrations", source.name, gathered)


def _place(example: ParsedRow, split: str, name: str, gathered: Gathered) -> None:
    if example.text is not None:
        _place_text(example.text, split, name, gathered)
        return
    if split in ("documents", "demonstrations") and not example.messages:
        split = "train"  # only tests or a bad answer: nothing to demonstrate
    if split == "train" and not example.is_single_question and not example.is_preference:
        split = "demonstrations"  # a conversation cannot be a prompt
    if split not in ("validation", "test"):
        questions = [turn["content"] for turn in example.prompt if turn["role"] == "user"]
        gathered.learnt_questions.setdefault(name, []).extend(questions)
    if split == "documents" and example.is_single_question:
        text = f"{as_text(example.question)} {example.best_answer}"
        gathered.documents.append({"id": f"documents/{name}/{len(gathered.documents):06d}", "text": text})
    elif split in ("documents", "demonstrations"):
        identity = f"demonstrations/{name}/{len(gathered.demonstrations):06d}"
        shown = Conversation(identity, identity, name, example.messages, tools=example.tools)
        gathered.demonstrations.append(shown)
    else:
        identity = gathered.ask(example, split, name)
        if split != "test":
            gathered.prefer(example, identity, "train" if split == "train" else "validation")


def _place_text(text: str, split: str, name: str, gathered: Gathered) -> None:
    if split == "documents":
        gathered.documents.append({"id": f"documents/{name}/{len(gathered.documents):06d}", "text": text})
        return
    identity = f"demonstrations/{name}/{len(gathered.demonstrations):06d}"
    gathered.demonstrations.append(Conversation(identity, identity, name, [], text=text))
