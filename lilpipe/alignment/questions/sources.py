"""Question datasets: read from files or the Hugging Face Hub, and split.

The hash of the normalised question decides the split, for any source: two sources with the same question put it in the
same split if their shares for `test` and `validation` are equal. Unreadable rows are quarantined with file, line and
reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lilpipe.alignment.questions.formats import Malformed, ParsedRow, parse
from lilpipe.alignment.verify.verifiers import as_text
from lilpipe.artifact import digest_json
from lilpipe.config.prompts import PromptsConfig, PromptSource
from lilpipe.config.sources import Source
from lilpipe.data.sources import huggingface
from lilpipe.data.sources.files import BrokenStream, File, digest_files, find_files, open_file
from lilpipe.data.sources.raw_documents import EXCERPT_CHARS
from lilpipe.errors import DataError
from lilpipe.schemas.examples import Conversation, Prompt, normalise_question
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import Pair, PairSplit, UnpairedExample

Located = tuple[str, int, Any]
"""File, line or row number from 1, and the row's values, or ``Malformed`` if they cannot be read."""


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
    num_repeated: int = 0
    """Number of rows with a repeated question, which add no prompt."""
    _ids: dict[tuple[str, str], str] = field(default_factory=dict)

    def add_to_quarantine(self, source: PromptSource, file: str, row: int, error: str, excerpt: str) -> None:
        """Quarantine a row with its error."""
        self.quarantine.append({"source": source.name, "file": file, "row": row, "error": error, "excerpt": excerpt})

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
            pair = Pair(identity, side, example.prompt, example.reference, example.rejected, example.edited)
            self.pairs.append(pair)
        if example.desirable is not None:
            judged = UnpairedExample(identity, side, example.prompt, example.reference, example.desirable)
            self.examples.append(judged)


# --- reading ------------------------------------------------------------------------------------------------------


def external(config: PromptsConfig) -> dict[str, str]:
    """Return digests of the sources' contents. Raises ``DataError`` if a source does not exist."""
    return {f"source {source.name}": _digest(source) for source in config.sources}


def _digest(source: PromptSource) -> str:
    if source.hub is not None:
        if source.revision and not Path(source.hub).exists():
            return f"revision {source.revision}"
        return huggingface.digest(_of_hub(source))
    paths = [path for path in (source.path, source.test_path) if path]
    return digest_json([digest_files(find_files(_of_files(source, path))) for path in paths])


def _of_files(source: PromptSource, path: str) -> Source:
    return Source(kind="jsonl", name=source.name, path=path)


def _of_hub(source: PromptSource) -> Source:
    return Source(kind="huggingface", name=source.name, path=source.hub, subset=source.subset, split=source.split)


def read_rows(source: PromptSource, *, official_test: bool) -> Iterator[Located]:
    """Yield the rows of a source, or of its official test split."""
    if source.hub is not None:
        split = source.test_split if official_test else source.split
        yield from _hub_rows(source, str(split))
        return
    for file in find_files(_of_files(source, str(source.test_path if official_test else source.path))):
        yield from _file_rows(file)


def _hub_rows(source: PromptSource, split: str) -> Iterator[Located]:
    import datasets  # imported lazily: it takes a second

    try:
        rows = datasets.load_dataset(
            str(source.hub), source.subset, split=split, revision=source.revision, streaming=True
        )
        for number, values in enumerate(rows, 1):
            yield split, number, values
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"source {source.name!r}: dataset {source.hub}, subset {source.subset!r}, split {split!r}, cannot be "
            f"read: {error}; correct `hub`, `subset`, `split` or `revision`, or download it and set `hub` to its folder"
        ) from error


def _file_rows(file: File) -> Iterator[Located]:
    number = 0
    try:
        with open_file(file) as stream:
            for number, values in _json_rows(stream):
                yield file.name, number, values
    except BrokenStream as error:
        yield file.name, number + 1, Malformed(f"file is truncated after row {number}: {error}")


def _json_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield numbered rows of a JSON array or of JSON Lines."""
    is_first = True
    for number, line in enumerate(stream, 1):
        if is_first and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            rows = _parsed(line + stream.read())
            yield from enumerate(rows, 1) if isinstance(rows, list) else [(number, rows)]
            return
        if line.strip():
            is_first = False
            yield number, _parsed(line)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:
        return Malformed(f"invalid JSON: {error}", data[:EXCERPT_CHARS].decode(errors="replace").strip())


# --- splitting ----------------------------------------------------------------------------------------------------


def position(question: str) -> float:
    """Return a hash of the normalised question, uniform in [0, 1)."""
    digest = hashlib.sha256(f"question/{normalise_question(question)}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of_question(question: str, source: PromptSource) -> str:
    """Return `test`, `validation`, `documents`, `demonstrations` or `train`."""
    place = position(question)
    for split, share in source.shares.items():
        place -= share
        if place < 0:
            return split
    return "train"


def gather(config: PromptsConfig) -> Gathered:
    """Read and split all sources. Raises ``DataError`` if one is missing, empty or has too many malformed rows."""
    gathered = Gathered()
    for source in config.sources:
        num_rows = num_malformed = 0
        for official_test in (False, True) if source.has_official_test else (False,):
            rows = read_rows(source, official_test=official_test)
            for row in rows if official_test else itertools.islice(rows, source.max_rows):
                num_rows += 1
                num_malformed += not _take(row, source, gathered, official_test=official_test)
        _check_rows(source, num_rows, num_malformed, gathered)
    return gathered


def _check_rows(source: PromptSource, num_rows: int, num_malformed: int, gathered: Gathered) -> None:
    if not num_rows:
        raise DataError(f"source {source.name!r}: {source.path or source.hub} has no rows; correct the path")
    if num_malformed > source.max_malformed_ratio * num_rows:
        last = gathered.quarantine[-1]
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
        example = parse(source.kind, values, source.columns)
    except Malformed as error:
        excerpt = error.excerpt or json.dumps(values, default=str)[:EXCERPT_CHARS]
        gathered.add_to_quarantine(source, file, number, str(error), excerpt)
        return False
    split = "test" if official_test else split_of_question(example.question, source)
    is_validation = split == "validation" and example.is_preference
    if split in ("validation", "test") and not example.is_single_question and not is_validation:
        reason = f"conversation whose first question is in the {split!r} split, which takes single questions only"
        gathered.add_to_quarantine(source, file, number, reason, example.question[:EXCERPT_CHARS])
        return True
    _place(example, split, source.name, gathered)
    return True


def _place(example: ParsedRow, split: str, name: str, gathered: Gathered) -> None:
    if split in ("documents", "demonstrations") and not example.best_answer:
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
        answer: Message = {"role": "assistant", "content": example.best_answer}
        gathered.demonstrations.append(Conversation(identity, identity, name, [*example.prompt, answer]))
    else:
        identity = gathered.ask(example, split, name)
        if split != "test":
            gathered.prefer(example, identity, "train" if split == "train" else "validation")
