"""Which documents a step of a pretraining run saw, and which steps saw a document.

Nothing is logged for it: the order of rows is a function that can be inverted (``lilpipe.tokens.order``), and
documents are found by id in the stream's index. A question costs milliseconds whatever the length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase import DataPhase, Rows
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.plan import open_loader
from lilpipe.tokens.shards import SPLITS, Split, TokenShards


@dataclass(frozen=True)
class Span:
    """Tokens ``first`` to ``stop`` of a document, counted within it, in a row of a run; the last is a target alone."""

    document_id: str
    source: str
    stream: str
    number: int
    """Of the document in the stream's training split."""
    first: int
    stop: int
    num_tokens: int
    """Of the document, its end included."""


@dataclass(frozen=True)
class TracedRow:
    """What one row of a step held, in order."""

    step: int
    row: int
    stream: str
    epoch: int
    """Passes over the stream before this one, in rows of this length."""
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Sighting:
    """Tokens ``first`` to ``stop`` of a document, as a row held them."""

    step: int
    row: int
    epoch: int
    first: int
    stop: int


@dataclass(frozen=True)
class TracedDocument:
    """Where a document is, and what a run saw of it."""

    document_id: str
    source: str
    stream: str
    split: Split
    number: int
    num_tokens: int
    sightings: tuple[Sighting, ...]
    """By step and row; none where the document is held out for validation or the run did not get to it."""


def trace_row(shards: TokenShards, config: PretrainConfig, *, step: int, row: int) -> TracedRow:
    """The documents of one row; steps and rows count from 0. Raises ``ConfigError`` for a place that the run lacks."""
    _check_place("step", step, config.num_steps, of="the run")
    _check_place("row", row, config.phase_of(step).batch_size, of="the step")
    loader = open_loader(config, shards)
    rows = Rows(*(values[row : row + 1] for values in loader.rows(step)))
    stream = list(loader.streams)[int(rows.streams[0])]
    spans = tuple(_spans(loader, step, rows))
    return TracedRow(step=step, row=row, stream=stream, epoch=int(rows.epochs[0]), spans=spans)


def documents_of(loader: PretrainLoader, step: int) -> list[str]:
    """Ids of the documents in the batch of a step, over all workers, in the order in which they lie there."""
    return list(dict.fromkeys(span.document_id for span in _spans(loader, step, loader.rows(step))))


def _check_place(name: str, value: int, end: int, *, of: str) -> None:
    if not 0 <= value < end:
        raise ConfigError(f"{name}: got {value}, expected 0 to {end - 1}, as {of} had {end}")


def _spans(loader: PretrainLoader, step: int, rows: Rows) -> Iterator[Span]:
    numbers, pieces = loader.pieces(loader.data_phase_of(step), rows)
    names = list(loader.streams)
    columns = (column.tolist() for column in (numbers, *pieces[1:4]))
    for stream, number, start, stop in zip(*columns, strict=True):
        tokens = loader.streams[names[stream]]
        document, begin = tokens.document(number), int(tokens.offsets[number])
        yield Span(
            document_id=document.id,
            source=document.source,
            stream=names[stream],
            number=number,
            first=start - begin,
            stop=stop - begin,
            num_tokens=len(document.tokens),
        )


def trace_document(shards: TokenShards, config: PretrainConfig, document_id: str) -> list[TracedDocument]:
    """Every document of that id, with the steps that saw it. Raises ``DataError`` where no stream holds it."""
    places: list[tuple[str, Split, int]] = [
        (stream, split, number)
        for stream in shards.streams
        for split in SPLITS
        for number in shards.stream(stream, split).find(document_id)
    ]
    if not places:
        raise DataError(
            f"document {document_id!r}: in none of the streams {', '.join(shards.streams)}; check the id, or ask the "
            "corpus why it rejected the document"
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
