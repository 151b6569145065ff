import pytest

from lilpipe.alignment.prompts import Prompt
from lilpipe.alignment.rewards import brevity_win, judge, reward

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [("Answer: 1 3", True, 1.0), ("Answer: 1 3", False, 0.0), ("Answer: 3 1", True, 0.0), ("1 3", True, 0.0)],
)
def test_only_what_is_right_and_ended_is_rewarded(response, ended, expected):
    assert reward(judge(PROMPT, response, ended=ended)) == expected


@pytest.mark.parametrize(
    ("well_formed", "num_words", "expected"),
    [
        ((True, True), (3, 5), 1.0),
        ((True, True), (5, 3), 0.0),
        ((True, True), (3, 3), 0.5),
        ((True, False), (9, 1), 1.0),
        ((False, True), (1, 9), 0.0),
        ((False, False), (1, 9), 1.0),
    ],
)
def test_form_comes_before_brevity(well_formed, num_words, expected):
    assert brevity_win(well_formed, num_words) == expected
    assert brevity_win(well_formed[::-1], num_words[::-1]) == 1 - expected
