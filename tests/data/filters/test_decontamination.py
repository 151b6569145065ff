import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lilpipe.config.corpus import DecontaminationConfig
from lilpipe.data.filters.chain import Bounds, Document
from lilpipe.data.filters.decontamination import (
    MATCHES,
    DecontaminationFilter,
    EvaluationIndex,
    EvaluationSet,
    word_spans,
    write_index,
)
from lilpipe.data.filters.words import Words
from lilpipe.data.survey import KeyCounter, MergeCounts, merged_files, plan_merge
from tests.data.prose import prose

SHARED = Path(__file__).parents[4] / "shared" / "data"

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
    "did Natalia sell altogether in April and May?"
)
SHORT = "Whose turn was it to feed the seven geese?"  # 9 words


def index(folder, *sets, **settings):
    write_index(folder, sets, DecontaminationConfig(**settings))
    return folder


def questions(*texts, name="quiz"):
    return EvaluationSet(name, [(f"q{number}", text) for number, text in enumerate(texts)])


def decontamination(folder, *sets, frequent=(), **settings):
    return DecontaminationFilter(DecontaminationConfig(**settings), index(folder, *sets, **settings), frequent)


def document(text, number=0):
    return Document(id=f"d{number}", text=text, source="web", key=number + 1)


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.lower())


# --- what is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION,
        QUESTION.upper(),
        re.sub(r"[,.?]", " --", QUESTION),
        QUESTION.replace(" ", "\n\t "),
        " ".join(QUESTION.split()[3:16]),
    ],
    ids=["verbatim", "case", "punctuation", "white space", "thirteen words of it"],
)
def test_a_planted_question_rejects_the_document_and_is_named(tmp_path, copy):
    each = document(f"{prose(1)}\n\n{copy}\n\n{prose(2)}")
    rejection = decontamination(tmp_path, questions(prose(3), QUESTION))(each)
    assert rejection is not None
    assert rejection.reason == "evaluation_text"
    named, _, found = rejection.detail.partition(": ")
    assert named == "quiz/q1"
    assert set(words_of(found)) <= set(words_of(QUESTION))
    assert each.scores["decontamination.matched_ngrams"] == len(words_of(copy)) - 12
    share = len(words_of(copy)) / len(words_of(each.text))
    assert each.scores["decontamination.matched_ratio"] == pytest.approx(share)


@pytest.mark.parametrize(
    "other",
    [
        prose(4),
        " ".join(QUESTION.split()[3:15]),
        " ".join(word for i, word in enumerate(QUESTION.split(), 1) for word in ([word] if i % 12 else [word, "so"])),
        " ".join(reversed(QUESTION.split())),
    ],
    ids=["prose", "twelve words of it", "a word put in after every twelve", "reversed"],
)
def test_what_shares_fewer_words_in_a_row_passes(tmp_path, other):
    each = document(f"{prose(1)} {other} {prose(2)}")
    check = decontamination(tmp_path, questions(QUESTION))
    assert check(each) is None
    assert each.scores == {"decontamination.matched_ngrams": 0, "decontamination.matched_ratio": 0}
    assert check.drain() == []


def test_an_item_shorter_than_the_ngrams_is_looked_for_as_a_whole_and_a_very_short_one_is_not(tmp_path):
    quiz = questions(SHORT, "How many geese?", QUESTION)
    check = decontamination(tmp_path, quiz)
    assert check(document(f"{prose(1)} {SHORT} {prose(2)}")) is not None
    assert check(document(f"{prose(1)} {SHORT.removesuffix(' geese?')} {prose(2)}")) is None
    assert check(document(f"{prose(1)} How many geese? {prose(2)}")) is None
    assert EvaluationIndex(tmp_path).coverage() == {"quiz": {"items": 3, "too_short": 1}}


VOCABULARY = ["one", "two", "Three", "four's", "...", "_", "fünf", "6"]
TEXTS = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)


