"""The flow `full-pipeline`: from raw documents to an aligned model in the registry."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.parameters import Recipe, configure, flow_run_created, run_name
from lilpipe.errors import LilpipeError
from lilpipe.pipeline.runs import new_pipeline_run
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.tracking import MLflowTracker
from tasks.stage import run_configured


@flow(name="full-pipeline", flow_run_name=run_name, persist_result=False)
def full_pipeline(
    recipe: Recipe = "tiny",
    config: str | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006 (Prefect shows it as the form's default)
    seed: int | None = None,
) -> State:
    """Run every step of the pipeline in order; steps that the store holds already are not run again.

    Args:
        recipe: The complete configuration to start from.
        config: A TOML file whose values go over the recipe's, by its path from the project's directory or in full.
            It may name data of your own under `[[corpus.sources]]`.
        overrides: Single settings over both, such as `{"sft.num_epochs": 4}`. `lilpipe/config/` describes each.
        seed: Seed of every training stage; the configuration's own (0) where none is given.
    """
    try:
        pipeline = configure(recipe, config, overrides, seed)
        for step in pipeline.steps:
            check_wiring(pipeline, step)
    except LilpipeError as error:
        return Failed(message=str(error))
    tracker = MLflowTracker(pipeline, pipeline_run=new_pipeline_run(pipeline, created=flow_run_created()))
    with closing(tracker):
        for step in pipeline.steps:
            state = run_configured(pipeline, step, tracker)
            if not state.is_completed():
                return Failed(message=f"{step}: {state.message}")
    return Completed(message=f"All {len(pipeline.steps)} steps are in the store")
