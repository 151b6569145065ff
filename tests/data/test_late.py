"""The verdicts that fall when all documents have been through the chain, on tables made by hand."""

import numpy as np
import pytest

from lilpipe.data.documents import documents_table
from lilpipe.data.filters.chain import Document, Rejection
from lilpipe.data.late import CLASSIFIER_SCORE, SIMILARITY, LateVerdict, LateVerdicts, kept_file
from lilpipe.data.minhash import MATCHES
from lilpipe.schemas.tables import write_rows, write_table

LOW = Rejection("low_quality")


def late(folder, shards, *, min_score=None, matches=None):
    """Verdicts over shards of documents, each of which is given as its score."""
    for rank, scores in enumerate(shards):
        documents = [
            Document(id=f"{rank}/{row}", text="x", source="mine", scores={CLASSIFIER_SCORE: score})
            for row, score in enumerate(scores)
        ]
        write_table(kept_file(folder, rank), documents_table(documents, [CLASSIFIER_SCORE, SIMILARITY]))
    if matches is None:
        return LateVerdicts(folder, min_score, None)
    rows = [dict(zip(MATCHES.names, each, strict=True)) for each in matches]
    write_rows(folder / "matches.arrow", rows, MATCHES)
    return LateVerdicts(folder, min_score, folder / "matches.arrow")


def test_without_a_threshold_or_matches_no_document_goes(tmp_path):
    assert late(tmp_path, [[0.0, 1.0]]).of(0) == []


def test_scores_below_the_threshold_go_and_the_threshold_itself_stays(tmp_path):
    verdicts = late(tmp_path, [[0.1, 0.09999, 0.9], [0.5], []], min_score=0.1)
    assert [verdicts.of(shard) for shard in range(3)] == [[LateVerdict(1, "classifier", LOW)], [], []]


def test_a_threshold_that_is_one_of_the_scores_keeps_its_document_though_tables_hold_32_bits(tmp_path):
    scores = np.random.default_rng(0).random(50).astype(np.float32)
    threshold = float(np.sort(scores)[20])
    gone = late(tmp_path, [scores.tolist()], min_score=threshold).of(0)
    assert [verdict.row for verdict in gone] == np.flatnonzero(scores < np.float32(threshold)).tolist()
    assert len(gone) == 20


def test_near_duplicates_name_the_document_that_stays_in_whatever_shard_it_lies(tmp_path):
    matches = [(0, 2, 1, 0, 0.5), (1, 1, 0, 0, 0.75), (1, 2, 1, 0, 1.0)]
    verdicts = late(tmp_path, [[0.5] * 3, [0.5] * 3, [0.5]], matches=matches)
    duplicate = [
        LateVerdict(row, "near_dedup", Rejection("near_duplicate", kept), similarity)
        for row, kept, similarity in ((2, "1/0", 0.5), (1, "0/0", 0.75), (2, "1/0", 1.0))
    ]
    assert [verdicts.of(shard) for shard in range(3)] == [duplicate[:1], duplicate[1:], []]


def test_verdicts_of_both_kinds_come_by_row(tmp_path):
    verdicts = late(tmp_path, [[0.9, 0.1, 0.9, 0.2]], min_score=0.5, matches=[(0, 2, 0, 0, 0.6)])
    assert [(each.row, each.stage) for each in verdicts.of(0)] == [
        (1, "classifier"),
        (2, "near_dedup"),
        (3, "classifier"),
    ]


@pytest.mark.parametrize("shards", [[[0.5]], [[]]])
def test_no_match_at_all_is_no_verdict(tmp_path, shards):
    assert late(tmp_path, shards, matches=[]).of(0) == []
