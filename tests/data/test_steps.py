import itertools
import struct

import numpy as np
import pyarrow as pa
import pytest

from lilpipe.config import CorpusConfig, Source
from lilpipe.data.corpus import MAX_SHARDS, _select, num_shards
from lilpipe.data.documents import write_rows
from lilpipe.data.steps import RUNS, Selection, TakeShard, near_duplicates, read_pairs


def connected_components(pairs):
    """The sets of places that pairs connect, by flooding."""
    neighbours = {}
    for a, b in pairs:
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    components = []
    while neighbours:
        pending, component = [next(iter(neighbours))], set()
        while pending:
            place = pending.pop()
            if place not in component:
                component.add(place)
                pending += neighbours.pop(place)
        components.append(component)
    return components


@pytest.mark.parametrize("seed", range(5))
def test_of_connected_documents_the_first_is_kept_whatever_the_order_of_pairs(seed):
    draw = np.random.default_rng(seed)
    places = [(int(shard), int(row)) for shard, row in draw.integers(0, 8, (40, 2))]
    pairs = [(a, b) for a, b in itertools.pairwise(places) if a != b][: 10 + 5 * seed]
    expected = {place: min(each) for each in connected_components(pairs) for place in each if place != min(each)}
    assert near_duplicates(pairs) == expected
    assert near_duplicates([(b, a) for a, b in reversed(pairs)]) == expected


def test_pairs_are_read_as_datatrove_writes_them(tmp_path):
    (tmp_path / "00000_00.dups").write_bytes(struct.pack("<8I", 0, 1, 2, 3, 4, 5, 6, 7))
    (tmp_path / "00001_00.dups").write_bytes(struct.pack("<4I", 8, 9, 10, 11))
    assert list(read_pairs(tmp_path)) == [((0, 1), (2, 3)), ((4, 5), (6, 7)), ((8, 9), (10, 11))]


def run_row(key, order, source_index=0, **fields):
    row = dict.fromkeys((field.name for field in RUNS if field.type == pa.string()), "x")
    return {**row, "key": key, "order": order, "source_index": source_index, "row": 1, "num_bytes": 10, **fields}


def write_runs(folder, *runs):
    for number, rows in enumerate(runs):
        rows.sort(key=lambda row: row["key"])
        write_rows(folder / "runs" / f"{number:05d}-00000.arrow", rows, RUNS)
    return folder


def test_shards_share_out_all_documents_by_key_and_equal_keys_in_reading_order(tmp_path):
    draw = np.random.default_rng(0)
    keys = [0, 2**64 - 1, *map(int, draw.integers(0, 2**64, 60, dtype=np.uint64))]
    keys += keys[:5]
    rows = [run_row(key, order, id=str(order)) for order, key in enumerate(keys)]
    folder = write_runs(tmp_path, rows[:30], rows[30:60], [], rows[60:])
    expected = [str(order) for _, order in sorted((key, order) for order, key in enumerate(keys))]
    for count in (1, 7):
        selection = Selection(count, (2**64,), frozenset())
        shards = [[doc.id for doc in TakeShard(folder, selection).run(None, rank, count)] for rank in range(count)]
        assert list(itertools.chain(*shards)) == expected
        assert all(shards)


def test_max_bytes_cuts_each_source_in_its_own_order_and_repeated_ids_are_told_apart(tmp_path):
    rows = [run_row(key=order, order=order, id=f"a{order}", file="f") for order in (5, 1, 9, 3)]
    others = [run_row(key=100 + n, order=7, source_index=1, id="same", file="g", row=n, source="b") for n in range(2)]
    folder = write_runs(tmp_path, rows, others)
    sources = tuple(Source(kind="jsonl", name=n, path="x", max_bytes=m) for n, m in (("a", 29), ("b", None)))
    selection = _select(CorpusConfig(sources=sources), folder)
    assert selection == Selection(num_shards=1, last_order=(3, 7), repeated_ids=frozenset({7}))
    documents = list(TakeShard(folder, selection).run(None, 0, 1))
    assert [doc.id for doc in documents] == ["a1", "a3", "same#b/g:0", "same#b/g:1"]


def test_the_number_of_shards_grows_with_the_corpus_up_to_a_limit():
    sizes = [0, 1, 2**20, 2**24, 2**28, 2**31, 2**33, 2**40]
    assert [num_shards(size) for size in sizes] == [1, 1, 4, 64, 64, 64, 256, MAX_SHARDS]
