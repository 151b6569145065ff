"""`python -m flows`: run the flow `full-pipeline` in this process, as `make pipeline` does; no server is needed.

If `make up` has started a Prefect server, the run is shown there. Otherwise the run starts its own temporary Prefect
API, on the same database.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.server_process import Server
from flows.servers import QUIET, servers, temporary_prefect_api

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pipeline(
    recipe: Annotated[str, typer.Option(help="Recipe to start from.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="TOML file that overrides values of the recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override one setting, such as sft.num_epochs=4; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all training stages.")] = None,
) -> None:
    """Run the full pipeline; cached steps are not run again."""
    home = Path(".lilpipe").resolve()
    home.mkdir(exist_ok=True)
    sys.exit(_run(recipe, config, overrides or [], seed, _prefect_api(home)))


def _prefect_api(home: Path) -> Server | None:
    """Configure a Prefect API for this process: the configured one, the one of `make up`, or a temporary one."""
    for name, value in {**QUIET, "PREFECT_HOME": str(home)}.items():
        os.environ.setdefault(name, value)
    # Prefect's own logs go to its API; on the console, the display shows the same in less space.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    logging.getLogger("lilpipe").addHandler(logging.StreamHandler())
    if "PREFECT_API_URL" in os.environ:
        return None
    standing = servers(home)[0]
    server = standing if standing.process() is not None else temporary_prefect_api(home)
    os.environ["PREFECT_API_URL"] = f"{server.url}/api"
    return server


def _run(recipe: str, config: Path | None, overrides: list[str], seed: int | None, server: Server | None) -> int:
    """Run the flow with a display, and return the exit status. Imports that need the API come after it has been
    started.
    """
    from lilpipe.config.overrides import parse_override
    from lilpipe.display import Display
    from lilpipe.errors import LilpipeError
    from lilpipe.recipes import load

    display = Display()
    try:
        values = dict(parse_override(text) for text in overrides)
        complete = load(recipe, file=config, overrides=values if seed is None else {**values, "seed": seed})
        from flows.full_pipeline import full_pipeline
        from lilpipe.stage import get_stage
        from lilpipe.tracking import CLIENT_SETTINGS
        from tasks.stage import heard_by

        for step in complete.steps.values():  # import the stages while the API starts
            get_stage(step.stage, step.file)
        os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT_SETTINGS.items()})
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        if server is not None:
            server.wait()
        with heard_by(display):
            state = full_pipeline(  # type: ignore[call-overload]
                recipe=recipe, config=str(config) if config else None, overrides=values, seed=seed, return_state=True
            )
    except LilpipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        return 1
    display.summary(complete)
    return 0


if __name__ == "__main__":
    app()
