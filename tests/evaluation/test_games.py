import pytest

from lilpipe.errors import ConfigError, DataError
from lilpipe.evaluation.games import (
    by_brevity,
    by_reward,
    play,
    play_before_judge,
    reference_answers,
    set_against,
    win_scores,
)
from lilpipe.evaluation.judge import Outcome
from lilpipe.schemas.examples import Prompt
from lilpipe.stage import Workspace
from tests.evaluation.judges import babbles, judge_config, serving
from tests.evaluation.rows import games


def win_rate(rows, reference):
    return win_scores(play({"model": set_against(rows, reference)}, by_brevity)["model"])["win_rate"]


def test_the_win_rate_counts_ties_as_half_and_malformed_completions_as_lost():
    assert win_rate(games([[1, 1]]), games([[2, 2]])).value == 1
    assert win_rate(games([[2, 2]]), games([[2, 2]])).value == 0.5
    assert win_rate(games([[9, None]]), games([[None, 1]])).value == (0 + 0.5) / 2  # 9 against 1, both malformed
    assert win_rate(games([[9, None]]), games([[1, None]])).value == (1 + 0) / 2  # against a malformed one, as one
    estimate = win_rate(games([[1, 1], [3, 3]]), games([[2, 2], [2, 2]]))
    assert (estimate.value, estimate.stderr, estimate.n) == (0.5, 0.5, 2)


def test_a_completion_never_meets_the_one_of_its_own_random_stream():
    # Equal models that draw equal completions would tie in each game; here each game has a winner.
    rows = games([[1, 2, 3]])
    assert win_rate(rows, rows).value == pytest.approx(2 / 3)  # 1 < 2, 2 < 3, 3 > 1


def test_the_higher_reward_wins_and_equal_ones_tie():
    rows = [{**row, "rewards": {"worth": value}} for row, value in zip(games([[1, 1, 1]]), (1, 2, 3), strict=True)]
    other = [{**row, "rewards": {"worth": 2.0}} for row in games([[1, 1, 1]])]
    outcomes = play({"model": set_against(rows, other)}, by_reward("worth"))["model"]
    assert [outcome.win for outcome in outcomes["0"]] == [0, 0.5, 1]


def test_completions_may_be_set_against_those_that_come_with_prompts():
    known = [Prompt("0", "sort", "q", "a", reference="Answer: a b c"), Prompt("1", "sort", "q", "a")]
    opponent = reference_answers(known, num_generations=2)
    assert [(row["prompt_id"], row["num_words"], row["well_formed"]) for row in opponent] == [("0", 4, True)] * 2
    outcomes = play({"model": set_against(games([[3, 5], [1, 1]]), opponent)}, by_brevity)["model"]
    assert {prompt: [o.win for o in group] for prompt, group in outcomes.items()} == {"0": [1, 0]}
    with pytest.raises(ConfigError, match=r"evaluate\.win_against: got 'answer', but no prompt"):
        reference_answers(known[1:], num_generations=2)


def test_a_place_that_decides_is_a_tie_and_reported():
    outcomes = {"0": [Outcome(0.5, flipped=True)], "1": [Outcome(1.0)], "2": [Outcome(None)], "3": [Outcome(0.5)]}
    scores = {name: (estimate.value, estimate.n) for name, estimate in win_scores(outcomes, judged=True).items()}
    assert scores == {
        "win_rate": (pytest.approx(2 / 3), 3),
        "tie_rate": (pytest.approx(2 / 3), 3),
        "flip_rate": (pytest.approx(1 / 3), 3),
        "unreadable_ratio": (0.25, 4),
    }


def test_a_judge_that_says_nothing_is_refused_though_most_completions_tie_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    mine, theirs = ([{**row, "question": "q", "completion": "alike"} for row in games([[1]] * 5)] for _ in range(2))
    mine[3]["completion"] = "another"
    with serving(babbles) as (address, asked), pytest.raises(DataError, match="none of the 1 games got a verdict"):
        play_before_judge({"model": set_against(mine, theirs)}, judge_config(address), Workspace(tmp_path))
    assert len(asked.bodies) == 2
