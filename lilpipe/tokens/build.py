"""Stage ``tokens``: encodes documents into token shards, split into training and validation by a hash of the text.

The split depends on the text alone: a document stays in its split whatever else the corpus contains, and equal texts
are in the same split. The stage reads each source once and appends each document to the open shard of its stream and
split. Each shard stores the source position at which the next shard of its stream starts, so a resumed run skips
documents in finished shards. Threads encode in parallel (tiktoken releases the GIL, ``tokenizers`` has its own
threads); the order of rows does not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lilpipe.artifact import Inputs, one_input, write_atomically
from lilpipe.config.tokens import TokensConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.documents import read_documents
from lilpipe.schemas.examples import read_exercises
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.shards import (
    CORPUS,
    EXERCISES,
    SPLITS,
    TOKENIZER_FOLDER,
    Split,
    TokenizedDocument,
    TokenShards,
    finished_shards,
    shard_folder,
    token_type,
    write_index,
    write_shard,
)
from lilpipe.tokens.tokens_report import write_tokens_report

CHARS_PER_TASK = 2**18
"""Characters per encoding task: a few hundredths of a second, so that no thread is idle for long at the end."""
TASKS_AHEAD = 8
"""Maximum queued tasks per thread, so that no thread is idle while a shard is written."""
QUARANTINE_FILE = "quarantine.jsonl"
"""Lists documents that cannot be encoded, if there are any."""
MAX_OPEN_SHARDS = 8
"""Limit of tokens in all open shards, in units of ``shard_tokens``; bounds memory if there are many streams."""

Place = tuple[str, Split]
"""A stream and split."""


class PlainDocument(NamedTuple):
    """A document before encoding."""

    id: str
    source: str
    stream: str
    text: str


def run(config: TokensConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Encode the corpus and, if given, the exercises.

    Raises ``DataError`` if a source is too small to split, ``ConfigError`` if ``streams_by`` is not a column.
    """
    if ("tokenizer" in inputs) == ("model" in inputs):
        raise ConfigError(
            "tokens: got both inputs tokenizer and model or neither, expected one: a tokenizer trained here, or the "
            "model whose tokenizer to use"
        )
    tokenizer = Tokenizer.load(_path(inputs, "tokenizer" if "tokenizer" in inputs else "model"))
    corpus = _path(inputs, "corpus")
    exercises = list(_read_exercises(_path(inputs, "prompts"))) if "prompts" in inputs else []
    _remove_leftovers(workspace.output)
    progress = Progress(workspace, total=sum(batch.num_rows for batch in read_documents(corpus)) + len(exercises))
    streams: list[str] = []
    for source, texts in ((CORPUS, read_corpus(corpus, config.streams_by)), (EXERCISES, exercises)):
        if source == CORPUS or exercises:
            counts = write_streams(workspace.output, texts, tokenizer, config, progress)
            _check_split(source, counts, config.validation_ratio)
            streams += sorted({stream for stream, _ in counts})
    tokenizer.save(workspace.output / TOKENIZER_FOLDER)
    write_index(workspace.output, tokenizer, streams)
    shards = TokenShards.open(workspace.output)
    write_tokens_report(shards, workspace.report / "report.html")
    quarantined = _sort_quarantine(workspace.output / QUARANTINE_FILE)
    return {**measure(shards), **({"quarantined": quarantined} if quarantined else {})}


