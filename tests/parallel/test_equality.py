"""Ten steps of training in every layout against the same in one process: same losses, gradients, weights, validation.

One process is ``toy.plain_losses``, which has whole batches, whole logits and torch's own masks, loss and clipping.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.parallel import toy
from tests.parallel.layouts import BFLOAT16, CASES, EIGHT, MORE


def launch(root, cases, *, num_workers):
    """What each worker under torchrun reported of the cases."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    command = [*torchrun, "-m", "tests.parallel.workers", str(root), *(case.name for case in cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(num_workers)]


@pytest.fixture(scope="module")
def four_workers(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), CASES, num_workers=4)


@pytest.fixture(scope="module")
def four_workers_for_longer(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("more"), MORE + BFLOAT16, num_workers=4)


@pytest.fixture(scope="module")
def eight_workers(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("eight"), EIGHT, num_workers=8)


def check(case, reports):
    expected = toy.plain_losses(case.config(), case.dtype)
    loosely = 40 * case.tolerance  # for numbers that are larger than a loss, or further on
    for report in reports:
        got = report[case.name]
        assert got["losses"] == pytest.approx(expected["losses"], rel=0, abs=case.tolerance)
        assert got["norms"] == pytest.approx(expected["norms"], rel=loosely)
        assert got["nats"] == pytest.approx(expected["nats"], rel=loosely)
        if case.size == len(reports):  # to the bit, so that all workers decide alike
            assert (got["losses"], got["norms"]) == (reports[0][case.name]["losses"], reports[0][case.name]["norms"])
    got = reports[0][case.name]["weights"]  # the first worker alone is given whole tensors
    assert got.keys() == expected["weights"].keys()
    for name, (total, squares) in expected["weights"].items():
        assert got[name] == pytest.approx([total, squares], rel=0, abs=loosely), name


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process_does(case, four_workers):
    check(case, four_workers)


@pytest.mark.distributed
def test_gradients_that_are_not_added_up_are_found_out(four_workers):
    expected = four_workers[0]["cp2"]["losses"]
    wrong = [abs(got - loss) for got, loss in zip(four_workers[0]["gradients not summed"], expected, strict=True)]
    assert wrong[0] == 0  # before the first update
    assert max(wrong) > 1e-3


@pytest.mark.distributed
def test_logits_a_few_at_a_time_give_the_same_scores(four_workers):
    expected = four_workers[0]["tp2"]["losses"]
    assert four_workers[0]["few logits at once"] == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.distributed
def test_no_worker_ever_holds_the_whole_model(four_workers):
    for report in four_workers:
        assert report["memory"]["held"] < 0.35
        assert report["memory"]["largest"] < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_a_layout_and_an_architecture_train_as_one_process_does(case, four_workers_for_longer):
    check(case, four_workers_for_longer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", BFLOAT16[1:], ids=lambda case: case.name)
def test_in_bfloat16_a_layout_begins_as_one_process_does(case, four_workers_for_longer):
    got, expected = (four_workers_for_longer[0][name]["losses"][:5] for name in (case.name, BFLOAT16[0].name))
    assert got[0] == pytest.approx(expected[0], abs=1e-4)
    assert got == pytest.approx(expected, abs=2e-3)  # rounding to 8 bits makes more of every difference


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_a_layout_of_eight_trains_as_one_process_does(case, eight_workers):
    check(case, eight_workers)
