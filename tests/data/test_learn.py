"""What filters are told of the whole corpus, and that nothing is looked for that was not asked for."""

from collections import Counter

import numpy as np
import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data import learn as learning
from lilpipe.data.executors.executor import open_executor
from lilpipe.data.filters.decontamination import EvaluationIndex
from lilpipe.data.filters.frequent_keys import frequent_keys
from lilpipe.data.filters.repeated import line_keys
from lilpipe.data.filters.words import Words
from lilpipe.data.learn import Learnt, has_pages, learn
from lilpipe.data.survey import dropped_pages, merged_files
from lilpipe.data.work import Work
from lilpipe.schemas.examples import PROMPT_SCHEMA
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace

from .prose import prose, write_jsonl
from .selections import select

QUIET = {"url": {"deduplicate": False}, "decontamination": {"enabled": False}}


def settings(**others):
    source = {"kind": "jsonl", "name": "mine", "path": "x"}
    return CorpusConfig.model_validate({"sources": [source], "num_workers": 1, **QUIET, **others})


def learnt_of(folder, rows, *, num_shards=1, prompts=None, **others):
    """What is learnt of these rows, and the workspace in which it was."""
    workspace, config = Workspace(folder / "work"), settings(**others)
    with open_executor(config) as run_tasks:
        return learn(config, select(folder, rows, num_shards), prompts, Work(workspace, run_tasks)), workspace


def prompts_artifact(folder, questions):
    """The folder of a Prompts artifact, with questions by split."""
    rows = [
        {"id": f"{split}/{number}", "split": split, "family": "f", "question": question, "answer": "7"}
        for split, each in questions.items()
        for number, question in enumerate(each)
    ]
    write_rows(folder / "prompts.arrow", rows, PROMPT_SCHEMA)
    return folder


def test_nothing_is_learnt_and_no_document_read_where_nothing_is_asked_for(tmp_path):
    learnt, workspace = learnt_of(tmp_path, [{"text": prose(1)}])
    assert learnt == Learnt()
    assert learnt.unigrams() is None
    assert not list(workspace.scratch.iterdir())


def test_lines_of_more_documents_than_allowed_are_found_across_shards(tmp_path):
    often, seldom = "All rights of the author are reserved.", "The press was closed for three weeks."
    rows = [{"text": "\n".join([prose(n), often, *[seldom] * (n < 3)])} for n in range(8)]
    exact_dedup = {"lines": True, "max_line_occurrences": 3}
    learnt, _ = learnt_of(tmp_path, rows, num_shards=3, exact_dedup=exact_dedup)
    assert learnt.lines is not None
    expected = line_keys(often)[1].tolist()
    for shard in range(3):
        assert frequent_keys(merged_files(learnt.lines, shard)).tolist() == expected
    assert (learnt.pages, learnt.evaluation, learnt.words) == (None, None, None)


def test_a_bucket_of_documents_counts_its_lines_alone(tmp_path):
    often = "All rights of the author are reserved."
    rows = [{"text": f"{prose(n)}\n{often}"} for n in range(12)]
    exact_dedup = {"lines": True, "max_line_occurrences": 8, "bucket_documents": 6}
    learnt, _ = learnt_of(tmp_path, rows, num_shards=4, exact_dedup=exact_dedup)
    assert learnt.lines is not None
    assert len({task.first_shard for task in learnt.lines}) == 2
    assert [frequent_keys(merged_files(learnt.lines, shard)).tolist() for shard in range(4)] == [[]] * 4


def test_the_most_recent_page_of_an_address_replaces_the_others_wherever_they_lie(tmp_path):
    dates = ["2024-01-01", "2024-06-01T00:00:00Z", "", "2023"]
    rows = [{"id": date or "none", "text": prose(n), "url": URLS[n], "date": date} for n, date in enumerate(dates)]
    rows += [{"id": f"lone {n}", "text": prose(10 + n), "url": f"/{n}.html", "date": ""} for n in range(4)]
    rows += [{"id": f"none {n}", "text": prose(20 + n)} for n in range(4)]
    selection = select(tmp_path, rows, 3)
    learnt, _ = learnt_of(tmp_path, rows, num_shards=3, url={"deduplicate": True})
    assert learnt.pages is not None
    replaced = {}
    for shard in range(3):
        ids = [document.id for document in selection.documents(shard)]
        replaced |= {ids[place]: kept for place, kept in dropped_pages(learnt.pages, shard).items()}
    # what has no host is no address, and nothing is known to be its duplicate
    assert replaced == dict.fromkeys(["2024-01-01", "none", "2023"], "2024-06-01T00:00:00Z")


