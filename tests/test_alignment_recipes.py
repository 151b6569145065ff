"""The recipes of post-training: how their steps are wired, and all of them end to end in one store."""

import json
import tomllib
from pathlib import Path

import pytest

from lilpipe.alignment_recipes import ALIGNMENT_RECIPES, FRONT, llama3
from lilpipe.config.overrides import merge
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.pipeline.plan import plan
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.recipes import tiny

OVERLAY = Path(__file__).parent / "recipes.toml"
MODELS = {
    "llama3": ["pretrain", "sft_0", "sft_1", "dpo_1", "sft_2", "dpo_2"],
    "r1": ["pretrain", "zero", "sft", "grpo"],
    "instruct-gpt": ["pretrain", "sft", "ppo"],
    "lillm": ["pretrain", "sft"],
}


def toy(name):
    """A recipe at toy size."""
    values = ALIGNMENT_RECIPES[name](tiny()).model_dump(by_alias=True)
    merge(values, tomllib.loads(OVERLAY.read_text()), model=PipelineConfig, where=str(OVERLAY))
    return PipelineConfig.model_validate(values)


@pytest.fixture(scope="module", params=list(ALIGNMENT_RECIPES))
def recipe(request):
    return ALIGNMENT_RECIPES[request.param](tiny())


def test_every_recipe_is_here():
    assert ALIGNMENT_RECIPES.keys() == MODELS.keys()


def test_each_step_gets_what_its_stage_takes(recipe):
    for name in recipe.steps:
        check_wiring(recipe, name)
        recipe.section(name)


def test_each_step_is_planned_in_an_empty_store(recipe, store):
    planned = plan(recipe, store)
    assert list(planned) == list(recipe.steps)
    assert planned["sft" if "sft" in planned else "sft_1"].status == "waits"


def test_the_front_half_is_that_of_tiny_so_that_a_store_shares_it(recipe):
    start = tiny()
    for name in FRONT:
        assert recipe.steps[name] == start.steps[name]
        assert recipe.section(name) == start.section(name)
    assert list(recipe.steps)[: len(FRONT)] == list(FRONT)


@pytest.mark.parametrize("name", list(ALIGNMENT_RECIPES))
def test_all_models_are_evaluated_and_the_last_is_registered(name):
    recipe = ALIGNMENT_RECIPES[name](tiny())
    assert recipe.recipe == name
    assert list(recipe.steps["evaluate"].inputs["models"]) == MODELS[name]
    assert list(recipe.steps)[-2:] == ["evaluate", "register"]
    assert recipe.steps["register"].inputs == {"model": MODELS[name][-1], "report": "evaluate"}


def test_a_base_model_is_asked_in_text_and_a_chat_model_in_chat():
    r1 = ALIGNMENT_RECIPES["r1"](tiny())
    forms = {name: r1.section(name).prompt_form for name in ("zero", "rejection_sampling", "grpo")}
    assert forms == {"zero": "text", "rejection_sampling": "text", "grpo": "chat"}


@pytest.mark.parametrize("rounds", [1, 3])
def test_llama3_takes_as_many_rounds_as_are_asked_for(rounds):
    recipe = llama3(tiny(), rounds=rounds)
    stages = [node.stage for node in recipe.steps.values()]
    assert stages.count("dpo") == stages.count("rejection_sampling") == rounds
    last = recipe.steps[f"rejection_sampling_{rounds}"]
    assert last.inputs["model"] == (("sft_0",) if rounds == 1 else (f"sft_{rounds - 1}", f"dpo_{rounds - 1}"))
    assert len(recipe.steps[f"sft_{rounds}"].inputs["conversations"]) == rounds
    assert recipe.steps["register"].inputs["model"] == f"dpo_{rounds}"


@pytest.mark.slow
def test_the_four_recipes_run_end_to_end_and_give_the_table_by_stage(store):
    for name, models in MODELS.items():
        config = toy(name)
        artifacts = {step: run_step(config, step, store=store, pipeline_run=name) for step in config.steps}
        shared = {step for step in FRONT if artifacts[step][1]}
        assert shared == (set() if name == next(iter(MODELS)) else set(FRONT))
        evaluation, _ = artifacts["evaluate"]
        table = json.loads((evaluation.path / "metrics.json").read_text())
        assert list(table["models"]) == sorted(models)
        for model in models:
            assert table["models"][model]["accuracy"]["n"] == 20
            assert f"accuracy_stderr/{model}" in evaluation.manifest.metrics
        page = (evaluation.path / "report" / "report.html").read_text()
        assert all(f"<td>{model}</td>" in page for model in models)
