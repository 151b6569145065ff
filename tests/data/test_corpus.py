"""The stage as a whole, on hand-made sources with planted faults."""

import gzip
import json
import shutil

import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data import corpus
from lilpipe.data.corpus import external, read_documents, read_rejected
from lilpipe.data.filters.language import bundled_model_path
from lilpipe.data.sorting import text_key
from lilpipe.errors import DataError

from . import planted
from .planted import FEW_BANDS, build, events_of, no_report
from .prose import prose, write_jsonl

NUM_GOOD = 24


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """A report takes longer to draw than a small corpus to build; that of ``built`` is there before this."""
    monkeypatch.setattr(corpus, "build_report", no_report)


def sources(tmp_path):
    """24 good documents in three files of two sources, with planted duplicates, short ones and bad rows."""
    rows = [{"id": f"good {i}", "text": prose(i), "license": "CC0"} for i in range(NUM_GOOD)]
    rows[3]["text"] = rows[3]["text"].replace(". ", ". <script>alert(1)</script> ", 1)
    near = {"id": "near", "text": rows[5]["text"] + " So it was."}
    exact = {"id": "exact", "text": rows[6]["text"].upper().replace(" ", "  ").lower()}
    write_jsonl(tmp_path / "one" / "a.jsonl", [*rows[:10], near, {"id": "short", "text": "Too short."}])
    write_jsonl(tmp_path / "one" / "b.jsonl", [*rows[10:20], exact, {"id": "twice", "text": prose(100)}])
    write_jsonl(tmp_path / "two" / "c.jsonl", [*rows[20:], {"id": "twice", "text": prose(101)}])
    with (tmp_path / "two" / "c.jsonl").open("a") as file:
        file.write('{"id": "bad"\n{"id": "no text"}\n')
    return tuple(Source(kind="jsonl", name=name, path=str(tmp_path / name)) for name in ("one", "two"))


def settings(tmp_path, **others):
    others = {"num_workers": 1, "max_malformed_ratio": 0.5, "language": {"min_score": 0.3}, **FEW_BANDS, **others}
    return CorpusConfig.model_validate({"sources": sources(tmp_path), **others})


def rows(batches):
    return [row for batch in batches for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One corpus, in one process; the tests only look at it. In small shards, so that there are several."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", 5_000)
        metrics, workspace = build(settings(folder), folder / "work")
    return folder, metrics, workspace


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 5_000)


def test_good_documents_are_kept_with_their_origin(built):
    _, metrics, workspace = built
    kept = {row["id"]: row for row in rows(read_documents(workspace.output))}
    expected = {f"good {i}" for i in range(NUM_GOOD)} | {"twice#one/b.jsonl:12", "twice#two/c.jsonl:5"}
    # of near and exact duplicates, the one kept is the first in the order of the corpus
    assert len(kept) == len(expected)
    assert len(set(kept) & expected) >= len(expected) - 2
    row = kept["good 21"]
    assert (row["text"], row["source"], row["file"], row["row"]) == (prose(21), "two", "c.jsonl", 2)
    assert (row["licence"], row["language"]) == ("CC0", "en")
    assert 0.3 < row["language_score"] <= 1
    assert metrics["documents_kept"] == len(expected)
    assert metrics["documents_read"] == len(expected) + 3
    assert metrics["quarantined"] == 2


def test_documents_that_share_an_id_stay_apart(built):
    kept = {row["id"]: row["text"] for row in rows(read_documents(built[2].output))}
    assert kept["twice#one/b.jsonl:12"] == prose(100)
    assert kept["twice#two/c.jsonl:5"] == prose(101)


def test_duplicates_are_rejected_and_name_what_was_kept(built):
    _, metrics, workspace = built
    rejected = {row["reason"]: row for row in rows(read_rejected(workspace.output))}
    kept = {row["id"] for row in rows(read_documents(workspace.output))}
    assert set(rejected) == {"too_few_chars", "exact_duplicate", "near_duplicate"}
    near, exact = rejected["near_duplicate"], rejected["exact_duplicate"]
    assert {near["id"], near["detail"]} == {"near", "good 5"}
    assert {exact["id"], exact["detail"]} == {"exact", "good 6"}
    assert {near["detail"], exact["detail"]} <= kept
    assert near["stage"] == "near_dedup"
    assert metrics["rejected_near_duplicate"] == metrics["rejected_too_few_chars"] == 1


def test_unreadable_rows_are_quarantined_by_file_and_line(built):
    lines = [json.loads(line) for line in (built[2].output / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["source"], line["file"], line["row"]) for line in lines] == [
        ("two", "c.jsonl", 6),
        ("two", "c.jsonl", 7),
    ]
    assert "not JSON" in lines[0]["error"]
    assert "has no 'text'" in lines[1]["error"]


