"""Rules that pair the completions to one prompt; see ``preferences.rule``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lilpipe.config.preferences import PreferencesConfig
from lilpipe.schemas.chunks import Row

VERDICTS = ((True, True), (True, False), (False, False))
"""(well-formed, correct), best first."""


def brevity_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """Return (chosen, rejected) pairs among the completions to one prompt, at most ``max_pairs_per_prompt``.

    Both completions ended, have the same verdict and differ by at least ``min_words_apart``; each is used at most once.
    Correct completions are paired first, then, unless ``only_correct``, well-formed incorrect ones, then malformed
    ones.
    """
    pairs: list[tuple[Row, Row]] = []
    take = _widest if config.contrast == "widest" else _nearest
    for verdict in VERDICTS[:1] if config.only_correct else VERDICTS:
        alike = {
            row["completion"]: row
            for row in reversed(rows)
            if row["ended"] and (row["well_formed"], row["correct"]) == verdict
        }
        left = sorted(alike.values(), key=lambda row: row["sample"])
        while (pair := take(left, config.min_words_apart)) is not None:
            left = [row for row in left if row not in pair]
            pairs.append(pair)
    return pairs[: config.max_pairs_per_prompt]


def _widest(rows: Sequence[Row], min_words_apart: int) -> tuple[Row, Row] | None:
    """Return the shortest and the longest completion if they differ by ``min_words_apart``."""
    ranked = sorted(rows, key=lambda row: (row["num_words"], row["sample"]))
    apart = ranked[-1]["num_words"] - ranked[0]["num_words"] if ranked else 0
    return (ranked[0], ranked[-1]) if apart >= min_words_apart else None


def _nearest(rows: Sequence[Row], min_words_apart: int) -> tuple[Row, Row] | None:
    """Return the first completion with another at least ``min_words_apart`` longer, and the shortest such other."""
    for row in rows:
        longer = [other for other in rows if other["num_words"] - row["num_words"] >= min_words_apart]
        if longer:
            return row, min(longer, key=lambda other: (other["num_words"], other["sample"]))
    return None


def reward_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """Return (chosen, rejected): the best completion with the worst, the second best with the second worst, and so on.

    Both ended and their rewards differ, by at least ``min_margin``; each completion is used at most once.
    """
    ranked = sorted(distinct(rows), key=lambda row: (-row["reward"], row["sample"]))
    pairs = list(zip(ranked, reversed(ranked), strict=True))[: len(ranked) // 2]
    apart = [(best, worst) for best, worst in pairs if best["reward"] - worst["reward"] >= config.min_margin]
    return [(best, worst) for best, worst in apart if best["reward"] > worst["reward"]][: config.max_pairs_per_prompt]


def correctness_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """Return (chosen, rejected): correct and incorrect completions that ended, each used at most once, in order."""
    ended = distinct(rows)
    right, wrong = ([row for row in ended if row["correct"] is verdict] for verdict in (True, False))
    return list(zip(right, wrong, strict=False))[: config.max_pairs_per_prompt]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the ended, non-empty completions in sampling order, without duplicates up to whitespace."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["ended"] and row["completion"]:
            found.setdefault(" ".join(row["completion"].split()), row)
    return list(found.values())


RULES: dict[str, Callable[[Sequence[Row], PreferencesConfig], list[tuple[Row, Row]]]] = {
    "brevity": brevity_pairs,
    "reward": reward_pairs,
    "correctness": correctness_pairs,
}
"""Pairing function of each rule: from the completions to one prompt to its pairs."""

NO_PAIR = {
    "brevity": "the same verdict and different lengths",
    "reward": "sufficiently different rewards",
    "correctness": "different verdicts",
}
"""Requirement on the two completions of a pair, for error messages."""

REMEDY = {
    "brevity": "allow pairs of incorrect completions (preferences.only_correct = false)",
    "reward": "lower preferences.min_margin, or use rewards that distinguish more completions",
    "correctness": "use another preferences.rule",
}
"""Remedy if no prompt has a pair, for error messages."""
