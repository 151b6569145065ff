"""Plain English that passes every filter, different for every seed."""

import json
import random
import re

import numpy as np
import xxhash

from lilpipe.data.filters.outliers import WordCounter

WORDS = {
    "noun": "river farmer village letter engine garden winter captain market window teacher mountain harbour forest "
    "baker bridge candle doctor kitchen lantern meadow orchard painter sailor tailor tower valley wagon",
    "verb": "carried watched repaired remembered followed painted measured opened crossed described counted answered "
    "borrowed cleaned guarded hid invited kept lifted moved noticed offered",
    "quality": "quiet heavy narrow ancient cheerful distant broken golden patient crowded bitter clever dusty early "
    "famous gentle honest lonely modest plain round silent tired useful",
    "place": "harbour school station library church hospital bakery theatre museum factory",
    "time": "morning evening spring autumn holiday afternoon weekend century",
}
TEMPLATES = (
    "The {quality} {noun} {verb} a {noun} near the {place}, and nobody had to wonder why.",
    "It was in the {time} that every {noun} of the town {verb} its {quality} {noun}.",
    "Have you ever {verb} such a {quality} {noun} without asking for the {noun}?",
    "When the {time} came, my {quality} brother {verb} two of the {noun}s for us.",
    "Because no {noun} was left, they {verb} the old {noun} instead of a {quality} one.",
    "A {noun} is not a {noun}, said the {quality} woman who {verb} the {place}.",
    "Some people believe that the {quality} {noun} will be {verb} again this {time}.",
    "We walked to the {place} with our {noun} and {verb} what the {quality} {noun} had left behind.",
    "If only they had {verb} the {noun}, this {quality} {time} would have ended well!",
    "Three {noun}s stood beside the {place} while an {noun} {verb} them from far away.",
    "Nothing about that {noun} seemed {quality}, yet he {verb} it until the {time}.",
    "Perhaps a {quality} {noun} knows more about the {place} than any {noun} ever {verb}.",
)


def prose(seed, sentences=8):
    """Up to twelve sentences, no two alike."""
    draw = random.Random(seed)
    pools = {kind: draw.sample(words.split(), len(words.split())) * 3 for kind, words in WORDS.items()}
    chosen = draw.sample(TEMPLATES, sentences)
    return " ".join(re.sub(r"\{(\w+)\}", lambda found: pools[found[1]].pop(), each) for each in chosen)


def write_jsonl(path, rows):
    """Write rows as JSON lines, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def count_words(texts):
    """How often each word is in these ``Words``."""
    counter = WordCounter()
    for words in texts:
        counter.add(words)
    return counter.total()


def words(text):
    return np.array([xxhash.xxh3_64_intdigest(word) for word in re.findall(r"\w+", text.lower())], np.uint64)


def jaccard(a, b, size=5):
    """Exact, over word n-grams."""
    a, b = ({tuple(text[i : i + size]) for i in range(len(text) - size + 1)} for text in (a.split(), b.split()))
    return len(a & b) / len(a | b)


def change_words(text, share, draw, vocabulary):
    """Replace that share of the words, drawn at random, by others."""
    parts = re.split(r"(\w+)", text)
    for word in draw.sample(range(len(parts) // 2), round(share * (len(parts) // 2))):
        parts[2 * word + 1] = draw.choice(vocabulary)
    return "".join(parts)
