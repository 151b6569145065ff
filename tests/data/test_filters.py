import re

import pytest
from datatrove.data import Document

from lilpipe.config import CorpusConfig, QualityConfig
from lilpipe.data.documents import REJECTED, read_table
from lilpipe.data.filters import (
    C4Filter,
    ExactDuplicateFilter,
    LanguageFilter,
    build_filters,
    identify_language,
    normalise,
    rejections_file,
)
from lilpipe.data.steps import text_key

from .prose import prose

GERMAN = (
    "Der alte Fischer trug den schweren Korb durch das ruhige Dorf, weil der Weg zum Hafen gesperrt war. "
    "Die Kinder sangen, und niemand wunderte sich über den frühen Winter in diesem Jahr. "
    "Später kam der Lehrer mit einem alten Brief."
)


def lines(text):
    return re.sub(r"([.!?]) ", r"\1\n", text)


STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}

REJECTED_TEXTS = {
    ("length", "too_few_chars"): "The river is wide.",
    ("length", "no_words"): "… — ! " * 60,
    ("language", "other_language"): GERMAN,
    ("language", "unsure_language"): "def f(x): return self.x[i] " * 12,
    ("gopher_repetition", "repeated_paragraphs"): "\n\n".join([prose(1, 3)] * 2 + [prose(2, 3)]),
    ("gopher_repetition", "repeated_lines"): lines(prose(3, 9)) + "\nNo end." * 8,
    ("gopher_repetition", "repeated_line_chars"): "\n".join(["short", "lines", "of", prose(4, 4), prose(4, 4)]),
    ("gopher_repetition", "frequent_2_gram"): prose(6, 3) + " incomprehensible considerations, whatever they" * 14,
    ("gopher_repetition", "repeated_5_grams"): " ".join([prose(7, 6), "But", prose(7, 6)]),
    ("gopher_quality", "too_few_words"): " ".join(prose(8, 3).split()[:26]) + " internationalisation" * 3,
    ("gopher_quality", "words_too_long"): " ".join(f"{word}ingtonshirehood" for word in prose(9, 12).split())
    + " the of",
    ("gopher_quality", "too_many_hashes"): prose(10).replace(" ", " #"),
    ("gopher_quality", "too_many_ellipses"): prose(11).replace(" a ", "... a ").replace(" the ", "... the "),
    ("gopher_quality", "too_many_bullet_lines"): "\n".join("- " + line for line in lines(prose(12)).split("\n")),
    ("gopher_quality", "too_many_ellipsis_lines"): "\n".join(f"{line}..." for line in lines(prose(13)).split("\n")),
    ("gopher_quality", "too_few_alphabetic_words"): prose(14).replace(" ", " 123456 987654 "),
    ("gopher_quality", "too_few_stop_words"): " ".join(w for w in prose(15).split() if w.lower() not in STOP_WORDS),
    ("fineweb", "too_few_punctuated_lines"): re.sub(r"[.!?]", "", lines(prose(16))),
    ("fineweb", "too_many_short_lines"): prose(17).replace(" ", "\n"),
    ("fineweb", "duplicate_line_chars"): lines(prose(18)) + "\n" + lines(prose(18)).split("\n", 3)[0],
    ("fineweb", "too_many_line_breaks"): lines(prose(19)).replace("\n", "\n" * 9),
}


def only(stage):
    """The section with one heuristic filter alone."""
    on = {name: name == stage for name in ("gopher_repetition", "gopher_quality", "fineweb", "c4")}
    return CorpusConfig(quality=QualityConfig(**on), min_language_score=0.6 if stage == "language" else 0)


def run(texts, config, folder):
    documents = [
        Document(text=text, id=f"doc {i}", metadata={"key": text_key(text), "num_bytes": len(text.encode())})
        for i, text in enumerate(texts)
    ]
    data = iter(documents)
    filters = build_filters(config, folder)
    for each in filters:
        data = each.run(data, 0, 1)
    return [document.id for document in data]


def rejections(folder):
    return [row for path in sorted(folder.rglob("*.arrow")) for row in read_table(path).to_pylist()]


def test_plain_prose_passes_every_filter(tmp_path):
    texts = [prose(seed) for seed in range(5)]
    assert run(texts, CorpusConfig(), tmp_path) == [f"doc {i}" for i in range(5)]
    assert not rejections(tmp_path)


@pytest.mark.parametrize(("stage", "reason"), REJECTED_TEXTS)
def test_a_document_made_for_a_reason_is_rejected_for_it_and_kept_whole(tmp_path, stage, reason):
    text = REJECTED_TEXTS[stage, reason]
    assert run([text], only(stage), tmp_path) == []
    table = read_table(rejections_file(tmp_path, stage, 0))
    assert table.schema == REJECTED
    (row,) = table.to_pylist()
    assert (row["stage"], row["reason"], row["text"], row["id"]) == (stage, reason, text, "doc 0")


def test_filters_that_are_off_reject_nothing(tmp_path):
    config = only("none").model_copy(update={"min_chars": 0, "languages": ()})
    texts = [text for (_, reason), text in REJECTED_TEXTS.items() if reason != "no_words"]
    assert len(run(texts, config, tmp_path)) == len(texts)


def test_texts_that_differ_in_case_space_and_unicode_form_alone_are_exact_duplicates():
    assert normalise("Caf\u00e9\n  au LAIT") == normalise("cafe\u0301 au lait ")
    assert text_key("Caf\u00e9\n  au LAIT") == text_key("cafe\u0301 au lait ")
    assert text_key("cafe au lait") != text_key("caf\u00e9 au lait")


def test_an_exact_duplicate_names_the_document_that_was_kept():
    same = ["One  text", "one text", "another"]
    documents = [Document(text=text, id=str(i), metadata={"key": 5}) for i, text in enumerate(same)]
    step = ExactDuplicateFilter()
    results = [step.filter(document) for document in documents]
    # the third has the hash of the others, and is no duplicate for that
    assert results == [True, (False, "exact_duplicate"), True]
    assert documents[1].metadata["detail"] == "0"


def test_languages_are_told_apart_across_line_breaks():
    assert identify_language(lines(prose(1)))[0] == "en"
    language, score = identify_language(GERMAN.replace(" ", "\n"))
    assert language == "de"
    assert 0.5 < score <= 1
    assert LanguageFilter(("de", "en"), 0.5).filter(Document(text=GERMAN, id="")) is True


def test_c4_keeps_the_text_as_read_beside_what_it_leaves(tmp_path):
    text = lines(prose(1)) + "\na line without an end"
    document = Document(text=text, id="", metadata={})
    assert C4Filter().filter(document) is True
    assert document.text == lines(prose(1))
    assert document.metadata["original_text"] == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ " + prose(1), "curly_bracket"),
        ("Lorem ipsum dolor sit amet. " + prose(1), "lorem_ipsum"),
        (prose(1, 3), "too_few_sentences"),
    ],
)
def test_c4_rejects_what_its_authors_rejected(tmp_path, text, reason):
    assert run([lines(text)], only("c4"), tmp_path) == []
    assert [row["reason"] for row in rejections(tmp_path)] == [reason]