def test_counts_add_up_for_each_source(built):
    _, metrics, workspace = built
    counts = json.loads((workspace.output / "counts.json").read_text())["sources"]
    for source in counts.values():
        rejected = [tally for stage in source["rejected"].values() for tally in stage.values()]
        for unit in ("documents", "bytes"):
            assert source["read"][unit] == source["kept"][unit] + sum(tally[unit] for tally in rejected)
    assert sum(source["read"]["bytes"] for source in counts.values()) == metrics["bytes_read"]
    assert counts["two"]["quarantined"] == 2


def test_the_corpus_is_in_the_order_of_a_hash_over_several_files(built):
    files = sorted((built[2].output / "documents").iterdir())
    assert len(files) > 3
    keys = [text_key(row["text"]) for row in rows(read_documents(built[2].output))]
    assert keys == sorted(keys)


def test_the_report_shows_reasons_and_samples_and_runs_nothing_of_what_it_shows(built):
    page = (built[2].report / "report.html").read_text()
    for text in ("near_duplicate", "too_few_chars", "Too short.", "CC0", "c.jsonl", "<svg"):
        assert text in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_nothing_outside_the_report_tells_of_this_machine(built):
    folder, _, workspace = built
    for path in workspace.output.rglob("*"):
        if path.is_file() and "report" not in path.parts:
            assert str(folder).encode() not in path.read_bytes()


def test_progress_grows_through_all_steps_to_all_of_it(built):
    events = events_of(built[2].root)
    done = [event["done"] for event in events]
    assert {event["total"] for event in events} == {100}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 100)
    assert len(set(done)) > 8


def test_the_same_documents_in_other_files_give_the_same_kept_texts(built, small_shards, tmp_path):
    folder, _, workspace = built
    lines = [line for name in ("one/b", "one/a") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    (tmp_path / "one").mkdir()
    for number in range(4):
        (tmp_path / "one" / f"{number}.jsonl").write_text("\n".join(lines[number::4]) + "\n")
    moved = Source(kind="jsonl", name="one", path=str(tmp_path / "one"))
    config = settings(folder)
    _, other = build(config.model_copy(update={"sources": (moved, config.sources[1])}), tmp_path / "work")
    kept = [row["text"].casefold().split() for row in rows(read_documents(workspace.output))]
    assert [row["text"].casefold().split() for row in rows(read_documents(other.output))] == kept


# --- what is wrong with sources and settings ----------------------------------------------------------------------


def test_too_many_unreadable_rows_fail_the_stage_with_examples(tmp_path):
    with pytest.raises(
        DataError, match=r"source 'two': 2 of 7 rows.*28\.6%.*c\.jsonl:6 is not JSON.*max_malformed_ratio"
    ):
        build(settings(tmp_path, max_malformed_ratio=0.1), tmp_path / "work")


def test_a_file_that_breaks_off_counts_as_a_share_of_the_files(tmp_path):
    for i in range(3):
        content = gzip.compress("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(200)).encode())
        (tmp_path / f"{i}.jsonl.gz").write_bytes(content if i else content[:-2_000])
    config = CorpusConfig(sources=(Source(kind="jsonl", name="mine", path=str(tmp_path)),), num_workers=1)
    with pytest.raises(DataError, match=r"33\.3% of its files.*0\.jsonl\.gz:\d+ cannot be read after line"):
        build(config, tmp_path / "work")


def test_a_missing_source_fails_before_any_work_and_already_when_planning(tmp_path):
    config = settings(tmp_path)
    missing = Source(kind="text", name="gone", path=str(tmp_path / "gone"))
    config = config.model_copy(update={"sources": (*config.sources, missing)})
    for act in (lambda: build(config, tmp_path / "work"), lambda: external(config)):
        with pytest.raises(DataError, match=r"source 'gone'.*does not exist"):
            act()
    assert not list((tmp_path / "work" / "scratch").iterdir())


def test_a_source_without_documents_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    config = CorpusConfig(sources=(Source(kind="jsonl", name="blank", path=str(tmp_path / "x.jsonl")),), num_workers=1)
    with pytest.raises(DataError, match=r"source 'blank': got no documents in path .*x\.jsonl"):
        build(config, tmp_path / "work")


def test_a_corpus_of_nothing_says_what_rejected_it(tmp_path):
    with pytest.raises(DataError, match=r"all 29 documents were rejected \(too_few_chars 29"):
        build(settings(tmp_path, min_chars=10_000), tmp_path / "work")


def test_filters_and_deduplication_can_be_turned_off(tmp_path):
    metrics, _ = build(
        settings(
            tmp_path,
            min_chars=0,
            exact_dedup={"documents": False},
            minhash={"enabled": False},
            quality={"gopher_repetition": False, "gopher_quality": False, "fineweb": False},
            language={"min_score": 0},
            languages=[],
        ),
        tmp_path / "work",
    )
    assert metrics["documents_kept"] == metrics["documents_read"] == NUM_GOOD + 5


def test_external_digests_follow_the_content_of_every_file_that_is_named(tmp_path):
    planted.write_sources(tmp_path)
    model = tmp_path / "model.ftz"
    shutil.copyfile(bundled_model_path(), model)
    config = planted.settings(tmp_path, language={"model": str(model)})
    files = {
        "language model": model,
        "corpus.url.blocked_domains": tmp_path / "domains.txt",
        "corpus.url.blocked_words": tmp_path / "words.txt",
        "corpus.quality.dirty_words": tmp_path / "dirty.txt",
        "source web": tmp_path / "web" / "b.jsonl",
        "source german": tmp_path / "german.jsonl",
        "good example good": tmp_path / "good.jsonl",
        "bad example bad": tmp_path / "bad.jsonl",
        "evaluation set quiz": tmp_path / "quiz.jsonl",
    }
    before = external(config)
    assert set(before) == set(files)
    for name, path in files.items():
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        after = external(config)
        assert [key for key in before if before[key] != after[key]] == [name]
        path.write_bytes(content)
    assert external(config) == before


@pytest.mark.parametrize("name", ["model", "blocked_domains", "blocked_words", "dirty_words"])
def test_a_file_that_is_named_and_absent_fails_already_when_planning(tmp_path, name):
    sections = {"model": "language", "dirty_words": "quality"}
    section = sections.get(name, "url")
    config = settings(tmp_path, **{section: {name: str(tmp_path / "absent")}})
    with pytest.raises(DataError, match=rf"corpus\.{section}\.{name}: .*absent cannot be read"):
        external(config)


def test_what_is_not_turned_on_is_not_digested(tmp_path):
    assert set(external(settings(tmp_path))) == {"language model", "source one", "source two"}
    quiz = {"kind": "text", "name": "quiz", "path": str(tmp_path / "absent")}
    off = settings(tmp_path, decontamination={"enabled": False, "sets": [quiz]})
    assert set(external(off)) == {"language model", "source one", "source two"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"classifier": {"min_score": 0.5}}, "got one without examples; set `good` and `bad`"),
        ({"classifier": {"keep_ratio": 0.5}}, "got one without examples; set `good` and `bad`"),
        ({"classifier": {"good": ["a"], "bad": ["b"]}}, "got both or neither, expected exactly one"),
        ({"classifier": {"good": ["a"], "min_score": 0.5}}, "only one of them has examples"),
        ({"classifier": {"good": ["a", "a"], "bad": ["a"], "min_score": 0.5}}, r"good: names must be unique.*'a', 'a'"),
        ({"classifier": {"good": ["a"], "bad": ["b", "b"], "min_score": 0.5}}, r"bad: names must be unique.*'b', 'b'"),
        ({"decontamination": {"sets": ["quiz", "quiz"]}}, r"sets: names must be unique.*'quiz', 'quiz'"),
        ({"sources": ["a", "a"]}, r"sources: names must be unique.*'a', 'a'"),
        ({"sources": []}, "sources: got none, expected at least one"),
    ],
)
def test_settings_that_would_be_ignored_or_hide_one_another_are_refused(section, message):
    def source(name):
        return {"kind": "text", "name": name, "path": "x"}

    def filled(value):
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return [source(name) for name in value] if isinstance(value, list) else value

    with pytest.raises(ValueError, match=message):
        CorpusConfig.model_validate(filled(section))


