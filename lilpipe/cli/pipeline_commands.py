"""Commands that run and inspect the pipeline."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lilpipe.cli.options import ConfigFile, Overrides, Recipe, Seed, load_config, override_values
from lilpipe.config.backend import BackendConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.model.hub import read_model_config
from lilpipe.pipeline.base_model import ancestors_of, known_model
from lilpipe.pipeline.plan import WaitingStep, changes, plan
from lilpipe.pipeline.run import Listener, run_step
from lilpipe.pipeline.run_names import latest_pipeline_run, new_pipeline_run
from lilpipe.recipes import resolve
from lilpipe.store import Store
from lilpipe.terminal import make_console

app = typer.Typer()


@app.command()
def run(
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    stage: Annotated[str | None, typer.Option(help="Run only this step; the steps before it must be cached.")] = None,
    track: Annotated[bool, typer.Option(help="Record the run in MLflow.")] = True,
) -> None:
    """Run the pipeline, or one step of it; cached steps are not run again."""
    from lilpipe.display import Display

    loaded = load_config(recipe, config, overrides, seed)
    store, display = Store(), Display()
    pipeline_run = (latest_pipeline_run(loaded, store) if stage else None) or new_pipeline_run(loaded)
    with ExitStack() as stack:
        listeners: list[Listener] = [display]
        if track:
            from lilpipe.tracking import MLflowTracker

            listeners.append(stack.enter_context(closing(MLflowTracker(loaded, pipeline_run=pipeline_run))))
        plan(loaded, store, until=stage)  # what cannot run is said before the first step
        for step in [stage] if stage else loaded.steps:
            run_step(loaded, step, store=store, pipeline_run=pipeline_run, listeners=listeners)
    display.summary(loaded)


@app.command("plan")
def show_plan(
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    device: Annotated[str | None, typer.Option(help="Accelerator, such as h100; default: of this machine.")] = None,
    mfu: Annotated[float | None, typer.Option(min=0, max=1, help="Expected model FLOPs utilization.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one device per hour.")] = None,
) -> None:
    """Show which steps are cached, which will run and why, and the estimated cost of pretraining."""
    budgets = {"device": device, "mfu": mfu, "price_per_hour": price}
    given = [f"pretrain.budget.{name}={value}" for name, value in budgets.items() if value is not None]
    loaded = load_config(recipe, config, [*(overrides or []), *given], seed)
    console = make_console()
    console.print(_steps_table(loaded))
    from lilpipe.training.budget import budget, budget_table

    for name in (name for name, node in loaded.steps.items() if node.stage == "pretrain"):
        if (vocab_size := _vocab_size(loaded, name)) is None:
            console.print(f"{name}: no estimate, because its model is not imported yet or computed by transformers")
            continue
        planned = budget(loaded.section(name), vocab_size)
        console.print(budget_table(planned, title=name))
        for warning in planned.warnings:
            console.print(f"[yellow bold]warning[/]: {escape(warning)}", highlight=False, soft_wrap=True)


def _steps_table(loaded: PipelineConfig) -> Table:
    table = Table()
    for header in ("step", "status", "why"):
        table.add_column(header)
    colours = {"cached": "dim", "run": "yellow", "waits": "cyan"}
    for name, planned in plan(loaded, Store()).items():
        table.add_row(name, f"[{colours[planned.status]}]{planned.status}[/]", escape(planned.reason))
    return table


def _vocab_size(loaded: PipelineConfig, step: str) -> int | None:
    """Return the vocabulary size of a step of pretraining; None for an imported model of unknown shape."""
    if loaded.steps[ancestors_of(loaded, step)[-1]].stage != "import_model":
        return loaded.tokenizer.vocab_size
    model = known_model(loaded, step, {}, Store())
    shape, vocab_size = (None, 0) if model is None else read_model_config(model)
    return None if shape is None or isinstance(shape, BackendConfig) else vocab_size


@app.command()
def why(
    stage: Annotated[str, typer.Argument(help="Step of the pipeline.")],
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
) -> None:
    """Show why a step runs: what changed since its most similar earlier run (config, inputs, code or packages)."""
    loaded = load_config(recipe, config, overrides, seed)
    if stage not in loaded.steps:
        raise ConfigError(f"step {stage!r}: there is no such step; known: {', '.join(loaded.steps)}")
    store = Store()
    planned = plan(loaded, store, until=stage)[stage]
    console = make_console(highlight=False)
    console.print(f"{stage}: {planned.status}", markup=False)
    if isinstance(planned, WaitingStep) or planned.status == "cached":
        console.print(f"  {planned.reason}", markup=False)
        return
    for line in changes(store, stage, planned.cache_key) or [planned.reason]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


@app.command("config")
def show_settings(
    step: Annotated[str | None, typer.Argument(help="Step whose settings to show; all settings by default.")] = None,
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    word: Annotated[str | None, typer.Option("--search", help="Word in the name or description of settings.")] = None,
) -> None:
    """Print the resolved settings as TOML for --config, with type, unit, default and source; or search settings."""
    from lilpipe.settings import search, show_config, show_found

    resolved = resolve(recipe, file=config, overrides=override_values(overrides, seed))
    if word is None:
        typer.echo(show_config(resolved, step), nl=False)
    elif found := search(word, type(resolved.config)):
        typer.echo("\n".join(show_found(found, resolved)))
    else:
        raise ConfigError(f"--search {word!r}: no setting has this word; try a shorter one")


@app.command()
def scaling(
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    depths: Annotated[str, typer.Option(help="Comma-separated depths to train (or found cached).")] = "1,2,3,4",
    ratios: Annotated[
        str,
        typer.Option(
            "--tokens-per-parameter", help="Comma-separated; with several, fit the law in parameters and tokens."
        ),
    ] = "20",
    from_store: Annotated[bool, typer.Option("--from-store", help="Train nothing; use all runs in the store.")] = False,
    target_depth: Annotated[
        int | None, typer.Option(min=1, help="Depth to predict; default: twice the largest.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Pretraining metric to fit.")] = "validation_bits_per_byte_corpus",
    output: Annotated[Path | None, typer.Option(help="Directory of the report; default: in the store.")] = None,
) -> None:
    """Fit a scaling law to the loss of small runs and predict a larger run, with a report and a plot."""
    from lilpipe.display import Display
    from lilpipe.scaling import study
    from lilpipe.scaling.scaling_report import show, write_study

    def loaded(changes: dict[str, Any]) -> PipelineConfig:
        return load_config(recipe, config, overrides, seed, changes=changes)

    layers = [int(depth) for depth in _numbers(depths, "--depths")]
    lengths = _numbers(ratios, "--tokens-per-parameter")
    # The same tokens per parameter as the runs: a law in compute holds only for runs that are scaled alike.
    (target,) = study.configurations(loaded, depths=[target_depth or 2 * max(layers)], ratios=[max(lengths)])
    store = Store()
    if from_store:
        runs = study.stored_runs(store, metric=metric)
    else:
        configs = study.configurations(loaded, depths=layers, ratios=lengths)
        runs = study.trained_runs(configs, metric=metric, store=store, listeners=[Display()])
    found = study.study(runs, metric=metric, target=study.planned_run(target))
    directory = output or store.local / "scaling" / new_pipeline_run(target)
    console = make_console(highlight=False, soft_wrap=True)
    console.print(f"{metric} = {found.law}, from {len(runs)} runs", markup=False)
    for name, prediction in (("held out", found.held_out), ("target", found.target)):
        if prediction is not None:
            actual = "" if prediction.run.loss is None else f", actual {prediction.run.loss:.4g}"
            console.print(f"  {name}, {prediction.run.flops:.3g} FLOPs: {show(prediction)}{actual}", markup=False)
    console.print(f"  {write_study(found, directory)}", markup=False)


def _numbers(text: str, option: str) -> list[float]:
    """Parse comma-separated numbers above 0."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        raise ConfigError(f"{option}: got {text!r}, expected comma-separated numbers above 0, such as 2,3,4,6")
    return numbers


@app.command()
def trace(
    doc: Annotated[str | None, typer.Option(help="Document id: show its verdicts, and the steps that saw it.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Pretraining step, from 0: show the documents in one of its rows.")
    ] = None,
    row: Annotated[int, typer.Option(help="Row of that step, from 0.")] = 0,
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
) -> None:
    """Trace a document through the filters and pretraining, or list the documents in a pretraining step."""
    from lilpipe.provenance import Trail, show_document, show_row

    if (doc is None) == (step is None):
        raise ConfigError("trace: got both --doc and --step or neither, expected exactly one")
    trail, console = Trail(load_config(recipe, config, overrides, seed), Store()), make_console(highlight=False)
    if doc is not None:
        show_document(trail, doc, console)
    elif step is not None:
        show_row(trail, step, row, console)
