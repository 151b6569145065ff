"""The flow `full-pipeline`: from raw documents to an aligned model in the registry."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.parameters import Recipe, configure, flow_run_created, run_name
from lilpipe.errors import LilpipeError
from lilpipe.pipeline.plan import plan
from lilpipe.pipeline.run_names import new_pipeline_run
from lilpipe.store import Store
from lilpipe.tracking import MLflowTracker
from tasks.stage import failed, run_configured


@flow(name="full-pipeline", flow_run_name=run_name, persist_result=False)
def full_pipeline(
    recipe: Recipe = "tiny",
    config: str | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006 (Prefect shows it as the form's default)
    seed: int | None = None,
) -> State:
    """Run all steps of the pipeline in order; cached steps are not run again.

    Args:
        recipe: The complete configuration to start from.
        config: Path of a TOML file that overrides values of the recipe, absolute or relative to the project directory.
            It may define your own data under `[[corpus.sources]]`.
        overrides: Settings that override both, such as `{"sft.num_epochs": 4}`. `lilpipe/config/` describes them.
        seed: Seed of all training stages; if None, the configuration's (default 0).
    """
    try:
        pipeline = configure(recipe, config, overrides, seed)
        plan(pipeline, Store())  # what cannot run is said before the first step
    except LilpipeError as error:
        return failed(error)
    tracker = MLflowTracker(pipeline, pipeline_run=new_pipeline_run(pipeline, created=flow_run_created()))
    with closing(tracker):
        for step in pipeline.steps:
            state = run_configured(pipeline, step, tracker)
            if not state.is_completed():
                return Failed(message=f"{step}: {state.message}")
    return Completed(message=f"All {len(pipeline.steps)} steps are in the store")
