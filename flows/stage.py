"""The flow `stage`: run one step of the pipeline on the artifacts of the steps before it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.parameters import Recipe, configure, flow_run_created, run_name
from lilpipe.errors import LilpipeError
from lilpipe.pipeline.run_names import latest_pipeline_run, new_pipeline_run
from lilpipe.store import Store
from lilpipe.tracking import MLflowTracker
from tasks.stage import failed, run_configured


@flow(name="stage", flow_run_name=run_name, persist_result=False)
def run_one_stage(
    stage: str,
    recipe: Recipe = "tiny",
    config: str | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006 (Prefect shows it as the form's default)
    seed: int | None = None,
) -> State:
    """Run one step as part of the latest pipeline run of this configuration; the steps before it must be finished.

    Args:
        stage: The step to run: corpus, prompts, tokenizer, tokens, pretrain, rejection_sampling, sft, preferences,
            dpo, grpo, evaluate, register, or one that the configuration adds.
        recipe: The complete configuration to start from.
        config: Path of a TOML file that overrides values of the recipe, absolute or relative to the project directory.
        overrides: Settings that override both, such as `{"sft.num_epochs": 4}`. `lilpipe/config/` describes them.
        seed: Seed of all training stages; if None, the configuration's (default 0).
    """
    try:
        pipeline = configure(recipe, config, overrides, seed)
        pipeline_run = latest_pipeline_run(pipeline, Store())
    except LilpipeError as error:
        return failed(error)
    pipeline_run = pipeline_run or new_pipeline_run(pipeline, created=flow_run_created())
    with closing(MLflowTracker(pipeline, pipeline_run=pipeline_run)) as tracker:
        state = run_configured(pipeline, stage, tracker)
    outcome = Completed if state.is_completed() else Failed
    return outcome(name=state.name, message=state.message)
