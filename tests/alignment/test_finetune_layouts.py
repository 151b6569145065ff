"""The stages of post-training by two workers in several layouts, against one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lilpipe.model.heads import load_head_model
from lilpipe.model.hub import load_model
from tests.alignment.finetune_workers import CASES, RESUMED, STAGES, run, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

HEADS = ("reward_model", "classify", "frozen", "lora reward_model", "lora classify")


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """Where the two workers and the one left what they made, training all weights."""
    return made(prompts, tmp_path_factory.mktemp("whole"), "whole")


@pytest.fixture(scope="module")
def adapted(prompts, tmp_path_factory):
    """The same, training adapters."""
    return made(prompts, tmp_path_factory.mktemp("adapted"), "adapted")


@pytest.fixture
def root(stage, request):
    return request.getfixturevalue("adapted" if stage.startswith("lora ") else "whole")


def made(prompts, root, part):
    write_inputs(root, prompts.path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.alignment.finetune_workers", str(root), part]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in (name for name in STAGES if name.startswith("lora ") == (part == "adapted")):
        run(stage, root, "alone", {}, num_workers=1)
    return root


def losses(path):
    """Of each step, as reported last."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    found = {event["done"]: event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})}
    return [found[done] for done in sorted(found)]


@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_every_layout_comes_to_the_model_of_one_process(root, stage, layout):
    expected = losses(root / f"{stage} alone")
    assert len(expected) >= 2
    assert losses(root / f"{stage} {layout}") == pytest.approx(expected, abs=2e-6)
    load = load_head_model if stage in HEADS else load_model
    model, _ = load(root / f"{stage} {layout}" / "output")
    one, _ = load(root / f"{stage} alone" / "output")
    # Adam divides a gradient by its size: where one is nearly zero, as few texts make it, rounding decides on a step.
    tolerance = 5e-5 if stage.endswith("classify") else 1e-5
    compare(model, one, tolerance)
    if stage.endswith("ppo"):
        value, wanted = (
            load_head_model(root / f"{stage} {name}" / "output" / "value")[0] for name in (layout, "alone")
        )
        compare(value, wanted, tolerance)


def compare(model, one, tolerance):
    for (key, tensor), wanted in zip(model.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("stage", RESUMED)
def test_a_sharded_run_that_stopped_halfway_ends_in_the_bytes_of_one_that_did_not(root, stage):
    stopped, whole = (root / f"{stage} {name}" for name in ("resumed", "sharded"))
    assert "resuming from the checkpoint after step 2" in (stopped / "events.jsonl").read_text()
    for name in ("model.safetensors", "config.json"):
        assert (stopped / "output" / name).read_bytes() == (whole / "output" / name).read_bytes()
