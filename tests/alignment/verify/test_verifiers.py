import pytest

from lilpipe.alignment.rewards.reward_functions import CompletionText, Rewards, judge
from lilpipe.alignment.verify.verifiers import has_form, is_thinking, stated_number, verify
from lilpipe.config.prompts import RewardConfig
from lilpipe.schemas.examples import Prompt

EIGHTEEN = Prompt("p", "gsm8k", "How much?", "18", verifier="numeric")
DOUBLE = Prompt("p", "programs", "Double a number.", "assert double(2) == 4", verifier="program")
POEM = Prompt("p", "instructions", "Write a poem.", "", reference="Roses are red.", verifier="none")


@pytest.mark.parametrize(
    ("marker", "expected"), [(None, 9), ("####", None), ("Answer:", 2), ("<answer>", None), ("nowhere", None)]
)
def test_a_stated_number_is_that_behind_the_last_marker_or_the_last_of_all(marker, expected):
    assert stated_number("#### 1 Answer: 2\n#### 3 or 9 <answer>none", marker) == expected


@pytest.mark.parametrize(
    ("answer", "stated", "correct"),
    [
        ("1", "1/2", False),
        ("0.5", "1/2", True),
        ("1/3", "2/6", True),
        ("9", "9 500", False),
        ("9500", "9 500", True),
        ("3", "3 or 4", False),
        ("3", "between 3 and 4", False),
        ("3", "3-4", False),
        ("9500", "9{,}500", True),
        ("-3", "- 3", True),
        ("3", "- 3", False),
        ("5", "5 million", False),
        ("100000", "1e5", True),
        ("1", "1e5", False),
    ],
)
def test_the_whole_stated_answer_is_graded(answer, stated, correct):
    prompt = Prompt("p", "s", "How much?", answer, verifier="numeric")
    assert verify(prompt, f"Work.\nAnswer: {stated}") is correct
    scored = Rewards((RewardConfig(kind="numeric", marker="Answer:"),))([prompt], [CompletionText(stated, True, 1)])
    assert scored[0].total == 0  # no marker
    scored = Rewards((RewardConfig(kind="numeric", marker="####"),))(
        [prompt], [CompletionText(f"Work.\n#### {stated}", True, 1)]
    )
    assert scored[0].total == correct


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("9 * 2 = 18.\nAnswer: 18", True),
        ("Answer: $18.00", True),
        ("Answer: 18 dollars", True),
        ("Answer: 81", False),
        ("Answer: eighteen", False),
        ("So it is 18", False),
        ("Answer: 17\nAnswer: 18", False),
    ],
)
def test_a_numeric_answer_is_compared_as_a_number_where_it_is_stated(completion, correct):
    assert verify(EIGHTEEN, completion) is correct
    verdict = judge(EIGHTEEN, completion, ended=True)
    assert verdict.correct <= verdict.well_formed


@pytest.mark.parametrize(
    ("completion", "well_formed", "correct"),
    [
        ("```python\ndef double(x): return 2 * x\n```", True, True),
        ("```python\ndef double(x): return x\n```", True, False),
        ("def double(x): return 2 * x", False, False),
    ],
)
def test_a_program_is_correct_if_it_passes_the_prompts_tests(completion, well_formed, correct):
    verdict = judge(DOUBLE, completion, ended=True)
    assert (verdict.well_formed, verdict.correct) == (well_formed, correct)


def test_without_a_verifier_any_words_have_the_form_and_none_are_correct():
    assert has_form(POEM, "Roses are red.")
    assert not has_form(POEM, " ")
    assert not verify(POEM, POEM.reference)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>2 + 2</think><answer>4</answer>", True),
        (" <think>a\nb</think>\n<answer>4</answer>\n", True),
        ("<think></think><answer>4</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think>4", False),
        ("So <think>a</think><answer>4</answer>", False),
        ("<think>a</think><answer>4</answer> done", False),
        ("<think>a</think><answer>4</answer><answer>5</answer>", False),
        ("<answer>4</answer><think>a</think>", False),
    ],
)
def test_a_thinking_response_has_each_part_once_and_nothing_around(completion, expected):
    assert is_thinking(completion) is expected
