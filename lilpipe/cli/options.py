"""Options that most commands have, and the configuration that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lilpipe.config.overrides import parse_override
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.recipes import load

Recipe = Annotated[str, typer.Option(help="Recipe to start from.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file that overrides values of the recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting, such as sft.num_epochs=4; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of all training stages.")]


def load_config(
    recipe: str,
    file: Path | None,
    overrides: list[str] | None,
    seed: int | None,
    *,
    changes: dict[str, Any] | None = None,
) -> PipelineConfig:
    """Return the configuration of the common options; ``changes`` override all of them but ``seed``."""
    return load(recipe, file=file, overrides=override_values(overrides, seed, changes))


def override_values(
    overrides: list[str] | None, seed: int | None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings of --set and --seed, by dotted name."""
    values = dict(parse_override(text) for text in overrides or []) | (changes or {})
    return values if seed is None else {**values, "seed": seed}
