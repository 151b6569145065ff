"""Stage ``tokens``: documents to token shards, split into training and validation by a hash of the text.

The split looks at the text alone, so that a document stays on its side whatever else the corpus holds, and equal
texts never straddle it. Each stream's shards are written in the order of the source's documents and say where the
next one begins, so a killed run goes on behind the last finished shard. Threads encode (tiktoken lets go of the
interpreter's lock); the order of the rows does not depend on their number.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lilpipe.alignment.prompts import read_exercises
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import TokensConfig
from lilpipe.data.documents import read_documents
from lilpipe.errors import DataError
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.report import write_report
from lilpipe.tokens.shards import (
    SPLITS,
    TOKENIZER_FOLDER,
    Document,
    TokenShards,
    finished_shards,
    shard_folder,
    write_index,
    write_shard,
)

DOCUMENTS_PER_TASK = 64


class Text(NamedTuple):
    """A document before it is encoded."""

    id: str
    source: str
    text: str


Reader = Callable[[], Iterator[Text]]


def run(config: TokensConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Encode the corpus and, where given, the exercises. Raises ``DataError`` for a source too small to be split."""
    tokenizer = Tokenizer.load(_path(inputs, "tokenizer"))
    readers: dict[str, Reader] = {"corpus": partial(_read_corpus, _path(inputs, "corpus"))}
    if "prompts" in inputs:
        readers["exercises"] = partial(_read_exercises, _path(inputs, "prompts"))
    _remove_leftovers(workspace.output)

    splits = {source: hold_out(reader(), config.validation_share) for source, reader in readers.items()}
    if not len(splits.get("exercises", [0])):  # prompts that were asked for without exercises
        del splits["exercises"]
    for source, is_validation in splits.items():
        _check_split(source, is_validation, config.validation_share)
    progress = _Progress(workspace, total=sum(map(len, splits.values())))
    for source, is_validation in splits.items():
        for split in SPLITS:
            write_stream(
                workspace.output / shard_folder(source, split),
                readers[source],
                is_validation == (split == "validation"),
                tokenizer,
                config,
                progress,
            )
    tokenizer.save(workspace.output / TOKENIZER_FOLDER)
    write_index(workspace.output, tokenizer, list(splits))
    shards = TokenShards.open(workspace.output)
    write_report(shards, workspace.report / "report.html")
    return measure(shards)


def measure(shards: TokenShards) -> Metrics:
    """Tokens and documents by source and split, and bytes per token over all of them."""
    metrics: Metrics = {}
    num_bytes = num_tokens = 0
    for source in shards.sources:
        for split in SPLITS:
            stream = shards.stream(source, split)
            metrics[f"{source}_{split}_tokens"] = stream.num_tokens
            metrics[f"{source}_{split}_documents"] = stream.num_documents
            num_bytes += stream.num_bytes
            num_tokens += stream.num_tokens
    return {"tokens": num_tokens, "bytes_per_token": num_bytes / num_tokens, **metrics}


# --- reading ------------------------------------------------------------------------------------------------------


def _path(inputs: Inputs, role: str) -> Path:
    artifact = inputs[role]
    assert isinstance(artifact, Artifact)
    return artifact.path


def _read_corpus(directory: Path) -> Iterator[Text]:
    for batch in read_documents(directory):
        columns = (batch.column(name).to_pylist() for name in ("id", "source", "text"))
        yield from map(Text, *columns)


def _read_exercises(directory: Path) -> Iterator[Text]:
    for document_id, text in read_exercises(directory):
        yield Text(document_id, "exercises", text)


def is_held_out(text: str, share: float) -> bool:
    """Whether a text belongs to validation: its hash, as a number in [0, 1), is below ``share``."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def hold_out(texts: Iterator[Text], share: float) -> np.ndarray:
    """For each document whether it is held out, bool [documents]."""
    return np.fromiter((is_held_out(text.text, share) for text in texts), dtype=bool)


def _check_split(source: str, is_validation: np.ndarray, share: float) -> None:
    for split, got in (("validation", int(is_validation.sum())), ("training", int((~is_validation).sum()))):
        if got == 0:
            change = "raise" if split == "validation" else "lower"
            raise DataError(
                f"tokens.validation_share: got {share}, which leaves 0 of the {len(is_validation)} documents of "
                f"{source!r} for {split}, expected at least 1; add documents or {change} tokens.validation_share"
            )


# --- encoding -----------------------------------------------------------------------------------------------------


class _Progress:
    """Counts documents over all streams."""

    def __init__(self, workspace: Workspace, *, total: int) -> None:
        self.workspace, self.total, self.done = workspace, total, 0

    def add(self, num_documents: int) -> None:
        self.done += num_documents
        self.workspace.progress(self.done, self.total, "documents")


def write_stream(
    folder: Path,
    reader: Reader,
    belongs: np.ndarray,
    tokenizer: Tokenizer,
    config: TokensConfig,
    progress: _Progress,
) -> None:
    """Write the shards of one stream that are not there yet.

    ``belongs``, bool [documents], says which documents of the source are in the stream.
    """
    num_shards, first = finished_shards(folder)
    progress.add(int(belongs[:first].sum()))
    positions = np.flatnonzero(belongs[first:]) + first
    texts = (text for text, wanted in zip(islice(reader(), first, None), belongs[first:], strict=True) if wanted)
    shard: list[Document] = []
    num_tokens = 0
    for position, document in zip(positions, encode_in_order(texts, tokenizer, config.num_workers), strict=True):
        shard.append(document)
        num_tokens += len(document.tokens)
        if num_tokens >= config.shard_tokens or position == positions[-1]:
            path = folder / f"{num_shards:05d}.arrow"
            write_shard(path, shard, vocab_size=tokenizer.vocab_size, next_document=int(position) + 1)
            progress.add(len(shard))
            num_shards, shard, num_tokens = num_shards + 1, [], 0


def encode_in_order(texts: Iterator[Text], tokenizer: Tokenizer, num_workers: int) -> Iterator[Document]:
    """The documents encoded, in their order, by threads that run a few tasks ahead of what is taken."""
    pending: deque[Future[list[Document]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        while group := list(islice(texts, DOCUMENTS_PER_TASK)):
            pending.append(pool.submit(_encode, group, tokenizer))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _encode(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Document]:
    end = np.array([tokenizer.document_end_id], dtype=np.uint32)
    return [
        Document(
            text.id,
            text.source,
            num_bytes=len(text.text.encode()),
            tokens=np.concatenate([tokenizer.encode_array(text.text), end]),
        )
        for text in texts
    ]


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
