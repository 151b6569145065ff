"""Sources with a document for every stage of the corpus to find, among good ones that nothing is to find.

``write_sources`` makes them and the section that turns every stage on; ``VICTIMS`` says what must become of which.
"""

import json
import random
import re
from typing import Any

from lilpipe.config.corpus import CorpusConfig
from lilpipe.schemas.examples import PROMPT_SCHEMA
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace, get_stage
from tests.artifacts import artifact

from .prose import prose, write_jsonl

NUM_GOOD = 40
NUM_GERMAN = 8

QUESTION = "What did the keeper of the lighthouse ask the three sailors who brought him oil and bread that winter?"
QUIZ = "Which of the five bridges was built last, and how long did the masons need to close its middle arch?"
NOTICES = (
    "Subscribe to our weekly letter and read the news of the valley before your neighbours do.",
    "Every picture on this page belongs to the library and must not be copied for money.",
    "We open at nine in the morning and close when the last of the visitors has left.",
    "If you have found a mistake, please tell the clerk who sits behind the second door.",
)
SPAM = (
    "Buy our cheap miracle pills now and get {n} bonus coupons for free shipping.",
    "Click here to win a casino jackpot of {n} dollars that was reserved for you.",
    "Our discount store has {n} luxury watches and they will be sold out tonight.",
    "Act now, because this limited offer of {n} credits ends with the next click.",
    "No risk is taken: with our guarantee you have {n} days to send it all back.",
    "Thousands of happy customers have won {n} prizes, and that could be you.",
)
GERMAN = (
    "Der {a} Fischer trug den Korb {n} Stunden durch das Dorf, weil der Weg zum Hafen gesperrt war.",
    "Die Kinder sangen {n} Lieder, und niemand wunderte sich über den {a} Winter in diesem Jahr.",
    "Später kam der Lehrer mit {n} Briefen und las sie den {a} Leuten am Brunnen vor.",
    "Wer den {a} Bäcker fragte, bekam {n} Brote und eine Geschichte aus der Zeit der Mühlen.",
    "Am Abend zählten die Frauen {n} Laternen, die am {a} Ufer hingen und im Wind schwankten.",
    "Das Schiff blieb {n} Tage aus, doch die {a} Männer hatten längst aufgehört zu warten.",
    "Im {a} Keller fand man {n} Flaschen, von denen keine ein Etikett oder einen Korken hatte.",
)
GERMAN_WORDS = (
    "zwei drei vier fünf sechs sieben acht neun zehn elf",
    "alten jungen müden stillen klugen armen frohen kalten dunklen fremden",
)
FRENCH = (
    "Le vieux pêcheur portait le panier à travers le village, car la route du port était fermée. Les enfants "
    "chantaient et personne ne s'étonnait de cet hiver précoce. Plus tard, le maître arriva avec une lettre ancienne."
)
LIST_OF_WORDS = (
    "Quixotic zephyrs beguile wistful mariners. Brazen gargoyles mock the pious abbots below. To wander amid "
    "bioluminescent jellyfish is to taste eternity. Phosphorescent caverns devour unwary spelunkers with relish. "
    "Obsidian monoliths have baffled astronomers and geologists. Languid crocodiles of mangrove estuaries swallow "
    "migrating wildebeest. Sibilant whispers haunt derelict observatories that once tracked comets."
)
SHORT_LINES = "\n".join(
    f"{subject} {verb} {place}."
    for subject, verb, place in zip(
        ("The dog", "A farmer", "My brother", "A man", "Nobody", "Her cat", "The teacher", "A sailor",
         "The baker", "One", "The king", "Our aunt"),
        ("sat", "slept", "waited", "lived", "stayed", "sang", "worked", "rested", "hid", "stood", "ruled", "played"),
        ("on the hill", "in a barn", "with us", "by that lake", "at the inn", "under it", "to the end", "and left",
         "for a year", "near the gate", "from afar", "at dawn"),
        strict=True,
    )
)  # fmt: skip


def spam(seed):
    """Sentences of another kind, all different in their numbers and their order."""
    draw = random.Random(seed)
    return " ".join(each.format(n=draw.randrange(10, 99)) for each in draw.sample(SPAM, len(SPAM)))


