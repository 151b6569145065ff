import math
from typing import get_args

import pytest
from pydantic import ValidationError

from lilpipe.alignment.rewards import reward_functions as module
from lilpipe.alignment.rewards.reward_functions import (
    CompletionText,
    Rewards,
    Scored,
    brevity_win,
    external,
    judge,
    reward,
)
from lilpipe.config.prompts import ANSWER_REWARD, RewardConfig, RewardConfigs, RewardKind
from lilpipe.config.section import Section
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Prompt
from lilpipe.stage import Workspace

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")
NUMBER = Prompt("n", "gsm8k", "How much?", "1,250", verifier="numeric")
PROGRAM = Prompt("c", "programs", "Double a number.", "assert double(2) == 4", verifier="program")


class SectionWithRewards(Section):
    rewards: RewardConfigs = ANSWER_REWARD


def worth(text, *, prompt=PROMPT, ended=True, num_tokens=10, **settings):
    """What one reward gives for one completion."""
    scored = Rewards([RewardConfig(**settings)])([prompt], [CompletionText(text, ended, num_tokens)])
    return scored[0].total


@pytest.mark.parametrize(
    ("completion", "ended", "expected"),
    [("Answer: 1 3", True, 1.0), ("Answer: 1 3", False, 0.0), ("Answer: 3 1", True, 0.0), ("1 3", True, 0.0)],
)
def test_only_what_is_right_and_ended_is_rewarded(completion, ended, expected):
    assert reward(judge(PROMPT, completion, ended=ended)) == expected
    assert worth(completion, ended=ended, kind="answer") == expected


@pytest.mark.parametrize(
    ("completion", "settings", "expected"),
    [
        ("It makes $1250.00", {}, 1.0),
        ("1250 and then 7", {}, 0.0),
        ("#### 1,250", {"marker": "####"}, 1.0),
        ("1,250", {"marker": "####"}, 0.0),
        ("<answer>1250</answer> 8", {"marker": "<answer>"}, 1.0),
        ("1249.5", {}, 0.0),
        ("1249.5", {"tolerance": 0.5}, 1.0),
        ("no number", {}, 0.0),
    ],
)
def test_a_number_is_rewarded_however_it_is_written(completion, settings, expected):
    assert worth(completion, prompt=NUMBER, kind="numeric", **settings) == expected
    assert worth(completion, prompt=NUMBER, ended=False, kind="numeric", **settings) == 0


def test_a_form_is_rewarded_whatever_the_answer():
    assert worth("Answer: 9", kind="format") == 1
    assert worth("9", kind="format") == 0
    assert worth("<think>a</think><answer>9</answer>", kind="format", template="think") == 1
    assert worth("Answer: 9", kind="format", template="think") == 0


def test_a_pattern_may_run_over_lines():
    assert worth("First this\nthen that", kind="regex", pattern="first.*that$") == 0
    assert worth("First this\nthen that", kind="regex", pattern="First.*that$") == 1


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (10, 0.5), (20, 1), (30, 0.5), (40, 0), (90, 0)])
def test_a_length_is_rewarded_by_how_near_it_is(num_tokens, expected):
    assert worth("", num_tokens=num_tokens, kind="length", target_tokens=20) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (80, 0), (85, -0.25), (95, -0.75), (100, -1), (300, -1)])
def test_a_response_is_punished_the_more_the_longer_it_is_over(num_tokens, expected):
    assert worth("", num_tokens=num_tokens, ended=False, kind="length", limit_tokens=100) == expected
    assert worth("", num_tokens=num_tokens, kind="length", limit_tokens=100, buffer_tokens=20) == expected


def test_a_language_is_told_from_another():
    english = "The weather was cold, so we stayed at home and read our books by the fire."
    german = "Das Wetter war kalt, also blieben wir zu Hause und lasen unsere Bücher am Feuer."
    assert worth(english, kind="language") > 0.8 > 0.1 > worth(german, kind="language")
    assert worth(german, kind="language", language="de") > 0.8
    assert worth("", kind="language") < 0.5
    with pytest.raises(ConfigError, match="language 'klingon' is unknown; expected one of the codes"):
        Rewards([RewardConfig(kind="language", language="klingon")])


