"""Plain English that passes every filter, different for every seed."""

import json
import random

NOUNS = "river farmer village letter engine garden winter captain market window teacher mountain harbour forest".split()
VERBS = "carried watched repaired remembered followed painted measured opened crossed described".split()
QUALITIES = "quiet heavy narrow ancient cheerful distant broken golden patient crowded".split()
ENDINGS = (
    "and nobody in the house had to wonder why it was late",
    "because the road to the coast was closed for the season",
    "while the children of the school were singing with their friends",
    "although the weather would be kinder to them in the spring",
    "before the last train of the evening left for the city",
)


def prose(seed, sentences=8):
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        noun, other = draw.sample(NOUNS, 2)
        lines.append(
            f"The {draw.choice(QUALITIES)} {noun} {draw.choice(VERBS)} the {draw.choice(QUALITIES)} {other} "
            f"number {draw.choice('one two three four five six seven eight nine'.split())} with "
            f"{draw.choice(QUALITIES)} {draw.choice(NOUNS)}s, {draw.choice(ENDINGS)}."
        )
    return " ".join(lines)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
