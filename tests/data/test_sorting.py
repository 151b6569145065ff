import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data import sorting
from lilpipe.data.corpus import MAX_SHARDS, _select, num_shards
from lilpipe.data.sorting import RUNS, ReadParts, Selection, run_files, text_key
from lilpipe.data.sources.readers import find_parts
from lilpipe.schemas.tables import read_table, write_rows

from .prose import prose, write_jsonl


def run_row(key, order, source_index=0, **fields):
    row = dict.fromkeys((field.name for field in RUNS if field.type == pa.string()), "x")
    return {**row, "key": key, "order": order, "source_index": source_index, "row": 1, "num_bytes": 10, **fields}


def write_runs(folder, *runs):
    for number, rows in enumerate(runs):
        rows.sort(key=lambda row: row["key"])
        write_rows(folder / "runs" / f"{number:05d}-00000.arrow", rows, RUNS)
    return folder


def everything(folder, count=1):
    """A selection of all that was read."""
    return Selection(folder=folder, num_shards=count, num_bytes=0, last_order=(2**64,) * 2, repeated_ids=frozenset())


def read(source, folder):
    """All parts of a source as runs; returns what the summaries say."""
    parts = find_parts(source)
    for rank in range(len(parts)):
        ReadParts(parts, [source.name], folder).run(None, rank, len(parts))
    return [json.loads(path.read_text()) for path in sorted((folder / "summaries").iterdir())]


@pytest.mark.parametrize("rows_at_a_time", [256, 7])
def test_shards_share_out_all_documents_by_key_and_equal_keys_in_reading_order(tmp_path, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(sorting, "ROWS_AT_A_TIME", rows_at_a_time)
    draw = np.random.default_rng(0)
    keys = [0, 2**64 - 1, *map(int, draw.integers(0, 2**64, 60, dtype=np.uint64))]
    keys += keys[:5]
    rows = [run_row(key, order, id=str(order)) for order, key in enumerate(keys)]
    folder = write_runs(tmp_path, rows[:30], rows[30:60], [], rows[60:])
    expected = [(str(order), key) for key, order in sorted((key, order) for order, key in enumerate(keys))]
    for count in (1, 7):
        selection = everything(folder, count)
        shards = [list(selection.documents(rank)) for rank in range(count)]
        assert [(doc.id, doc.key) for doc in itertools.chain(*shards)] == expected
        assert all(shards)
        for rank, shard in enumerate(shards):
            assert [doc.place for doc in shard] == list(range(len(shard)))
            assert all(rank / count <= doc.key / 2**64 <= (rank + 1) / count for doc in shard)


def test_max_bytes_cuts_each_source_in_its_own_order_and_repeated_ids_are_told_apart(tmp_path):
    rows = [run_row(key=order, order=order, id=f"a{order}", file="f") for order in (5, 1, 9, 3)]
    others = [run_row(key=100 + n, order=7, source_index=1, id="same", file="g", row=n, source="b") for n in range(2)]
    folder = write_runs(tmp_path, rows, others)
    sources = tuple(Source(kind="jsonl", name=n, path="x", max_bytes=m) for n, m in (("a", 29), ("b", None)))
    selection = _select(CorpusConfig(sources=sources), folder)
    assert selection == Selection(folder, num_shards=1, num_bytes=40, last_order=(3, 7), repeated_ids=frozenset({7}))
    documents = list(selection.documents(0))
    assert [doc.id for doc in documents] == ["a1", "a3", "same#b/g:0", "same#b/g:1"]
    assert [doc.place for doc in documents] == [0, 1, 2, 3]  # of those admitted


def test_the_number_of_shards_grows_with_the_corpus_up_to_a_limit():
    sizes = [0, 1, 2**20, 2**24, 2**28, 2**31, 2**33, 2**40]
    assert [num_shards(size) for size in sizes] == [1, 1, 1, 16, 64, 64, 256, MAX_SHARDS]


def test_a_long_part_becomes_several_sorted_runs_and_the_same_documents(tmp_path, monkeypatch):
    rows = [{"id": str(n), "text": prose(n), "url": f"https://a.org/{n}", "label": "tale"} for n in range(30)]
    source = Source(kind="jsonl", name="mine", path=str(write_jsonl(tmp_path / "x.jsonl", rows)), licence="CC0")
    read(source, tmp_path / "one")
    monkeypatch.setattr(sorting, "RUN_BYTES", 4 * len(prose(0)))
    read(source, tmp_path / "several")
    runs = [read_table(path)["key"].to_pylist() for path in run_files(tmp_path / "several")]
    assert len(run_files(tmp_path / "one")) == 1
    assert len(runs) > 3
    assert all(keys == sorted(keys) for keys in runs)
    documents = [list(everything(tmp_path / name).documents(0)) for name in ("one", "several")]
    assert documents[0] == documents[1]
    by_id = {doc.id: doc for doc in documents[0]}
    assert len(by_id) == 30
    assert (by_id["7"].text, by_id["7"].url, by_id["7"].label) == (prose(7), "https://a.org/7", "tale")
    assert (by_id["7"].licence, by_id["7"].file, by_id["7"].row) == ("CC0", "x.jsonl", 8)
    assert (by_id["7"].num_bytes, by_id["7"].key) == (len(prose(7)), text_key(prose(7)))


def test_what_cannot_be_read_is_in_the_summary_and_in_no_run(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": prose(1)}, {"text": 5}, {"text": prose(2)}])
    (summary,) = read(Source(kind="jsonl", name="mine", path=str(path)), tmp_path / "read")
    assert (summary["source"], summary["num_documents"], summary["num_files"]) == ("mine", 2, 1)
    (row,) = summary["unreadable"]
    assert (row["source"], row["file"], row["row"], row["breaks_off"]) == ("mine", "x.jsonl", 2, False)
    assert sum(read_table(each).num_rows for each in run_files(tmp_path / "read")) == 2


def test_no_more_text_is_sorted_than_max_bytes_may_need_but_all_documents_are_counted(tmp_path):
    rows = [{"id": str(n), "text": prose(n)} for n in range(50)]
    source = Source(kind="jsonl", name="mine", path=str(write_jsonl(tmp_path / "x.jsonl", rows)))
    limited = source.model_copy(update={"max_bytes": 3_000})
    (summary,) = read(limited, tmp_path / "read")
    assert summary["num_documents"] == 50
    assert sum(read_table(each).num_rows for each in run_files(tmp_path / "read")) < 30
    selection = _select(CorpusConfig(sources=(limited,)), tmp_path / "read")
    read(source, tmp_path / "all")
    unlimited = dataclasses.replace(selection, folder=tmp_path / "all")
    assert [doc.id for doc in selection.documents(0)] == [doc.id for doc in unlimited.documents(0)]
    assert 2_000 < selection.num_bytes <= 3_000


def test_texts_that_differ_in_case_space_and_unicode_form_alone_have_one_key():
    assert text_key("Caf\u00e9\n  au LAIT") == text_key("cafe\u0301 au lait ")
    assert text_key("cafe au lait") != text_key("caf\u00e9 au lait")
