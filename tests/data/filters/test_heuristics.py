import gzip
import json
import pickle
import re
from pathlib import Path

import pytest
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.config.corpus import QualityConfig
from lilpipe.data.filters.chain import Bounds, Document, run_filters, score_names
from lilpipe.data.filters.heuristics import (
    C4,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    count_sentences,
    heuristic_filters,
)
from lilpipe.data.filters.outliers import Unigrams
from lilpipe.data.filters.rules import Heuristic
from lilpipe.data.filters.words import STOP_WORDS, Words
from tests.data.prose import count_words, prose

SHARED = Path(__file__).parents[4] / "shared" / "data"
DATATROVES = QualityConfig(
    min_words=50,
    min_alpha_word_ratio=0.8,
    min_line_punctuation_ratio=0.12,
    max_short_line_ratio=0.67,
    max_duplicate_line_char_ratio=0.01,
)
"""datatrove's thresholds."""


def lines(text):
    return re.sub(r"([.!?]) ", r"\1\n", text)


def document(text):
    return Document(id="1", text=text, source="test")


REJECTED_TEXTS = {
    ("gopher_repetition", "repeated_paragraphs"): "\n\n".join([prose(1, 3)] * 2 + [prose(2, 3)]),
    ("gopher_repetition", "repeated_paragraph_chars"): "\n\n".join(["A.", "B.", "C.", prose(4, 4), prose(4, 4)]),
    ("gopher_repetition", "repeated_lines"): lines(prose(3, 9)) + "\nNo end." * 8,
    ("gopher_repetition", "repeated_line_chars"): "\n".join(["short", "lines", "of", prose(4, 4), prose(4, 4)]),
    ("gopher_repetition", "frequent_2_gram"): prose(6, 3) + " incomprehensible considerations, whatever they" * 14,
    ("gopher_repetition", "frequent_3_gram"): prose(6, 12) + " and so on" * 40,
    ("gopher_repetition", "frequent_4_gram"): prose(6, 12) + " one of the many" * 18,
    ("gopher_repetition", "repeated_5_grams"): " ".join([prose(7, 6), "But", prose(7, 6)]),
    ("gopher_quality", "too_few_words"): " ".join(prose(8, 3).split()[:26]) + " internationalisation" * 3,
    ("gopher_quality", "too_many_words"): " ".join([prose(8)] * 1200),
    ("gopher_quality", "words_too_short"): prose(8) + " a i o" * 200,
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
    ("c4", "curly_bracket"): lines(prose(1)) + "\nThis {is} code.",
    ("c4", "lorem_ipsum"): "Lorem ipsum dolor sit amet.\n" + lines(prose(1)),
    ("c4", "too_few_sentences"): prose(1, 3),
    ("ngram_coverage", "duplicate_ngram_coverage"): "\n".join(f"{i} {prose(20, 1)}" for i in range(4)),
    ("dirty_words", "too_many_dirty_words"): prose(21) + " PORN, sex-chat!",
    ("divergence", "outlier_words"): " ".join(f"zq{i}" for i in range(80)),
}
REASONS = {
    "dup_para_frac": "repeated_paragraphs",
    "dup_para_char_frac": "repeated_paragraph_chars",
    "dup_line_frac": "repeated_lines",
    "dup_line_char_frac": "repeated_line_chars",
    **{f"top_{n}_gram": f"frequent_{n}_gram" for n in range(2, 5)},
    **{f"duplicated_{n}_n_grams": f"repeated_{n}_grams" for n in range(5, 11)},
    "gopher_short_doc": "too_few_words",
    "gopher_long_doc": "too_many_words",
    "gopher_below_avg_threshold": "words_too_short",
    "gopher_above_avg_threshold": "words_too_long",
    "gopher_too_many_hashes": "too_many_hashes",
    "gopher_too_many_ellipsis": "too_many_ellipses",
    "gopher_too_many_bullets": "too_many_bullet_lines",
    "gopher_too_many_end_ellipsis": "too_many_ellipsis_lines",
    "gopher_below_alpha_threshold": "too_few_alphabetic_words",
    "gopher_enough_stop_words": "too_few_stop_words",
    "line_punct_ratio": "too_few_punctuated_lines",
    "short_line_ratio": "too_many_short_lines",
    "char_dup_ratio": "duplicate_line_chars",
    "list_ratio": "too_many_line_breaks",
}
"""datatrove's to ours; C4's have the same names."""
PEERS = {
    "gopher_repetition": GopherRepetitionFilter(),
    "gopher_quality": GopherQualityFilter(),
    "c4": C4QualityFilter(),
    "fineweb": FineWebQualityFilter(),
}