def german(seed):
    """Six German sentences."""
    draw = random.Random(seed)
    numbers, qualities = (pool.split() for pool in GERMAN_WORDS)
    return " ".join(each.format(n=draw.choice(numbers), a=draw.choice(qualities)) for each in draw.sample(GERMAN, 6))


TOWN = (
    "One baker of the town said that bread was dear. His boat lay by the river for a while, and a sailor of the town "
    "laughed. Rain had come late to the fields, so everybody rested for a while. A doctor of the town found nobody ill "
    "in May and walked by the river instead. Red is not a colour for doors, thought a painter who sat by the river, "
    "but he kept silent for a while."
)
PARAGRAPH = "Nobody in the village could say who had painted the door of the chapel blue that night."
KEPT = {
    "mail": prose(200) + " Write to jo.miller@post.org if you have seen it.",
    "notice": f"{prose(201)}\n{NOTICES[0]}\nThat was the end of it.",
    "paragraph": f"{PARAGRAPH}\n\n{prose(202)}\n\n{PARAGRAPH}\n\nThat was the end of it.",
}
LEFT = {
    "mail": prose(200) + " Write to <EMAIL> if you have seen it.",
    "notice": f"{prose(201)}\nThat was the end of it.",
    "paragraph": f"{PARAGRAPH}\n{prose(202)}\nThat was the end of it.",  # C4 leaves no blank lines
}
"""What the filters make of them."""

VICTIMS = {
    "blocked domain": ("url", "blocked_domain", "bad.example.org"),
    "blocked word": ("url", "blocked_word", "casino"),
    "older page": ("url_dedup", "duplicate_url", "newest page"),
    "page without date": ("url_dedup", "duplicate_url", "newest page"),
    "short": ("length", "too_few_chars", ""),
    "copy": ("exact_dedup", "exact_duplicate", "original"),
    "french": ("language", "other_language", "fr"),
    "german in web": ("language", "other_language", "de"),
    "notices": ("line_dedup", "only_repeated_lines", ""),
    "lorem": ("c4", "lorem_ipsum", ""),
    "said twice": ("gopher_repetition", "repeated_5_grams", ""),
    "hashes": ("gopher_quality", "too_many_hashes", ""),
    "short lines": ("fineweb", "too_many_short_lines", ""),
    "town": ("ngram_coverage", "duplicate_ngram_coverage", ""),
    "dirty": ("dirty_words", "too_many_dirty_words", ""),
    "rare words": ("divergence", "outlier_words", ""),
    "leak": ("decontamination", "evaluation_text", "prompts-validation/validation/0: "),
    "named leak": ("decontamination", "evaluation_text", "quiz/q1: "),
    "spam": ("classifier", "low_quality", ""),
    "spam again": ("classifier", "low_quality", ""),
}
"""Stage, reason, and the detail or its beginning."""

TEXTS = {
    "blocked domain": prose(100),
    "blocked word": prose(101),
    "newest page": prose(102),
    "older page": prose(103),
    "page without date": prose(104),
    "short": "Too short.",
    "original": prose(105),
    "copy": prose(105).replace(" ", "  ") + "\n",
    "french": FRENCH,
    "german in web": german(99),
    "notices": "\n".join(NOTICES),
    "lorem": "Lorem ipsum dolor sit amet. " + prose(106),
    "said twice": f"{prose(107, 6)} But {prose(107, 6)}",
    "hashes": prose(108).replace(" ", " #"),
    "short lines": SHORT_LINES,
    "town": TOWN,
    "dirty": prose(109) + " Grumblewort! The grumblewort was there.",
    "rare words": LIST_OF_WORDS,
    "leak": f"{prose(110)} {QUESTION} Nobody knew.",
    "named leak": f"{prose(111)} {QUIZ} Nobody knew.",
    "spam": spam(1),
    "spam again": spam(1) + " It is so.",
    "near": prose(115),
    "nearer": prose(115) + " So it was, and nobody has asked since.",
    **KEPT,
}
URLS = {
    "blocked domain": "https://news.bad.example.org/a",
    "blocked word": "https://fine.org/best-casino-ever",
    "newest page": "https://www.fine.org/page/?utm_source=x",
    "older page": "http://fine.org/page",
    "page without date": "fine.org/page#top",
    "relative": "/index.html",
}
DATES = {"newest page": "2024-05-01", "older page": "2023-12-31T23:59:59Z"}


