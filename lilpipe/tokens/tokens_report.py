"""Report of stage ``tokens``: tokens by stream and source, and lengths of documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from lilpipe import charts, page
from lilpipe.artifact import write_atomically
from lilpipe.tokens.shards import SPLITS, TokenShards, TokenStream


def write_tokens_report(shards: TokenShards, path: Path) -> None:
    """Write the report as an HTML page."""
    streams = {(name, split): shards.stream(name, split) for name in shards.streams for split in SPLITS}
    total = sum(stream.num_tokens for stream in streams.values())
    rows: list[dict[str, page.Cell]] = [
        {
            "stream": name,
            "split": split,
            "documents": stream.num_documents,
            "tokens": stream.num_tokens,
            "% of tokens": 100 * stream.num_tokens / total,
            "bytes": stream.num_bytes,
            "bytes per token": stream.num_bytes / stream.num_tokens,
            "median tokens per document": float(np.median(np.diff(stream.offsets))),
            "shards": stream.num_shards,
        }
        for (name, split), stream in streams.items()
        if stream.num_documents
    ]
    origins: Counter[str] = Counter()
    for stream in streams.values():
        origins.update(_tokens_by_source(stream))
    html = page.render(
        "Tokens",
        {
            "Streams": page.table(rows),
            "Tokens by source": page.bar_table(dict(origins.most_common()), total=total),
            "Lengths of documents": [
                page.note("Number of documents of the training split by length in tokens."),
                _length_chart(shards),
            ],
        },
        subtitle=f"Vocabulary of {shards.vocab_size:,}; tokenizer {shards.tokenizer_digest[:12]}",
        key_figures={"tokens": total, "documents": sum(stream.num_documents for stream in streams.values())},
    )
    write_atomically(path, html)


def _tokens_by_source(stream: TokenStream) -> Counter[str]:
    """Return the number of tokens of each source named in the corpus."""
    counts: Counter[str] = Counter()
    for index in range(stream.num_shards):
        shard = stream.shard(index)
        encoded = shard.sources.dictionary_encode()
        sums = np.bincount(encoded.indices.to_numpy(), weights=np.diff(shard.offsets))
        counts.update(dict(zip(encoded.dictionary.to_pylist(), sums.astype(int).tolist(), strict=True)))
    return counts


def _length_chart(shards: TokenShards) -> page.Fragment:
    streams = {name: shards.stream(name, "train") for name in shards.streams}
    largest = sorted(streams, key=lambda name: -streams[name].num_tokens)[: len(charts.COLOURS)]
    lengths = {name: np.diff(streams[name].offsets) for name in largest if streams[name].num_documents}
    edges = np.geomspace(1, max(int(values.max()) for values in lengths.values()) + 1, 50)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in lengths.items()}
    return charts.svg(charts.histograms([charts.Histogram("", edges.tolist(), counts)]))