URLS = ["http://www.news.org/a/", "https://news.org/a?utm_source=mail", "news.org/a#top", "https://news.org:443/a"]


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [("installed-docs", None, False), ("text", "x", False), ("jsonl", "x", True), ("warc", "x", True)],
)
def test_only_sources_that_can_have_addresses_are_searched_for_pages(kind, path, expected):
    source = {"kind": kind, "name": "mine", "path": path}
    assert has_pages(settings(sources=[source], url={"deduplicate": True})) is expected
    assert not has_pages(settings(sources=[source], url={"deduplicate": False}))


def test_words_are_counted_over_the_first_shards_alone_where_the_corpus_is_large(tmp_path, monkeypatch):
    rows = [{"text": prose(n)} for n in range(40)]
    selection = select(tmp_path, rows, 4)
    quality = {"max_kl_divergence": 9.0}

    def expected(num_shards):
        words: Counter[int] = Counter()
        for shard in range(num_shards):
            for document in selection.documents(shard):
                words.update(Words(document.text).hashes.tolist())
        return words

    for name, sample_bytes, num_shards in (
        ("all", 2**26, 4),
        ("half", selection.num_bytes // 2 + 1, 2),
        ("first", 1, 1),
    ):
        monkeypatch.setattr(learning, "UNIGRAM_BYTES", sample_bytes)
        learnt, _ = learnt_of(tmp_path / name, rows, num_shards=4, quality=quality)
        counts, unigrams = expected(num_shards), learnt.unigrams()
        assert unigrams is not None
        assert unigrams.hashes.tolist() == sorted(counts)
        denominator = counts.total() + len(counts) + 1
        probabilities = [(counts[word] + 1) / denominator for word in sorted(counts)]
        np.testing.assert_allclose(unigrams.probabilities, probabilities)


# --- evaluation sets ----------------------------------------------------------------------------------------------

QUESTION = "What did the captain of the quiet boat ask the farmer who sold him bread that morning?"


def test_the_pipelines_held_out_prompts_and_the_users_sets_are_looked_for(tmp_path):
    prompts = prompts_artifact(tmp_path, {"train": [prose(1, 2)], "validation": [QUESTION], "test": [prose(2, 2)]})
    path = write_jsonl(tmp_path / "quiz.jsonl", [{"id": "1", "text": prose(3, 2)}])
    quiz = {"kind": "jsonl", "name": "quiz", "path": str(path)}
    rows = [{"text": prose(9)}]
    enabled = {"enabled": True, "sets": [quiz]}
    learnt, _ = learnt_of(tmp_path, rows, prompts=prompts, decontamination=enabled)
    assert learnt.evaluation is not None
    index = EvaluationIndex(learnt.evaluation)
    assert list(index.coverage()) == ["prompts-validation", "prompts-test", "quiz"]
    found = [bool(len(index.find(Words(text).hashes)[2])) for text in (QUESTION, *(prose(n, 2) for n in (1, 2, 3)))]
    assert found == [True, False, True, True]  # what is trained on may be in the corpus

    path.unlink()  # a resumed stage does not read the sets again
    again, _ = learnt_of(tmp_path, rows, prompts=prompts, decontamination=enabled)
    assert again == learnt


@pytest.mark.parametrize(("enabled", "with_prompts"), [(False, True), (True, False)])
def test_no_evaluation_set_is_looked_for_where_it_is_off_or_there_is_none(tmp_path, enabled, with_prompts):
    prompts = prompts_artifact(tmp_path, {"validation": [QUESTION]}) if with_prompts else None
    learnt, _ = learnt_of(tmp_path, [{"text": prose(1)}], prompts=prompts, decontamination={"enabled": enabled})
    assert learnt == Learnt()


def test_evaluation_text_that_many_documents_hold_is_found_to_be_no_sign(tmp_path):
    prompts = prompts_artifact(tmp_path, {"validation": [QUESTION, prose(1, 2)]})
    rows = [{"text": f"{prose(10 + n)} {QUESTION}"} for n in range(4)] + [{"text": f"{prose(20)} {prose(1, 2)}"}]
    for most, common in ((3, True), (4, False)):
        decontamination = {"enabled": True, "max_ngram_documents": most}
        folder = tmp_path / str(most)
        learnt, _ = learnt_of(folder, rows, num_shards=3, prompts=prompts, decontamination=decontamination)
        assert learnt.evaluation is not None
        index = EvaluationIndex(learnt.evaluation)
        keys = frequent_keys(merged_files(learnt.ngrams, 2)).tolist()
        assert keys == (np.unique(index.find(Words(QUESTION).hashes)[2]).tolist() if common else [])
