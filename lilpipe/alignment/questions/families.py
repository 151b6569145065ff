"""Task families with verifiable answers, from list skills to word problems.

A family generates a ``Task`` from a random generator. A task's key is its arguments in canonical form: tasks that ask
the same in other words (sorting the same numbers in another order, ``7 + 5`` and ``5 + 7``) share a key. Tasks are
split by the hash of the key, so that no test question has an equivalent in training.

Difficulty is an integer in a unit of the family: items of a list, digits of a number, operations of an expression. A
model of 0.4 M parameters learns the list skills and small sums in a few minutes on two cores; comparisons and counting
take longer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from lilpipe.config.prompts import PromptsConfig
from lilpipe.extensions import load

LARGEST_NUMBER = 19
"""Maximum of numbers in lists; the minimum is 0."""

LARGEST_TERM = 10
"""Maximum of addends in word problems; the minimum is 2. A model of 0.4 M parameters learns these sums (up to 20 it did
not)."""

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
    """A question with its answer."""

    key: str
    """Arguments in canonical form, unique within the family."""
    question: str
    answer: str
    prose: str
    """The same fact as a plain sentence."""
    difficulty: int


class Difficulty(NamedTuple):
    """Range of difficulty, in the family's unit."""

    least: int
    most: int

    @property
    def easy(self) -> Difficulty:
        """Range without the hardest level, for pretraining exercises; post-training teaches that level."""
        return Difficulty(self.least, max(self.least, self.most - 1))

    def draw(self, random: Random) -> int:
        """Sample a level; does not use the generator if there is only one."""
        return random.randint(self.least, self.most) if self.least < self.most else self.least


Draw = Callable[[Random, Difficulty], Task]


@dataclass(frozen=True)
class Family:
    """Type of task."""

    draw: Draw
    unit: str
    """Unit of its difficulty."""
    least: int
    """Minimum valid difficulty."""
    default: Difficulty


def _numbers(random: Random, difficulty: Difficulty) -> list[int]:
    return [random.randint(0, LARGEST_NUMBER) for _ in range(difficulty.draw(random))]


def _objects(random: Random, difficulty: Difficulty) -> list[str]:
    return [random.choice(OBJECTS) for _ in range(difficulty.draw(random))]


def _of_digits(digits: int) -> range:
    """Return the numbers with this many digits."""
    return range(10 ** (digits - 1), 10**digits)


def _join(items: Sequence[int | str]) -> str:
    return " ".join(str(item) for item in items)


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def _copy(random: Random, difficulty: Difficulty) -> Task:
    numbers = _numbers(random, difficulty)
    items = _join(numbers)
    return Task(items, f"Copy the list {items}.", items, f"A copy of the list {items} is {items}.", len(numbers))


def _reverse(random: Random, difficulty: Difficulty) -> Task:
    numbers = _numbers(random, difficulty)
    items, answer = _join(numbers), _join(numbers[::-1])
    prose = f"The list {items} read from its end is {answer}."
    return Task(items, f"Reverse the list {items}.", answer, prose, len(numbers))


def _sort(random: Random, difficulty: Difficulty) -> Task:
    numbers = _numbers(random, difficulty)
    items, answer = _join(numbers), _join(sorted(numbers))
    prose = f"Sorted, the list {items} becomes {answer}."
    return Task(answer, f"Sort the list {items}.", answer, prose, len(numbers))


def _largest(random: Random, difficulty: Difficulty) -> Task:
    numbers = _numbers(random, difficulty)
    items, answer = _join(numbers), str(max(numbers))
    question = f"What is the largest number in the list {items}?"
    prose = f"The largest number in the list {items} is {answer}."
    return Task(_join(sorted(numbers)), question, answer, prose, len(numbers))


def _first_word(random: Random, difficulty: Difficulty) -> Task:
    words = _objects(random, difficulty)
    items = _join(words)
    question = f"What is the first word in the list {items}?"
    return Task(items, question, words[0], f"The list {items} begins with {words[0]}.", len(words))


def _last_word(random: Random, difficulty: Difficulty) -> Task:
    words = _objects(random, difficulty)
    items = _join(words)
    question = f"What is the last word in the list {items}?"
    return Task(items, question, words[-1], f"The list {items} ends with {words[-1]}.", len(words))


def _count(random: Random, difficulty: Difficulty) -> Task:
    target, other = random.sample(OBJECTS, 2)
    words = [target, *(random.choice((target, other)) for _ in range(difficulty.draw(random) - 1))]
    random.shuffle(words)
    items, answer = _join(words), str(words.count(target))
    key = f"{target} in {_join(sorted(words))}"
    return Task(
        key,
        f"How often does {target} occur in the list {items}?",
        answer,
        f"The count of {target} in {items} is {answer}.",
        len(words),
    )


def _addition(random: Random, difficulty: Difficulty) -> Task:
    name, noun = random.choice(NAMES), random.choice(OBJECTS)
    digits = difficulty.draw(random)
    terms = range(2, LARGEST_TERM + 1) if digits == 1 else _of_digits(digits)
    a, b = random.choice(terms), random.choice(terms)
    things, answer = _plural(noun), str(a + b)
    return Task(
        f"{name} {noun} {min(a, b)} {max(a, b)}",
        f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        answer,
        f"{name} had {a} {things}, bought {b} more and now has {answer} {things}.",
        digits,
    )


