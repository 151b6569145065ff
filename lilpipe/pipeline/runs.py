"""Names of pipeline runs. A pipeline run is one execution of a configuration; what it used lies in the store's refs."""

from __future__ import annotations

from datetime import UTC, datetime

from lilpipe.artifact import digest_json
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.store import Store


def new_pipeline_run(config: PipelineConfig, *, created: datetime | None = None) -> str:
    """A name for a pipeline run: recipe, seed, digest of the configuration, time. Names sort by time."""
    created = created or datetime.now(UTC)
    return f"{_prefix(config)}{created.astimezone(UTC):%Y%m%d-%H%M%S-%f}"


def latest_pipeline_run(config: PipelineConfig, store: Store) -> str | None:
    """The most recent pipeline run of the same configuration; none if it has never been run."""
    return max(store.pipeline_runs(_prefix(config)), default=None)


def _prefix(config: PipelineConfig) -> str:
    """What all runs of a configuration share. Settings that cannot change an output make no other configuration."""
    values = config.identity()
    values.pop("orchestration")
    return f"{config.recipe}-seed{config.seed}-{digest_json(values)[:8]}-"