def alone(stage, config=None):
    """One filter."""
    on = {name: name == stage for name in PEERS}
    on |= {"max_duplicate_ngram_coverage": 0.4} if stage == "ngram_coverage" else {}
    on |= {"max_dirty_words": 1} if stage == "dirty_words" else {}
    on |= {"max_kl_divergence": 4.0} if stage == "divergence" else {}
    reference = Unigrams.from_counts(count_words(Words(prose(seed)) for seed in range(50)))
    (only,) = heuristic_filters((config or QualityConfig()).model_copy(update=on), reference)
    return only


def peer_s_reason(stage, text):
    """What datatrove says, in our words; empty if it keeps the text."""
    result = PEERS[stage].filter(DatatroveDocument(text=text, id=""))
    if result is True:
        return ""
    reason = result[1] if isinstance(result, tuple) else stage
    return REASONS.get(reason, reason)


def test_plain_prose_passes_every_filter():
    config = QualityConfig(c4=True, max_duplicate_ngram_coverage=0.4, max_dirty_words=0, max_kl_divergence=4)
    filters = heuristic_filters(config, Unigrams.from_counts(count_words(Words(prose(seed)) for seed in range(50))))
    for seed in range(5):
        passing = document(lines(prose(seed)))
        assert run_filters(filters, passing) is None
        assert list(passing.scores) == score_names(filters)


@pytest.mark.parametrize(("stage", "reason"), REJECTED_TEXTS)
def test_a_document_made_for_a_reason_is_rejected_for_it_with_the_score_out_of_bounds(stage, reason):
    only = alone(stage)
    rejected = document(REJECTED_TEXTS[stage, reason])
    rejection = only(rejected)
    assert rejection is not None
    assert rejection.reason == reason
    *passed, failed = rejected.scores
    for name in [*passed, failed]:
        least, most = only.bounds[name.removeprefix(f"{stage}.")]
        value = rejected.scores[name]
        inside = (least is None or value >= least) and (most is None or value <= most)
        assert inside == (name != failed), name


@pytest.mark.parametrize(("stage", "reason"), REJECTED_TEXTS)
def test_a_score_at_its_bound_passes(stage, reason):
    only = alone(stage)
    rejected = document(REJECTED_TEXTS[stage, reason])
    only(rejected)
    name, value = list(rejected.scores.items())[-1]
    assert isinstance(only, Heuristic)
    rule = only.rules[name.removeprefix(f"{stage}.")]
    assert rule.reason(value) == reason
    at_value = Bounds(*(None if bound is None else value for bound in rule.bounds))
    assert rule._replace(bounds=at_value).reason(value) == ""


@pytest.mark.parametrize(
    ("stage", "reason"), [key for key in REJECTED_TEXTS if key[0] in PEERS and key[1] != "too_many_words"]
)
def test_datatrove_rejects_the_same_documents_for_the_same_reason(stage, reason):
    text = REJECTED_TEXTS[stage, reason]
    for name in PEERS:
        rejection = alone(name, DATATROVES)(document(text))
        assert (rejection.reason if rejection else "") == peer_s_reason(name, text), name


# pieces of prose, repeated, with white space and marks of every kind between them
PIECES = [
    *lines(prose(1, 6)).split("\n"),
    "the be to of",
    "- a bullet",
    "and so on...",
    "# 1 2 3",
    "Foo(bar)!",
    "…",
    "x",
]
spoilt = st.lists(
    st.tuples(st.sampled_from(PIECES), st.sampled_from(["\n", "\n\n", " ", "  \n", "\n\n\n", ". ", "\x0b", "[1]\n"])),
    min_size=1,
    max_size=40,
).map(lambda parts: "".join(map("".join, parts)))
# The peer's splitter takes "…." at the beginning of a line for a sentence of its own, ours for a part of the next.
spoilt = spoilt.filter(lambda text: "…." not in text)


