"""Report of an evaluation: scores of each model, their differences, and completions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lilpipe import charts, page
from lilpipe.evaluation.estimates import Estimates, Evaluation, comparisons, label, score_by
from lilpipe.evaluation.games import ending
from lilpipe.metrics.pass_at_k import Estimate
from lilpipe.schemas.chunks import Row

NUM_EXAMPLES = 20
RULES = {
    "brevity": "well-formed beats malformed, then fewer words win",
    "reward_model": "the reward model's higher score",
    "judge": "a language model asked twice, in both orders",
}
GAME_SCORES = ("win_rate", "tie_rate", "flip_rate", "unreadable_ratio")


def write_page(found: Evaluation) -> str:
    """Return the page as HTML."""
    note = f"{len(found.prompts):,} prompts of the {found.config.split} split; ± is one standard error over prompts."
    sections: dict[str, page.Body] = {
        "After each stage": [page.note(note), _stages(found), *_chart(found.scores)],
        "Comparisons": _comparisons(found),
        "Rewards of sampled completions": _table(found.scores, [name for name in _names(found) if _is_reward(name)]),
    }
    if found.outcomes:
        decision = RULES[found.config.win_by]
        rule = f"Sampled completions against {found.opponent}, by {decision}; ties count as half a win."
        sections["Games"] = [page.note(rule), _table(found.scores, [n for n in GAME_SCORES if n in _names(found)])]
    for key in ("family", "difficulty"):
        if len({row[key] for row in next(iter(found.rows.values()))}) > 1:
            sections[f"Greedy accuracy by {key}"] = _by(found, key)
    sections["Completions side by side"] = side_by_side(found)
    last = found.scores[found.models[-1]]
    shown = [name for name in last if name in ("accuracy", "sampled_accuracy", "win_rate") or name.startswith("pass_")]
    figures = {name.replace("_", " "): f"{last[name].value:.3f}" for name in shown}
    return page.render("Evaluation", sections, subtitle="Key figures are the last model's.", key_figures=figures)


# --- tables -------------------------------------------------------------------------------------------------------


def _names(found: Evaluation) -> list[str]:
    return list(dict.fromkeys(name for estimates in found.scores.values() for name in estimates))


def _is_reward(name: str) -> bool:
    return name.startswith("reward_") and not name.endswith("_gain")


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} ± {estimate.stderr:.3f}"


def _table(scores: Mapping[str, Estimates], names: Sequence[str]) -> page.Fragment:
    rows: list[dict[str, page.Cell]] = [
        {"model": model, **{label(name): _cell(estimates.get(name)) for name in names}}
        for model, estimates in scores.items()
    ]
    return page.table(rows)


def _stages(found: Evaluation) -> page.Fragment:
    names = [n for n in _names(found) if not n.startswith("reward_") and n not in GAME_SCORES and n != "accuracy_gain"]
    rows: list[dict[str, page.Cell]] = [
        {
            "model": model,
            **{label(name): _cell(estimates.get(name)) for name in names},
            "bits per byte": f"{found.bits[model]:.3f}" if model in found.bits else "",
        }
        for model, estimates in found.scores.items()
    ]
    return page.table(rows)


def _comparisons(found: Evaluation) -> list[page.Fragment]:
    rows: list[dict[str, page.Cell]] = [
        {
            "measure": each.measure,
            "model": each.model,
            "compared with": each.than,
            "": each.word,
            "difference": each.amount,
        }
        for each in comparisons(found)
    ]
    return [page.note("A difference of less than two standard errors is within the noise."), page.table(rows)]


def _by(found: Evaluation, key: str) -> page.Fragment:
    parts = {model: score_by(rows, key) for model, rows in found.rows.items()}
    values = list(next(iter(parts.values())))
    rows: list[dict[str, page.Cell]] = [
        {key: value, **{model: _cell(parts[model][value].get("accuracy")) for model in found.models}}
        for value in values
    ]
    return page.table(rows)


def _chart(scores: Mapping[str, Estimates]) -> list[page.Fragment]:
    first = next(iter(scores.values()))
    passes = [name for name in first if name.startswith("pass_at_")]
    shown = [name for name in first if name in ("accuracy", "sampled_accuracy", *passes[-1:])]
    if not shown:
        return []
    series = {label(name): [estimates[name].value for estimates in scores.values()] for name in shown}
    errors = {label(name): [estimates[name].stderr for estimates in scores.values()] for name in shown}
    return [charts.svg(charts.bars(list(scores), {"share of prompts": series}, errors=errors, limit=1))]


# --- completions --------------------------------------------------------------------------------------------------


def side_by_side(found: Evaluation) -> list[page.Fragment]:
    """Return a folded table for each of the first prompts: each model's greedy and first sampled completion."""
    completions = {
        (model, row["prompt_id"], row["greedy"]): row
        for model, rows in found.rows.items()
        for row in rows
        if row["sample"] == 0
    }
    blocks: list[page.Fragment] = []
    for prompt in found.prompts[:NUM_EXAMPLES]:
        rows: list[dict[str, page.Cell]] = []
        for model in found.models:
            for greedy in (True, False):
                row = completions[model, prompt.id, greedy]
                played = found.outcomes.get(model, {}).get(prompt.id, [])
                game = {"game": ending(played[0]) if played and not greedy else ""} if found.outcomes else {}
                rows.append(
                    {
                        "model": model,
                        "decoding": "greedy" if greedy else "sample",
                        "completion": row["completion"],
                        "verifier": _verdict(row),
                        **{label(f"reward_{name}"): f"{value:.3g}" for name, value in row["rewards"].items()},
                        **game,
                    }
                )
        right = prompt.answer or prompt.reference
        detail = f"answer: {right}" if right else ""
        blocks.append(page.folded(page.table(rows), title=prompt.question, detail=detail))
    return blocks


def _verdict(row: Row) -> str:
    if not row["verifiable"]:
        return ""
    return "correct" if row["correct"] else "wrong"
