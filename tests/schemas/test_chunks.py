import pyarrow as pa
import pytest

from lilpipe.schemas.chunks import run_chunks
from lilpipe.stage import Workspace

SCHEMA = pa.schema([("value", pa.int64())])


def squares(index):
    return [{"value": index}, {"value": index * index}]


def run(workspace, work):
    return [row["value"] for row in run_chunks(work, 4, name="squares", schema=SCHEMA, workspace=workspace)]


def test_rows_come_back_in_the_order_of_chunks(tmp_path):
    assert run(Workspace(tmp_path), squares) == [0, 0, 1, 1, 2, 4, 3, 9]


def test_a_killed_run_works_only_the_chunks_that_are_missing(tmp_path):
    worked = []

    def work(index, *, killed_at):
        if index == killed_at:
            raise KeyboardInterrupt
        worked.append(index)
        return squares(index)

    with pytest.raises(KeyboardInterrupt):
        run(Workspace(tmp_path), lambda index: work(index, killed_at=2))
    assert run(Workspace(tmp_path), lambda index: work(index, killed_at=None)) == [0, 0, 1, 1, 2, 4, 3, 9]
    assert worked == [0, 1, 2, 3]


def test_ranks_share_the_chunks_and_all_read_the_whole(tmp_path, as_workers):
    worked = {0: [], 1: []}

    def on_rank(rank):
        return run(Workspace(tmp_path, rank=rank), lambda index: worked[rank].append(index) or squares(index))

    assert as_workers(2, on_rank) == [[0, 0, 1, 1, 2, 4, 3, 9]] * 2
    assert worked == {0: [0, 2], 1: [1, 3]}
