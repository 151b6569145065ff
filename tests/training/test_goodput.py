import json
import os
import signal

import pytest

from lilpipe import distributed
from lilpipe.training import goodput
from lilpipe.training.goodput import Goodput
from tests.training import toy


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when the test says so."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

        perf_counter = time

    monkeypatch.setattr(goodput, "time", clock := Clock())
    return clock


def test_every_second_of_two_tries_has_its_cause(tmp_path, clock):
    path = tmp_path / "goodput.json"
    first = Goodput(path, process_started=990.0)
    first.first_step()
    for done in (1, 2, 3):
        clock.now += 2
        first.step(done, 2.0)
    with first.measure("save"):
        clock.now += 1
    clock.now += 50  # killed; 50 s until the next try
    second = Goodput(path, process_started=clock.now - 5)
    clock.now += 4
    second.first_step()
    for done in (3, 4):  # the third is taken again
        clock.now += 2
        second.step(done, 2.0)
    assert second.seconds == {
        "step": 8.0,
        "setup": 10.0,
        "restart": 54.0,
        "replay": 2.0,
        "save": 1.0,
        "evaluation": 0.0,
        "rollback": 0.0,
    }
    assert second.share == pytest.approx(8 / 75)
    assert sum(second.seconds.values()) == clock.now - 990


def test_a_stop_saves_and_the_next_try_goes_on_from_that_step(tmp_path):
    def loss(model, step, micro):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.loss(model, step, micro)

    with pytest.raises(distributed.Preempted, match="after step 6 of 20"):
        toy.run(tmp_path, loss=loss, checkpoint_every=100)
    distributed._stop.clear()
    seen = []

    def watched(model, step, micro):
        seen.append(step)
        return toy.loss(model, step, micro)

    model, result = toy.run(tmp_path, loss=watched, checkpoint_every=100)
    expected, _ = toy.run(tmp_path / "whole", checkpoint_every=100)
    assert seen[0] == 6
    assert (toy.weights(model) == toy.weights(expected)).all()
    account = json.loads((tmp_path / "scratch" / "goodput.json").read_text())
    assert account["furthest"] == 20
    assert result.time["restart"] > 0
