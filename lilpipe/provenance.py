"""``lilpipe trace``: from a document to its decisions and the steps that saw it, and from a step to its documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lilpipe.artifact import Artifact
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.data.filter_trace import FilterDecision, FilterTrace, trace_filters
from lilpipe.data.filters.chain import Bounds
from lilpipe.errors import ConfigError, DataError
from lilpipe.pipeline.plan import plan
from lilpipe.store import Store
from lilpipe.tokens.shards import TokenShards
from lilpipe.tokens.trace import TracedDocument, trace_document, trace_row

MAX_SIGHTINGS = 30
"""Maximum number of rows shown for a document."""
EXCERPT_CHARS = 240


class Trail:
    """Artifacts of one configuration that a trace reads: corpus, token shards and pretrained model."""

    def __init__(self, config: PipelineConfig, store: Store) -> None:
        self._store = store
        planned = plan(config, store)
        self._made: Mapping[str, tuple[str, Artifact]] = {
            config.steps[name].stage: (name, each.artifact) for name, each in planned.items() if each.artifact
        }
        self._pretrain: PretrainConfig | None = None
        if "pretrain" in self._made:
            self._pretrain = config.section(self._made["pretrain"][0])

    def folder(self, stage: str) -> Path | None:
        """Return the directory of a stage's artifact, or None if it does not exist."""
        return self._store.fetch(self._made[stage][1]).path if stage in self._made else None

    def run(self) -> tuple[TokenShards, PretrainConfig]:
        """Return the tokens and settings of the pretraining run. Raises ``ConfigError`` if there is none."""
        folder = self.folder("tokens")
        if folder is None or self._pretrain is None:
            raise ConfigError("trace: no pretraining of this configuration is in the store; run the pipeline first")
        return TokenShards.open(folder), self._pretrain

    def has_run(self) -> bool:
        """Return whether there is a pretraining run."""
        return self._pretrain is not None


def show_document(trail: Trail, document_id: str, console: Console) -> None:
    """Print a document's decisions in the corpus and its rows in pretraining.

    Raises ``DataError`` if the id is unknown.
    """
    folder, trace, unknown = trail.folder("corpus"), None, None
    if folder is None:
        raise ConfigError("trace: no corpus of this configuration is in the store; run the pipeline first")
    try:
        trace = trace_filters(folder, document_id)
    except DataError as error:
        unknown = error  # may be an exercise
    if trace is not None:
        _show_filters(trace, console)
        if trace.rejected_by is not None:
            return
    if not trail.has_run():
        if unknown is not None:
            raise unknown
        console.print("No pretraining of this configuration is in the store yet.")
        return
    try:
        found = trace_document(*trail.run(), document_id)
    except DataError as error:
        raise unknown or error from error
    for each in found:
        _show_sightings(each, console)


def show_row(trail: Trail, step: int, row: int, console: Console) -> None:
    """Print the documents of one row of a pretraining step."""
    shards, config = trail.run()
    traced = trace_row(shards, config, step=step, row=row)
    console.print(f"step {step}, row {row}: stream [bold]{escape(traced.stream)}[/], epoch {traced.epoch + 1}")
    table = Table("document", "source", "tokens", "of")
    for span in traced.spans:
        table.add_row(
            escape(span.document_id), escape(span.source), f"{span.first} to {span.stop}", str(span.num_tokens)
        )
    console.print(table)


def _show_filters(trace: FilterTrace, console: Console) -> None:
    row = trace.row
    about = [row["source"], f"{row['name']} {row['version']}".strip(), row["licence"], row["url"]]
    console.print(f"[bold]{escape(row['id'])}[/]  {escape(' · '.join(part for part in about if part))}")
    console.print(f"read from {row['file']}:{row['row']}, {row['num_bytes']:,} bytes", markup=False)
    console.print(_excerpt(row["text"]), style="dim", markup=False)
    table, decisive = Table("filter", "score", "value", "passes", "verdict"), _decisive(trace.decisions)
    for decision in trace.decisions:
        said = "[green]passed[/]" if decision.passed else ""
        if decision is decisive:
            said = f"[red]{escape(row['reason'])}[/]"
        value = "" if decision.value is None else f"{decision.value:.4g}"
        table.add_row(decision.stage, decision.score, value, _range(decision.bounds), said)
    for stage in trace.not_reached:
        table.add_row(stage, "", "", "", "[dim]not reached[/]")
    console.print(table)
    if trace.rejected_by is None:
        console.print("[green]kept[/]")
        return
    detail = f": {row['detail']}" if row["detail"] else ""
    console.print(f"[red]rejected[/] by {trace.rejected_by}: {escape(row['reason'] + detail)}")
    if trace.kept is not None:
        said = f"first duplicate, itself rejected by {trace.kept['stage']}" if "stage" in trace.kept else "kept instead"
        console.print(f"{said}: [bold]{escape(trace.kept['id'])}[/] ({escape(trace.kept['source'])})")
        console.print(_excerpt(trace.kept["text"]), style="dim", markup=False)


def _decisive(decisions: Sequence[FilterDecision]) -> FilterDecision | None:
    """Return the score that rejected the document: the stage records no scores after it. Scores without bounds are
    informative only.
    """
    mine = [each for each in decisions if not each.passed]
    taken = [each for each in mine if each.value is not None]
    bounded = [each for each in taken if each.bounds != Bounds()]
    return ([*mine[:1], *taken, *bounded] or [None])[-1]


def _range(bounds: Bounds) -> str:
    parts = [
        f"≥ {bounds.least:g}" if bounds.least is not None else "",
        f"≤ {bounds.most:g}" if bounds.most is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARS else f"{line[:EXCERPT_CHARS]} …"


def _show_sightings(found: TracedDocument, console: Console) -> None:
    where = f"stream {found.stream}, split {found.split}, {found.num_tokens:,} tokens"
    if not found.sightings:
        why = "in the validation split" if found.split == "validation" else "not reached by pretraining"
        console.print(f"{where}: {why}", markup=False)
        return
    console.print(f"{where}: seen in {len(found.sightings):,} rows of pretraining", markup=False)
    table = Table("step", "row", "epoch", "tokens")
    for each in found.sightings[:MAX_SIGHTINGS]:
        table.add_row(f"{each.step:,}", str(each.row), str(each.epoch + 1), f"{each.first} to {each.stop}")
    console.print(table)
    if (rest := len(found.sightings) - MAX_SIGHTINGS) > 0:
        console.print(f"and {rest:,} more")
