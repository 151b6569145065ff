"""Stage ``benchmarks``: tasks of lm-evaluation-harness on several models, compared on the same questions.

Each model is compared with the input ``reference``, or else with the first model. A model is better or worse only if
the mean difference over the questions of a task exceeds twice its standard error. With many tasks some differences do
so by chance: of equal models, about 1 in 20.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from lilpipe import page
from lilpipe.artifact import Artifact, Inputs, all_inputs, optional_input, write_atomically
from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ConfigError, DataError
from lilpipe.evaluation.comparison import Comparison, paired
from lilpipe.metrics.pass_at_k import Estimate, mean_estimate
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace

SAMPLE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("model", "task", "metric")),
        ("question", pa.int64()),
        ("value", pa.float64()),
        ("response", pa.string()),
        ("target", pa.string()),
    ]
)


LOG_LIKELIHOOD = "log_likelihood"
"""Metric of tasks with ``perplexity``: the mean log-likelihood of a question's target, in nats."""


class Measure(NamedTuple):
    """A metric of a task. The same metric after two of the task's filters is two measures."""

    task: str
    metric: str


class Result(NamedTuple):
    """What one model reached on one task."""

    values: dict[str, float]
    """Metric to its value over all questions."""
    higher_is_better: dict[str, bool]
    samples: list[dict[str, Any]]
    """A row of ``SAMPLE_SCHEMA`` per question and metric, without the model's name."""
    version: str
    """The task's version."""


def run(config: BenchmarksConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Run every task on every model. Finished tasks of a model are kept over a kill.

    Raises ``ConfigError`` if the harness is not installed or has no such task.
    """
    if not config.tasks:
        raise ConfigError("benchmarks.tasks: got none, expected names of tasks such as 'gsm8k'; `lm-eval ls tasks`")
    models = {model.manifest.step: model for model in _distinct(inputs)}
    results: dict[str, dict[str, Result]] = {}
    total = len(models) * len(config.tasks)
    for number, (name, model) in enumerate(models.items()):
        results[name] = {}
        for place, task in enumerate(config.tasks):
            workspace.progress(number * len(config.tasks) + place, total, "tasks")
            results[name] |= _run_task(config, model, task, workspace)
    workspace.progress(total, total, "tasks")
    reference = optional_input(inputs, "reference")
    base = next(iter(models)) if reference is None else reference.manifest.step
    _write(workspace, results, base)
    return {
        f"{measure.task}_{measure.metric}{suffix}/{model}": value
        for model, tasks in results.items()
        for measure, estimate in _estimates(tasks).items()
        for suffix, value in (("", estimate.value), ("_stderr", estimate.stderr))
        if not (suffix and estimate.n < 2)
    }


def _distinct(inputs: Inputs) -> list[Artifact]:
    """Return the reference, if it is not one of the models, and the models."""
    models, reference = list(all_inputs(inputs, "models")), optional_input(inputs, "reference")
    names = [model.manifest.step for model in models]
    return models if reference is None or reference.manifest.step in names else [reference, *models]


# --- running ------------------------------------------------------------------------------------------------------


def run_tasks(config: BenchmarksConfig, checkpoint: Path) -> dict[str, Any]:
    """Return the harness's results of a checkpoint. Raises ``ConfigError`` if it is not installed or lacks a task."""
    try:
        from lilpipe.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"benchmarks: {error.name} is not installed; run `pip install -c constraints.txt -e '.[eval]'`"
        ) from error
    return run_harness(checkpoint, config)


def _run_task(config: BenchmarksConfig, model: Artifact, task: str, workspace: Workspace) -> dict[str, Result]:
    """Return the results of a task, or of each task of a group, by the task's name."""
    path = workspace.scratch / f"{model.content_digest}-{task.replace('/', '_')}.json"
    if not path.exists():
        found = run_tasks(config.model_copy(update={"tasks": (task,)}), model.path)
        write_atomically(path, json.dumps({name: result._asdict() for name, result in _results(found).items()}))
    return {name: Result(**result) for name, result in json.loads(path.read_text(encoding="utf-8")).items()}


def _results(found: Mapping[str, Any]) -> dict[str, Result]:
    results = {}
    for task, rows in found["samples"].items():
        values = {_metric(key): value for key, value in found["results"][task].items() if _is_value(key, value)}
        samples = list(_samples(task, rows))
        if likelihoods := [row["value"] for row in samples if row["metric"] == LOG_LIKELIHOOD]:
            values[LOG_LIKELIHOOD] = mean_estimate(likelihoods).value
        higher = dict(found["higher_is_better"].get(task) or {})
        results[task] = Result(values, higher, samples, version=str(found["versions"].get(task)))
    return results


def _is_value(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)


def _metric(key: str) -> str:
    """Return the metric of the harness's ``metric,filter``, without the filter ``none``."""
    name, _, filtered = key.partition(",")
    return name if filtered in ("", "none") else f"{name}_{filtered}"