def test_a_program_is_rewarded_for_passing_and_its_end_has_a_name():
    texts = {
        "```python\ndef double(x): return 2 * x\n```": (1.0, "passed"),
        "```python\ndef double(x): return 3 * x\n```": (0.0, "wrong"),
        "no program": (0.0, "no_program"),
        "```python\nbytearray(10**10)\n```": (0.0, "memory"),
        "```python\nimport socket\nsocket.socket()\n```": (0.0, "network"),
    }
    rewards = Rewards([RewardConfig(kind="program", timeout_seconds=1)])
    scored = rewards([PROGRAM] * len(texts), [CompletionText(text, True, 10) for text in texts])
    assert [(one.total, one.reasons["program"]) for one in scored] == list(texts.values())


class CountingModel:
    """Scores a conversation by the words of its answer."""

    def score(self, conversations):
        assert all([turn["role"] for turn in each] == ["user", "assistant"] for each in conversations)
        return [float(len(each[-1]["content"].split())) for each in conversations]


def test_rewards_are_added_by_weight_and_each_is_told_apart():
    configs = [
        RewardConfig(kind="answer", weight=2),
        RewardConfig(kind="reward_model", weight=-0.5, name="words"),
        RewardConfig(kind="length", limit_tokens=20, buffer_tokens=10),
    ]
    rewards = Rewards(configs, reward_model=CountingModel())
    scored = rewards([PROMPT, PROMPT], [CompletionText("Answer: 1 3", True, 15), CompletionText("No", True, 5)])
    assert rewards.names == ["answer", "words", "length"]
    assert scored == [
        Scored(0.0, {"answer": 1.0, "words": 3.0, "length": -0.5}),
        Scored(-0.5, {"answer": 0.0, "words": 1.0, "length": 0.0}),
    ]


def test_a_reward_model_that_is_not_there_is_asked_for():
    with pytest.raises(ConfigError, match=r"reward 'reward_model' is of kind 'reward_model'.*input `reward_model`"):
        Rewards([RewardConfig(kind="reward_model")])


def test_a_reward_model_that_has_diverged_rewards_nothing():
    class DivergedModel:
        def score(self, conversations):
            return [math.nan] * len(conversations)

    rewards = Rewards([RewardConfig(kind="reward_model")], reward_model=DivergedModel())
    with pytest.raises(DataError, match="score is not finite"):
        rewards([PROMPT], [CompletionText("x", True, 1)])


