"""Families of tasks whose answers a program can check, from list skills to word problems.

A family draws a ``Task`` from a random generator. Each task has a key, its arguments in canonical form: two tasks
that are the same question in other words (a sort of the same numbers in another order, ``7 + 5`` and ``5 + 7``)
have one key. Splits are made by the hash of the key, so that no test question has a twin in training.

A model of 0.4 M parameters learns the list skills and small sums in a few minutes of two cores; comparisons and
counting need more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

LARGEST_NUMBER = 19
"""Numbers in lists are 0 to this."""

LARGEST_TERM = 10
"""Word problems add numbers from 2 to this: tables that a model of 0.4 M parameters learns (up to 20 it did not)."""

MAX_LENGTH = 5
"""Most items of a list."""

MAX_EASY_LENGTH = 4
"""Most items of a list in pretraining's exercises: the longest lists are left for post-training to teach."""

NAMES = (
    "Ann", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kate", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip

OBJECTS = (
    "apple", "ball", "book", "boat", "card", "coin", "cup", "doll", "drum", "egg", "flag", "hat",
    "key", "lamp", "leaf", "nut", "pear", "pen", "ring", "rope", "seed", "shell", "stamp", "toy",
)  # fmt: skip
_PLURALS = {"leaf": "leaves"}


@dataclass(frozen=True)
class Task:
    """One question with its answer."""

    key: str
    """The arguments in canonical form, within the family."""
    question: str
    answer: str
    prose: str
    """The same fact as a plain sentence."""


Draw = Callable[[Random, int], Task]
"""Draws a task; the number is the most items that a list may hold."""


def _numbers(random: Random, max_length: int) -> list[int]:
    return [random.randint(0, LARGEST_NUMBER) for _ in range(random.randint(2, max_length))]


def _objects(random: Random, max_length: int) -> list[str]:
    return [random.choice(OBJECTS) for _ in range(random.randint(2, max_length))]


def _join(items: Sequence[int | str]) -> str:
    return " ".join(str(item) for item in items)


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def _copy(random: Random, max_length: int) -> Task:
    items = _join(_numbers(random, max_length))
    return Task(items, f"Copy the list {items}.", items, f"A copy of the list {items} is {items}.")


def _reverse(random: Random, max_length: int) -> Task:
    numbers = _numbers(random, max_length)
    items, answer = _join(numbers), _join(numbers[::-1])
    return Task(items, f"Reverse the list {items}.", answer, f"The list {items} read from its end is {answer}.")


def _sort(random: Random, max_length: int) -> Task:
    numbers = _numbers(random, max_length)
    items, answer = _join(numbers), _join(sorted(numbers))
    return Task(answer, f"Sort the list {items}.", answer, f"Sorted, the list {items} becomes {answer}.")


def _largest(random: Random, max_length: int) -> Task:
    numbers = _numbers(random, max_length)
    items, answer = _join(numbers), str(max(numbers))
    question = f"What is the largest number in the list {items}?"
    return Task(_join(sorted(numbers)), question, answer, f"The largest number in the list {items} is {answer}.")


def _first_word(random: Random, max_length: int) -> Task:
    words = _objects(random, max_length)
    items = _join(words)
    question = f"What is the first word in the list {items}?"
    return Task(items, question, words[0], f"The list {items} begins with {words[0]}.")


def _last_word(random: Random, max_length: int) -> Task:
    words = _objects(random, max_length)
    items = _join(words)
    question = f"What is the last word in the list {items}?"
    return Task(items, question, words[-1], f"The list {items} ends with {words[-1]}.")


def _count(random: Random, max_length: int) -> Task:
    target, other = random.sample(OBJECTS, 2)
    words = [target, *(random.choice((target, other)) for _ in range(random.randint(1, max_length)))]
    random.shuffle(words)
    items, answer = _join(words), str(words.count(target))
    key = f"{target} in {_join(sorted(words))}"
    return Task(
        key,
        f"How often does {target} occur in the list {items}?",
        answer,
        f"The count of {target} in {items} is {answer}.",
    )


def _addition(random: Random, max_length: int) -> Task:  # noqa: ARG001 (a number has no length)
    name, noun = random.choice(NAMES), random.choice(OBJECTS)
    a, b = random.randint(2, LARGEST_TERM), random.randint(2, LARGEST_TERM)
    things, answer = _plural(noun), str(a + b)
    return Task(
        f"{name} {noun} {min(a, b)} {max(a, b)}",
        f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        answer,
        f"{name} had {a} {things}, bought {b} more and now has {answer} {things}.",
    )


def _subtraction(random: Random, max_length: int) -> Task:  # noqa: ARG001 (a number has no length)
    name, noun = random.choice(NAMES), random.choice(OBJECTS)
    a = random.randint(4, LARGEST_TERM + 2)
    b = random.randint(2, a - 2)
    things, answer = _plural(noun), str(a - b)
    return Task(
        f"{name} {noun} {a} {b}",
        f"{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?",
        answer,
        f"{name} had {a} {things}, gave away {b} and has {answer} {things} left.",
    )


def _compare(random: Random, max_length: int) -> Task:  # noqa: ARG001 (a number has no length)
    names, noun = random.sample(NAMES, 2), random.choice(OBJECTS)
    a, b = random.sample(range(2, 21), 2)
    things = _plural(noun)
    pair = sorted([f"{names[0]} {a}", f"{names[1]} {b}"])
    answer = names[0] if a > b else names[1]
    return Task(
        f"{noun} {_join(pair)}",
        f"{names[0]} has {a} {things} and {names[1]} has {b}. Who has more {things}?",
        answer,
        f"{names[0]} has {a} {things}, {names[1]} has {b}, so {answer} has more.",
    )


FAMILIES: dict[str, Draw] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "largest": _largest,
    "first_word": _first_word,
    "last_word": _last_word,
    "count": _count,
    "addition": _addition,
    "subtraction": _subtraction,
    "compare": _compare,
}
"""Every family by name. Sums and comparisons hold names and objects in their key, so that the tables of sums are
there to be learned while the problem itself is new."""
