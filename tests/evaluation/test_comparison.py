import random
from statistics import fmean, stdev

import pytest

from lilpipe.evaluation.comparison import Comparison, beyond_noise, over_seeds, paired, wording
from lilpipe.metrics.pass_at_k import Estimate


def test_better_is_said_only_outside_of_two_standard_errors():
    assert wording(Estimate(0.041, 0.02, 100)) == "better"
    assert wording(Estimate(-0.041, 0.02, 100)) == "worse"
    assert wording(Estimate(0.039, 0.02, 100)) == "no difference within the noise"
    assert wording(Estimate(0.0, 0.0, 100)) == "no difference within the noise"
    assert wording(Estimate(0.041, 0.02, 100), higher_is_better=False) == "worse"


def test_one_value_shows_nothing():
    assert beyond_noise(Estimate(0.9, 0.0, 1)) == 0


def test_equals_are_told_apart_about_once_in_twenty_times():
    draw = random.Random(0)
    wrong = sum(
        beyond_noise(paired([draw.random() for _ in range(50)], [draw.random() for _ in range(50)])) != 0
        for _ in range(1_000)
    )
    assert 25 <= wrong <= 80


def test_pairing_takes_away_what_both_have_in_common():
    before = [0.1, 0.9, 0.4, 0.6]
    after = [0.2, 1.0, 0.5, 0.7]
    difference = paired(after, before)
    assert difference.value == pytest.approx(0.1)
    assert difference.stderr == pytest.approx(0, abs=1e-12)
    assert wording(difference) == "better"


def test_the_error_over_seeds_is_never_below_that_over_prompts():
    spread = [Estimate(0.1, 0.01, 500), Estimate(0.3, 0.01, 500), Estimate(0.2, 0.01, 500)]
    assert over_seeds(spread).value == pytest.approx(fmean([0.1, 0.3, 0.2]))
    assert over_seeds(spread).stderr == pytest.approx(stdev([0.1, 0.3, 0.2]) / 3**0.5)
    agreed = [Estimate(0.1, 0.06, 500)] * 3
    assert over_seeds(agreed).stderr == pytest.approx(0.06 / 3**0.5)
    assert over_seeds(agreed).n == 3
    assert wording(over_seeds(agreed)) == "better"  # 0.1 against 2 x 0.035
    assert wording(over_seeds(agreed[:1])) == "no difference within the noise"


def test_a_sentence_says_no_more_than_the_numbers():
    better = Comparison("accuracy", Estimate(0.12, 0.02, 1_000), model="grpo", than="dpo")
    assert better.sentence == "accuracy: grpo is better than dpo, +0.120 ± 0.020 (1,000 prompts)"
    nothing = Comparison("accuracy", Estimate(0.03, 0.02, 3), model="grpo", than="dpo", unit="seeds")
    assert nothing.sentence == "accuracy: no difference within the noise between grpo and dpo, +0.030 ± 0.020 (3 seeds)"
