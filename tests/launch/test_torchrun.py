"""Faults planted in real processes under torchrun."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from lilpipe.errors import DataError, HungCollective, Preempted, StageFailure
from tests.launch import toy

pytestmark = pytest.mark.distributed


def starts(work):
    """How often the workers have come to the fault."""
    return (work / "worker.log").read_text().count("about to fail")


def processes_of(work):
    """The processes that have this folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(work) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def test_when_one_worker_is_killed_all_start_again_and_go_on_from_what_was_saved(tmp_path):
    heard = []
    metrics = toy.launch_toy(tmp_path, fault="kill", on_event=heard.append)
    assert metrics == {"total": toy.expected(), "first": 5.0}
    assert toy.messages(tmp_path) == [
        "rank 1: killed by SIGKILL (restart 1 of 3); all workers restart from the last checkpoint"
    ]
    assert [event["done"] for event in heard if "done" in event] == list(range(1, toy.NUM_STEPS + 1))


def test_an_error_of_the_users_ends_all_workers_at_once_without_a_restart(tmp_path):
    with pytest.raises(DataError, match=r"^field: got that, expected this$"):
        toy.launch_toy(tmp_path, fault="data", once=False)
    assert starts(tmp_path) == 1
    assert not toy.messages(tmp_path)
    assert not processes_of(tmp_path)


def test_a_bug_is_tried_again_so_often_and_then_told_with_the_rank_that_failed_first(tmp_path):
    with pytest.raises(StageFailure) as error:
        toy.launch_toy(tmp_path, fault="bug", once=False, settings={"max_restarts": 1})
    assert type(error.value) is StageFailure
    assert str(error.value).startswith("rank 1: KeyError: 'a planted bug'; from ")
    assert "in fail" in str(error.value)
    assert starts(tmp_path) == 2
    (restart,) = toy.messages(tmp_path)
    assert restart.startswith("rank 1: KeyError: 'a planted bug' (restart 1 of 1)")


def test_a_hung_collective_ends_with_the_names_of_those_who_came_and_those_who_did_not(tmp_path):
    with pytest.raises(HungCollective) as error:
        toy.launch_toy(tmp_path, fault="hang", once=False, settings={"timeout_seconds": 5})
    first, rank0, rank1 = str(error.value).splitlines()
    assert first.startswith("all_reduce (step 5, launch/toy.py:")
    assert first.endswith("in run) did not end in launch.timeout_seconds (5): rank 0 reached it, rank 1 did not")
    assert "rank 0: step 5, sum, for" in rank0
    assert "waits in all_reduce at launch/toy.py:" in rank0
    assert "rank 1: step 5, data, for" in rank1
    assert "; is at launch/toy.py:" in rank1
    assert rank1.endswith("in fail")
    assert starts(tmp_path) == 1  # another try would wait as long again
    assert not processes_of(tmp_path)


def test_a_worker_that_gets_sigterm_stops_all_after_a_step_that_is_saved_and_the_next_try_goes_on(tmp_path):
    with pytest.raises(Preempted, match=r"^pre-empted after step 6; saved$"):
        toy.launch_toy(tmp_path, fault="term")
    assert issubclass(Preempted, StageFailure)  # which is tried again
    assert "exitcode: 75" in (tmp_path / "worker.log").read_text()
    assert not processes_of(tmp_path)
    assert toy.launch_toy(tmp_path) == {"total": toy.expected(), "first": 6.0}


def test_an_agent_that_gets_sigterm_lets_its_workers_save(tmp_path):
    (tmp_path / "stage").mkdir()

    def terminate_agent():
        follow(tmp_path / "stage" / "events.jsonl")
        agent = min(processes_of(tmp_path / "stage"))
        os.kill(agent, 15)

    thread = threading.Thread(target=terminate_agent)
    thread.start()
    with pytest.raises(Preempted, match=r"^pre-empted after step \d+; saved$"):
        toy.launch_toy(tmp_path / "stage", fault="slow")
    thread.join()


def follow(events):
    """Wait for the first step."""
    while not (events.exists() and events.read_text()):
        time.sleep(0.05)


def test_cancelling_ends_every_process(tmp_path):
    class Cancelled(BaseException):
        pass

    def cancel(event):
        raise Cancelled

    with pytest.raises(Cancelled):
        toy.launch_toy(tmp_path, fault="slow", on_event=cancel)
    assert json.loads((tmp_path / "scratch" / "state.json").read_text())[0] < toy.NUM_STEPS
    assert not processes_of(tmp_path)
