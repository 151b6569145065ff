"""Console output of a pipeline run: a progress bar in a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import re
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lilpipe.artifact import Artifact
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.pipeline.plan import PlannedStep
from lilpipe.stage import get_stage
from lilpipe.terminal import make_console

LINE_SECONDS = 10
"""Minimum interval between two plain lines of a stage."""


class Display:
    """Listener that shows a pipeline run on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.live = self.console.is_terminal
        self.outcomes: dict[str, tuple[Artifact, bool, float]] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None

    def stage_started(self, step: str, planned: PlannedStep) -> None:
        """Print which step starts, and why."""
        self._first, self._last_line = None, time.time()
        self.console.print(f"[bold]{step}[/] runs [dim]({escape(planned.reason)})[/]", highlight=False, soft_wrap=True)
        if self.live:
            self._progress = Progress(
                TextColumn("  {task.description:<20}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
                TextColumn("[cyan]{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(step, total=None, unit="", numbers="", start=True)

    def stage_event(self, step: str, event: dict[str, Any]) -> None:
        """Update the progress bar, or print a line at intervals."""
        if "message" in event:
            self.console.print(f"  {step}: {event['message']}", markup=False, highlight=False, soft_wrap=True)
            return
        if "metrics" not in event:
            return
        done, total, unit = event["done"], event["total"], event["unit"]
        numbers = "  ".join(f"{name} {_number(value)}" for name, value in list(event["metrics"].items())[:4])
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, unit=unit, numbers=numbers)
            return
        if self._first is None or done < self._first[1]:
            self._first = (event["time"], done)
        if done == total or time.time() - self._last_line >= LINE_SECONDS:
            self._last_line = time.time()
            left = self._time_left(event["time"], done, total)
            self.console.print(
                f"  {step}: {done:,}/{total:,} {unit}  {numbers}{left}", markup=False, highlight=False, soft_wrap=True
            )

    def stage_finished(self, step: str, artifact: Artifact, *, cached: bool, seconds: float) -> None:
        """Record the outcome for the summary, and print that the step is done."""
        self._stop()
        self.outcomes[step] = (artifact, cached, seconds)
        state = "[dim]cached[/]" if cached else f"[green]done[/] in {seconds:.1f} s"
        self.console.print(f"[bold]{step}[/] {state}", highlight=False)

    def stage_failed(self, step: str, error: BaseException) -> None:
        """Print which step failed; the caller shows the error itself."""
        self._stop()
        self.console.print(f"[bold]{step}[/] [red]failed[/]: {type(error).__name__}", highlight=False)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _time_left(self, now: float, done: int, total: int) -> str:
        assert self._first is not None
        started, first = self._first
        if done <= first or done >= total:
            return ""
        return f"  {(now - started) / (done - first) * (total - done):.0f} s left"

    def summary(self, config: PipelineConfig) -> None:
        """Print the final tables: all steps, and the quality of the model after each training stage."""
        table = Table(title=f"{config.recipe}, seed {config.seed}", title_justify="left")
        for header, justify in (("stage", "left"), ("", "left"), ("time", "right"), ("main metric", "left")):
            table.add_column(header, justify=justify)  # type: ignore[arg-type]
        for step, (artifact, cached, seconds) in self.outcomes.items():
            manifest = artifact.manifest
            name = get_stage(manifest.stage, config.steps[step].file).main_metric
            metric = f"{name} {_number(manifest.metrics[name])}" if name in manifest.metrics else ""
            state = "[dim]cached[/]" if cached else "[green]run[/]"
            table.add_row(step, state, f"{seconds:.1f} s", metric)
        self.console.print(table)
        for artifact, _, _ in self.outcomes.values():
            if artifact.manifest.stage == "evaluate":
                self.console.print(quality_table(artifact.manifest.metrics))


COLUMNS = ("accuracy", "pass_at_8", "win_rate", "reference_bits_per_byte", "bits_per_byte")


def quality_table(metrics: dict[str, float]) -> Table:
    """Return the metrics of `evaluate` on the test prompts, with standard errors, as a table of one row per model."""
    table = Table(title="after each training stage (± one standard error)", title_justify="left")
    table.add_column("model")
    sizes = [int(size) for size in re.findall(r"^pass_at_(\d+)/", "\n".join(metrics), re.MULTILINE)]
    pass_at = f"pass_at_{max(sizes, default=0)}"
    columns = [pass_at if name == "pass_at_8" else name for name in COLUMNS]
    columns = [name for name in columns if any(key.startswith(f"{name}/") for key in metrics)]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for model in dict.fromkeys(key.split("/")[1] for key in metrics if key.split("/")[0] in columns):
        cells = []
        for name in columns:
            value, error = metrics.get(f"{name}/{model}"), metrics.get(f"{name}_stderr/{model}")
            cells.append("" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        table.add_row(model, *cells)
    return table


def _number(value: float) -> str:
    if value != value or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
