"""Stage ``tokens``: documents to token shards, split into training and validation by a hash of the text.

The split looks at the text alone, so that a document stays on its side whatever else the corpus holds, and equal
texts never straddle it. One pass encodes a source and hands each document to the shard that is open for its stream
and split; a shard says where in the source its stream goes on, so a killed run skips what is in finished shards.
Threads encode (tiktoken lets go of the interpreter's lock); the order of the rows does not depend on their number.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lilpipe.artifact import Artifact, Inputs
from lilpipe.config.tokens import TokensConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.documents import read_documents
from lilpipe.schemas.examples import read_exercises
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import TOKENIZER_FILES, Tokenizer
from lilpipe.tokens.report import write_report
from lilpipe.tokens.shards import (
    CORPUS,
    EXERCISES,
    SPLITS,
    TOKENIZER_FOLDER,
    Document,
    Split,
    TokenShards,
    finished_shards,
    shard_folder,
    token_type,
    write_index,
    write_shard,
)

CHARS_PER_TASK = 2**18
"""A thread encodes so much at once: a few hundredths of a second, so that none is long idle at the end."""
TASKS_AHEAD = 8
"""Tasks for each thread that may wait, so that none is idle while a shard is written."""
MAX_OPEN_SHARDS = 8
"""Shards being filled hold at most as many tokens as this many full ones: the memory of a corpus of many streams."""

Place = tuple[str, Split]
"""A stream and split."""


class Text(NamedTuple):
    """A document before it is encoded."""

    id: str
    source: str
    stream: str
    text: str


def run(config: TokensConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Encode the corpus and, where given, the exercises.

    Raises ``DataError`` for a source too small to be split, ``ConfigError`` for streams by a column that is not there.
    """
    tokenizer = Tokenizer.load(_path(inputs, "tokenizer"))
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
    copy_tokenizer(_path(inputs, "tokenizer"), workspace.output / TOKENIZER_FOLDER)
    write_index(workspace.output, tokenizer, streams)
    shards = TokenShards.open(workspace.output)
    write_report(shards, workspace.report / "report.html")
    return measure(shards)


def measure(shards: TokenShards) -> Metrics:
    """Tokens and documents by stream and split, and bytes per token over all of them."""
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
    artifact = inputs[role]
    assert isinstance(artifact, Artifact)
    return artifact.path


def read_corpus(directory: Path, streams_by: str) -> Iterator[Text]:
    """The documents of a Corpus artifact, each with its stream. Raises ``ConfigError``."""
    for batch in read_documents(directory):
        if streams_by != "none" and streams_by not in batch.schema.names:
            raise ConfigError(
                f"tokens.streams_by: got {streams_by!r}, expected a column of the corpus: "
                f"{', '.join(batch.schema.names)}; run stage `corpus` again, or choose one of these"
            )
        ids, sources, texts = (batch.column(name).to_pylist() for name in ("id", "source", "text"))
        values = repeat(None) if streams_by == "none" else batch.column(streams_by).to_pylist()
        streams = (CORPUS if streams_by == "none" else stream_name(value) for value in values)
        for text in map(Text, ids, sources, streams, texts):
            if text.stream == EXERCISES:
                raise ConfigError(
                    f"tokens.streams_by: got {streams_by!r}, but document {text.id!r} has the {streams_by} "
                    f"{EXERCISES!r}, expected any other: it is the name of the stream of stage `prompts`"
                )
            yield text


def stream_name(value: str | None) -> str:
    """A value of a column as a name for folders and metrics: ``CC BY 4.0`` is ``CC-BY-4.0``, none is ``unknown``.

    Values with the same name share a stream.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value or "")[:80].strip("-.") or "unknown"


def _read_exercises(directory: Path) -> Iterator[Text]:
    for document_id, text in read_exercises(directory):
        yield Text(document_id, EXERCISES, EXERCISES, text)


def is_validation(text: str | bytes, share: float) -> bool:
    """Whether a text belongs to validation: its hash, as a number in [0, 1), is below ``share``."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _check_split(source: str, counts: Mapping[Place, int], share: float) -> None:
    """Both splits must have documents of the source; one of several streams may lack them."""
    for split in SPLITS:
        if not any(count for (_, each), count in counts.items() if each == split):
            name, change = ("validation", "raise") if split == "validation" else ("training", "lower")
            raise DataError(
                f"tokens.validation_ratio: got {share}, which leaves 0 of the {sum(counts.values())} documents of "
                f"{source!r} for {name}, expected at least 1; add documents or {change} tokens.validation_ratio"
            )


