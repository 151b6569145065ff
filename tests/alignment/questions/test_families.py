import re
from random import Random

import pytest

from lilpipe.alignment.questions.families import FAMILIES, NAMES, Difficulty, in_base
from lilpipe.config.prompts import FAMILY_NAMES


def items(question):
    match = re.search(r"the list ([^.?]*)", question)
    assert match
    return match[1].split()


def numbers(question):
    return [int(number) for number in re.findall(r"\d+", question)]


def solve(family, question):
    """The answer worked out from the question's words alone."""
    if family in ("addition", "subtraction", "compare"):
        a, b = numbers(question)
        names = [word.strip("?.") for word in question.split() if word.strip("?.") in NAMES]
        return {"addition": str(a + b), "subtraction": str(a - b), "compare": names[a < b]}[family]
    if family in ("multiplication", "remainder", "base"):
        a, b = numbers(question)
        return {"multiplication": lambda: str(a * b), "remainder": lambda: str(a % b), "base": lambda: in_base(a, b)}[
            family
        ]()
    if family == "expression":
        return str(eval(question.removeprefix("What is ").removesuffix("?")))
    if family == "count":
        return str(items(question).count(question.split()[3]))
    words = items(question)
    return {
        "copy": lambda: " ".join(words),
        "reverse": lambda: " ".join(reversed(words)),
        "sort": lambda: " ".join(sorted(words, key=int)),
        "largest": lambda: max(words, key=int),
        "first_word": lambda: words[0],
        "last_word": lambda: words[-1],
    }[family]()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_what_the_question_asks_for(family):
    random = Random(0)
    for _ in range(300):
        task = FAMILIES[family].draw(random, FAMILIES[family].default)
        assert task.answer == solve(family, task.question)
        assert task.answer in task.prose


def test_two_orders_of_one_list_are_one_sorting_task():
    random = Random(0)
    by_key = {}
    for _ in range(3_000):
        task = FAMILIES["sort"].draw(random, Difficulty(2, 2))
        by_key.setdefault(task.key, set()).add(task.question)
    swapped = [questions for questions in by_key.values() if len(questions) > 1]
    assert swapped
    assert all(len({tuple(sorted(numbers(q))) for q in questions}) == 1 for questions in swapped)


def test_a_sum_and_its_mirror_are_one_task():
    random = Random(0)
    keys = {FAMILIES["addition"].draw(random, Difficulty(1, 1)).key for _ in range(2_000)}
    assert all(int(key.split()[2]) <= int(key.split()[3]) for key in keys)


def size(family, task):
    """The difficulty, counted in the question."""
    question = task.question
    if family in ("addition", "subtraction", "compare"):
        return max(len(str(number)) for number in numbers(question)) if min(numbers(question)) > 20 else 1
    if family == "multiplication":
        return max(len(str(number)) for number in numbers(question))
    if family in ("remainder", "base"):
        return len(str(numbers(question)[0]))
    if family == "expression":
        return len(numbers(question)) - 1
    return len(items(question))


@pytest.mark.parametrize("family", FAMILIES)
def test_difficulty_is_what_the_question_holds_and_lies_between_its_bounds(family):
    random = Random(1)
    tasks = [FAMILIES[family].draw(random, Difficulty(3, 5)) for _ in range(200)]
    assert {task.difficulty for task in tasks} == {3, 4, 5}
    if family != "subtraction":  # what is given away may be small
        assert all(task.difficulty == size(family, task) for task in tasks)
    assert all(task.answer == solve(family, task.question) for task in tasks)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_smallest_difficulty_can_be_drawn(family):
    least = FAMILIES[family].least
    task = FAMILIES[family].draw(Random(0), Difficulty(least, least))
    assert task.difficulty == least
    assert task.answer == solve(family, task.question)


@pytest.mark.parametrize(("number", "base"), [(1, 2), (10, 2), (255, 7), (999, 9), (80, 8)])
def test_a_number_written_in_a_base_reads_as_itself(number, base):
    assert int(in_base(number, base), base) == number


def test_an_expression_and_its_mirror_are_one_task_and_a_difference_is_not():
    random = Random(0)
    by_key = {}
    for _ in range(4_000):
        task = FAMILIES["expression"].draw(random, Difficulty(1, 1))
        by_key.setdefault(task.key, set()).add(task.question)
    assert {"What is 3 + 4?", "What is 4 + 3?"} <= by_key["(3+4)"]
    assert all(len(questions) == 1 for key, questions in by_key.items() if "-" in key)
    assert all(len(questions) <= 2 for questions in by_key.values())


def test_the_names_that_settings_know_are_those_of_the_families():
    assert tuple(FAMILIES) == FAMILY_NAMES
