import re
from random import Random

import pytest

from lilpipe.alignment.families import FAMILIES, MAX_LENGTH, NAMES


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
        task = FAMILIES[family](random, MAX_LENGTH)
        assert task.answer == solve(family, task.question)
        assert task.answer in task.prose


def test_two_orders_of_one_list_are_one_sorting_task():
    random = Random(0)
    by_key = {}
    for _ in range(3_000):
        task = FAMILIES["sort"](random, 2)
        by_key.setdefault(task.key, set()).add(task.question)
    swapped = [questions for questions in by_key.values() if len(questions) > 1]
    assert swapped
    assert all(len({tuple(sorted(numbers(q))) for q in questions}) == 1 for questions in swapped)


def test_a_sum_and_its_mirror_are_one_task():
    random = Random(0)
    keys = {FAMILIES["addition"](random, MAX_LENGTH).key for _ in range(2_000)}
    assert all(int(key.split()[2]) <= int(key.split()[3]) for key in keys)
