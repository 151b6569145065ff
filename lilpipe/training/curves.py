"""The report of a training stage: its curves and settings on one page, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from lilpipe import report
from lilpipe.artifact import write_atomically
from lilpipe.config.section import Section
from lilpipe.stage import Workspace

SMOOTHING = 0.95
"""Share of the past in the thick line of the loss."""

Curve = list[tuple[int, float]]


def write_report(
    workspace: Workspace,
    *,
    title: str,
    losses: list[float],
    config: Section,
    key_figures: Mapping[str, report.Cell],
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write ``report/report.html``: the loss of each step, what else was logged, further sections, the settings."""
    curves = read_curves(workspace)
    training = {name: curves.pop(name) for name in ("lr", "grad_norm", "tokens_per_second") if name in curves}
    curves.pop("loss", None)
    parts: dict[str, str | list[str]] = {"Loss": report.figure(_loss_figure(losses))}
    if curves:
        parts["Evaluation"] = report.figure(_grid(curves))
    parts |= dict(sections or {})
    if training:
        parts["Training"] = report.figure(_grid(training))
    settings = [{"setting": name, "value": str(value)} for name, value in _flatten(config.identity()).items()]
    parts["Settings"] = report.table(settings)
    write_atomically(workspace.report / "report.html", report.page(title, parts, key_figures=dict(key_figures)))


def read_curves(workspace: Workspace) -> dict[str, Curve]:
    """Metric to its (step, value) points as recorded; where a step was recorded twice, the last stands."""
    points: dict[str, dict[int, float]] = {}
    if workspace.events.exists():
        for line in workspace.events.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            for name, value in event.get("metrics", {}).items() if event.get("unit") == "steps" else ():
                points.setdefault(name, {})[event["done"]] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average without the bias towards its start (Kingma & Ba 2015, section 3)."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result


def _loss_figure(losses: list[float]) -> Figure:
    picture = Figure(figsize=(8, 3.2))
    axes = picture.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=report.COLOURS[0], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color=report.COLOURS[0], linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss")
    return picture


def _grid(curves: Mapping[str, Curve]) -> Figure:
    num_rows = -(-len(curves) // 3)
    picture = Figure(figsize=(9, 2.3 * num_rows), layout="constrained")
    for position, (name, curve) in enumerate(curves.items(), start=1):
        axes = picture.add_subplot(num_rows, 3, position)
        marker = "o" if len(curve) < 30 else ""
        axes.plot(*zip(*curve, strict=True), color=report.COLOURS[0], linewidth=1.4, marker=marker, markersize=3)
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    return picture


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
