"""The full pipeline on several seeds, pretraining included, and the table over them: ``make seeds``.

Means are over seeds. A difference between two models is taken seed by seed on the same test prompts; its standard
error is the larger of the one over seeds and the one over prompts (as if the two models' errors were independent,
which overstates it). A claim holds if the difference exceeds twice that.
"""

from __future__ import annotations

import argparse
import math
import statistics

from rich.console import Console
from rich.table import Table

from lilpipe.display import Display
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.run_names import new_pipeline_run
from lilpipe.recipes import load
from lilpipe.store import Store

COLUMNS = ("accuracy", "sampled_accuracy", "pass_at_8", "win_rate", "bits_per_byte")


def run_seed(recipe: str, seed: int, overrides: dict[str, object]) -> dict[str, float]:
    """Metrics of `evaluate` for one seed; what is in the store already is not run again."""
    config = load(recipe, overrides={**overrides, "seed": seed})
    store, display, run = Store(), Display(), new_pipeline_run(config)
    for step in config.steps:
        artifact, _ = run_step(config, step, store=store, pipeline_run=run, listeners=[display])
        if config.steps[step].stage == "evaluate":
            return artifact.manifest.metrics
    raise SystemExit(f"recipe {recipe} has no evaluate step")


def standard_error(values: list[float]) -> float:
    """Of the mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(runs: list[dict[str, float]], metric: str, before: str, after: str) -> tuple[float, float]:
    """Mean over seeds of after - before, and its standard error."""
    deltas = [run[f"{metric}/{after}"] - run[f"{metric}/{before}"] for run in runs]
    over_prompts = math.sqrt(
        sum(run[f"{metric}_stderr/{model}"] ** 2 for run in runs for model in (before, after))
    ) / len(runs)
    return statistics.fmean(deltas), max(standard_error(deltas), over_prompts)


def quality(runs: list[dict[str, float]]) -> Table:
    """Mean ± standard deviation over seeds, a row per model."""
    table = Table(title=f"mean ± SD over {len(runs)} seeds", title_justify="left")
    table.add_column("model")
    models = [name.split("/")[1] for name in runs[0] if name.startswith("accuracy/")]
    columns = [name for name in COLUMNS if any(key.startswith(f"{name}/") for key in runs[0])]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for model in models:
        cells = []
        for name in columns:
            values = [run[f"{name}/{model}"] for run in runs if f"{name}/{model}" in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        table.add_row(model, *cells)
    return table


def main() -> None:
    """Run the seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--split", default="test", choices=("test", "validation"), help="choose hyperparameters on validation"
    )
    arguments = parser.parse_args()
    runs = [run_seed(arguments.recipe, seed, {"evaluate.split": arguments.split}) for seed in arguments.seeds]
    console = Console(width=120)
    console.print(quality(runs))
    if len(runs) < 2:
        return  # one seed shows nothing of the spread between seeds
    claims = [
        ("accuracy", "pretrain", "sft", "rises"),
        ("accuracy", "sft", "grpo", "rises"),
        ("win_rate", "sft", "dpo", "rises"),
        ("accuracy", "sft", "dpo", "does not fall by more than one standard error"),
    ]
    for metric, before, after, claim in claims:
        delta, error = difference(runs, metric, before, after)
        holds = delta > 2 * error if claim == "rises" else delta > -error
        verdict = "[green]holds[/]" if holds else "[red]does not hold[/]"
        console.print(
            f"{metric} {before} -> {after}: {delta:+.3f}, standard error {error:.3f}; {claim}: {verdict}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
