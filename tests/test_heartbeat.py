import json
import time

from lilpipe import heartbeat
from lilpipe.heartbeat import Heartbeat, describe_hang, read_places

TRAIN = ("/opt/lilpipe/training/loop.py", 120, "train")
WAIT = [
    ("/venv/torch/distributed/distributed_c10d.py", 3252, "all_reduce"),
    ("/venv/torch/distributed/c10d_logger.py", 83, "wrapper"),
    ("/opt/lilpipe/distributed.py", 140, "all_reduce_sum"),
    TRAIN,
]


def write(folder, rank, **fields):
    (folder / f"rank{rank}.json").write_text(json.dumps({"rank": rank, "phase": "step", "stack": [], **fields}))


def test_a_hang_is_told_with_who_came_and_who_did_not_and_where_each_is(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.time, "time", lambda: 1000.0)
    write(tmp_path, 10, step=7, since=999.0)
    write(tmp_path, 0, step=7, phase="reduce", since=990.0, stack=WAIT)
    write(tmp_path, 2, step=6, phase="data", since=985.5, stack=[("/opt/lilpipe/tokens/loader.py", 9, "read"), TRAIN])
    assert describe_hang(tmp_path, timeout_seconds=10).splitlines() == [
        "all_reduce (step 7, training/loop.py:120 in train) did not end in launch.timeout_seconds (10): "
        "rank 0 reached it, rank 2, 10 did not",
        "  rank 0: step 7, reduce, for 10.0 s; waits in all_reduce at training/loop.py:120 in train",
        "  rank 2: step 6, data, for 14.5 s; is at tokens/loader.py:9 in read",
        "  rank 10: step 7, step, for 1.0 s",
    ]


def test_a_hang_in_which_no_wait_is_seen_is_told_with_the_places_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.time, "time", lambda: 1000.0)
    write(tmp_path, 0, step=7, since=990.0, stack=[("/venv/torch/_tensor.py", 1, "item"), TRAIN])
    assert describe_hang(tmp_path, timeout_seconds=10).splitlines() == [
        "a collective did not end in launch.timeout_seconds (10); positions of the workers:",
        "  rank 0: step 7, step, for 10.0 s; is at training/loop.py:120 in train",
    ]


def test_a_worker_that_moves_writes_its_step_and_one_that_stands_its_line_as_well(tmp_path):
    beating = Heartbeat(tmp_path / "beats", 3, interval_seconds=0.02)
    beating.beat(5, "data")
    stand_until(lambda: any(place.step == 5 and place.stack for place in read_places(tmp_path / "beats")))
    beating.stop()
    (place,) = read_places(tmp_path / "beats")
    assert (place.rank, place.phase) == (3, "data")
    assert any(function == "stand_until" for _, _, function in place.stack)
    assert place.collective is None


def stand_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