def web_rows():
    """The rows of source `web`."""
    rows: list[dict[str, Any]] = [{"id": name, "body": text} for name, text in TEXTS.items()]
    rows += [{"id": f"good {n}", "body": prose(n) + (f"\n{NOTICES[n % 4]}" if n < 32 else "")} for n in range(NUM_GOOD)]
    for n, row in enumerate(rows):
        name = row["id"]
        row["meta"] = {"url": URLS.get(name, "/index.html" if n % 5 == 0 else f"https://a.org/{n}")}
        row |= {"when": DATES.get(name, ""), "rights": "CC0" if n % 3 else "", "kind": "tale" if n % 2 else ""}
    return rows


def write_sources(folder):
    """Write the sources; returns the section as a dictionary, and the artifact with the pipeline's prompts."""
    lists = {"domains": "bad.example.org\n", "words": "# games\ncasino\n", "dirty": "grumblewort\n"}
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text)
    write_jsonl(folder / "web" / "a.jsonl", web_rows()[::2])
    write_jsonl(folder / "web" / "b.jsonl", web_rows()[1::2])
    with (folder / "web" / "b.jsonl").open("a") as file:
        file.write('{"id": "bad"\n{"id": "no text"}\n')
    write_jsonl(folder / "german.jsonl", [{"id": f"german {n}", "text": german(n)} for n in range(NUM_GERMAN)])
    write_jsonl(folder / "good.jsonl", [{"text": (german if n % 4 == 0 else prose)(n)} for n in range(1_000, 1_060)])
    write_jsonl(folder / "bad.jsonl", [{"text": spam(n)} for n in range(1_000, 1_060)])
    write_jsonl(folder / "quiz.jsonl", [{"id": "q1", "text": QUIZ}])
    questions = [
        ("validation/0", "validation", QUESTION),
        ("train/0", "train", " ".join(re.split(r"(?<=\.) ", prose(0))[:2])),
    ]
    rows = [{"id": key, "split": split, "family": "f", "question": q, "answer": "7"} for key, split, q in questions]
    write_rows(folder / "prompts" / "prompts.arrow", rows, PROMPT_SCHEMA)
    return section(folder), artifact(folder / "prompts")


def section(folder):
    def jsonl(name, **others):
        return {"kind": "jsonl", "name": name, "path": str(folder / f"{name}.jsonl"), **others}

    columns = {"text": "body", "url": "meta.url", "date": "when", "licence": "rights", "label": "kind"}
    web = {"kind": "jsonl", "name": "web", "path": str(folder / "web"), "columns": columns, "licence": "MIT"}
    return {
        "sources": [web, jsonl("german", languages=["de"], label="german")],
        "min_chars": 100,
        "max_malformed_ratio": 0.5,
        "num_workers": 1,
        "language": {"min_score": 0.3, "min_scores": {"de": 0.5}},
        "url": {"blocked_domains": str(folder / "domains.txt"), "blocked_words": str(folder / "words.txt")},
        "exact_dedup": {"paragraphs": True, "lines": True},
        "quality": {
            "c4": True,
            "max_duplicate_ngram_coverage": 0.15,
            "coverage_ngram_size": 3,
            "max_dirty_words": 1,
            "dirty_words": str(folder / "dirty.txt"),
            "max_kl_divergence": 3.0,
        },
        "decontamination": {"sets": [jsonl("quiz")]},
        "classifier": {
            "good": [jsonl("good")],
            "bad": [jsonl("bad")],
            "min_score": 0.5,
            "validation_ratio": 0.3,
            "num_epochs": 25,
            "learning_rate": 0.5,
            "dimension": 8,
        },
    }


def settings(folder, **others):
    """The section over the sources in a folder, with other values of its fields."""
    return CorpusConfig.model_validate({**section(folder), **others})


# --- running the stage ----------------------------------------------------------------------------------------------

FEW_BANDS = {"minhash": {"num_buckets": 8}}
"""Each band is a task, and datatrove takes some time for any."""


def no_report(*args, **kwargs):
    return ""


def build(config, root, **inputs):
    workspace = Workspace(root)
    return get_stage("corpus").run(config, inputs, workspace), workspace


def events_of(root):
    """What a run has told, as far as lines are whole."""
    path = root / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
