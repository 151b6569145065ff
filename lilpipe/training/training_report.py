"""HTML report of a training stage: loss, evaluation curves and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lilpipe import charts, page
from lilpipe.artifact import write_atomically
from lilpipe.config.section import Section
from lilpipe.stage import Workspace

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss."""

Curve = list[tuple[int, float]]


def write_report(
    workspace: Workspace,
    *,
    title: str,
    losses: list[float],
    config: Section,
    key_figures: Mapping[str, page.Cell],
    sections: page.Sections | None = None,
) -> None:
    """Write ``report/report.html``: loss per step, other logged metrics, further sections, and the settings."""
    curves = read_curves(workspace)
    training = {name: curves.pop(name) for name in ("lr", "grad_norm", "tokens_per_second") if name in curves}
    curves.pop("loss", None)
    parts: dict[str, page.Body] = {"Loss": _loss_chart(losses)}
    if curves:
        parts["Evaluation"] = _grid(curves)
    parts |= sections or {}
    if training:
        parts["Training"] = _grid(training)
    settings = [{"setting": name, "value": str(value)} for name, value in _flatten(config.identity()).items()]
    parts["Settings"] = page.table(settings)
    write_atomically(workspace.report / "report.html", page.render(title, parts, key_figures=dict(key_figures)))


def read_curves(workspace: Workspace) -> dict[str, Curve]:
    """Return each metric's (step, value) points; for a step recorded twice, the last value."""
    points: dict[str, dict[int, float]] = {}
    if workspace.events.exists():
        for line in workspace.events.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # truncated by a kill
                continue
            for name, value in event.get("metrics", {}).items() if event.get("unit") == "steps" else ():
                points.setdefault(name, {})[event["done"]] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


def smooth(values: list[float]) -> list[float]:
    """Return the bias-corrected exponential moving average (Kingma & Ba 2015, section 3)."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result


def _loss_chart(losses: list[float]) -> page.Fragment:
    steps = range(1, len(losses) + 1)
    each = charts.Line("each step", steps, losses, opacity=0.35, width=0.8)
    return charts.svg(charts.lines({"": [each, charts.Line("smoothed", steps, smooth(losses))]}, "step", "loss"))


def _grid(curves: Mapping[str, Curve]) -> page.Fragment:
    panels = {name.replace("_", " "): [charts.Line.of_points(curve)] for name, curve in curves.items()}
    return charts.svg(charts.lines(panels))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
