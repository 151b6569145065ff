"""Win rates: each chat model's sampled completions against another model's or reference answers, decided by a rule.

Completion i of a model plays completion i + 1 of the reference model. The two do not share a random stream, so the
reference also plays a fair game against itself. A prompt counts once, whatever its number of games.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import brevity_win, judge
from lilpipe.alignment.rollout.completion_rows import by_prompt
from lilpipe.config.evaluate import JudgeConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation.judge import Judge, Outcome, Pairing, check_readable
from lilpipe.metrics.pass_at_k import Estimate, mean_estimate
from lilpipe.schemas.chunks import Row, run_chunks
from lilpipe.schemas.examples import Prompt
from lilpipe.stage import Workspace

OUTCOME_SCHEMA = pa.schema([("win", pa.float64()), ("flipped", pa.bool_())])
GAMES_PER_CHUNK = 16
"""Games that a language model judges per chunk; progress is reported and saved after each chunk."""
UNREADABLE_ALARM = 0.1
"""Share of games without a verdict above which the run logs a warning."""


@dataclass(frozen=True)
class Game:
    """Two completions of one prompt."""

    mine: Row
    other: Row


Games = dict[str, list[Game]]
"""Games of each prompt."""
Outcomes = dict[str, list[Outcome]]
"""Outcomes of each prompt's games."""


def set_against(rows: Sequence[Row], opponent: Sequence[Row]) -> Games:
    """Pair each sampled completion with the opponent's next one, for prompts that the opponent has."""
    theirs = {group[0]["prompt_id"]: group for group in by_prompt([row for row in opponent if not row["greedy"]])}
    games = {}
    for mine in by_prompt([row for row in rows if not row["greedy"]]):
        prompt = mine[0]["prompt_id"]
        if other := theirs.get(prompt):
            games[prompt] = [Game(*pair) for pair in zip(mine, [*other[1:], other[0]], strict=True)]
    return games


def reference_answers(prompts: Sequence[Prompt], *, num_generations: int) -> list[Row]:
    """Return the prompts' reference answers as rows of a model that always gives the same answer.

    Raises ``ConfigError`` if no prompt has one.
    """
    if not any(prompt.reference for prompt in prompts):
        raise ConfigError(
            "evaluate.win_against: got 'answer', but no prompt of the split has a reference answer; set it to 'model' "
            "instead"
        )
    return [
        {
            "prompt_id": prompt.id,
            "question": prompt.question,
            "greedy": False,
            "sample": sample,
            "completion": prompt.reference,
            "num_tokens": 0,
            **vars(judge(prompt, prompt.reference, ended=True)),
        }
        for prompt in prompts
        if prompt.reference
        for sample in range(num_generations)
    ]


# --- rules --------------------------------------------------------------------------------------------------------


def by_brevity(game: Game) -> Outcome:
    """Decide by brevity: well-formed beats malformed, then fewer words win (``brevity_win``)."""
    a, b = game.mine, game.other
    return Outcome(brevity_win((a["well_formed"], b["well_formed"]), (a["num_words"], b["num_words"])))


def by_reward(name: str) -> Callable[[Game], Outcome]:
    """Return a rule: the higher value of the reward wins."""

    def rule(game: Game) -> Outcome:
        mine, other = game.mine["rewards"][name], game.other["rewards"][name]
        return Outcome(0.5 if mine == other else float(mine > other))

    return rule


def play(games: Mapping[str, Games], rule: Callable[[Game], Outcome]) -> dict[str, Outcomes]:
    """Return each model's outcomes by a rule."""
    return {
        model: {prompt: [rule(game) for game in group] for prompt, group in groups.items()}
        for model, groups in games.items()
    }


def play_before_judge(games: Mapping[str, Games], config: JudgeConfig, workspace: Workspace) -> dict[str, Outcomes]:
    """Return each model's outcomes by a language model, for ``games_per_prompt`` games of ``num_prompts`` prompts.

    Raises ``ConfigError`` if the judge rejects a request, ``StageFailure`` if it is not reachable, ``DataError`` if
    none of its verdicts is readable.
    """
    cut = {
        model: {
            prompt: group[: config.games_per_prompt] for prompt, group in islice(groups.items(), config.num_prompts)
        }
        for model, groups in games.items()
    }
    flat = [game for groups in cut.values() for group in groups.values() for game in group]
    concurrency = max(1, config.concurrency // distributed.world_size())
    judge_model = Judge(config, workspace.scratch / "replies", concurrency=concurrency)

    def work(index: int) -> list[Row]:
        part = flat[index * GAMES_PER_CHUNK : (index + 1) * GAMES_PER_CHUNK]
        pairings = [Pairing(g.mine["question"], g.mine["completion"], g.other["completion"]) for g in part]
        return [dict(vars(outcome)) for outcome in judge_model.decide(pairings)]

    num_chunks = -(-len(flat) // GAMES_PER_CHUNK)
    table = run_chunks(work, num_chunks, name="verdicts", schema=OUTCOME_SCHEMA, workspace=workspace)
    outcomes = [Outcome(**row) for row in table]
    # Equal completions tie without asking the judge, so the readable share is that of the other games.
    asked = [o for game, o in zip(flat, outcomes, strict=True) if game.mine["completion"] != game.other["completion"]]
    if (share := check_readable(asked)) > UNREADABLE_ALARM:
        workspace.log(
            f"the judge gave no readable verdict in {share:.0%} of {len(asked)} games, which are left out; "
            "raise evaluate.judge.max_new_tokens, or change its template or model"
        )
    each = iter(outcomes)
    return {
        model: {prompt: [next(each) for _ in group] for prompt, group in groups.items()}
        for model, groups in cut.items()
    }


# --- scores -------------------------------------------------------------------------------------------------------


def win_scores(outcomes: Outcomes, *, judged: bool = False) -> dict[str, Estimate]:
    """Return the win rate (a tie is half a win) and the tie rate.

    With a language model as judge, also the share of verdicts that changed with the order of the answers
    (``flip_rate``), and the share of games without a verdict (``unreadable_ratio``). Games without a verdict are left
    out of the other rates.
    """
    read = [[outcome for outcome in group if outcome.win is not None] for group in outcomes.values()]
    read = [group for group in read if group]
    scores: dict[str, Estimate] = {}
    if read:
        scores["win_rate"] = mean_estimate([_mean([o.win or 0.0 for o in group]) for group in read])
        scores["tie_rate"] = mean_estimate([_mean([o.win == 0.5 for o in group]) for group in read])
    if read and judged:
        scores["flip_rate"] = mean_estimate([_mean([o.flipped for o in group]) for group in read])
    if outcomes and judged:
        scores["unreadable_ratio"] = mean_estimate(
            [_mean([o.win is None for o in group]) for group in outcomes.values()]
        )
    return scores


def ending(outcome: Outcome) -> str:
    """Return a game's outcome in words."""
    if outcome.win is None:
        return "no verdict"
    if outcome.flipped:
        return "tie (went with the place)"
    return {1.0: "won", 0.0: "lost"}.get(outcome.win, "tie")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
