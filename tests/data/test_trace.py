import json

import pytest

from lilpipe.data.filters.chain import Bounds
from lilpipe.data.trace import Verdict, read_thresholds, trace_document
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
    fate = trace_document(corpus, "kept/5")
    assert (fate.row["id"], fate.rejected_by, fate.not_reached, fate.kept) == ("kept/5", None, [], None)
    assert fate.verdicts == [
        Verdict("url", "", None, Bounds(), passed=True),
        Verdict("length", "chars", 250, Bounds(least=200), passed=True),
        Verdict("exact_dedup", "", None, Bounds(), passed=True),
        Verdict("language", "score", 0.75, Bounds(least=0.65), passed=True),
        Verdict("line_dedup", "removed_lines", 2, Bounds(), passed=True),
        Verdict("line_dedup", "removed_chars", 0.125, Bounds(), passed=True),
        Verdict("c4", "lorem_ipsum", 0, Bounds(most=0), passed=True),
        Verdict("c4", "curly_bracket", 0, Bounds(most=0), passed=True),
        Verdict("c4", "num_sentences", 9, Bounds(least=5), passed=True),
        Verdict("pii", "emails", 1, Bounds(), passed=True),
        Verdict("decontamination", "matched_ngrams", 0, Bounds(most=0), passed=True),
        Verdict("decontamination", "matched_ratio", 0, Bounds(), passed=True),
        Verdict("near_dedup", "similarity", None, Bounds(most=0.4), passed=True),
    ]


def test_a_rejected_document_ends_at_its_stage(corpus):
    fate = trace_document(corpus, "bracket")
    assert (fate.rejected_by, fate.row["reason"], fate.kept) == ("c4", "curly_bracket", None)
    assert fate.not_reached == ["pii", "decontamination", "near_dedup"]
    assert [each.stage for each in fate.verdicts if not each.passed] == ["c4"] * 3
    assert [each.value for each in fate.verdicts if not each.passed] == [0, 1, None]  # the third was not taken
    assert [each.stage for each in fate.verdicts if each.passed] == [
        *("url", "length", "exact_dedup", "language", "line_dedup", "line_dedup"),
    ]
    assert [each.stage for each in trace_document(corpus, "short").verdicts] == ["url", "length"]


@pytest.mark.parametrize(("name", "kept"), [("copy", "kept/5"), ("near", "kept/7"), ("copy of short", "bracket")])
def test_a_duplicate_comes_with_the_document_it_is_one_of(corpus, name, kept):
    fate = trace_document(corpus, name)
    assert fate.kept is not None
    assert fate.kept["id"] == kept
    assert ("stage" in fate.kept) == (kept == "bracket")  # the first of two copies may have been rejected later


@pytest.mark.parametrize("name", ["german", "lines"])
def test_a_detail_that_names_no_document_is_not_looked_up(corpus, name):
    assert trace_document(corpus, name).kept is None


def test_an_id_that_is_not_there_is_an_error_with_those_that_hold_it(corpus):
    with pytest.raises(DataError, match=r"'kept': id not found.*: (kept/\d, ){4}kept/\d$"):
        trace_document(corpus, "kept")
    with pytest.raises(DataError, match=r"'ort': .*: short, copy of short$"):
        trace_document(corpus, "ort")
    with pytest.raises(DataError, match=r"'absent': .*unreadable rows are in quarantine\.jsonl"):
        trace_document(corpus, "absent")


def test_thresholds_are_kept_in_the_order_of_the_chain(corpus):
    assert list(read_thresholds(corpus).items()) == list(THRESHOLDS.items())
    content = json.loads((corpus / "filters.json").read_text())
    assert content["language"] == {"score": {"least": 0.65, "most": None}}
    assert content["exact_dedup"] == {}
