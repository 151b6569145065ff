"""What the flows have in common: their parameters' types, and from these a configuration and a run's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from prefect.runtime import flow_run

from lilpipe.config import PipelineConfig, load
from lilpipe.errors import LilpipeError
from lilpipe.pipeline import Listener

Recipe = Literal["tiny"]
"""The names in ``lilpipe.recipes.RECIPES``, spelled out so that Prefect's form offers them."""

_listeners: ContextVar[Sequence[Listener]] = ContextVar("listeners", default=())


def configure(recipe: str, config: str | None, overrides: dict[str, Any], seed: int | None) -> PipelineConfig:
    """The configuration that a flow's parameters stand for. Raises ``ConfigError`` naming the field."""
    values = overrides if seed is None else {**overrides, "seed": seed}
    return load(recipe, file=Path(config) if config else None, overrides=values)


def run_name() -> str:
    """The flow run's name: recipe and seed, and the step where one step is run."""
    given = flow_run.get_parameters()
    recipe, seed = given["recipe"], given["seed"] or 0
    try:
        complete = configure(recipe, given["config"], given["overrides"], given["seed"])
        recipe, seed = complete.recipe, complete.seed
    except LilpipeError:
        pass  # the run itself will report it
    what = f"{given['stage']} of {recipe}" if "stage" in given else recipe
    return f"{what}, seed {seed}"


@contextmanager
def heard_by(*listeners: Listener) -> Iterator[None]:
    """Let a display of this process hear the flows that are called inside; a flow's parameters cannot carry it."""
    token = _listeners.set(listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


def current_listeners() -> Sequence[Listener]:
    """Who hears the flow that runs."""
    return _listeners.get()
