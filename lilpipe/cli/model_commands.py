"""Commands that use, serve, import or measure a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from lilpipe.cli.options import ConfigFile, Overrides, Recipe, Seed, load_config
from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.config.overrides import explain
from lilpipe.config.pipeline import PipelineConfig, Step
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.run_names import new_pipeline_run
from lilpipe.store import Store
from lilpipe.terminal import make_console

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Argument(
        help="Checkpoint directory, step of the pipeline, or models:/NAME@ALIAS; default: the last checkpoint."
    ),
]


@app.command("chat")
def talk(
    model: Model = None,
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens up to this probability.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Minimum probability relative to the most likely token.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
) -> None:
    """Chat with a checkpoint in the terminal."""
    from lilpipe.generation.chat import chat
    from lilpipe.locate import locate

    _, directory = locate(model, load_config(recipe, config, overrides, seed), Store())
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "max_new_tokens": max_tokens}
    try:
        sampling = SamplingConfig(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(f"chat: {explain(error)}") from error
    chat(directory, sampling=sampling, system=system, seed=seed or 0)


@app.command("serve")
def serve_model(
    model: Model = None,
    recipe: Recipe = "tiny",
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    host: Annotated[str, typer.Option(help="Address to bind; there is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in the API.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Maximum concurrent requests; others wait.")] = 32,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: also serve an adapter of the checkpoint in peft's format; repeatable."),
    ] = None,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API and a chat page."""
    from lilpipe.generation.serve import serve
    from lilpipe.locate import locate

    found, directory = locate(model, load_config(recipe, config, overrides, seed), Store())
    name = name or found
    adapters: dict[str, Path] = {}
    for text in adapter or []:
        other, sign, folder = text.partition("=")
        if not (other and sign and folder) or other in (name, *adapters):
            raise ConfigError(f"serve: --adapter: got {text!r}, expected NAME=DIR with a NAME that is not served yet")
        adapters[other] = Path(folder)
    serve(directory, name=name, host=host, port=port, max_rows=max_rows, adapters=adapters)


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="Directory in Hugging Face format, GGUF file, or name on the hub.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
) -> None:
    """Check an open model and add it to the store as a Checkpoint."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() and not source.endswith(".gguf")
    settings = {"repo_id": source, "revision": revision} if on_hub else {"path": str(Path(source).resolve())}
    config = PipelineConfig(recipe="import", steps={"import_model": Step(stage="import_model", settings=settings)})
    artifact, cached = run_step(config, "import_model", store=Store(), pipeline_run=new_pipeline_run(config))
    console = make_console(highlight=False)
    console.print(f"{'cached' if cached else 'imported'}: {artifact.path}", markup=False, soft_wrap=True)
    shown = ", ".join(f"{key} = {value!r}" for key, value in settings.items())
    console.print(f'To use it as a step: stage = "import_model", settings = {{{shown}}}', soft_wrap=True)


@app.command()
def harness(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    tasks: Annotated[list[str], typer.Option("--task", help="Task of the harness; repeatable.")],
    include_path: Annotated[str | None, typer.Option(help="Folder with your own task files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Few-shot examples per question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum questions per task; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 16,
    chat: Annotated[bool, typer.Option(help="Apply the chat template.")] = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a checkpoint (extra `eval`)."""
    from lilpipe.evaluation.benchmarks import run_tasks

    config = BenchmarksConfig(
        tasks=tuple(tasks),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        chat=chat,
    )
    results = run_tasks(config, checkpoint)
    from lm_eval.utils import make_table

    make_console(highlight=False).print(make_table(results), markup=False, soft_wrap=True)