# --- encoding -----------------------------------------------------------------------------------------------------


class Progress:
    """Counts documents over all streams."""

    def __init__(self, workspace: Workspace, *, total: int) -> None:
        self.workspace, self.total, self.done = workspace, total, 0

    def add(self, num_documents: int) -> None:
        """So many more are through."""
        self.done += num_documents
        self.workspace.progress(self.done, self.total, "documents")


class Encoded(NamedTuple):
    """A document of a source after encoding."""

    position: int
    """In the source."""
    place: Place
    document: Document | None
    """None where it is in a finished shard."""


class _OpenShard:
    """The shard that is being filled for one stream and split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_finished, self.next_document = finished_shards(folder)
        self.documents: list[Document] = []
        self.num_tokens = 0

    def add(self, position: int, document: Document) -> None:
        self.documents.append(document)
        self.num_tokens += len(document.tokens)
        self.next_document = position + 1

    def close(self, *, vocab_size: int) -> int:
        """Write it and begin another; returns its number of documents."""
        path = self.folder / f"{self.num_finished:05d}.arrow"
        write_shard(path, self.documents, vocab_size=vocab_size, next_document=self.next_document)
        closed = len(self.documents)
        self.num_finished, self.documents, self.num_tokens = self.num_finished + 1, [], 0
        return closed


def write_streams(
    output: Path, texts: Iterable[Text], tokenizer: Tokenizer, config: TokensConfig, progress: Progress
) -> Counter[Place]:
    """Write the shards of a source that are not there yet; returns its documents by stream and split.

    A shard is closed when it is full, or when it is the fullest of too many. Both depend on the documents so far and
    nothing else, so that a run which goes on after a kill closes them at the same documents.
    """
    counts: Counter[Place] = Counter()
    shards: dict[Place, _OpenShard] = {}
    finished = {(each.parent.name, each.name): finished_shards(each)[1] for each in output.glob("shards/*/*")}
    open_tokens = 0
    for position, place, document in encode_in_order(texts, tokenizer, config, finished):
        counts[place] += 1
        if document is None:
            progress.done += 1
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
    texts: Iterable[Text], tokenizer: Tokenizer, config: TokensConfig, finished: Mapping[tuple[str, str], int]
) -> Iterator[Encoded]:
    """The documents encoded, in their order, by threads that run a few tasks ahead of what is taken."""
    work = partial(_encode, tokenizer=tokenizer, validation_ratio=config.validation_ratio, finished=finished)
    pending: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(config.num_workers) as pool:
        for first, group in _groups(texts):
            pending.append(pool.submit(work, first, group))
            if len(pending) > TASKS_AHEAD * config.num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _groups(texts: Iterable[Text]) -> Iterator[tuple[int, list[Text]]]:
    """Texts that are encoded together, with the position of the first."""
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
    texts: Sequence[Text],
    *,
    tokenizer: Tokenizer,
    validation_ratio: float,
    finished: Mapping[tuple[str, str], int],
) -> list[Encoded]:
    dtype = token_type(tokenizer.vocab_size).to_pandas_dtype()
    results = []
    for position, text in enumerate(texts, start=first):
        data = text.text.encode(errors="surrogatepass")
        place: Place = (text.stream, "validation" if is_validation(data, validation_ratio) else "train")
        document = None
        if position >= finished.get(place, 0):
            ids = tokenizer.encode_array(text.text)
            tokens = np.empty(len(ids) + 1, dtype=dtype)
            tokens[:-1], tokens[-1] = ids, tokenizer.document_end_id
            document = Document(text.id, text.source, num_bytes=len(data), tokens=tokens)
        results.append(Encoded(position, place, document))
    return results


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer's files beside the shards; to save it anew, its merges would have to be found again."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, target / name)


def _remove_leftovers(directory: Path) -> None:
    """Remove half-written files of a run that was killed, which must not become part of the artifact."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


STAGE = Stage(
    name="tokens",
    output="TokenShards",
    config=TokensConfig,
    run=run,
    inputs={"corpus": "Corpus", "tokenizer": "Tokenizer"},
    optional_inputs={"prompts": "Prompts"},
    main_metric="tokens",
)