def test_where_and_by_how_many_the_work_is_done_is_no_part_of_the_identity(tmp_path):
    ways = ({"num_workers": 7}, {"executor": "slurm", "slurm": {"partition": "big"}}, {"ray": {"cpus_per_task": 3}})
    identities = [settings(tmp_path, **way).identity() for way in ({}, *ways)]
    assert identities == identities[:1] * len(identities)
    assert settings(tmp_path, min_chars=7).identity() != identities[0]


def test_max_bytes_does_not_make_bad_rows_a_larger_ratio(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": prose(i), "id": str(i)} for i in range(40)])
    with path.open("a") as file:
        file.write("{\n")
    source = Source(kind="jsonl", name="mine", path=str(path), max_bytes=2_000)
    metrics, _ = build(CorpusConfig(sources=(source,), num_workers=1, max_malformed_ratio=0.05), tmp_path / "work")
    assert 0 < metrics["bytes_read"] <= 2_000
    with pytest.raises(DataError, match="max_bytes = 10 is smaller than its first document"):
        build(
            CorpusConfig(
                sources=(source.model_copy(update={"max_bytes": 10}),), num_workers=1, max_malformed_ratio=0.05
            ),
            tmp_path / "other work",
        )


def test_a_corpus_may_be_one_document(tmp_path):
    (tmp_path / "book.txt").write_text(prose(1))
    source = Source(kind="text", name="book", path=str(tmp_path / "book.txt"))
    metrics, workspace = build(CorpusConfig(sources=(source,), num_workers=1), tmp_path / "work")
    assert metrics["documents_kept"] == 1
    assert [row["id"] for row in rows(read_documents(workspace.output))] == ["book.txt"]