@settings(max_examples=60, deadline=None)
@given(spoilt)
def test_spoilt_prose_meets_the_decisions_of_datatrove(text):
    for name in PEERS:
        rejection = alone(name, DATATROVES)(document(text))
        assert (rejection.reason if rejection else "") == peer_s_reason(name, text), name


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_shared_documents_meet_the_decisions_of_datatrove():
    with gzip.open(SHARED / "rust-book.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file][::24]
    for name in PEERS:
        ours = [alone(name, DATATROVES)(document(text)) is None for text in texts]
        assert ours == [peer_s_reason(name, text) == "" for text in texts], name


C4_TEXT = """A line with an end.
A line without
Too short.
Another line; it has "quotes"
He said: "No."
What is JavaScript? It is a language.
Please read our Privacy Policy first.
See the notes[3] of others[citation needed].
And so on and on...
{tag}: """ + "y" * 1001 + """ is a word.
  The third line of five, is it not? It is! Yes.
"""  # fmt: skip


def test_c4_leaves_the_lines_that_datatrove_leaves():
    ours, theirs = document(C4_TEXT), DatatroveDocument(text=C4_TEXT, id="")
    assert C4()(ours) is None
    assert C4QualityFilter().filter(theirs) is True
    assert ours.text == theirs.text
    assert ours.text.split("\n") == [
        "A line with an end.",
        'Another line; it has "quotes"',
        'He said: "No."',
        "See the notes of others.",
        "The third line of five, is it not? It is! Yes.",
    ]


def test_c4_changes_no_text_that_it_rejects():
    rejected = document("One line. \nNo end")
    assert C4()(rejected) is not None
    assert rejected.text == "One line. \nNo end"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ([], 0),
        (["One."], 1),
        (["One. Two! Three?"], 3),
        (['He said: "No." Then he left.'], 2),
        (["No end here", "nor here"], 2),
        (["Version 1.5 of e.g. this... is out."], 1),
        (["What?! No."], 2),
    ],
)
def test_sentences_end_at_full_stops_and_at_ends_of_lines(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize("text", ["", "\n\n", "…", "###", " \t "])
def test_texts_without_words_are_rejected_and_divide_by_nothing(text):
    for each in heuristic_filters(QualityConfig(c4=True, max_duplicate_ngram_coverage=0.1, max_dirty_words=0)):
        each(document(text))
    assert GopherQuality(QualityConfig())(document(text)) == ("too_few_words", "")


def test_filters_come_in_the_order_of_the_stages_and_only_those_that_are_on():
    everything = QualityConfig(c4=True, max_duplicate_ngram_coverage=0.4, max_dirty_words=0, max_kl_divergence=4)
    reference = Unigrams.from_counts(count_words([]))
    names = [each.stage for each in heuristic_filters(everything, reference)]
    assert names == [
        "c4",
        "gopher_repetition",
        "gopher_quality",
        "fineweb",
        "ngram_coverage",
        "dirty_words",
        "divergence",
    ]
    nothing = QualityConfig(gopher_repetition=False, gopher_quality=False, fineweb=False)
    assert heuristic_filters(nothing) == []
    with pytest.raises(ValueError, match="count them first"):
        heuristic_filters(everything)


def test_ngrams_of_any_sizes_can_be_bounded():
    config = QualityConfig(max_top_ngram_chars={1: 0.9, 3: 0.05}, max_duplicate_ngram_chars={3: 0.5, 12: 0.01})
    only = GopherRepetition(config)
    names = [f"{kind}_{n}_gram_chars" for kind, n in [("top", 1), ("top", 3), ("duplicate", 3), ("duplicate", 12)]]
    kept = document(prose(1))
    assert only(kept) is None
    assert [name for name in kept.scores if "gram" in name] == [f"gopher_repetition.{name}" for name in names]


def test_filters_can_be_sent_to_other_processes():
    config = QualityConfig(c4=True, max_duplicate_ngram_coverage=0.4, max_dirty_words=0, max_kl_divergence=4)
    filters = heuristic_filters(config, Unigrams.from_counts(count_words([Words(prose(1))])))
    here, there = document(lines(prose(2))), document(lines(prose(2)))
    assert run_filters(filters, here) == run_filters(pickle.loads(pickle.dumps(filters)), there)
    assert here.scores == there.scores


def test_lines_of_white_space_do_not_count_for_fineweb():
    text = lines(prose(1))
    spaced, plain = document(text.replace("\n", "\n \t\n", 2)), document(text)
    assert FineWeb(QualityConfig())(spaced) is None
    assert FineWeb(QualityConfig())(plain) is None
    for name in ("punctuated_line_ratio", "short_line_ratio"):
        assert spaced.scores[f"fineweb.{name}"] == plain.scores[f"fineweb.{name}"]


@pytest.mark.parametrize(
    ("language", "reason"), [(None, "too_few_stop_words"), ("en", "too_few_stop_words"), ("de", None)]
)
def test_stop_words_are_asked_of_english_alone(language, reason):
    german = (
        "Der alte Müller ging gestern langsam durch den dunklen Wald nach Hause und fand dort einen kleinen Hund. " * 3
    )
    document = Document(id="a", text=german, source="mine", language=language)
    rejection = GopherQuality(QualityConfig())(document)
    assert (rejection and rejection.reason) == reason
