import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lilpipe.alignment.questions import prompts as module
from lilpipe.alignment.questions.families import FAMILIES, Difficulty
from lilpipe.alignment.questions.prompts import SPLIT_SHARES, draw_tasks, split_of
from lilpipe.alignment.verify.verifiers import as_text, first_paragraph, is_well_formed, verify
from lilpipe.config.prompts import PromptsConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Prompt, check_not_held_out, read_conversations, read_exercises, read_prompts
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")

SMALL: dict[str, Any] = {
    "num_documents": 300,
    "num_demonstrations": 100,
    "num_train": 200,
    "num_validation": 60,
    "num_test": 60,
}


@pytest.mark.parametrize(
    "response", ["Answer: 1 3", "Sure. Answer: 1 3", "Answer:  1  3 \n", "Let me see.\nAnswer: 1 3"]
)
def test_a_right_answer_is_accepted(response):
    assert is_well_formed(response)
    assert verify(PROMPT, response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "1 3",
        "Answer:",
        "Answer: \n1 3",
        "answer: 1 3",
        "Answer: 1 3\nIs that right?",
        "Answer: 3 1 Answer: 1 3",
        "Answer: 1 3\n\nAnswer: 1 3",
    ],
)
def test_a_response_of_another_form_is_refused(response):
    assert not is_well_formed(response)
    assert not verify(PROMPT, response)


@pytest.mark.parametrize("response", ["Answer: 3 1", "Answer: 1 3 1 3", "Answer: 13", "Answer: 1 3.", "Answer: 1, 3"])
def test_a_wrong_answer_is_refused_however_well_formed(response):
    assert is_well_formed(response)
    assert not verify(PROMPT, response)


def test_a_base_models_answer_ends_at_the_first_blank_line():
    assert first_paragraph(" Answer: 1 3\n\nExercise: Sort") == "Answer: 1 3"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_task_is_in_two_splits_and_none_twice_in_one(family):
    counts = {"test": 50, "validation": 50, "train": 200, "demonstrations": 80, "exercises": 200}
    keys = {split: [task.key for task in draw_tasks(family, split, n, seed=0)] for split, n in counts.items()}
    for split, mine in keys.items():
        assert len(mine) == counts[split]
        if split != "exercises":
            assert len(set(mine)) == len(mine)
        for other, theirs in keys.items():
            assert other == split or not set(mine) & set(theirs)


def test_a_permutation_of_a_held_out_list_is_in_no_other_split(prompts):
    held_out = {
        tuple(sorted(re.findall(r"\d+", prompt.question)))
        for split in ("validation", "test")
        for prompt in read_prompts(prompts.path, split)
        if prompt.family == "sort"
    }
    train = [prompt.question for prompt in read_prompts(prompts.path, "train") if prompt.family == "sort"]
    shown = [conversation.messages[0]["content"] for conversation in read_conversations(prompts.path)]
    read = [text.split("\n")[0] for _, text in read_exercises(prompts.path) if "Sort the list" in text]
    seen = [question for question in [*train, *shown, *read] if "Sort the list" in question]
    assert held_out
    assert seen
    assert not held_out & {tuple(sorted(re.findall(r"\d+", question))) for question in seen}


def test_a_tasks_split_does_not_depend_on_seed_or_counts():
    first = {task.key for task in draw_tasks("sort", "test", 30, seed=0)}
    for seed in range(1, 4):
        assert not first & {task.key for task in draw_tasks("sort", "train", 200, seed=seed)}
    assert split_of("sort", "1 2 3") == split_of("sort", "1 2 3") in SPLIT_SHARES


def test_the_longest_lists_are_left_for_after_pretraining():
    def longest(split):
        return max(len(task.answer.split()) for task in draw_tasks("copy", split, 100, seed=0))

    assert longest("exercises") == 4
    assert longest("demonstrations") == longest("train") == longest("test") == 5


def test_a_family_too_small_for_its_split_is_refused_with_numbers():
    with pytest.raises(ConfigError, match=r"num_test.*'copy' gave \d\d distinct tasks.*100 are needed"):
        draw_tasks("copy", "test", 100, seed=0, difficulty=Difficulty(2, 2))


