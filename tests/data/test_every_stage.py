"""The corpus stage with everything turned on, over sources with a document planted for each of its filters."""

import json
from collections import Counter

import pytest

from lilpipe.data import corpus, filter_trace
from lilpipe.data.corpus import read_documents, read_rejected
from lilpipe.data.filters.chain import Bounds
from lilpipe.data.filters.url import url_key
from lilpipe.data.signatures import num_hashes
from lilpipe.schemas.examples import PROMPT_SCHEMA
from lilpipe.schemas.tables import read_table, write_rows
from lilpipe.stage import Workspace
from tests.artifacts import artifact

from . import planted
from .planted import LEFT, NUM_GERMAN, NUM_GOOD, QUIZ, TEXTS, VICTIMS
from .prose import prose, write_jsonl

STAGES = [
    *("url", "url_dedup", "length", "exact_dedup", "language", "line_dedup", "paragraph_dedup", "c4"),
    *("gopher_repetition", "gopher_quality", "fineweb", "ngram_coverage", "dirty_words", "divergence", "pii"),
    *("decontamination", "classifier", "near_dedup"),
]


class Built:
    """What a run of the stage left."""

    def __init__(self, config, inputs, root):
        workspace = Workspace(root)
        self.config = config
        self.metrics = corpus.run(config, inputs, workspace)
        self.output, self.report = workspace.output, workspace.report
        self.kept, self.rejected = (
            {row["id"]: row for batch in read(self.output) for row in batch.to_pylist()}
            for read in (read_documents, read_rejected)
        )
        self.counts = json.loads((self.output / "counts.json").read_text())
        self.thresholds = filter_trace.read_thresholds(self.output)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tests only look at it. It is in small shards, so that there are several."""
    folder = tmp_path_factory.mktemp("planted")
    _, prompts = planted.write_sources(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", 8_000)
        return Built(planted.settings(folder), {"prompts": prompts}, folder / "work")


@pytest.mark.parametrize("name", VICTIMS)
def test_each_planted_document_is_rejected_at_its_stage_for_its_reason(built, name):
    row = built.rejected[name]
    stage, reason, detail = VICTIMS[name]
    assert (row["stage"], row["reason"]) == (stage, reason)
    assert row["detail"].startswith(detail)
    assert row["text"] == TEXTS[name]  # as read
    assert row["num_bytes"] == len(TEXTS[name].encode())


def test_nothing_else_is_rejected(built):
    assert set(built.rejected) - {"near", "nearer"} == set(VICTIMS)
    good = {f"good {n}" for n in range(NUM_GOOD)} | {f"german {n}" for n in range(NUM_GERMAN)}
    rest = {"newest page", "original", *LEFT}
    assert set(built.kept) - {"near", "nearer"} == good | rest
    assert len(list((built.output / "documents").iterdir())) > 4


def test_a_near_duplicate_names_the_better_one_that_stays_and_how_similar_it_is(built):
    (gone,) = {"near", "nearer"} & set(built.rejected)
    (stays,) = {"near", "nearer"} & set(built.kept)
    row = built.rejected[gone]
    assert (row["stage"], row["reason"], row["detail"]) == ("near_dedup", "near_duplicate", stays)
    similarity = row["scores"]["near_dedup.similarity"]
    assert 0.8 < similarity < 1
    assert (similarity * num_hashes(built.config.minhash)).is_integer()
    assert row["scores"]["classifier.score"] <= built.kept[stays]["scores"]["classifier.score"]
    assert all(each["scores"]["near_dedup.similarity"] is None for each in built.kept.values())


def test_documents_that_the_classifier_rejects_are_no_duplicates_of_one_another(built):
    for name in ("spam", "spam again"):  # near-duplicates, if they had come so far
        assert built.rejected[name]["scores"]["near_dedup.similarity"] is None
        assert built.rejected[name]["scores"]["classifier.score"] < 0.5
    assert all(row["scores"]["classifier.score"] >= 0.5 for row in built.kept.values())


def test_what_filters_change_is_changed_in_the_text_that_is_kept(built):
    assert {name: built.kept[name]["text"] for name in LEFT} == LEFT
    scores = {name: built.kept[name]["scores"] for name in LEFT}
    assert [scores[name]["pii.emails"] for name in LEFT] == [1, 0, 0]
    assert [scores[name]["line_dedup.removed_lines"] for name in LEFT] == [0, 1, 0]
    assert [scores[name]["paragraph_dedup.removed_paragraphs"] for name in LEFT] == [0, 0, 1]
    for n in range(NUM_GOOD):  # most had a line that seven others share
        assert built.kept[f"good {n}"]["text"] == prose(n)


def test_origin_label_address_date_and_licence_stay_with_the_document(built):
    row = built.kept["newest page"]
    (read,) = [each for each in planted.web_rows() if each["id"] == "newest page"]
    assert (row["url"], row["date"]) == (read["meta"]["url"], "2024-05-01")
    assert (row["licence"], row["label"]) == (read["rights"] or "MIT", read["kind"])
    assert (row["source"], row["file"], row["language"]) == ("web", row["file"], "en")
    assert row["scores"]["language.score"] == pytest.approx(row["language_score"])
    assert built.rejected["older page"]["date"] == "2023-12-31T23:59:59Z"
    rows = planted.web_rows()
    licences = Counter(row["rights"] or "MIT" for row in rows if row["id"] in built.kept)
    assert {name: each["documents"] for name, each in built.counts["licences"].items()} == {
        **licences,
        "unknown": NUM_GERMAN,
    }


def test_a_page_without_an_address_of_its_own_replaces_no_other(built):
    homeless = [row for row in [*built.kept.values(), *built.rejected.values()] if row["url"] == "/index.html"]
    assert len(homeless) > 5
    assert url_key("/index.html") == 0
    assert not any(row.get("stage") == "url_dedup" for row in homeless)


def test_sources_keep_the_languages_that_they_name(built):
    assert {row["language"] for row in built.kept.values() if row["source"] == "german"} == {"de"}
    assert {row["language"] for row in built.kept.values() if row["source"] == "web"} == {"en"}
    assert built.counts["languages"]["de"]["documents"] == NUM_GERMAN


def test_every_document_has_the_scores_of_the_stages_that_it_passed_and_of_no_later_one(built):
    for row in [*built.kept.values(), *built.rejected.values()]:
        end = STAGES.index(row["stage"]) if "stage" in row else len(STAGES)
        for name, value in row["scores"].items():
            stage = STAGES.index(name.partition(".")[0])
            if name == "gopher_quality.num_stop_words" and row["language"] != "en":
                assert value is None
            elif stage < end and stage != STAGES.index("near_dedup"):
                assert value is not None, (row["id"], name)
                least, most = built.thresholds[name.partition(".")[0]][name.partition(".")[2]]
                assert least is None or value >= least - 1e-6
                assert most is None or value <= most + 1e-6
            elif stage > end:
                assert value is None, (row["id"], name)


def test_the_thresholds_of_all_stages_are_told_in_their_order(built):
    assert list(built.thresholds) == STAGES
    assert built.thresholds["length"] == {"chars": Bounds(least=100)}
    assert built.thresholds["language"] == {"score": Bounds(least=0.3)}
    assert built.thresholds["gopher_quality"]["num_words"] == Bounds(30, 100_000)
    assert built.thresholds["divergence"] == {"kl_divergence": Bounds(most=3)}
    assert built.thresholds["classifier"] == {"score": Bounds(least=0.5)}
    assert built.thresholds["near_dedup"] == {"similarity": Bounds(most=0.4)}


# --- numbers ------------------------------------------------------------------------------------------------------


def test_of_each_source_what_was_read_is_what_was_kept_and_what_each_stage_rejected(built):
    read = {"web": planted.web_rows(), "german": [{"body": planted.german(n)} for n in range(NUM_GERMAN)]}
    for name, source in built.counts["sources"].items():
        rejected = [tally for stage in source["rejected"].values() for tally in stage.values()]
        for unit in ("documents", "bytes"):
            assert source["read"][unit] == source["kept"][unit] + sum(tally[unit] for tally in rejected)
        assert source["read"]["documents"] == len(read[name])
        assert source["read"]["bytes"] == sum(len(row["body"].encode()) for row in read[name])
        assert source["kept"]["documents"] == sum(row["source"] == name for row in built.kept.values())
    stages = Counter(row["stage"] for row in built.rejected.values())
    web = built.counts["sources"]["web"]["rejected"]
    assert {stage: sum(each["documents"] for each in reasons.values()) for stage, reasons in web.items()} == stages
    assert built.counts["stages"] == STAGES
    assert built.counts["sources"]["web"]["quarantined"] == 2


def test_metrics_are_the_counts(built):
    metrics = built.metrics
    assert metrics["documents_read"] == len(built.kept) + len(built.rejected)
    assert metrics["documents_kept"] == len(built.kept)
    assert metrics["bytes_kept"] == sum(row["num_bytes"] for row in built.kept.values())
    assert metrics["kept_ratio"] == len(built.kept) / (len(built.kept) + len(built.rejected))
    assert metrics["quarantined"] == 2
    reasons = Counter(row["reason"] for row in built.rejected.values())
    assert {reason: metrics[f"rejected_{reason}"] for reason in reasons} == reasons
    for stage in STAGES:
        expected = sum(row["num_bytes"] for row in built.rejected.values() if row["stage"] == stage)
        assert metrics[f"rejected_bytes_{stage}"] == expected
    assert metrics["kept_documents_german"] == NUM_GERMAN
    # of what was kept: a line in `notice` and in 32 good documents, an address in `mail`
    assert (metrics["line_dedup_removed_lines"], metrics["pii_emails"]) == (33, 1)


def test_the_report_tells_of_every_stage_of_the_classifier_and_of_the_evaluation_sets(built):
    page = (built.report / "report.html").read_text()
    reasons = [reason for _, reason, _ in VICTIMS.values()]
    for text in (*reasons, "Grumblewort", "⟦", "prompts-validation", "Area under"):
        assert text in page


def test_matches_of_evaluation_sets_are_a_table_of_the_artifact(built):
    (table,) = built.output.glob("evaluation_matches.arrow")
    matches = {(row["document"], row["set"], row["item"], row["overlap"]) for row in read_table(table).to_pylist()}
    # the last mark of a sentence is no word
    quiz = ("named leak", "quiz", "q1", QUIZ.removesuffix("?"))
    assert matches == {("leak", "prompts-validation", "validation/0", planted.QUESTION.removesuffix("?")), quiz}


def test_a_trace_tells_what_became_of_any_document(built):
    for name, row in {**built.kept, **built.rejected}.items():
        trace = filter_trace.trace_filters(built.output, name)
        stage = row.get("stage")
        assert trace.rejected_by == stage
        assert {each.stage for each in trace.decisions if not each.passed} == ({stage} - {None})
        reached = list(dict.fromkeys(each.stage for each in trace.decisions))
        assert reached + trace.not_reached == STAGES
        if stage in ("url_dedup", "exact_dedup", "near_dedup"):
            assert trace.kept == built.kept[row["detail"]]


# --- a share instead of a threshold -------------------------------------------------------------------------------


def test_a_share_to_keep_becomes_the_threshold_that_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(corpus, "build_report", lambda *_, **__: "")
    planted.write_sources(tmp_path)
    rows = [{"id": f"good {n}", "text": prose(n)} for n in range(8)]
    rows += [{"id": f"spam {n}", "text": planted.spam(n)} for n in range(4)] + [{"id": "short", "text": "Too short."}]
    source = {"kind": "jsonl", "name": "mine", "path": str(write_jsonl(tmp_path / "mine.jsonl", rows))}
    classifier = planted.section(tmp_path)["classifier"] | {"min_score": None, "keep_ratio": 0.5}
    built = Built(
        planted.settings(tmp_path, sources=[source], classifier=classifier, minhash={"enabled": False}),
        {},
        tmp_path / "work",
    )
    scores = {name: row["scores"]["classifier.score"] for name, row in {**built.kept, **built.rejected}.items()}
    assert scores.pop("short") is None  # it did not come so far, and is no part of what is shared
    threshold = built.thresholds["classifier"]["score"].least
    assert threshold is not None
    assert set(built.kept) == set(sorted(scores, key=lambda name: -scores[name])[:6])
    assert min(scores[name] for name in built.kept) == pytest.approx(threshold)
    assert {row["reason"] for row in built.rejected.values()} == {"low_quality", "too_few_chars"}
    assert set(built.kept) < {f"good {n}" for n in range(8)}


# --- evaluation sets ----------------------------------------------------------------------------------------------


def test_without_prompts_or_sets_nothing_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "build_report", lambda *_, **__: "")
    folder = tmp_path / "prompts"
    row = {"id": "validation/0", "split": "validation", "family": "f", "question": planted.QUESTION, "answer": "7"}
    write_rows(folder / "prompts.arrow", [row], PROMPT_SCHEMA)
    rows = [{"id": "leak", "text": TEXTS["leak"]}, {"id": "good", "text": prose(1)}]
    source = {"kind": "jsonl", "name": "mine", "path": str(write_jsonl(tmp_path / "mine.jsonl", rows))}
    config = planted.CorpusConfig.model_validate(
        {"sources": [source], "num_workers": 1, "language": {"min_score": 0.3}}
    )
    without = Built(config, {}, tmp_path / "without")
    assert set(without.kept) == {"leak", "good"}
    assert "decontamination" not in without.thresholds
    assert not list(without.output.glob("evaluation*"))
    given = Built(config, {"prompts": artifact(folder)}, tmp_path / "with")
    assert set(given.kept) == {"good"}
    assert given.rejected["leak"]["stage"] == "decontamination"
    off = config.model_copy(update={"decontamination": config.decontamination.model_copy(update={"enabled": False})})
    assert set(Built(off, {"prompts": artifact(folder)}, tmp_path / "off").kept) == {"leak", "good"}
