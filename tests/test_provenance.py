"""``lilpipe trace`` on a store with hand-made artifacts, through the command line but in this process."""

import re

import pytest
from typer.testing import CliRunner

from lilpipe.artifact import list_files
from lilpipe.cli import app
from lilpipe.errors import ConfigError, DataError
from lilpipe.pipeline.manifest import collect_logs, make_manifest
from lilpipe.pipeline.plan import PlannedStep, plan
from lilpipe.recipes import load
from lilpipe.schemas.examples import DOCUMENT_SCHEMA
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from lilpipe.store import Store
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokens.build import STAGE as TOKENS
from tests.data.corpora import document, write_corpus
from tests.data.prose import prose

CONFIG = """
[steps.prompts]
stage = "prompts"
[steps.corpus]
stage = "corpus"
[steps.tokenizer]
stage = "tokenizer"
inputs = { corpus = "corpus" }
[steps.tokens]
stage = "tokens"
inputs = { corpus = "corpus", prompts = "prompts", tokenizer = "tokenizer" }
[steps.pretrain]
stage = "pretrain"
inputs = { tokens = "tokens" }
[[corpus.sources]]
kind = "text"
name = "books"
path = "PATH"
[tokens]
validation_ratio = 0.2
[pretrain]
num_steps = 60
batch_size = 4
num_workers = 1
exercise_ratio = 0.25
[pretrain.model]
max_seq_len = 32
"""
KEPT = [
    document(f"kept/{n}", f"{n} [b] " + prose(n), licence="CC0", url="https://a.org", name="Tales", version="2")
    for n in range(20)
]
SCORES = {"length.chars": 321, "language.score": 0.875, "c4.lorem_ipsum": 0, "c4.curly_bracket": 1}
REJECTED = [
    (document("bracket", "A [red]{ bracket }.", scores=SCORES), "c4", "curly_bracket", ""),
    (document("copy"), "exact_dedup", "exact_duplicate", "kept/3"),
    (document("copy of a bracket"), "exact_dedup", "exact_duplicate", "bracket"),
    (document("near", scores={"near_dedup.similarity": 0.5}), "near_dedup", "near_duplicate", "kept/4"),
    (document("german", language="de", scores={"language.score": 0.9}), "language", "other_language", "de"),
    (
        document("leak", scores={"decontamination.matched_ngrams": 7, "decontamination.matched_ratio": 0.25}),
        "decontamination",
        "evaluation_text",
        "quiz/1: [b]who",
    ),
    (document("lines", scores={"line_dedup.removed_lines": 4}), "line_dedup", "only_repeated_lines", ""),
]
EXERCISES = [{"id": f"exercise/{n}", "text": f"Exercise: {n} plus {n}\nSolution: {2 * n}"} for n in range(30)]