def found_naively(items, text, n, least):
    """The n-grams of items among a text's, as tuples of words, by looking at all of them."""
    wanted = set()
    for item in items:
        words = tuple(Words(item).hashes.tolist())
        if len(words) >= min(least, n):
            length = min(n, len(words))
            wanted |= {words[i : i + length] for i in range(len(words) - length + 1)}
    words = tuple(Words(text).hashes.tolist())
    grams = [(i, words[i : i + len(each)]) for each in wanted for i in range(len(words) - len(each) + 1)]
    return {(i, len(gram)) for i, gram in grams if gram in wanted}


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, max_size=4), TEXTS, st.integers(1, 5), st.integers(1, 5))
@example(["one two Three", "two"], "one two Three two", 3, 1)
def test_the_index_finds_the_ngrams_that_a_set_finds(tmp_path_factory, items, text, n, least):
    folder = index(tmp_path_factory.mktemp("index"), questions(*items), ngram_size=n, min_item_words=least)
    places, lengths, _ = EvaluationIndex(folder).find(Words(text).hashes)
    found = list(zip(places.tolist(), lengths.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == found_naively(items, text, n, least)


@given(st.text())
@example("a_b __ _ c's 3.5 naïve ５ x̄")
def test_the_words_that_are_told_are_those_that_are_compared(text):
    spans = word_spans(text)
    told = [Words(text[start:end]).hashes.tolist() for start, end in spans]
    assert [each for word in told for each in word] == Words(text).hashes.tolist()
    assert all(len(word) == 1 for word in told)


# --- n-grams that say nothing -------------------------------------------------------------------------------------


def frequent_ngrams(folder, texts, *, num_shards, most):
    keys_of = EvaluationIndex(folder).document_keys
    survey = folder / f"survey-{num_shards}"
    for rank in range(num_shards):
        counter = KeyCounter(survey, rank, keys_of)
        for number in range(rank, len(texts), num_shards):
            counter.add(document(texts[number], number))
        counter.close()
    tasks = plan_merge(survey, [range(num_shards)])
    for rank in range(len(tasks)):
        MergeCounts(tasks, most).run(rank=rank)
    return merged_files(tasks, 0)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_ngram_of_many_documents_is_no_sign(tmp_path, num_shards):
    notice = "Permission is hereby granted free of charge to any person who obtains a copy of this software"
    quiz = questions(f"Which licence says this? {notice}", QUESTION)
    folder = index(tmp_path, quiz)
    texts = [f"{prose(number)} {notice}" for number in range(11)] + [f"{prose(20)} {QUESTION}"]
    for most, rejected in ((10, 1), (11, 12)):
        frequent = frequent_ngrams(folder, texts, num_shards=num_shards, most=most)
        check = DecontaminationFilter(DecontaminationConfig(), folder, frequent)
        assert sum(check(document(text)) is not None for text in texts) == rejected


# --- what is told -------------------------------------------------------------------------------------------------


def test_matches_tell_each_item_with_its_share_and_the_text_around_it(tmp_path):
    half = " ".join(QUESTION.split()[10:])
    text = f"{prose(1)}\nQuiz:\n{half}\n({SHORT.upper()}) {prose(2)}"
    each = document(text)
    check = decontamination(tmp_path, questions(SHORT, QUESTION), questions(QUESTION, name="exam"), action="report")
    assert check.bounds["matched_ngrams"] == Bounds()
    assert check(each) is None, "it only reports"
    rows = check.drain()
    assert check.drain() == []
    assert [(row["set"], row["item"]) for row in rows] == [("quiz", "q0"), ("quiz", "q1"), ("exam", "q0")]
    assert [row["overlap"] for row in rows] == [SHORT.upper().removesuffix("?"), *[half.removesuffix("?")] * 2]
    for row in rows:
        assert row["before"] + row["overlap"] + row["after"] in text
        assert row["before"].endswith("(" if row["item"] == "q0" and row["set"] == "quiz" else "Quiz:\n")
    ngrams = len(words_of(half)) - 12
    assert [row["matched_ngrams"] for row in rows] == [1, ngrams, ngrams]
    assert [row["item_ratio"] for row in rows] == [1.0, *[ngrams / (len(words_of(QUESTION)) - 12)] * 2]
    assert pa.Table.from_pylist(rows, schema=MATCHES).to_pylist() == rows


def test_of_several_overlaps_the_longest_is_told(tmp_path):
    words = QUESTION.split()
    text = f"{' '.join(words[:14])} or so. {' '.join(words[6:])}"
    check = decontamination(tmp_path, questions(QUESTION))
    rejection = check(document(text))
    assert rejection is not None
    assert check.drain()[0]["overlap"] == " ".join(words[6:]).removesuffix("?")


def test_an_item_that_a_document_holds_twice_is_covered_once(tmp_path):
    check = decontamination(tmp_path, questions(QUESTION))
    check(document(f"{QUESTION} {prose(1)} {QUESTION}"))
    (row,) = check.drain()
    assert row["item_ratio"] == 1
    assert row["matched_ngrams"] == len(words_of(QUESTION)) - 12


def test_nothing_to_look_for_finds_nothing(tmp_path):
    check = decontamination(tmp_path)
    assert check(document(prose(1))) is None
    assert check(document("")) is None


# --- real questions -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_real_questions_are_found_where_they_were_planted_and_nowhere_else(tmp_path):
    def rows(name, count):
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as lines:
            return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]

    texts = [row["question"] for row in rows("gsm8k-test", 200)]
    check = decontamination(tmp_path, questions(*texts))
    draw = random.Random(0)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for number, row in enumerate(rows("rust-book", 200)):
        words = texts[number].split()
        planted = " ".join(" ".join(words[i : i + 20]) + " indeed" for i in range(0, len(words), 20)).upper()
        lines = row["text"].split("\n")
        lines.insert(draw.randrange(len(lines)), planted)
        verdicts["clean", check(document(row["text"])) is not None] += 1
        rejection = check(document("\n".join(lines)))
        verdicts["planted", rejection is not None and rejection.detail.startswith(f"quiz/q{number}:")] += 1
    assert verdicts["clean", True] == 0
    assert verdicts["planted", True] >= 0.98 * 200