def test_every_kind_that_can_be_named_is_there():
    assert set(module.KINDS) == set(get_args(RewardKind))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tallest"}, "there is no reward 'tallest'; known: answer, numeric"),
        (
            {"kind": "answer", "pattern": "x"},
            r"'answer': got options pattern, which it does not use \(its options: none\)",
        ),
        ({"kind": "regex"}, "'regex': needs pattern"),
        ({"kind": "regex", "pattern": "("}, "is not a valid regular expression"),
        ({"kind": "answer", "file": "x.py"}, "x.py would be ignored"),
        ({"kind": "answer", "options": {"a": 1}}, "would be ignored: they are only for extensions"),
        (
            {"kind": "mine", "file": "x.py", "pattern": "x"},
            r"'mine': got options pattern, which it does not use \(its options: none\)",
        ),
        ({"kind": "length"}, "one of target_tokens and limit_tokens"),
        ({"kind": "length", "target_tokens": 3, "limit_tokens": 4}, "one of target_tokens and limit_tokens"),
        ({"kind": "length", "limit_tokens": 4, "buffer_tokens": 5}, "buffer_tokens 5 must be at most limit_tokens 4"),
        ({"kind": "answer", "strength": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_are_unknown_or_would_be_ignored_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig(**settings)


def test_two_rewards_of_one_name_are_refused_and_so_are_none():
    with pytest.raises(ValidationError, match=r"names must be unique, got \['answer', 'answer'\]"):
        SectionWithRewards(rewards=(*ANSWER_REWARD, *ANSWER_REWARD))
    with pytest.raises(ValidationError, match="at least 1 item"):
        SectionWithRewards(rewards=())


def test_a_section_with_rewards_survives_being_written_out():
    section = SectionWithRewards(rewards=(RewardConfig(kind="regex", pattern="x"), *ANSWER_REWARD))
    assert SectionWithRewards.model_validate_json(section.model_dump_json()) == section


# --- a file of the user's own -------------------------------------------------------------------------------------

VOWELS = (
    "def score(prompt, completion):\n    return sum(c in 'aeiou' for c in completion.text) + len(prompt.answer) / 10\n"
)


def of_file(path, source, function="score"):
    path.write_text(source)
    return RewardConfig(kind=function, file=str(path), name="mine")


def test_a_function_of_the_users_own_is_a_reward_like_any_other(tmp_path):
    rewards = Rewards([of_file(tmp_path / "mine.py", VOWELS)])
    assert rewards([PROMPT], [CompletionText("banana", True, 3)]) == [Scored(3.3, {"mine": 3.3})]


def test_the_users_file_may_define_what_looks_its_own_module_up(tmp_path):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Bonus:\n"
        "    size: float = 2.0\n\ndef score(prompt, completion):\n    return Bonus().size\n"
    )
    assert Rewards([of_file(tmp_path / "mine.py", source)])([PROMPT], [CompletionText("x", True, 1)])[0].total == 2.0


def test_options_are_keyword_arguments_of_the_users_function(tmp_path):
    (tmp_path / "mine.py").write_text("def at(prompt, completion, *, scale): return scale * completion.num_tokens\n")
    config = RewardConfig(kind="at", file=str(tmp_path / "mine.py"), options={"scale": 0.5})
    assert Rewards([config])([PROMPT], [CompletionText("x", True, 3)])[0].parts == {"at": 1.5}


def test_the_model_of_languages_is_part_of_the_identity_and_a_plain_reward_adds_nothing():
    assert external(SectionWithRewards()) == {}
    assert list(external(SectionWithRewards(rewards=(RewardConfig(kind="language"),)))) == ["reward language"]


@pytest.mark.parametrize(
    ("source", "function", "error", "message"),
    [
        (VOWELS, "mark", ConfigError, "has no 'mark'; it has score"),
        ("import nothing_of_this_name", "score", ConfigError, "fails on import: ModuleNotFoundError"),
        ("raise SystemExit(3)", "score", ConfigError, "fails on import: SystemExit: 3"),
        (
            "def score(prompt, completion): return 1 / 0",
            "score",
            DataError,
            "fails on prompt 'p': ZeroDivisionError",
        ),
        ("def score(prompt, completion): return float('nan')", "score", DataError, "returned nan for prompt 'p'"),
        ("def score(prompt, completion): return 'high'", "score", DataError, "fails on prompt 'p': ValueError"),
    ],
)
def test_what_is_wrong_with_the_users_file_is_told(tmp_path, source, function, error, message):
    config = of_file(tmp_path / "mine.py", source, function)
    with pytest.raises(error, match=message):
        Rewards([config])([PROMPT], [CompletionText("x", True, 1)])


# --- preference for brevity ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "verifier", "is_told"),
    [("answer", "answer", False), ("program", "none", True), ("answer", "program", True)],
)
def test_a_stage_that_runs_programs_logs_what_protects_from_them(tmp_path, kind, verifier, is_told):
    workspace = Workspace(tmp_path)
    workspace.log("begun")
    prompts = [Prompt("p", "f", "Double it.", "assert True", verifier=verifier)]
    Rewards([RewardConfig(kind=kind)]).log_sandbox(prompts, workspace)
    assert ("programs in completions run with the network blocked" in workspace.events.read_text()) == is_told
