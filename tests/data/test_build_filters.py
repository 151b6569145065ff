"""The chain as a whole, and the filters that are too simple for a module of their own."""

import pyarrow as pa
import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data.build_filters import ExactDuplicateFilter, LengthFilter, UrlDuplicateFilter, build_filters
from lilpipe.data.filters.chain import Bounds, Document, Rejection, run_filters, score_names
from lilpipe.data.filters.decontamination import EvaluationSet, write_index
from lilpipe.data.filters.normalise import normalise
from lilpipe.data.learn import Learnt
from lilpipe.data.survey import DROPPED, MergeTask
from lilpipe.schemas.tables import write_rows
from tests.data.prose import prose


def document(text, **fields):
    return Document(**{"id": "doc", "source": "mine", "text": text, **fields})


# --- the chain ----------------------------------------------------------------------------------------------------


def settings(**others):
    return CorpusConfig.model_validate({"sources": [{"kind": "jsonl", "name": "mine", "path": "x"}], **others})


NOTHING = {
    "exact_dedup": {"documents": False},
    "quality": {"gopher_repetition": False, "gopher_quality": False, "fineweb": False},
    "pii": {"emails": False, "ip_addresses": False, "phone_numbers": False, "secrets": False},
}


def stages(config, learnt=None):
    return [each.stage for each in build_filters(config, learnt or Learnt(), 0)]


def learnt_all(folder):
    """What the survey of an empty corpus comes to, with one evaluation item."""
    words = pa.schema([("hash", pa.uint64()), ("count", pa.int64())])
    write_rows(folder / "words.arrow", [{"hash": 1, "count": 3}], words)
    write_index(folder / "index", [EvaluationSet("quiz", [("1", prose(1))])], settings().decontamination)
    task = MergeTask(folder, 0, 1, 0, 1)
    write_rows(task.output, [], DROPPED)
    return Learnt(evaluation=folder / "index", lines=(task,), pages=(task,), words=folder / "words.arrow")


def test_cheap_filters_come_first_and_those_that_change_the_text_before_those_that_judge_it(tmp_path):
    (tmp_path / "domains").write_text("bad.org\n")
    on = settings(
        url={"blocked_domains": str(tmp_path / "domains")},
        exact_dedup={"paragraphs": True},
        quality={"c4": True, "max_duplicate_ngram_coverage": 0.5, "max_dirty_words": 3, "max_kl_divergence": 5.0},
    )
    assert stages(on, learnt_all(tmp_path)) == [
        *("url", "url_dedup", "length", "exact_dedup", "language"),
        *("line_dedup", "paragraph_dedup", "c4", "gopher_repetition", "gopher_quality", "fineweb"),
        *("ngram_coverage", "dirty_words", "divergence", "pii", "decontamination"),
    ]


def test_what_is_off_is_not_in_the_chain():
    assert stages(settings(**NOTHING)) == ["length", "language"]
    assert stages(settings()) == [
        *("length", "exact_dedup", "language", "gopher_repetition", "gopher_quality", "fineweb", "pii"),
    ]


@pytest.mark.parametrize("kind", ["emails", "ip_addresses", "phone_numbers", "secrets"])
def test_personal_data_of_any_kind_puts_its_filter_into_the_chain(kind):
    chain = build_filters(settings(**{**NOTHING, "pii": {**NOTHING["pii"], kind: True}}), Learnt(), 0)
    assert score_names(chain) == ["length.chars", "language.score", f"pii.{kind}"]


def test_sources_that_name_their_languages_are_held_to_those_alone():
    sources = [Source(kind="text", name=name, path="x", languages=each) for name, each in (("a", None), ("b", ("de",)))]
    config = CorpusConfig(sources=tuple(sources), min_chars=0)
    chain = [each for each in build_filters(config, Learnt(), 0) if each.stage == "language"]
    english = [run_filters(chain, document(prose(1), source=name)) for name in ("a", "b")]
    assert english == [None, ("language", Rejection("other_language", "en"))]


def test_the_first_filter_that_rejects_ends_the_chain_and_scores_before_it_stay():
    short = document("Too short.")
    assert run_filters(build_filters(settings(), Learnt(), 0), short) == ("length", Rejection("too_few_chars"))
    assert short.scores == {"length.chars": 10}
    good = document(prose(1))
    chain = build_filters(settings(), Learnt(), 0)
    assert run_filters(chain, good) is None
    assert list(good.scores) == score_names(chain)
    for each in chain:
        for name, (least, most) in each.bounds.items():
            score = good.scores[f"{each.stage}.{name}"]
            assert least is None or score >= least
            assert most is None or score <= most


# --- length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("x" * 200, None),
        ("x" * 199, Rejection("too_few_chars")),
        (" \n" * 200 + "x" * 199, Rejection("too_few_chars")),  # white space at the ends is no length
        ("… — ! " * 60, Rejection("no_words")),
        ("… — ! " * 60 + "7", None),
    ],
)
def test_a_document_needs_some_length_and_a_letter_or_digit(text, verdict):
    judged = document(text)
    step = LengthFilter(200)
    assert step(judged) == verdict
    assert judged.scores == {"length.chars": len(text.strip())}
    assert step.bounds == {"chars": Bounds(least=200)}


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_an_exact_duplicate_names_the_document_that_was_kept():
    step = ExactDuplicateFilter()
    texts = ["One  text", "one text", "another", "ONE\ttext", "Another"]
    verdicts = [step(document(text, id=str(number), key=5)) for number, text in enumerate(texts)]
    # the third has the hash of the others, and is no duplicate for that
    duplicate = "exact_duplicate"
    assert verdicts == [None, (duplicate, "0"), None, (duplicate, "0"), (duplicate, "2")]
    assert step(document("one text", id="5", key=6)) is None  # would come before, if its text were the same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Caf\u00e9\n  au LAIT", "cafe\u0301 au lait ", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("cafe au lait", "caf\u00e9 au lait", False),
        ("a b", "ab", False),
    ],
)
def test_texts_are_the_same_up_to_case_space_and_unicode_form(one, other, same):
    assert (normalise(one) == normalise(other)) is same


def test_a_replaced_page_names_the_one_that_stays():
    step = UrlDuplicateFilter({3: "newer"})
    assert step(document("", place=2)) is None
    assert step(document("", place=3)) == Rejection("duplicate_url", "newer")
