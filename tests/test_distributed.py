import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lilpipe import distributed
from lilpipe.errors import HungCollective
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


def test_inside_of_honours_stop_sigterm_only_asks_and_outside_it_does_what_it_did():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.honours_stop():
        assert not distributed.stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert distributed.stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before
    with distributed.honours_stop():
        assert not distributed.stop_requested()


@pytest.mark.parametrize(
    ("error", "is_hang"),
    [
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"), True),
        (RuntimeError("wait timeout after 5000ms, keys: /default_pg/0//1//cpu//0"), True),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:9138"), False),
        (TimeoutError("Timed out waiting for the data"), False),
    ],
)
def test_a_timeout_of_a_collective_is_told_from_other_errors(tmp_path, error, is_hang):
    assert isinstance(distributed.hang(error, tmp_path, timeout_seconds=4), HungCollective) is is_hang


@pytest.mark.distributed
def test_two_workers_know_their_places_and_add_up(reports):
    assert [(r["rank"], r["world_size"], r["is_main"]) for r in reports] == [(0, 2, True), (1, 2, False)]
    assert [r["sum"] for r in reports] == [[2.0, 10.0]] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "dtype"), workers.CASES)
def test_two_workers_train_as_one_does(reports, tmp_path, kind, dtype):
    expected = workers.train(tmp_path, kind, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for report in reports:
        assert report["losses"][f"{kind}-{dtype}"] == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.distributed
def test_both_workers_see_the_same_losses_and_end_in_the_same_weights(reports):
    assert reports[0]["losses"] == reports[1]["losses"]
    assert reports[0]["whole"] == reports[1]["whole"]


@pytest.mark.distributed
def test_two_workers_that_resume_end_in_the_same_bits(reports):
    assert {report[name] for report in reports for name in ("whole", "resumed")} == {reports[0]["whole"]}


@pytest.mark.distributed
def test_a_bad_loss_on_one_worker_stops_both_with_the_same_words(reports):
    assert "step 3:" in reports[0]["error"]
    assert reports[0]["error"] == reports[1]["error"]


@pytest.mark.distributed
def test_no_thread_of_the_group_outlives_it_to_race_the_interpreters_end(reports):
    assert not [name for report in reports for name in report["threads"] if "gloo" in name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is changed")
def test_products_by_onednn_are_those_of_float32():
    left_NN, right_NN = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(1))
    distributed.use_onednn()
    exact_NN = left_NN.double() @ right_NN.double()
    assert ((left_NN @ right_NN) - exact_NN).abs().max() < 1e-5 * exact_NN.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is changed")
def test_onednn_is_not_used_where_it_multiplies_in_bfloat16(monkeypatch):
    def multiply(left, right):
        product = torch.mm(left, right)
        return product if left.dtype == torch.float64 else product.bfloat16().float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(distributed, "_onednn_is_float32", distributed._onednn_is_float32.__wrapped__)
    assert not distributed.use_onednn()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is changed")
def test_threads_that_try_onednn_at_once_do_not_leave_it_on(monkeypatch):
    """On a processor with AMX one thread restored what the other had set, so that models ran in bfloat16."""
    inside, met = [], threading.Event()

    def multiply(left, right):
        product = torch.mm(left, right)
        if left.dtype == torch.float64:
            return product
        inside.append(left)
        if len(inside) == 2:
            met.set()
        met.wait(0.2)  # for the other thread, which comes only if nothing keeps it out
        return product.bfloat16().float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(distributed, "_onednn_is_float32", distributed._onednn_is_float32.__wrapped__)
    with ThreadPoolExecutor(2) as pool:
        used = [pool.submit(distributed.use_onednn) for _ in range(2)]
        assert not any(each.result() for each in used)
    assert torch.get_float32_matmul_precision() == "highest"
