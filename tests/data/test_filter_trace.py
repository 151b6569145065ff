import json

import pytest

from lilpipe.data.filter_trace import FilterDecision, read_thresholds, trace_filters
from lilpipe.data.filters.chain import Bounds
from lilpipe.errors import DataError

from .corpora import THRESHOLDS, document, write_corpus

GOOD = {
    "length.chars": 250,
    "language.score": 0.75,
    "line_dedup.removed_lines": 2,
    "line_dedup.removed_chars": 0.125,
    "c4.lorem_ipsum": 0,
    "c4.curly_bracket": 0,
    "c4.num_sentences": 9,
    "pii.emails": 1,
    "decontamination.matched_ngrams": 0,
    "decontamination.matched_ratio": 0,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    kept = [document(f"kept/{number}", scores=GOOD) for number in range(8)]
    near = document("near", scores=GOOD | {"near_dedup.similarity": 0.5})
    bracket = document("bracket", scores=GOOD | {"c4.curly_bracket": 1, "c4.num_sentences": float("nan")})
    for name in ("pii.emails", "decontamination.matched_ngrams", "decontamination.matched_ratio"):
        del bracket.scores[name]
    rejected = [
        (document("short", scores={"length.chars": 9}, language=None, language_score=None), "length", "short", ""),
        (bracket, "c4", "curly_bracket", ""),
        (document("copy", scores={"length.chars": 250}), "exact_dedup", "exact_duplicate", "kept/5"),
        (document("copy of short", scores={"length.chars": 250}), "exact_dedup", "exact_duplicate", "bracket"),
        (document("german", scores={"language.score": 0.9}), "language", "other_language", "kept/1"),
        (document("lines"), "line_dedup", "only_repeated_lines", ""),
        (near, "near_dedup", "near_duplicate", "kept/7"),
    ]
    return write_corpus(tmp_path_factory.mktemp("corpus"), kept, rejected)


def test_a_kept_document_has_passed_every_stage_and_shows_score_and_threshold_of_each(corpus):
    trace = trace_filters(corpus, "kept/5")
    assert (trace.row["id"], trace.rejected_by, trace.not_reached, trace.kept) == ("kept/5", None, [], None)
    assert trace.decisions == [
        FilterDecision("url", "", None, Bounds(), passed=True),
        FilterDecision("length", "chars", 250, Bounds(least=200), passed=True),
        FilterDecision("exact_dedup", "", None, Bounds(), passed=True),
        FilterDecision("language", "score", 0.75, Bounds(least=0.65), passed=True),
        FilterDecision("line_dedup", "removed_lines", 2, Bounds(), passed=True),
        FilterDecision("line_dedup", "removed_chars", 0.125, Bounds(), passed=True),
        FilterDecision("c4", "lorem_ipsum", 0, Bounds(most=0), passed=True),
        FilterDecision("c4", "curly_bracket", 0, Bounds(most=0), passed=True),
        FilterDecision("c4", "num_sentences", 9, Bounds(least=5), passed=True),
        FilterDecision("pii", "emails", 1, Bounds(), passed=True),
        FilterDecision("decontamination", "matched_ngrams", 0, Bounds(most=0), passed=True),
        FilterDecision("decontamination", "matched_ratio", 0, Bounds(), passed=True),
        FilterDecision("near_dedup", "similarity", None, Bounds(most=0.4), passed=True),
    ]


def test_a_rejected_document_ends_at_its_stage(corpus):
    trace = trace_filters(corpus, "bracket")
    assert (trace.rejected_by, trace.row["reason"], trace.kept) == ("c4", "curly_bracket", None)
    assert trace.not_reached == ["pii", "decontamination", "near_dedup"]
    assert [each.stage for each in trace.decisions if not each.passed] == ["c4"] * 3
    assert [each.value for each in trace.decisions if not each.passed] == [0, 1, None]  # the third was not taken
    assert [each.stage for each in trace.decisions if each.passed] == [
        *("url", "length", "exact_dedup", "language", "line_dedup", "line_dedup"),
    ]
    assert [each.stage for each in trace_filters(corpus, "short").decisions] == ["url", "length"]


@pytest.mark.parametrize(("name", "kept"), [("copy", "kept/5"), ("near", "kept/7"), ("copy of short", "bracket")])
def test_a_duplicate_comes_with_the_document_it_is_one_of(corpus, name, kept):
    trace = trace_filters(corpus, name)
    assert trace.kept is not None
    assert trace.kept["id"] == kept
    assert ("stage" in trace.kept) == (kept == "bracket")  # the first of two copies may have been rejected later


@pytest.mark.parametrize("name", ["german", "lines"])
def test_a_detail_that_names_no_document_is_not_looked_up(corpus, name):
    assert trace_filters(corpus, name).kept is None


def test_an_id_that_is_not_there_is_an_error_with_those_that_hold_it(corpus):
    with pytest.raises(DataError, match=r"'kept': id not found.*: (kept/\d, ){4}kept/\d$"):
        trace_filters(corpus, "kept")
    with pytest.raises(DataError, match=r"'ort': .*: short, copy of short$"):
        trace_filters(corpus, "ort")
    with pytest.raises(DataError, match=r"'absent': .*unreadable rows are in quarantine\.jsonl"):
        trace_filters(corpus, "absent")


def test_thresholds_are_kept_in_the_order_of_the_chain(corpus):
    assert list(read_thresholds(corpus).items()) == list(THRESHOLDS.items())
    content = json.loads((corpus / "filters.json").read_text())
    assert content["language"] == {"score": {"least": 0.65, "most": None}}
    assert content["exact_dedup"] == {}