def _sort_quarantine(path: Path) -> int:
    """Remove duplicates, which a killed run leaves, from the list of documents without tokens; return its length."""
    if not path.exists():
        return 0
    lines = sorted({line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"})
    write_atomically(path, "".join(lines))
    return len(lines)


def measure(shards: TokenShards) -> Metrics:
    """Return tokens and documents per stream and split, and bytes per token over all streams."""
    metrics: Metrics = {}
    num_bytes = num_tokens = 0
    for name in shards.streams:
        for split in SPLITS:
            stream = shards.stream(name, split)
            metrics[f"{name}_{split}_tokens"] = stream.num_tokens
            metrics[f"{name}_{split}_documents"] = stream.num_documents
            num_bytes += stream.num_bytes
            num_tokens += stream.num_tokens
    return {"tokens": num_tokens, "bytes_per_token": num_bytes / num_tokens, **metrics}


# --- reading ------------------------------------------------------------------------------------------------------


def _path(inputs: Inputs, role: str) -> Path:
    return one_input(inputs, role).path


def read_corpus(directory: Path, streams_by: str) -> Iterator[PlainDocument]:
    """Yield the documents of a Corpus artifact with their streams.

    Raises ``ConfigError`` if ``streams_by`` is not a column, or a value of it is the name of the exercises' stream.
    """
    for batch in read_documents(directory):
        if streams_by != "none" and streams_by not in batch.schema.names:
            raise ConfigError(
                f"tokens.streams_by: got {streams_by!r}, expected a column of the corpus: "
                f"{', '.join(batch.schema.names)}; run stage `corpus` again, or choose one of these columns"
            )
        ids, sources, texts = (batch.column(name).to_pylist() for name in ("id", "source", "text"))
        values = repeat(None) if streams_by == "none" else batch.column(streams_by).to_pylist()
        streams = (CORPUS if streams_by == "none" else stream_name(value) for value in values)
        for text in map(PlainDocument, ids, sources, streams, texts):
            if text.stream == EXERCISES:
                raise ConfigError(
                    f"tokens.streams_by: got {streams_by!r}, but document {text.id!r} has the {streams_by} "
                    f"{EXERCISES!r}, expected any other value: this name is reserved for the stream of stage `prompts`"
                )
            yield text


def stream_name(value: str | None) -> str:
    """Convert a column value to a name for folders and metrics: ``CC BY 4.0`` to ``CC-BY-4.0``, none to ``unknown``.

    Values with the same name share a stream.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value or "")[:80].strip("-.") or "unknown"


def _read_exercises(directory: Path) -> Iterator[PlainDocument]:
    for document_id, text in read_exercises(directory):
        yield PlainDocument(document_id, EXERCISES, EXERCISES, text)


def is_validation(text: str | bytes, share: float) -> bool:
    """Return whether a text belongs to the validation split: its hash, scaled to [0, 1), is below ``share``."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _check_split(source: str, counts: Mapping[Place, int], share: float) -> None:
    """Raise ``DataError`` if a split has no documents of the source; single streams may be empty in a split."""
    for split in SPLITS:
        if not any(count for (_, each), count in counts.items() if each == split):
            name, change = ("validation", "raise") if split == "validation" else ("training", "lower")
            raise DataError(
                f"tokens.validation_ratio: got {share}, which leaves 0 of the {sum(counts.values())} documents of "
                f"{source!r} for {name}, expected at least 1; add documents or {change} tokens.validation_ratio"
            )


# --- encoding -----------------------------------------------------------------------------------------------------


class Progress:
    """Reports the number of processed documents over all streams."""

    def __init__(self, workspace: Workspace, *, total: int) -> None:
        self.workspace, self.total, self.done = workspace, total, 0

    def skip(self, error: str) -> None:
        """Count a document that gets no tokens; log and list it if it cannot be encoded."""
        self.done += 1
        if error:
            self.workspace.log(f"quarantined {error}")
            with (self.workspace.output / QUARANTINE_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"error": error}, ensure_ascii=False) + "\n")

    def add(self, num_documents: int) -> None:
        """Add to the count and report it."""
        self.done += num_documents
        self.workspace.progress(self.done, self.total, "documents")


class Encoded(NamedTuple):
    """A document of a source after encoding."""

    position: int
    """Index of the document in the source."""
    place: Place
    document: TokenizedDocument | None
    """``None`` if the document is in a finished shard, or cannot be encoded."""
    error: str = ""
    """Why it cannot be encoded."""


