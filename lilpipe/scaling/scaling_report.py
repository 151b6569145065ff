"""Files of a scaling study: ``report.html``, ``scaling.json`` and the plot ``scaling.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lilpipe import charts, page
from lilpipe.artifact import write_atomically
from lilpipe.scaling.study import Prediction, Run, Study, features, tokens_per_parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_POINTS = 100


def write_study(study: Study, directory: Path, *, title: str = "Scaling law") -> Path:
    """Write all three files; return the path of the report."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "scaling.json", json.dumps(study.as_json(), indent=2) + "\n")
    draw(study).savefig(directory / "scaling.png", dpi=150)
    sections = {
        "Loss against compute": [charts.svg(draw(study)), page.note(_explanation(study))],
        "Predictions": page.table(_prediction_rows(study)),
        "Runs": page.table([_row(run, study) for run in study.runs]),
    }
    key_figures: dict[str, page.Cell] = {"law": str(study.law), "runs": len(study.runs)}
    if study.target is not None:
        key_figures[f"{study.metric} at {study.target.run.flops:.3g} FLOPs"] = show(study.target)
    html = page.render(title, sections, subtitle=f"{study.metric} = {study.law}", key_figures=key_figures)
    write_atomically(directory / "report.html", html)
    return directory / "report.html"


def show(prediction: Prediction) -> str:
    """Return a predicted loss with its interval, as text."""
    if prediction.interval is None:
        return f"{prediction.loss:.4g} (too few runs for an interval)"
    low, high = prediction.interval
    return f"{prediction.loss:.4g} ({low:.4g} to {high:.4g})"


def _explanation(study: Study) -> str:
    in_what = " and ".join(study.law.coefficients)
    return (
        f"Points are runs; lines are the law in {in_what}, dashed beyond the runs. Error bars contain 9 of 10 new runs "
        "if the law holds: they cover noise, not deviations from the law."
    )


def _predictions(study: Study) -> list[tuple[str, Prediction]]:
    named = {"held out": study.held_out, "target": study.target}
    return [(name, prediction) for name, prediction in named.items() if prediction is not None]


def _prediction_rows(study: Study) -> list[dict[str, page.Cell]]:
    rows: list[dict[str, page.Cell]] = []
    for name, prediction in _predictions(study):
        actual = prediction.run.loss
        low, high = prediction.interval or (None, None)
        rows.append(
            {
                "run": f"{name}, {prediction.run.num_layers} layers",
                "FLOPs": f"{prediction.run.flops:.3g}",
                "predicted": prediction.loss,
                "low": low,
                "high": high,
                "actual": actual,
                "error": f"{prediction.loss / actual - 1:+.2%}" if actual else "",
            }
        )
    return rows


def _row(run: Run, study: Study) -> dict[str, page.Cell]:
    fitted = float(study.law.predict(features([run], like=study.runs))[0])
    return {
        "layers": run.num_layers,
        "parameters": run.parameters,
        "tokens": run.tokens,
        "tokens / parameter": run.ratio,
        "FLOPs": f"{run.flops:.3g}",
        study.metric: run.loss,
        "fitted": fitted,
        "fingerprint": run.fingerprint[:12],
    }


def draw(study: Study) -> Figure:
    """Return the plot of loss against FLOPs (log-log) with the law, the held-out run and the target."""
    drawn: list[charts.Line] = []
    for colour, ratio in zip(charts.COLOURS, tokens_per_parameter(study.runs), strict=False):
        alike = [run for run in study.runs if ratio <= run.ratio <= 1.1 * ratio]
        losses = [run.loss for run in alike if run.loss is not None]
        drawn.append(charts.Line(f"{ratio:.0f} tokens per parameter", [r.flops for r in alike], losses, "o", colour))
        drawn += _law_line(study, alike, colour, "-")
        if study.target is not None and ratio <= study.target.run.ratio <= 1.1 * ratio:
            drawn += _law_line(study, [alike[-1], study.target.run], colour, "--")
    for (name, prediction), colour in zip(_predictions(study), charts.COLOURS[3:], strict=False):
        drawn.append(_prediction_point(prediction, colour, f"{name}: {show(prediction)}"))
    return charts.lines({"": drawn}, "training FLOPs", study.metric.replace("_", " "), log=True, height=4.5)


def _law_line(study: Study, runs: Sequence[Run], colour: str, style: str) -> list[charts.Line]:
    """Return the law's line from the first run to the last; features are interpolated geometrically."""
    if len(runs) < 2:
        return []

    def between(values: Sequence[float]) -> list[float]:
        return np.geomspace(values[0], values[-1], CURVE_POINTS).tolist()

    ends = features([runs[0], runs[-1]], like=study.runs)
    losses = study.law.predict({name: between(values) for name, values in ends.items()})
    return [charts.Line("", between([runs[0].flops, runs[-1].flops]), losses.tolist(), style, colour)]


def _prediction_point(prediction: Prediction, colour: str, label: str) -> charts.Line:
    low, high = prediction.interval or (prediction.loss, prediction.loss)
    errors = [[max(0.0, prediction.loss - low)], [max(0.0, high - prediction.loss)]]
    return charts.Line(label, [prediction.run.flops], [prediction.loss], "D", colour, errors)
