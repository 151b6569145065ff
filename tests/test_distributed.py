import json
import os
import subprocess
import sys

import pytest
import torch

from lilpipe import distributed
from tests.training import workers


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What two workers under torchrun reported."""
    root = tmp_path_factory.mktemp("workers")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.training.workers", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_a_plain_process_is_a_group_of_one():
    distributed.init()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_floats([1.5]) == [1.5]
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    distributed.barrier()
    distributed.shutdown()


def test_two_workers_know_their_places_and_add_up(reports):
    assert [(r["rank"], r["world_size"], r["is_main"]) for r in reports] == [(0, 2, True), (1, 2, False)]
    assert [r["sum"] for r in reports] == [[2.0, 10.0]] * 2


@pytest.mark.parametrize(("kind", "dtype"), workers.CASES)
def test_two_workers_train_as_one_does(reports, tmp_path, kind, dtype):
    expected = workers.train(tmp_path, kind, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for report in reports:
        assert report["losses"][f"{kind}-{dtype}"] == pytest.approx(expected, rel=0, abs=tolerance)


def test_both_workers_see_the_same_losses_and_end_in_the_same_weights(reports):
    assert reports[0]["losses"] == reports[1]["losses"]
    assert reports[0]["whole"] == reports[1]["whole"]


def test_two_workers_that_resume_end_in_the_same_bits(reports):
    assert {report[name] for report in reports for name in ("whole", "resumed")} == {reports[0]["whole"]}


def test_a_bad_loss_on_one_worker_stops_both_with_the_same_words(reports):
    assert "step 3:" in reports[0]["error"]
    assert reports[0]["error"] == reports[1]["error"]


def test_no_thread_of_the_group_outlives_it_to_race_the_interpreters_end(reports):
    assert not [name for report in reports for name in report["threads"] if "gloo" in name]
