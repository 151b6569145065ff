import math

import pytest

from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.evaluation.estimates import Evaluation, comparisons, gains, score, score_by
from lilpipe.metrics.pass_at_k import Estimate
from tests.evaluation.rows import completion


def accuracy_gain(rows, before):
    return gains(rows, before)["accuracy_gain"]


def test_scores_are_worked_out_over_prompts():
    rows = [completion("a", greedy=True, correct=True), completion("b", greedy=True)]
    rows += [completion("a", greedy=False, correct=c) for c in (True, True, False)]
    rows += [completion("b", greedy=False, correct=False)] * 3
    estimates = score(rows)
    assert (estimates["accuracy"].value, estimates["accuracy"].n) == (0.5, 2)
    assert estimates["accuracy"].stderr == pytest.approx(math.sqrt(0.25 / 2))
    assert estimates["sampled_accuracy"].value == pytest.approx(1 / 3)
    assert estimates["sampled_accuracy"].stderr == pytest.approx(1 / 3)  # two prompts, 2/3 and 0
    assert estimates["pass_at_3"].value == 0.5
    assert estimates["pass_at_2"].value == 0.5  # of the three pairs of draws each holds a right one


def test_pass_at_k_is_told_for_powers_of_two_and_for_all_samples():
    rows = [completion("a", greedy=True)]
    rows += [completion("a", greedy=False, correct=number == 0) for number in range(6)]
    estimates = score(rows)
    found = {name: estimates[name].value for name in estimates if name.startswith("pass_at_")}
    assert found == pytest.approx({"pass_at_2": 2 / 6, "pass_at_4": 4 / 6, "pass_at_6": 1.0})


def test_a_gain_is_paired_by_prompt():
    before = [completion(prompt, greedy=greedy, correct=prompt == "a") for greedy in (True, False) for prompt in "abc"]
    after = [completion(prompt, greedy=greedy, correct=prompt in "ab") for greedy in (True, False) for prompt in "abc"]
    gain = accuracy_gain(after, before)
    assert gain.value == pytest.approx(1 / 3)
    assert gain.stderr == pytest.approx(1 / 3)
    assert accuracy_gain(after, after).stderr == 0


def test_prompts_that_no_program_can_check_count_for_rewards_alone():
    rows = [{**completion("a", greedy=greedy, correct=True), "rewards": {"length": 0.5}} for greedy in (True, False)]
    rows += [
        {**completion("b", greedy=greedy), "verifiable": False, "rewards": {"length": 1.0}} for greedy in (True, False)
    ]
    estimates = score(rows)
    assert (estimates["accuracy"].value, estimates["accuracy"].n) == (1, 1)
    assert (estimates["pass_at_1"].n, estimates["reward_length"].n) == (1, 2)
    assert estimates["reward_length"].value == 0.75
    assert "accuracy" not in score(rows[2:])
    assert "accuracy_gain" not in gains(rows[2:], rows[2:])


def test_the_reward_of_a_model_is_that_of_its_completions_each_prompt_once():
    rows = [{**completion("a", greedy=True), "rewards": {"length": 9.0}}]
    rows += [{**completion("a", greedy=False), "rewards": {"length": value}} for value in (1.0, 2.0)]
    rows += [{**completion("b", greedy=True), "rewards": {"length": 9.0}}]
    rows += [{**completion("b", greedy=False), "rewards": {"length": value}} for value in (3.0, 4.0)]
    estimate = score(rows)["reward_length"]
    assert (estimate.value, estimate.stderr, estimate.n) == (2.5, 1.0, 2)


def test_scores_are_given_by_family_and_by_difficulty():
    rows = [
        {**completion(prompt, greedy=greedy, correct=right, family=family), "difficulty": difficulty}
        for prompt, family, difficulty, right in (
            ("a", "sort", 2, True),
            ("b", "sort", 3, False),
            ("c", "sum", 3, True),
        )
        for greedy in (True, False)
    ]
    assert {key: value["accuracy"].value for key, value in score_by(rows, "family").items()} == {"sort": 0.5, "sum": 1}
    assert {key: value["accuracy"].value for key, value in score_by(rows, "difficulty").items()} == {"2": 1, "3": 0.5}


def test_comparisons_are_worded_by_their_noise():
    scores = {
        "sft": {"win_rate": Estimate(0.5, 0.0, 100)},
        "dpo": {"accuracy_gain": Estimate(0.01, 0.02, 100), "win_rate": Estimate(0.7, 0.02, 100)},
        "grpo": {"accuracy_gain": Estimate(0.2, 0.02, 100), "reward_length_gain": Estimate(-0.3, 0.1, 100)},
    }
    rows = {model: [] for model in scores}
    found = Evaluation(EvaluateConfig(), [], rows, scores, {}, {}, "sft")
    assert [comparison.sentence for comparison in comparisons(found)] == [
        "accuracy: no difference within the noise between dpo and sft, +0.010 ± 0.020 (100 prompts)",
        "accuracy: grpo is better than dpo, +0.200 ± 0.020 (100 prompts)",
        "reward length: grpo is worse than dpo, -0.300 ± 0.100 (100 prompts)",
        "win rate above one half: dpo is better than sft, +0.200 ± 0.020 (100 prompts)",
    ]
