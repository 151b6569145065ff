"""The tasks that filter a shard and write the artifact's tables of it."""

import numpy as np
import pytest

from lilpipe.artifact import list_files
from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.filtering import FilterShards, WriteShards, matches_folder
from lilpipe.data.filters.decontamination import MATCHES, EvaluationSet, write_index
from lilpipe.data.filters.words import Words
from lilpipe.data.late import LateVerdicts, kept_file, rejected_file
from lilpipe.data.learn import Learnt
from lilpipe.data.minhash import MATCHES as NEAR_DUPLICATES
from lilpipe.data.signatures import Signatures, signatures
from lilpipe.schemas.documents import documents_schema, rejected_schema
from lilpipe.schemas.tables import read_table, write_table

from .prose import prose
from .selections import select

REPEATED = "\n\n".join([prose(1, 3), prose(1, 3), "No more was said of it."])
MAIL = prose(2) + " Write to jo.miller@post.org, or to ann@post.org."
PAGE = prose(3).replace(". ", ".\n") + "\nHome\nMenu"


def settings(**others):
    return CorpusConfig.model_validate({"language": {"min_score": 0.3}, **others})


def filtered(tmp_path, rows, *, learnt=None, num_shards=1, name="filtered", **others):
    """The folder of what the filtering tasks of these rows write."""
    selection, folder = select(tmp_path, rows, num_shards), tmp_path / name
    for rank in range(num_shards):
        FilterShards(selection, settings(**others), learnt or Learnt(), folder).run(None, rank, num_shards)
    return folder


def rows_of(path):
    return {row["id"]: row for row in read_table(path).to_pylist()}


def test_a_kept_text_is_as_the_filters_left_it_and_a_rejected_one_as_read(tmp_path):
    folder = filtered(
        tmp_path,
        [{"id": "mail", "text": MAIL}, {"id": "page", "text": PAGE}, {"id": "twice", "text": REPEATED}],
        quality={"c4": True, "gopher_repetition": False},
        exact_dedup={"paragraphs": True},
    )
    kept, rejected = rows_of(kept_file(folder, 0)), rows_of(rejected_file(folder, 0))
    assert kept["mail"]["text"] == prose(2) + " Write to <EMAIL>, or to <EMAIL>."
    assert kept["mail"]["num_bytes"] == len(MAIL)
    assert kept["page"]["text"] == prose(3).replace(". ", ".\n")
    assert rejected["twice"]["text"] == REPEATED
    assert rejected["twice"]["reason"] == "too_few_sentences"  # once the paragraph was cut


def test_every_score_taken_is_in_the_table_and_none_that_was_not(tmp_path):
    rows = [{"id": "mail", "text": MAIL}, {"id": "short", "text": "Too short."}, {"id": "hash", "text": "# " * 200}]
    folder = filtered(tmp_path, rows, language={"min_score": 0}, languages=())
    kept, rejected = rows_of(kept_file(folder, 0)), rows_of(rejected_file(folder, 0))
    scores = kept["mail"]["scores"]
    assert scores["length.chars"] == len(MAIL)
    assert scores["pii.emails"] == 2
    assert scores["language.score"] == pytest.approx(kept["mail"]["language_score"])
    assert [name for name, value in scores.items() if value is None] == ["near_dedup.similarity"]
    assert {name for name, value in rejected["short"]["scores"].items() if value is not None} == {"length.chars"}
    assert rejected["short"]["language"] is rejected["short"]["language_score"] is None
    assert (rejected["hash"]["stage"], rejected["hash"]["reason"]) == ("length", "no_words")
    assert read_table(kept_file(folder, 0)).schema == documents_schema(list(scores))
    assert read_table(rejected_file(folder, 0)).schema == rejected_schema(list(scores))


def test_signatures_are_those_of_the_texts_that_passed_row_by_row(tmp_path):
    rows = [{"id": f"{n}", "text": prose(n) if n % 3 else f"Too short {n}."} for n in range(12)]
    config = settings().minhash
    folder = filtered(tmp_path, [*rows, {"id": "mail", "text": MAIL}])
    found, kept = Signatures(folder / "signatures", config), read_table(kept_file(folder, 0))
    texts = kept["text"].to_pylist()
    assert len(found) == len(texts) == 9
    every = np.arange(len(texts))
    assert found.take("row", every).tolist() == every.tolist()
    assert found.take("num_bytes", every).tolist() == [len(text) for text in texts]
    expected = signatures([Words(text).hashes for text in texts], config)
    assert found.take("values", every).tolist() == expected.tolist()