def _samples(task: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row per question and metric that has one number per question.

    For ``perplexity``, the harness states the log-likelihood of each question.
    """
    for row in rows:
        for name in row["metrics"]:
            if isinstance(row[name], int | float):
                metric = _metric(f"{name},{row['filter']}")
                yield {
                    "task": task,
                    "metric": LOG_LIKELIHOOD if metric == "perplexity" else metric,
                    "question": row["doc_id"],
                    "value": float(row[name]),
                    "response": json.dumps(row["filtered_resps"], ensure_ascii=False),
                    "target": str(row["target"]),
                }


# --- comparing ----------------------------------------------------------------------------------------------------


def _estimates(tasks: Mapping[str, Result]) -> dict[Measure, Estimate]:
    """Return the value of each measure; its standard error if it is a mean over questions."""
    estimates = {}
    for task, result in tasks.items():
        for metric, value in result.values.items():
            scores = _scores(result, metric)
            estimate = mean_estimate(list(scores.values())) if scores else None
            same = estimate is not None and abs(estimate.value - value) < 1e-6 * max(1, abs(value))
            estimates[Measure(task, metric)] = estimate if estimate and same else Estimate(value, 0.0, 1)
    return estimates


def _scores(result: Result, metric: str) -> dict[int, float]:
    return {row["question"]: row["value"] for row in result.samples if row["metric"] == metric}


def comparisons(results: Mapping[str, Mapping[str, Result]], base: str) -> list[Comparison]:
    """Return the paired comparison of each model with ``base``, for each measure that is a mean over questions."""
    found = []
    for model, tasks in results.items():
        for measure, estimate in _estimates(tasks).items() if model != base else ():
            before = _scores(results[base][measure.task], measure.metric)
            after = _scores(tasks[measure.task], measure.metric)
            if estimate.n < 2:
                continue
            if before.keys() != after.keys():
                raise DataError(f"{measure.task}: {model} and {base} were asked different questions, expected the same")
            difference = paired(list(after.values()), [before[question] for question in after])
            if not tasks[measure.task].higher_is_better.get(measure.metric.partition("_")[0], True):
                difference = Estimate(-difference.value, difference.stderr, difference.n)
            name = f"{measure.task} {measure.metric}"
            found.append(Comparison(name, difference, model=model, than=base, unit="questions"))
    return found


def _write(workspace: Workspace, results: Mapping[str, Mapping[str, Result]], base: str) -> None:
    """Write ``metrics.json``, ``samples.arrow`` and the report."""
    estimates = {model: _estimates(tasks) for model, tasks in results.items()}
    content = {
        model: {f"{task}_{metric}": value.value for (task, metric), value in found.items()}
        for model, found in estimates.items()
    }
    write_atomically(workspace.output / "metrics.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    rows = [
        {"model": model, **row} for model, tasks in results.items() for task in tasks.values() for row in task.samples
    ]
    write_rows(workspace.output / "samples.arrow", rows, SAMPLE_SCHEMA)
    measures = list(dict.fromkeys(measure for found in estimates.values() for measure in found))
    table: list[dict[str, page.Cell]] = [
        {
            "task": measure.task,
            "version": next(tasks[measure.task].version for tasks in results.values() if measure.task in tasks),
            "metric": measure.metric,
            **{model: _cell(found.get(measure)) for model, found in estimates.items()},
        }
        for measure in measures
    ]
    compared = comparisons(results, base)
    differences: list[dict[str, page.Cell]] = [
        {"measure": each.measure, "model": each.model, "difference": each.amount, "verdict": each.word}
        for each in compared
    ]
    for each in compared:
        workspace.log(each.sentence)
    explained = (
        f"Paired by question, against {base}; positive is better. A difference within two standard errors is noise; of "
        "equal models, about 1 in 20 comparisons exceeds it."
    )
    sections: dict[str, page.Body] = {
        "Tasks": [page.note("± is one standard error over questions."), page.table(table)],
        f"Compared with {base}": [page.note(explained), page.table(differences)] if differences else page.note("None."),
    }
    workspace.report.mkdir(exist_ok=True)
    write_atomically(workspace.report / "report.html", page.render("Benchmarks", sections))


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f} ± {estimate.stderr:.3f}" if estimate.n > 1 else f"{estimate.value:.3f}"


# --- files --------------------------------------------------------------------------------------------------------


class _TaskFile(yaml.SafeLoader):
    """Reads task files; ignores their ``!function`` tags."""


_TaskFile.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


def external(config: BenchmarksConfig) -> dict[str, str]:
    """Return digests of the files in ``include_path`` and of the local data files that its tasks name.

    Raises ``DataError`` for a missing folder or a task file that is not valid YAML.
    """
    if config.include_path is None:
        return {}
    folder = Path(config.include_path)
    if not folder.is_dir():
        raise DataError(f"benchmarks.include_path: {folder} is not a folder; check the path")
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digests[str(path.relative_to(folder))] = digest_file(path)
        if path.suffix in (".yaml", ".yml"):
            for data in _data_files(path):
                digests[f"data {data.name}"] = digest_file(data)
    return digests


def _data_files(path: Path) -> list[Path]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskFile)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not valid YAML ({error}); correct the task file") from error
    settings = content.get("dataset_kwargs") if isinstance(content, dict) else None
    return sorted(_local(settings.get("data_files"))) if isinstance(settings, dict) else []


def _local(value: Any) -> Iterator[Path]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _local(item)
    elif isinstance(value, str) and Path(value).is_file():
        yield Path(value)


STAGE = Stage(
    name="benchmarks",
    output="Report",
    config=BenchmarksConfig,
    run=run,
    inputs={"models": "Checkpoint"},
    optional_inputs={"reference": "Checkpoint"},
    several=frozenset({"models"}),
    external=external,
    names_inputs=True,
)
