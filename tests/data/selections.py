"""Documents as the filtering tasks find them: in sorted runs, in one shard or several."""

from dataclasses import replace

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data.corpus import _select
from lilpipe.data.sorting import ReadParts
from lilpipe.data.sources.readers import find_parts

from .prose import write_jsonl


def select(folder, rows, num_shards=1):
    """The selection of these rows, from one source named `mine`, in so many shards."""
    source = Source(kind="jsonl", name="mine", path=str(write_jsonl(folder / "mine.jsonl", rows)))
    parts = find_parts(source)
    for rank in range(len(parts)):
        ReadParts(parts, ["mine"], folder / "read").run(None, rank, len(parts))
    return replace(_select(CorpusConfig(sources=(source,)), folder / "read"), num_shards=num_shards)