class _OpenShard:
    """The shard being filled for one stream and split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_finished, self.next_document = finished_shards(folder)
        self.documents: list[TokenizedDocument] = []
        self.num_tokens = 0

    def add(self, position: int, document: TokenizedDocument) -> None:
        self.documents.append(document)
        self.num_tokens += len(document.tokens)
        self.next_document = position + 1

    def close(self, *, vocab_size: int) -> int:
        """Write the shard, start the next one, and return the number of documents written."""
        path = self.folder / f"{self.num_finished:05d}.arrow"
        write_shard(path, self.documents, vocab_size=vocab_size, next_document=self.next_document)
        closed = len(self.documents)
        self.num_finished, self.documents, self.num_tokens = self.num_finished + 1, [], 0
        return closed


def write_streams(
    output: Path, texts: Iterable[PlainDocument], tokenizer: Tokenizer, config: TokensConfig, progress: Progress
) -> Counter[Place]:
    """Write the missing shards of a source; return its number of documents per stream and split.

    A shard is closed when it is full, or when it is the largest and all open shards exceed ``MAX_OPEN_SHARDS``. Both
    depend only on the preceding documents, so a resumed run closes shards at the same documents.
    """
    counts: Counter[Place] = Counter()
    shards: dict[Place, _OpenShard] = {}
    finished = {(each.parent.name, each.name): finished_shards(each)[1] for each in output.glob("shards/*/*")}
    open_tokens = 0
    for position, place, document, error in encode_in_order(texts, tokenizer, config, finished):
        counts[place] += 1
        if document is None:
            progress.skip(error)
            continue
        shard = shards.get(place) or shards.setdefault(place, _OpenShard(output / shard_folder(*place)))
        shard.add(position, document)
        open_tokens += len(document.tokens)
        while shard.num_tokens >= config.shard_tokens or open_tokens > MAX_OPEN_SHARDS * config.shard_tokens:
            _, full = max(shards.items(), key=lambda item: (item[1].num_tokens, item[0]))
            open_tokens -= full.num_tokens
            progress.add(full.close(vocab_size=tokenizer.vocab_size))
    for _, shard in sorted(shards.items()):
        if shard.documents:
            progress.add(shard.close(vocab_size=tokenizer.vocab_size))
    return counts


def encode_in_order(
    texts: Iterable[PlainDocument], tokenizer: Tokenizer, config: TokensConfig, finished: Mapping[tuple[str, str], int]
) -> Iterator[Encoded]:
    """Yield encoded documents in input order; threads encode a few tasks ahead of the consumer."""
    work = partial(_encode, tokenizer=tokenizer, validation_ratio=config.validation_ratio, finished=finished)
    pending: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(config.num_workers) as pool:
        for first, group in _groups(texts):
            pending.append(pool.submit(work, first, group))
            if len(pending) > TASKS_AHEAD * config.num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _groups(texts: Iterable[PlainDocument]) -> Iterator[tuple[int, list[PlainDocument]]]:
    """Yield groups of texts to encode together, each with the position of its first text."""
    first, group, num_chars = 0, [], 0
    for text in texts:
        group.append(text)
        num_chars += len(text.text)
        if num_chars >= CHARS_PER_TASK:
            yield first, group
            first, group, num_chars = first + len(group), [], 0
    if group:
        yield first, group


def _encode(
    first: int,
    texts: Sequence[PlainDocument],
    *,
    tokenizer: Tokenizer,
    validation_ratio: float,
    finished: Mapping[tuple[str, str], int],
) -> list[Encoded]:
    results, todo = [], []
    for position, text in enumerate(texts, start=first):
        data = text.text.encode(errors="surrogatepass")
        place: Place = (text.stream, "validation" if is_validation(data, validation_ratio) else "train")
        if position >= finished.get(place, 0):
            todo.append((position, text, len(data)))
        results.append(Encoded(position, place, None))
    dtype = token_type(tokenizer.vocab_size).to_pandas_dtype()
    start = tokenizer.document_start_ids
    ids_of_each = _encode_each(tokenizer, [text.text for _, text, _ in todo])
    for (position, text, num_bytes), ids in zip(todo, ids_of_each, strict=True):
        encoded = results[position - first]
        if isinstance(ids, str):
            results[position - first] = encoded._replace(error=f"{text.source} {text.id}: {ids}")
            continue
        tokens = np.empty(len(start) + len(ids) + 1, dtype=dtype)
        tokens[: len(start)], tokens[len(start) : -1], tokens[-1] = start, ids, tokenizer.document_end_id
        document = TokenizedDocument(text.id, text.source, num_bytes=num_bytes, tokens=tokens)
        results[position - first] = encoded._replace(document=document)
    return results


def _encode_each(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray | str]:
    """Return the ids of each text, or why it has none."""
    try:
        return [*tokenizer.encode_batch(texts)]
    except DataError as error:
        return [str(error)] if len(texts) == 1 else [_encode_each(tokenizer, [text])[0] for text in texts]


def _remove_leftovers(directory: Path) -> None:
    """Delete temporary files of a killed run, so that they do not become part of the artifact."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


STAGE = Stage(
    name="tokens",
    output="TokenShards",
    config=TokensConfig,
    run=run,
    inputs={"corpus": "Corpus"},
    optional_inputs={"tokenizer": "Tokenizer", "model": "Checkpoint", "prompts": "Prompts"},
    main_metric="tokens",
)
