"""The four recipes of post-training on several seeds, pretraining included, and the accuracy by stage as Markdown.

Behind one front half a seed: what is in the store already is not run again. Means are over seeds. A model is compared
with the one before it seed by seed on the same prompts; the standard error of that is the larger of the one over
seeds and the one over prompts, and "better" is said only outside of two of them (``lilpipe.evaluation.comparison``).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lilpipe.alignment_recipes import ALIGNMENT_RECIPES
from lilpipe.config.overrides import parse_override
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.display import Display
from lilpipe.evaluation.comparison import Comparison
from lilpipe.metrics.pass_at_k import Estimate, mean_estimate
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.run_names import new_pipeline_run
from lilpipe.recipes import load
from lilpipe.store import Store
from tests.benchmarks.tables import over_seeds

METRICS = {
    "accuracy": "accuracy",
    "sampled_accuracy": "sampled",
    "pass_at_8": "pass@8",
    "reward_reward_model": "reward model",
    "win_rate": "win rate",
}
SETTINGS: dict[str, object] = {
    "grpo.num_steps": 150,  # `tiny` takes 400; r1 does them twice
}
"""Beside those of the recipes, for a few minutes each on two cores."""


def config_of(recipe: str, overrides: Mapping[str, object]) -> PipelineConfig:
    """A recipe behind the front half of `tiny`, on as many workers."""
    return load(recipe, overrides={**SETTINGS, **overrides})


def evaluate(config: PipelineConfig) -> dict[str, float]:
    """The metrics of the recipe's `evaluate`."""
    store, display, run = Store(), Display(), new_pipeline_run(config)
    for step in config.steps:
        artifact, _ = run_step(config, step, store=store, pipeline_run=run, listeners=[display])
        if step == "evaluate":
            return artifact.manifest.metrics
    raise SystemExit(f"recipe {config.recipe} has no step evaluate")


def table(results: Mapping[str, Sequence[Mapping[str, float]]], models: Mapping[str, Sequence[str]]) -> str:
    """Mean ± standard error over seeds, a row for each model of each recipe, in the order of its steps."""
    lines = [f"| recipe | after | {' | '.join(METRICS.values())} |", f"| --- | --- |{' --- |' * len(METRICS)}"]
    for recipe, runs in results.items():
        for model in models[recipe]:
            cells = [_cell([run[f"{name}/{model}"] for run in runs if f"{name}/{model}" in run]) for name in METRICS]
            lines.append(f"| {recipe} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    estimate = mean_estimate(values)
    return f"{estimate.value:.3f} ± {estimate.stderr:.3f}" if estimate.n > 1 else f"{estimate.value:.3f}"


def statements(recipe: str, runs: Sequence[Mapping[str, float]], models: Sequence[str]) -> list[str]:
    """What may be said of each model's accuracy beside that of the one before it."""
    lines = []
    for before, model in pairwise(models):
        gains = [
            Estimate(run[f"accuracy_gain/{model}"], run[f"accuracy_gain_stderr/{model}"], int(run["num_prompts"]))
            for run in runs
        ]
        compared = Comparison("accuracy", over_seeds(gains), model=model, than=before, unit="seeds")
        lines.append(f"{recipe}, {compared.sentence}")
    return lines


def main() -> None:
    """Run the recipes on the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(ALIGNMENT_RECIPES), choices=list(ALIGNMENT_RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--split", default="test", choices=("test", "validation"), help="choose hyperparameters on validation"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of all recipes")
    arguments = parser.parse_args()
    given = {"evaluate.split": arguments.split, **dict(parse_override(text) for text in arguments.set)}
    results: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in arguments.recipes}
    models: dict[str, Sequence[str]] = {}
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            config = config_of(recipe, {**given, "seed": seed})
            models[recipe] = config.steps["evaluate"].inputs["models"]
            results[recipe].append(evaluate(config))
    print(f"\nmean ± standard error over {len(arguments.seeds)} seeds, {arguments.split} prompts\n")
    print(table(results, models))
    if len(arguments.seeds) > 1:
        print()
        for recipe, runs in results.items():
            for line in statements(recipe, runs, models[recipe]):
                print(f"- {line}")


if __name__ == "__main__":
    main()
