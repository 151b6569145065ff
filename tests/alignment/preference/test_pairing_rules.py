import pytest

from lilpipe.alignment.preference.pairing_rules import brevity_pairs, correctness_pairs, reward_pairs
from lilpipe.config.preferences import PreferencesConfig


def row(words, *, correct=True, well_formed=True, ended=True, sample=0):
    return {
        "completion": " ".join(["w"] * words + [f"{correct} {sample}"]),
        "num_words": words,
        "correct": correct and well_formed,
        "well_formed": well_formed,
        "ended": ended,
        "sample": sample,
    }


def words(pairs):
    return [(chosen["num_words"], rejected["num_words"]) for chosen, rejected in pairs]


def config(**settings):
    return PreferencesConfig(seed=0, **settings)


def test_the_shorter_of_two_correct_completions_is_chosen():
    assert words(brevity_pairs([row(5), row(2)], config(max_pairs_per_prompt=1, only_correct=True))) == [(2, 5)]


def test_the_widest_difference_comes_first_and_no_completion_is_used_twice():
    rows = [row(n, sample=n) for n in (4, 9, 2, 7, 3)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=True))) == [(2, 9), (3, 7)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=1, only_correct=True))) == [(2, 9)]


def test_the_first_completion_is_chosen_against_the_nearest_longer_one_where_asked():
    rows = [row(n, sample=i) for i, n in enumerate((9, 4, 2, 17, 3))]
    assert words(brevity_pairs(rows, config(contrast="nearest"))) == [(9, 17)]
    assert words(brevity_pairs(rows, config(contrast="nearest", min_words_apart=6))) == [(9, 17)]
    assert words(brevity_pairs(rows, config(contrast="nearest", min_words_apart=9))) == [(4, 17)]
    assert brevity_pairs(rows, config(contrast="nearest", min_words_apart=16)) == []
    assert brevity_pairs(rows, config(min_words_apart=16)) == []


@pytest.mark.parametrize(
    "rows",
    [
        [row(3, sample=1), row(3, sample=2)],
        [row(2), row(5, correct=False)],
        [row(2, well_formed=False), row(5)],
        [row(2, well_formed=False), row(5, correct=False)],
        [row(2, well_formed=False, ended=False), row(5, well_formed=False)],
        [row(2)],
        [],
    ],
    ids=["equal length", "other verdict", "malformed", "malformed and wrong", "cut off", "alone", "none"],
)
def test_completions_that_differ_in_more_or_less_than_length_are_no_pair(rows):
    assert brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=False)) == []


def test_completions_that_are_wrong_alike_are_paired_on_request_after_correct_ones():
    malformed = [row(1, well_formed=False), row(9, well_formed=False)]
    rows = [*malformed, row(2, correct=False), row(5, correct=False), row(3), row(4)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=True))) == [(3, 4)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=False))) == [(3, 4), (2, 5), (1, 9)]
    assert words(brevity_pairs(rows[:4], config(max_pairs_per_prompt=1, only_correct=False))) == [(2, 5)]


def rewarded(*rewards, **settings):
    return [{**row(2, sample=index), "reward": reward, **settings} for index, reward in enumerate(rewards)]


def rewards_of(pairs):
    return [(chosen["reward"], rejected["reward"]) for chosen, rejected in pairs]


def test_the_best_completion_is_chosen_against_the_worst():
    rows = rewarded(0.5, -1.0, 2.0, 0.1)
    assert rewards_of(reward_pairs(rows, config(rule="reward"))) == [(2.0, -1.0)]
    assert rewards_of(reward_pairs(rows, config(rule="reward", max_pairs_per_prompt=9))) == [(2.0, -1.0), (0.5, 0.1)]
    assert rewards_of(reward_pairs(rewarded(1.0, 3.0, 2.0), config(max_pairs_per_prompt=9))) == [(3.0, 1.0)]


def test_completions_that_are_worth_nearly_the_same_are_no_pair():
    rows = rewarded(0.5, -1.0, 2.0, 0.1)
    assert rewards_of(reward_pairs(rows, config(min_margin=3.0))) == [(2.0, -1.0)]
    assert reward_pairs(rows, config(min_margin=3.01)) == []
    assert reward_pairs(rewarded(1.0, 1.0), config()) == []
    assert reward_pairs(rewarded(1.0), config()) == reward_pairs([], config()) == []


def test_completions_that_were_cut_off_or_are_empty_or_the_same_text_are_no_pair():
    assert reward_pairs(rewarded(2.0, 1.0, ended=False), config()) == []
    assert reward_pairs(rewarded(2.0, 1.0, completion="same"), config()) == []
    assert reward_pairs([*rewarded(2.0), *rewarded(1.0, completion="")], config()) == []


def test_a_correct_completion_is_chosen_against_an_incorrect_one_in_the_order_sampled():
    rows = [row(n, correct=n % 2 == 0, sample=n) for n in range(1, 6)]
    assert words(correctness_pairs(rows, config())) == [(2, 1)]
    assert words(correctness_pairs(rows, config(max_pairs_per_prompt=9))) == [(2, 1), (4, 3)]
    assert correctness_pairs(rows[:1], config()) == []
    assert correctness_pairs([row(1, correct=False, ended=False), row(2)], config()) == []
