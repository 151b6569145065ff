"""Sources of raw documents and of examples."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import Address, BuiltIn, Operational, Section, WithOptions


class Columns(Section):
    """Column names (JSON keys) of a source; a dotted name (`meta.url`) refers to a nested field."""

    text: str = "text"
    id: str = "id"
    """Rows without an id get `<file>:<row>`."""
    url: str = "url"
    date: str = "date"
    """When the page was crawled or written, as ISO 8601; decides which of several documents with the same URL is
    kept."""
    licence: str = "licence"
    label: str = "label"


SourceKind = Literal["installed-docs", "jsonl", "parquet", "text", "warc", "huggingface"]


class Source(WithOptions):
    """One source of raw documents."""

    kind: Annotated[str, BuiltIn("source", get_args(SourceKind))]
    """`installed-docs`: docstrings, help topics and READMEs of this Python environment. `jsonl`, `parquet`, `text`
    (plain text, Markdown, reStructuredText: one document per file) and `warc` (Common Crawl: one document per HTML
    response): files, plain or compressed (.gz, .zst, .bz2, .xz). `huggingface`: a hub name or a local folder. Or a
    custom source."""
    name: str
    """Name of the source in reports and shards."""
    path: Annotated[str | None, Address] = None
    """File, folder, glob or fsspec URL; for `huggingface` a hub name or folder."""
    columns: Columns = Columns()
    """Column names (`jsonl`, `parquet`, `huggingface`)."""
    subset: str | None = None
    """Configuration of the data set (`huggingface` only)."""
    split: str = "train"
    """Split to read (`huggingface` only)."""
    licence: str = "unknown"
    """Licence of documents that do not have their own."""
    languages: tuple[str, ...] | None = None
    """Languages to keep from this source; if None, `corpus.languages`."""
    label: str = ""
    """Kind of text, such as `code`, which mixtures can refer to. Documents may have their own label."""
    weight: Annotated[PositiveFloat | None, Operational] = None
    """Weight of the source in the tokenizer's sample and in the pretraining mixture, unless those set their own
    weights."""
    max_bytes: PositiveInt | None = None
    """Maximum bytes of text to read, in an order fixed by a hash of the document id; if None, all."""

    @model_validator(mode="after")
    def _path_matches_kind(self) -> Source:
        if self.kind == "installed-docs" and self.path is not None:
            raise ValueError(f"source {self.name!r}: kind 'installed-docs' reads this environment; remove `path`")
        if self.kind in get_args(SourceKind) and self.kind != "installed-docs" and self.path is None:
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} requires `path`")
        if self.kind != "huggingface" and (self.subset is not None or self.split != "train"):
            raise ValueError(f"source {self.name!r}: `subset` and `split` are for kind 'huggingface'; remove them")
        if self.kind in ("installed-docs", "text", "warc") and self.columns != Columns():
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} has no columns; remove `columns`")
        return self


def check_names(field: str, sources: tuple[Source, ...]) -> None:
    """Raise ``ValueError`` if two sources of a setting have the same name."""
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"{field}: names must be unique, got {names}")
