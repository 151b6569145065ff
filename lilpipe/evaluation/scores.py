"""Estimates over prompts from one model's answers, and the differences between models on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lilpipe.alignment.rollout.sampling import by_prompt
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.evaluation.comparison import Comparison, paired
from lilpipe.evaluation.games import Outcomes, win_scores
from lilpipe.metrics.pass_at_k import Estimate, mean_estimate, pass_at_k, ratio_estimate
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt

Estimates = dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found."""

    config: EvaluateConfig
    prompts: Sequence[Prompt]
    rows: Mapping[str, Sequence[Row]]
    """By model, in the order of the stages."""
    scores: Mapping[str, Estimates]
    bits: Mapping[str, float]
    outcomes: Mapping[str, Outcomes]
    """By model that took part in games."""
    opponent: str | None
    """Whom the games were against."""

    @property
    def models(self) -> list[str]:
        """Their names."""
        return list(self.rows)


def score(rows: Sequence[Row]) -> Estimates:
    """Estimates from one model's rows; pass@k for k of 2, 4, 8 and so on up to the number of samples.

    What a verifier says is left out of prompts that have none, and each reward is that of sampled answers.
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
    estimates["words"] = mean_estimate([float(row["num_words"]) for row in greedy])
    for name in rows[0]["rewards"]:
        estimates[f"reward_{name}"] = mean_estimate([_mean_reward(group, name) for group in groups])
    return estimates


def _sizes(num_generations: int) -> list[int]:
    """Powers of two below the number of samples, and it; that of one sample is the sampled accuracy."""
    return [*(1 << bits for bits in range(1, (num_generations - 1).bit_length())), num_generations]


def gains(rows: Sequence[Row], before: Sequence[Row]) -> Estimates:
    """Differences to another model on the same prompts: greedy accuracy, and each reward of sampled answers.

    Being paired, their errors are below those of two means.
    """
    pairs = [pair for pair in zip(rows, before, strict=True) if pair[0]["greedy"] and pair[0]["verifiable"]]
    estimates: Estimates = {}
    if pairs:
        estimates["accuracy_gain"] = paired(*([float(row["correct"]) for row in part] for part in zip(*pairs)))  # noqa: B905
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
    """By model, in their order: ``score``, the gains over the model before it, and how its games ended."""
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
    """``score`` for each family, or each difficulty."""
    values = sorted({row[key] for row in rows})
    return {str(value): score([row for row in rows if row[key] == value]) for value in values}


def comparisons(found: Evaluation) -> Iterator[Comparison]:
    """Each model with the one before it, and with whom it played."""
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
    """A metric's name for people; the reward of a reward model needs the word once."""
    return name.replace("reward_reward", "reward").replace("_", " ")
