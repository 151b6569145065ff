"""The report of the tokens stage: how many tokens there are, of what, and how long the documents are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lilpipe import report
from lilpipe.artifact import write_atomically
from lilpipe.tokens.shards import SPLITS, TokenShards, TokenStream


def write_report(shards: TokenShards, path: Path) -> None:
    """Write the page that people read."""
    streams = {(source, split): shards.stream(source, split) for source in shards.sources for split in SPLITS}
    rows: list[dict[str, report.Cell]] = [
        {
            "source": source,
            "split": split,
            "documents": stream.num_documents,
            "tokens": stream.num_tokens,
            "bytes": stream.num_bytes,
            "bytes per token": stream.num_bytes / stream.num_tokens,
            "median tokens of a document": float(np.median(_lengths(stream))),
            "shards": len(stream.shards),
        }
        for (source, split), stream in streams.items()
    ]
    origins: Counter[str] = Counter()
    for stream in streams.values():
        for shard in stream.shards:
            for origin, length in zip(shard.sources.to_pylist(), np.diff(shard.offsets), strict=True):
                origins[origin] += int(length)
    html = report.page(
        "Tokens",
        {
            "Streams": report.table(rows),
            "Tokens by origin": report.bars(dict(origins.most_common()), total=origins.total()),
            "Lengths of documents": report.figure(_length_figure(shards)),
        },
        subtitle=f"Vocabulary of {shards.vocab_size:,}; tokenizer {shards.tokenizer_digest[:12]}",
        key_figures={"tokens": origins.total(), "documents": sum(s.num_documents for s in streams.values())},
    )
    write_atomically(path, html)


def _lengths(stream: TokenStream) -> np.ndarray:
    """Tokens of each document."""
    return np.concatenate([np.diff(shard.offsets) for shard in stream.shards])


def _length_figure(shards: TokenShards) -> Figure:
    picture = Figure(figsize=(8, 3))
    axes = picture.subplots()
    lengths = {source: _lengths(shards.stream(source, "train")) for source in shards.sources}
    edges = np.geomspace(1, max(int(values.max()) for values in lengths.values()) + 1, 50)
    for colour, (source, values) in zip(report.COLOURS, lengths.items(), strict=False):
        axes.hist(values, bins=edges.tolist(), histtype="step", label=source, color=colour)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Training split")
    axes.legend(frameon=False)
    return picture
