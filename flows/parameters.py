"""Parameters shared by the flows, and the configuration that they define."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import LilpipeError
from lilpipe.extensions import installed
from lilpipe.recipes import RECIPES, load

if TYPE_CHECKING:
    Recipe = str
else:
    Recipe = Literal[(*RECIPES, *installed("recipe"))]
"""Names of the built-in recipes and of the recipes of installed packages, listed in Prefect's form."""


def configure(recipe: str, config: str | None, overrides: dict[str, Any], seed: int | None) -> PipelineConfig:
    """Return the configuration defined by a flow's parameters. Raises ``ConfigError`` naming the field."""
    values = overrides if seed is None else {**overrides, "seed": seed}
    return load(recipe, file=Path(config) if config else None, overrides=values)


def run_name() -> str:
    """Return the flow run's name: recipe and seed, and the step if only one is run."""
    given = flow_run.get_parameters()
    recipe, seed = given["recipe"], given["seed"] or 0
    try:
        complete = configure(recipe, given["config"], given["overrides"], given["seed"])
        recipe, seed = complete.recipe, complete.seed
    except LilpipeError:
        pass  # the flow reports it
    what = f"{given['stage']} of {recipe}" if "stage" in given else recipe
    return f"{what}, seed {seed}"


def flow_run_created() -> datetime | None:
    """Return when the flow run was created. Retries have the same time, so they stay in the same pipeline run."""
    context = FlowRunContext.get()
    return context.flow_run.created if context and context.flow_run else None