def _subtraction(random: Random, difficulty: Difficulty) -> Task:
    name, noun = random.choice(NAMES), random.choice(OBJECTS)
    digits = difficulty.draw(random)
    a = random.choice(range(4, LARGEST_TERM + 3) if digits == 1 else _of_digits(digits))
    b = random.randint(2, a - 2)
    things, answer = _plural(noun), str(a - b)
    return Task(
        f"{name} {noun} {a} {b}",
        f"{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?",
        answer,
        f"{name} had {a} {things}, gave away {b} and has {answer} {things} left.",
        digits,
    )


def _compare(random: Random, difficulty: Difficulty) -> Task:
    names, noun = random.sample(NAMES, 2), random.choice(OBJECTS)
    digits = difficulty.draw(random)
    a, b = random.sample(range(2, 21) if digits == 1 else _of_digits(digits), 2)
    things = _plural(noun)
    pair = sorted([f"{names[0]} {a}", f"{names[1]} {b}"])
    answer = names[0] if a > b else names[1]
    return Task(
        f"{noun} {_join(pair)}",
        f"{names[0]} has {a} {things} and {names[1]} has {b}. Who has more {things}?",
        answer,
        f"{names[0]} has {a} {things}, {names[1]} has {b}, so {answer} has more.",
        digits,
    )


def _multiplication(random: Random, difficulty: Difficulty) -> Task:
    digits = difficulty.draw(random)
    a, b = random.choice(_of_digits(digits)), random.choice(_of_digits(random.randint(1, digits)))
    a, b = random.sample((a, b), 2)
    answer = str(a * b)
    key = f"{min(a, b)} {max(a, b)}"
    return Task(key, f"What is {a} times {b}?", answer, f"The product of {a} and {b} is {answer}.", digits)


def _remainder(random: Random, difficulty: Difficulty) -> Task:
    digits = difficulty.draw(random)
    a, b = random.choice(_of_digits(digits)), random.randint(2, 9)
    answer = str(a % b)
    question = f"What is the remainder of {a} divided by {b}?"
    return Task(f"{a} {b}", question, answer, f"Divided by {b}, the number {a} leaves {answer}.", digits)


def _base(random: Random, difficulty: Difficulty) -> Task:
    digits = difficulty.draw(random)
    number, base = random.choice(_of_digits(digits)), random.randint(2, 9)
    answer = in_base(number, base)
    prose = f"The number {number} in base {base} is {answer}."
    return Task(f"{number} {base}", f"Write the number {number} in base {base}.", answer, prose, digits)


def in_base(number: int, base: int) -> str:
    """Return the digits of a positive number in a base from 2 to 10."""
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = f"{digit}{digits}"
    return digits


class _Expression(NamedTuple):
    """Arithmetic expression; ``key`` sorts the operands of sums and products."""

    text: str
    key: str
    value: int


_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def _draw_expression(random: Random, num_operations: int) -> _Expression:
    if num_operations == 0:
        value = random.randint(1, 9)
        return _Expression(str(value), str(value), value)
    left = random.randrange(num_operations)
    parts = [_draw_expression(random, left), _draw_expression(random, num_operations - 1 - left)]
    sign = random.choice(tuple(_OPERATIONS))
    texts = [part.text if part.text.isdigit() else f"({part.text})" for part in parts]
    keys = [part.key for part in parts]
    keys = keys if sign == "-" else sorted(keys)
    value = _OPERATIONS[sign](parts[0].value, parts[1].value)
    return _Expression(f" {sign} ".join(texts), f"({sign.join(keys)})", value)


def _expression(random: Random, difficulty: Difficulty) -> Task:
    num_operations = difficulty.draw(random)
    text, key, value = _draw_expression(random, num_operations)
    return Task(key, f"What is {text}?", str(value), f"The value of {text} is {value}.", num_operations)


_LISTS = Difficulty(2, 5)

FAMILIES: dict[str, Family] = {
    "copy": Family(_copy, "items", 1, _LISTS),
    "reverse": Family(_reverse, "items", 1, _LISTS),
    "sort": Family(_sort, "items", 1, _LISTS),
    "largest": Family(_largest, "items", 1, _LISTS),
    "first_word": Family(_first_word, "items", 1, _LISTS),
    "last_word": Family(_last_word, "items", 1, _LISTS),
    "count": Family(_count, "items", 2, Difficulty(2, 6)),
    "addition": Family(_addition, "digits", 1, Difficulty(1, 1)),
    "subtraction": Family(_subtraction, "digits", 1, Difficulty(1, 1)),
    "compare": Family(_compare, "digits", 1, Difficulty(1, 1)),
    "multiplication": Family(_multiplication, "digits", 1, Difficulty(1, 2)),
    "remainder": Family(_remainder, "digits", 1, Difficulty(1, 3)),
    "base": Family(_base, "digits", 1, Difficulty(1, 3)),
    "expression": Family(_expression, "operations", 1, Difficulty(2, 3)),
}
"""Task families by name.

The keys of word problems include the names and the object: the model can learn the sums, although each problem is new.
"""


def find_families(config: PromptsConfig) -> dict[str, Family]:
    """Return the families of a config section, built-in ones and extensions."""
    own = {extension.name: load(extension, Family) for extension in config.extensions()}
    return {name: own[name] if name in own else FAMILIES[name] for name in config.families}
