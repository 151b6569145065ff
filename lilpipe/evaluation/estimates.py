"""Estimates of one model's scores over prompts, and paired differences between models on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lilpipe.alignment.rollout.completion_rows import by_prompt
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.evaluation.comparison import Comparison, paired
from lilpipe.evaluation.games import Outcomes, win_scores
from lilpipe.metrics.pass_at_k import Estimate, mean_estimate, pass_at_k, ratio_estimate
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt

Estimates = dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation."""

    config: EvaluateConfig
    prompts: Sequence[Prompt]
    rows: Mapping[str, Sequence[Row]]
    """Rows of each model, in the order of the stages."""
    scores: Mapping[str, Estimates]
    bits: Mapping[str, float]
    outcomes: Mapping[str, Outcomes]
    """Outcomes of each model that took part in games."""
    opponent: str | None
    """Name of the opponent in the games."""

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.rows)


def score(rows: Sequence[Row]) -> Estimates:
    """Return estimates from one model's rows; pass@k for k = 2, 4, 8, ... and the number of completions per prompt.

    Prompts without a verifier are left out of verifier scores. Rewards are those of sampled completions.
    """
    greedy = [row for row in rows if row["greedy"]]
    checked = [row for row in greedy if row["verifiable"]]
    groups = by_prompt([row for row in rows if not row["greedy"]])
    verifiable = [group for group in groups if group[0]["verifiable"]]
    estimates: Estimates = {}
    if checked:
        k = len(verifiable[0])
        corrects = [sum(row["correct"] for row in group) for group in verifiable]
        estimates["accuracy"] = ratio_estimate(sum(row["correct"] for row in checked), len(checked))
        estimates["sampled_accuracy"] = mean_estimate([correct / k for correct in corrects])
        for size in _sizes(k):
            estimates[f"pass_at_{size}"] = mean_estimate([pass_at_k(k, correct, size) for correct in corrects])
        estimates["well_formed"] = ratio_estimate(sum(row["well_formed"] for row in checked), len(checked))
    if bits := [row["reference_bits"] for row in greedy if row.get("reference_bits") is not None]:
        estimates["reference_bits_per_byte"] = mean_estimate(bits)
    estimates["words"] = mean_estimate([float(row["num_words"]) for row in greedy])
    for name in rows[0]["rewards"]:
        estimates[f"reward_{name}"] = mean_estimate([_mean_reward(group, name) for group in groups])
    return estimates


def _sizes(num_generations: int) -> list[int]:
    """Return k: powers of two from 2, and the number of completions per prompt; pass@1 is the sampled accuracy."""
    return [*(1 << bits for bits in range(1, (num_generations - 1).bit_length())), num_generations]


def gains(rows: Sequence[Row], before: Sequence[Row]) -> Estimates:
    """Return paired differences to another model on the same prompts: greedy accuracy, sampled rewards, and bits per
    byte of the reference completions, with the sign that makes better positive.

    Their standard errors are below those of two unpaired means.
    """
    pairs = [pair for pair in zip(rows, before, strict=True) if pair[0]["greedy"] and pair[0]["verifiable"]]
    estimates: Estimates = {}
    if pairs:
        estimates["accuracy_gain"] = paired(*([float(row["correct"]) for row in part] for part in zip(*pairs)))  # noqa: B905
    bits = [tuple(row.get("reference_bits") for row in pair) for pair in zip(rows, before, strict=True)]
    if known := [(theirs, mine) for mine, theirs in bits if mine is not None and theirs is not None]:
        # Fewer bits are better, so the gain is positive if the model needs fewer than the one before.
        estimates["reference_bits_per_byte_gain"] = paired(*zip(*known))  # noqa: B905
    mine, theirs = (by_prompt([row for row in part if not row["greedy"]]) for part in (rows, before))
    for name in rows[0]["rewards"]:
        values = [[_mean_reward(group, name) for group in groups] for groups in (mine, theirs)]
        estimates[f"reward_{name}_gain"] = paired(*values)
    return estimates


def _mean_reward(group: Sequence[Row], name: str) -> float:
    return sum(row["rewards"][name] for row in group) / len(group)


def score_all(
    rows: Mapping[str, Sequence[Row]], outcomes: Mapping[str, Outcomes], *, judged: bool
) -> dict[str, Estimates]:
    """Return for each model, in order: ``score``, gains over the previous model, and win rates."""
    scores: dict[str, Estimates] = {}
    before: Sequence[Row] | None = None
    for model, mine in rows.items():
        scores[model] = score(mine)
        if before is not None:
            scores[model] |= gains(mine, before)
        if model in outcomes:
            scores[model] |= win_scores(outcomes[model], judged=judged)
        before = mine
    return scores


def score_by(rows: Sequence[Row], key: str) -> dict[str, Estimates]:
    """Return ``score`` for each value of ``key``: family or difficulty."""
    values = sorted({row[key] for row in rows})
    return {str(value): score([row for row in rows if row[key] == value]) for value in values}


def comparisons(found: Evaluation) -> Iterator[Comparison]:
    """Yield comparisons of each model with the previous one, and with its opponent in games."""
    for before, model in pairwise(found.models):
        for name, estimate in found.scores[model].items():
            if name.endswith("_gain"):
                yield Comparison(label(name.removesuffix("_gain")), estimate, model=model, than=before)
    for model in found.models:
        rate = found.scores[model].get("win_rate")
        if rate is not None and found.opponent is not None and model != found.opponent:
            above_half = replace(rate, value=rate.value - 0.5)
            yield Comparison("win rate above one half", above_half, model=model, than=found.opponent)


def label(name: str) -> str:
    """Return a metric's display name; ``reward_reward`` becomes ``reward``."""
    return name.replace("reward_reward", "reward").replace("_", " ")
