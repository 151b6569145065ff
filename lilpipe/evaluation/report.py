"""The report of an evaluation: scores by model, what may be said of their differences, and answers side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lilpipe import report
from lilpipe.evaluation.games import ending
from lilpipe.evaluation.scores import Estimates, Evaluation, comparisons, label, score_by
from lilpipe.metrics.pass_at_k import Estimate
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt

NUM_EXAMPLES = 20
RULES = {
    "brevity": "well-formed before malformed, then the fewer words",
    "reward_model": "the reward model's higher score",
    "judge": "a language model asked twice, with the places swapped",
}
GAME_SCORES = ("win_rate", "tie_rate", "flip_rate", "unreadable_ratio")


def write_page(found: Evaluation) -> str:
    """The whole page."""
    note = f"{len(found.prompts):,} prompts of the {found.config.split} split; ± is one standard error over prompts."
    sections: dict[str, str | list[str]] = {
        "After each stage": [report.note(note), _stages(found), *_pictures(found.scores)],
        "What may be said": _comparisons(found),
        "Rewards of sampled answers": _table(found.scores, [name for name in _names(found) if _is_reward(name)]),
    }
    if found.outcomes:
        rule = f"Sampled answers against {found.opponent}, by {RULES[found.config.win_by]}; ties count as half."
        sections["Games"] = [report.note(rule), _table(found.scores, [n for n in GAME_SCORES if n in _names(found)])]
    for key in ("family", "difficulty"):
        if len({row[key] for row in next(iter(found.rows.values()))}) > 1:
            sections[f"Greedy accuracy by {key}"] = _by(found, key)
    sections["The same prompts, model by model"] = side_by_side(found)
    last = found.scores[found.models[-1]]
    shown = [name for name in last if name in ("accuracy", "sampled_accuracy", "win_rate") or name.startswith("pass_")]
    figures = {name.replace("_", " "): f"{last[name].value:.3f}" for name in shown}
    return report.page("Evaluation", sections, subtitle="Key figures are the last model's.", key_figures=figures)


# --- tables -------------------------------------------------------------------------------------------------------


def _names(found: Evaluation) -> list[str]:
    return list(dict.fromkeys(name for estimates in found.scores.values() for name in estimates))


def _is_reward(name: str) -> bool:
    return name.startswith("reward_") and not name.endswith("_gain")


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} ± {estimate.stderr:.3f}"


def _table(scores: Mapping[str, Estimates], names: Sequence[str]) -> str:
    rows: list[dict[str, report.Cell]] = [
        {"model": model, **{label(name): _cell(estimates.get(name)) for name in names}}
        for model, estimates in scores.items()
    ]
    return report.table(rows)


def _stages(found: Evaluation) -> str:
    names = [n for n in _names(found) if not n.startswith("reward_") and n not in GAME_SCORES and n != "accuracy_gain"]
    rows: list[dict[str, report.Cell]] = [
        {
            "model": model,
            **{label(name): _cell(estimates.get(name)) for name in names},
            "bits per byte": f"{found.bits[model]:.3f}" if model in found.bits else "",
        }
        for model, estimates in found.scores.items()
    ]
    return report.table(rows)


def _comparisons(found: Evaluation) -> str:
    rows: list[dict[str, report.Cell]] = [
        {"measure": each.measure, "model": each.model, "beside": each.than, "": each.word, "difference": each.amount}
        for each in comparisons(found)
    ]
    return report.note("A difference of less than two standard errors is noise.") + report.table(rows)


def _by(found: Evaluation, key: str) -> str:
    parts = {model: score_by(rows, key) for model, rows in found.rows.items()}
    values = list(next(iter(parts.values())))
    rows: list[dict[str, report.Cell]] = [
        {key: value, **{model: _cell(parts[model][value].get("accuracy")) for model in found.models}}
        for value in values
    ]
    return report.table(rows)


def _pictures(scores: Mapping[str, Estimates]) -> list[str]:
    first = next(iter(scores.values()))
    passes = [name for name in first if name.startswith("pass_at_")]
    shown = [name for name in first if name in ("accuracy", "sampled_accuracy", *passes[-1:])]
    if not shown:
        return []
    picture = Figure(figsize=(max(7, 0.9 * len(scores)), 3.2))
    axes = picture.subplots()
    width = 0.8 / len(shown)
    for index, name in enumerate(shown):
        estimates = [model[name] for model in scores.values()]
        places = [place + (index - (len(shown) - 1) / 2) * width for place in range(len(scores))]
        heights, errors = [e.value for e in estimates], [e.stderr for e in estimates]
        axes.bar(places, heights, width, yerr=errors, label=label(name), color=report.COLOURS[index], capsize=2)
    slant = {"rotation": 30, "ha": "right"} if len(scores) > 5 else {}
    axes.set_xticks(range(len(scores)), list(scores), **slant)
    axes.set(ylabel="share of prompts", ylim=(0, 1))
    axes.legend(frameon=False, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1))
    return [report.figure(picture)]


# --- answers ------------------------------------------------------------------------------------------------------


def side_by_side(found: Evaluation) -> list[str]:
    """A folded table for each of the first prompts: each model's greedy answer and its first sample."""
    answers = {
        (model, row["prompt_id"], row["greedy"]): row
        for model, rows in found.rows.items()
        for row in rows
        if row["sample"] == 0
    }
    blocks = []
    for prompt in found.prompts[:NUM_EXAMPLES]:
        rows: list[dict[str, report.Cell]] = []
        for model in found.models:
            for greedy in (True, False):
                row = answers[model, prompt.id, greedy]
                played = found.outcomes.get(model, {}).get(prompt.id, [])
                game = {"game": ending(played[0]) if played and not greedy else ""} if found.outcomes else {}
                rows.append(
                    {
                        "model": model,
                        "draw": "greedy" if greedy else "sample",
                        "answer": row["completion"],
                        "verifier": _verdict(row),
                        **{label(f"reward_{name}"): f"{value:.3g}" for name, value in row["rewards"].items()},
                        **game,
                    }
                )
        blocks.append(_folded(prompt, report.table(rows)))
    return blocks


def _verdict(row: Row) -> str:
    if not row["verifiable"]:
        return ""
    return "correct" if row["correct"] else "wrong"


def _folded(prompt: Prompt, body: str) -> str:
    right = prompt.answer or prompt.reference
    detail = f"<small>answer: {html.escape(right)}</small>" if right else ""
    return f"<details><summary>{html.escape(prompt.question)}{detail}</summary>{body}</details>"