def commit(config, store, step, fill):
    """Put an artifact into the store as if the step had made it; ``fill`` writes the output and is given the inputs."""
    planned = plan(config, store, until=step)[step]
    assert isinstance(planned, PlannedStep)
    work = store.work(planned.stage.name, planned.cache_key.fingerprint)
    (work / "attempts.jsonl").write_text("")
    fill(Workspace(work), planned.inputs)
    collect_logs(work)
    return store.commit(work, make_manifest(planned, work, list_files(work / "output"), {}))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The configuration file, a store with the corpus alone, and one with everything."""
    folder = tmp_path_factory.mktemp("provenance")
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("What is read here is in the artifacts already.")
    file = folder / "mine.toml"
    file.write_text(CONFIG.replace("PATH", str(folder / "books")))
    config = load("tiny", file=file)
    made = {
        "prompts": lambda space, _: write_rows(space.output / "documents.arrow", EXERCISES, DOCUMENT_SCHEMA),
        "corpus": lambda space, _: write_corpus(space.output, KEPT, REJECTED),
        "tokenizer": lambda space, _: train_tokenizer([each.text for each in KEPT], vocab_size=300).save(space.output),
        "tokens": lambda space, inputs: TOKENS.run(config.section("tokens"), inputs, space),
        "pretrain": lambda space, _: (space.output / "model").write_text("weights"),
    }
    for name, steps in (("corpus", ("prompts", "corpus")), ("everything", made)):
        for step in steps:
            commit(config, Store(str(folder / name)), step, made[step])
    return file, {name: str(folder / name) for name in ("corpus", "everything", "nothing")}


@pytest.fixture
def trace(stores, monkeypatch):
    """What `lilpipe trace` prints, in lines without the table's frame; its errors are raised here."""
    file, roots = stores

    def call(*arguments, store="everything"):
        monkeypatch.setenv("LILPIPE_STORE", roots[store])
        monkeypatch.setenv("COLUMNS", "160")
        result = CliRunner().invoke(app, ["trace", *arguments, "--config", str(file)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        lines = [" ".join(re.sub("[│┃]", "|", line).split()) for line in result.output.splitlines()]
        return [line.removeprefix("| ").removesuffix(" |") for line in lines]

    return call


def verdicts(lines):
    """The rows of the table of filters, from the stage to the verdict."""
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") >= 1]
    return [row for row in rows if row[0] != "filter"]


def sightings(lines):
    """Step, row, epoch and tokens of each."""
    found = [re.fullmatch(r"([\d,]+) \| (\d+) \| (\d+) \| (\d+) to (\d+)", line) for line in lines]
    return [tuple(int(part.replace(",", "")) for part in each.groups()) for each in found if each]


def test_a_kept_document_shows_its_verdicts_and_the_rows_of_pretraining_that_held_it(trace):
    lines = trace("--doc", "kept/3")
    assert lines[0] == "kept/3 books · Tales 2 · CC0 · https://a.org"
    assert lines[1] == f"read from books.jsonl:0, {len(KEPT[3].text):,} bytes"
    assert "3 [b] " + prose(3)[:40] in " ".join(lines)  # as it is, not as markup
    assert "kept" in lines
    (summary,) = [line for line in lines if line.startswith("stream ")]
    assert "split train" in summary
    seen = sightings(lines)
    told = re.search(r"seen in (\d+) rows of pretraining", summary)
    assert told is not None
    assert len(seen) == min(int(told[1]), 30) > 0
    step, row, _, first, stop = seen[0]
    span = f"kept/3 | books | {first} to {stop} | "
    assert any(line.startswith(span) for line in trace("--step", str(step), "--row", str(row)))


def test_a_document_held_out_for_validation_was_seen_in_no_step(trace):
    told = {each.id: [line for line in trace("--doc", each.id) if line.startswith("stream ")] for each in KEPT}
    held_out = [lines for lines in told.values() if "split validation" in lines[0]]
    assert 0 < len(held_out) < len(KEPT)
    assert all(line.endswith("in the validation split") for (line,) in held_out)


def test_a_rejected_document_shows_the_score_that_decided_its_threshold_and_what_was_not_reached(trace):
    lines = trace("--doc", "bracket")
    assert "A [red]{ bracket }." in lines
    assert verdicts(lines) == [
        ["url", "", "", "", "passed"],
        ["length", "chars", "321", "≥ 200", "passed"],
        ["exact_dedup", "", "", "", "passed"],
        ["language", "score", "0.875", "≥ 0.65", "passed"],
        ["line_dedup", "removed_lines", "", "", "passed"],
        ["line_dedup", "removed_chars", "", "", "passed"],
        ["c4", "lorem_ipsum", "0", "≤ 0", ""],
        ["c4", "curly_bracket", "1", "≤ 0", "curly_bracket"],
        ["c4", "num_sentences", "", "≥ 5", ""],
        ["pii", "", "", "", "not reached"],
        ["decontamination", "", "", "", "not reached"],
        ["near_dedup", "", "", "", "not reached"],
    ]
    assert lines[-1] == "rejected by c4: curly_bracket"


@pytest.mark.parametrize(
    ("name", "decided", "said"),
    [
        ("copy", ["exact_dedup", "", "", "", "exact_duplicate"], "rejected by exact_dedup: exact_duplicate: kept/3"),
        (
            "german",
            ["language", "score", "0.9", "≥ 0.65", "other_language"],
            "rejected by language: other_language: de",
        ),
        (
            "lines",
            ["line_dedup", "removed_lines", "4", "", "only_repeated_lines"],
            "rejected by line_dedup: only_repeated_lines",
        ),
        (
            "leak",
            ["decontamination", "matched_ngrams", "7", "≤ 0", "evaluation_text"],
            "rejected by decontamination: evaluation_text: quiz/1: [b]who",
        ),
        (
            "near",
            ["near_dedup", "similarity", "0.5", "≤ 0.4", "near_duplicate"],
            "rejected by near_dedup: near_duplicate: kept/4",
        ),
    ],
)
def test_one_verdict_of_a_rejected_document_gives_the_reason(trace, name, decided, said):
    lines = trace("--doc", name)
    assert [row for row in verdicts(lines) if row[-1] not in ("passed", "", "not reached")] == [decided]
    assert said in lines


def test_a_duplicate_shows_the_document_that_was_kept_instead_or_that_there_is_none(trace):
    assert "kept instead: kept/3 (books)" in trace("--doc", "copy")
    assert "first duplicate, itself rejected by c4: bracket (books)" in trace("--doc", "copy of a bracket")


def test_the_documents_of_a_row_fill_it(trace):
    lines = trace("--step", "7", "--row", "2")
    assert re.fullmatch(r"step 7, row 2: stream \S+, epoch \d+", lines[0])
    spans = re.findall(r"(\d+) to (\d+) \| (\d+)", "\n".join(lines))
    assert sum(int(stop) - int(first) for first, stop, _ in spans) == 33  # 32 inputs and the last target
    assert all(0 <= int(first) < int(stop) <= int(total) for first, stop, total in spans)


def test_an_exercise_is_traced_though_no_corpus_holds_it(trace):
    lines = trace("--doc", "exercise/3")
    assert lines[0].startswith("stream exercises, split ")
    assert not any("rejected" in line or "read from" in line for line in lines)


def test_before_pretraining_a_document_has_its_verdicts_alone(trace):
    lines = trace("--doc", "kept/3", store="corpus")
    assert lines[-2:] == ["kept", "No pretraining of this configuration is in the store yet."]


@pytest.mark.parametrize("store", ["corpus", "everything"])
def test_an_id_that_nothing_knows_is_an_error_with_ids_like_it(trace, store):
    with pytest.raises(DataError, match=r"'racket': .*ids that contain it: bracket, copy of a bracket"):
        trace("--doc", "racket", store=store)


@pytest.mark.parametrize(
    ("arguments", "store", "message"),
    [
        (("--doc", "x"), "nothing", "no corpus of this configuration is in the store"),
        (("--step", "0"), "corpus", "no pretraining of this configuration is in the store"),
        (("--step", "0", "--doc", "x"), "everything", "got both --doc and --step or neither"),
        ((), "everything", "got both --doc and --step or neither"),
        (("--step", "60"), "everything", "step: got 60, expected 0 to 59"),
        (("--step", "0", "--row", "4"), "everything", "row: got 4, expected 0 to 3"),
    ],
)
def test_what_cannot_be_traced_says_why(trace, arguments, store, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        trace(*arguments, store=store)