def test_without_near_duplicate_removal_there_are_no_signatures(tmp_path):
    folder = filtered(tmp_path, [{"text": prose(1)}], minhash={"enabled": False})
    assert len(Signatures(folder / "signatures", settings().minhash)) == 0
    assert read_table(kept_file(folder, 0)).num_rows == 1


@pytest.mark.parametrize("action", ["reject", "report"])
def test_what_is_found_of_evaluation_sets_lies_beside_the_documents(tmp_path, action):
    config = settings(decontamination={"action": action})
    write_index(tmp_path / "index", [EvaluationSet("quiz", [("7", prose(5, 2))])], config.decontamination)
    text = prose(6, 4) + " " + prose(5, 2) + " " + prose(7, 4)
    rows = [{"id": "leak", "text": text}, {"id": "clean", "text": prose(8)}]
    learnt = Learnt(evaluation=tmp_path / "index")
    folder = filtered(tmp_path, rows, learnt=learnt, decontamination={"action": action})
    matches = read_table(matches_folder(folder) / "00000.arrow")
    (match,) = matches.to_pylist()
    assert matches.schema == MATCHES
    assert (match["document"], match["set"], match["item"], match["item_ratio"]) == ("leak", "quiz", "7", 1)
    assert match["overlap"] in text
    assert ("leak" in rows_of(kept_file(folder, 0))) == (action == "report")
    assert ("leak" in rows_of(rejected_file(folder, 0))) == (action == "reject")


def test_a_task_done_again_leaves_the_same_bytes(tmp_path):
    rows = [{"id": f"{n}", "text": prose(n)} for n in range(12)] + [{"id": "mail", "text": MAIL}]
    once = filtered(tmp_path, rows, num_shards=3, name="once")
    twice = filtered(tmp_path, rows, num_shards=3, name="twice")
    (twice / "kept" / "00001.arrow").write_bytes(b"half")
    assert filtered(tmp_path, rows, num_shards=3, name="twice") == twice
    assert digests(once) == digests(twice)


def digests(folder):
    return {name: entry.sha256 for name, entry in list_files(folder).items()}


def test_late_verdicts_move_documents_with_their_similarity_and_nothing_else_changes(tmp_path):
    rows = [{"id": f"{n}", "text": prose(n)} for n in range(8)] + [{"id": "short", "text": "Too short."}]
    folder = filtered(tmp_path, rows, num_shards=2)
    before = [read_table(kept_file(folder, rank)).to_pylist() for rank in range(2)]
    assert all(len(each) > 1 for each in before)
    columns = {"shard": [1], "row": [1], "kept_shard": [0], "kept_row": [0], "similarity": [0.75]}
    matches = tmp_path / "matches.arrow"
    write_table(matches, NEAR_DUPLICATES.empty_table().from_pydict(columns, schema=NEAR_DUPLICATES))
    for rank in range(2):
        WriteShards(LateVerdicts(folder, None, matches), tmp_path / "out").run(None, rank, 2)
    kept = [read_table(tmp_path / "out" / "documents" / f"0000{rank}.arrow").to_pylist() for rank in range(2)]
    rejected = [read_table(tmp_path / "out" / "rejected" / f"0000{rank}.arrow") for rank in range(2)]
    assert kept == [before[0], [row for row in before[1] if row is not before[1][1]]]
    by_id = {row["id"]: row for table in rejected for row in table.to_pylist()}
    gone = by_id.pop(before[1][1]["id"])
    assert list(by_id) == ["short"]
    assert (gone["stage"], gone["reason"], gone["detail"]) == ("near_dedup", "near_duplicate", before[0][0]["id"])
    assert gone["scores"] == before[1][1]["scores"] | {"near_dedup.similarity": 0.75}
    assert {name: gone[name] for name in before[1][1] if name != "scores"} == {
        name: value for name, value in before[1][1].items() if name != "scores"
    }
    assert rejected[0].schema == rejected[1].schema
