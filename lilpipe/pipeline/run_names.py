"""Names of pipeline runs. A pipeline run is one execution of a configuration; its artifacts are in the store's refs."""

from __future__ import annotations

from datetime import UTC, datetime

from lilpipe.artifact import digest_json
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.store import Store


def new_pipeline_run(config: PipelineConfig, *, created: datetime | None = None) -> str:
    """Return a name for a pipeline run: recipe, seed, digest of the configuration, time. Names sort by time."""
    created = created or datetime.now(UTC)
    return f"{_prefix(config)}{created.astimezone(UTC):%Y%m%d-%H%M%S-%f}"


def latest_pipeline_run(config: PipelineConfig, store: Store) -> str | None:
    """Return the most recent pipeline run of the same configuration, or None if it has never been run."""
    return max(store.pipeline_runs(_prefix(config)), default=None)


def _prefix(config: PipelineConfig) -> str:
    """Return the common prefix of all runs of a configuration; settings that cannot change an output are ignored."""
    values = config.identity()
    values.pop("orchestration")
    return f"{config.recipe}-seed{config.seed}-{digest_json(values)[:8]}-"