def test_difficulty_is_chosen_by_family_and_kept_with_each_prompt(tmp_path):
    config = PromptsConfig(**SMALL, families=("copy", "expression"), difficulty={"copy": (6, 7)})
    module.run(config, {}, Workspace(tmp_path))
    found = {}
    for prompt in read_prompts(tmp_path / "output", "train"):
        found.setdefault(prompt.family, set()).add(prompt.difficulty)
        if prompt.family == "copy":
            assert prompt.difficulty == len(prompt.answer.split())
    assert found == {"copy": {6, 7}, "expression": {2, 3}}
    exercises = [text for _, text in read_exercises(tmp_path / "output") if text.startswith("Exercise: Copy")]
    assert {len(re.findall(r"\d+", text.split("\n")[0])) for text in exercises} == {6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"difficulty": {"sort": (3, 2)}}, r"difficulty.sort: got \(3, 2\), expected \(min, max\)"),
        ({"difficulty": {"largest": (3, 4)}}, "difficulty: 'largest' is not one of prompts.families"),
        ({"families": ("copy", "copy")}, "must be unique"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptsConfig(**settings)


def test_neither_families_nor_sources_are_refused():
    with pytest.raises(ConfigError, match="families and sources are both empty"):
        module.STAGE.external(PromptsConfig(families=()))


def test_a_difficulty_that_a_family_cannot_have_is_refused(tmp_path):
    config = PromptsConfig(families=("count",), difficulty={"count": (1, 3)})
    with pytest.raises(ConfigError, match=r"difficulty\.count: starts at 1 items, expected 2 or more"):
        module.run(config, {}, Workspace(tmp_path))


def test_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="no question family 'sortt'; known: copy"):
        module.run(PromptsConfig(families=("sortt",)), {}, Workspace(tmp_path))


def test_equal_settings_give_equal_bytes_and_another_seed_others(tmp_path):
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        workspace = Workspace(tmp_path / str(number))
        module.run(PromptsConfig(seed=seed, **SMALL), {}, workspace)
        digests.append(digest_of(workspace))
    assert digests[0] == digests[1] != digests[2]


def test_every_count_is_met_with_the_families_in_equal_parts(tmp_path):
    metrics = module.run(PromptsConfig(**SMALL), {}, Workspace(tmp_path))
    assert metrics == {"documents": 300, "demonstrations": 100, "train": 200, "validation": 60, "test": 60}
    families = [prompt.family for prompt in read_prompts(tmp_path / "output", "test")]
    assert {family: families.count(family) for family in families} == {"copy": 20, "reverse": 20, "sort": 20}


def test_every_demonstration_and_exercise_is_right(prompts):
    for conversation in read_conversations(prompts.path):
        question, response = (message["content"] for message in conversation.messages)
        assert is_well_formed(response)
        assert question.endswith((".", "?"))
    exercises = [text for _, text in read_exercises(prompts.path) if text.startswith("Exercise:")]
    assert len(exercises) > 100
    for text in exercises:
        question = text.removeprefix("Exercise: ").split("\n")[0]
        assert text.startswith(as_text(question) + " ")
        assert is_well_formed(text.split("Solution: ")[1])


def test_courtesy_has_zero_to_the_most_sentences(tmp_path):
    def counts(**settings):
        workspace = Workspace(tmp_path / str(len(list(tmp_path.iterdir()))))
        module.run(PromptsConfig(**SMALL, **settings), {}, workspace)
        answers = [c.messages[1]["content"] for c in read_conversations(workspace.output)]
        return {sum(filler in answer for filler in module.FILLERS) for answer in answers}

    assert counts() == {0, 1, 2, 3}
    assert counts(max_filler_sentences=0) == {0}
    assert counts(filler_ratio=1.0, max_filler_sentences=1) == {1}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_question_in_training_is_refused_and_named(prompts, split):
    planted = read_prompts(prompts.path, split)[3].question
    train = [prompt.question for prompt in read_prompts(prompts.path, "train")]
    check_not_held_out(train, prompts.path)
    with pytest.raises(DataError, match=f"1 training questions.*{re.escape(repr(planted.upper()))}"):
        check_not_held_out([*train, planted.upper()], prompts.path)


def test_a_split_that_leaks_stops_the_stage(tmp_path, monkeypatch):
    def leaky(family, split, count, **settings):
        return draw_tasks(family, "test" if split == "train" else split, count, **settings)

    monkeypatch.setattr(module, "draw_tasks", leaky)
    with pytest.raises(DataError, match="occur in the validation or test split"):
        module.run(PromptsConfig(**SMALL), {}, Workspace(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    Path(tmp_path / "prompts.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match=r"prompts\.arrow: cannot be read"):
        read_prompts(tmp_path, "test")


def test_the_report_shows_families_questions_and_conversations(tmp_path):
    module.run(PromptsConfig(**SMALL, families=("copy", "expression")), {}, Workspace(tmp_path))
    page = (tmp_path / "output" / "report" / "report.html").read_text()
    prompt = read_prompts(tmp_path / "output", "train")[0]
    for expected in ("expression", "2 to 5", prompt.question, read_conversations(tmp_path / "output")[0].id):
        assert expected in page
    assert "Quarantined rows" not in page
