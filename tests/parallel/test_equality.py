"""Ten steps of training in every layout against the same in one process: same losses, gradients, weights, validation.

One process is ``toy.plain_losses``, which has whole batches, whole logits and torch's own masks, loss and clipping.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache

import pytest

from tests.parallel import toy
from tests.parallel.layouts import CASES, EIGHT


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
def eight_workers(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("eight"), EIGHT, num_workers=8)


@lru_cache
def one_process(model_and_settings, dtype):
    return toy.plain_losses(model_and_settings, dtype)


def check(case, reports):
    expected = toy.plain_losses(case.config(), case.dtype)
    for report in reports:
        got = report[case.name]
        assert got["losses"] == pytest.approx(expected["losses"], rel=0, abs=case.tolerance)
        assert got["norms"] == pytest.approx(expected["norms"], rel=case.tolerance)
        assert got["nats"] == pytest.approx(expected["nats"], rel=case.tolerance)
        assert got["losses"] == reports[0][case.name]["losses"]  # to the bit, so that workers decide alike
        assert got["norms"] == reports[0][case.name]["norms"]
    got = reports[0][case.name]["weights"]  # the first worker alone is given whole tensors
    assert got.keys() == expected["weights"].keys()
    for name, (total, squares) in expected["weights"].items():
        assert got[name] == pytest.approx([total, squares], rel=0, abs=10 * case.tolerance), name


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process_does(case, four_workers):
    check(case, four_workers)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_a_layout_of_eight_trains_as_one_process_does(case, eight_workers):
    check(case, eight_workers)
