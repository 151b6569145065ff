"""Finds the documents that a pretraining step read, and the steps that read a document.

This needs no log: the order of rows is an invertible function (``lilpipe.tokens.order``), and the stream's index
finds documents by id. A query takes milliseconds, independent of the length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase import DataPhase, RowOrigins
from lilpipe.tokens.data_phase_plan import open_loader
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.shards import SPLITS, Split, TokenShards


@dataclass(frozen=True)
class TokenSpan:
    """Tokens ``first`` to ``stop - 1`` of a document in a row of a run; the row's last token is only a target."""

    document_id: str
    source: str
    stream: str
    number: int
    """Number of the document in the stream's training split."""
    first: int
    """Counted from the start of the document."""
    stop: int
    num_tokens: int
    """Tokens of the document, including ``<|end_of_document|>``."""


@dataclass(frozen=True)
class TracedRow:
    """The documents of one row of a step, in order."""

    step: int
    row: int
    stream: str
    epoch: int
    """Number of earlier epochs over the stream, in rows of this length."""
    spans: tuple[TokenSpan, ...]


@dataclass(frozen=True)
class Sighting:
    """Tokens ``first`` to ``stop - 1`` of a document in a row of a step."""

    step: int
    row: int
    epoch: int
    first: int
    stop: int


@dataclass(frozen=True)
class TracedDocument:
    """A document and the steps that read it."""

    document_id: str
    source: str
    stream: str
    split: Split
    number: int
    num_tokens: int
    sightings: tuple[Sighting, ...]
    """In order of step and row; empty if the document is in the validation split or the run did not read it."""


def trace_row(shards: TokenShards, config: PretrainConfig, *, step: int, row: int) -> TracedRow:
    """Return the documents of one row; steps and rows count from 0. Raises ``ConfigError`` if out of range."""
    _check_place("step", step, config.num_steps, of="the run")
    _check_place("row", row, config.phase_of(step).batch_size, of="the step")
    loader = open_loader(config, shards)
    rows = RowOrigins(*(values[row : row + 1] for values in loader.rows(step)))
    stream = list(loader.streams)[int(rows.streams[0])]
    spans = tuple(_spans(loader, step, rows))
    return TracedRow(step=step, row=row, stream=stream, epoch=int(rows.epochs[0]), spans=spans)


def documents_of(loader: PretrainLoader, step: int) -> list[str]:
    """Return the ids of the documents in the batch of a step, over all workers, in order of first occurrence."""
    return list(dict.fromkeys(span.document_id for span in _spans(loader, step, loader.rows(step))))


def _check_place(name: str, value: int, end: int, *, of: str) -> None:
    if not 0 <= value < end:
        raise ConfigError(f"{name}: got {value}, expected 0 to {end - 1}, as {of} had {end}")


def _spans(loader: PretrainLoader, step: int, rows: RowOrigins) -> Iterator[TokenSpan]:
    numbers, pieces = loader.pieces(loader.data_phase_of(step), rows)
    names = list(loader.streams)
    columns = (column.tolist() for column in (numbers, *pieces[1:4]))
    for stream, number, start, stop in zip(*columns, strict=True):
        tokens = loader.streams[names[stream]]
        document, begin = tokens.document(number), int(tokens.offsets[number])
        yield TokenSpan(
            document_id=document.id,
            source=document.source,
            stream=names[stream],
            number=number,
            first=start - begin,
            stop=stop - begin,
            num_tokens=len(document.tokens),
        )


def trace_document(shards: TokenShards, config: PretrainConfig, document_id: str) -> list[TracedDocument]:
    """Return every document with the id and the steps that read it. Raises ``DataError`` if no stream contains it."""
    places: list[tuple[str, Split, int]] = [
        (stream, split, number)
        for stream in shards.streams
        for split in SPLITS
        for number in shards.stream(stream, split).find(document_id)
    ]
    if not places:
        raise DataError(
            f"document {document_id!r}: in none of the streams {', '.join(shards.streams)}; check the id, or look it "
            "up in the corpus: it may have been rejected"
        )
    loader = open_loader(config, shards)
    found = []
    for stream, split, number in places:
        document = shards.stream(stream, split).document(number)
        reading = [each for each in loader.data_phases if split == "train" and stream in each.sources]
        seen = [sighting for data_phase in reading for sighting in _sightings(loader, data_phase, stream, number)]
        found.append(
            TracedDocument(
                document_id=document.id,
                source=document.source,
                stream=stream,
                split=split,
                number=number,
                num_tokens=len(document.tokens),
                sightings=tuple(seen),
            )
        )
    return found


def _sightings(loader: PretrainLoader, data_phase: DataPhase, stream: str, number: int) -> Iterator[Sighting]:
    packing, begin = data_phase.sources[stream].packing, int(loader.streams[stream].offsets[number])
    rows = packing.rows_of(number)
    pieces = packing.pieces(rows)
    held: dict[int, list[tuple[int, int]]] = {}
    for piece in np.flatnonzero(pieces.documents == number):
        span = int(pieces.starts[piece]) - begin, int(pieces.stops[piece]) - begin
        held.setdefault(int(rows[pieces.rows[piece]]), []).append(span)
    seen = (column.tolist() for column in data_phase.sightings(stream, rows))
    for step, index, epoch, row in zip(*seen, strict=True):
        for first, stop in held[row]:
            yield Sighting(step=step, row=index, epoch=epoch, first=first, stop=stop)
