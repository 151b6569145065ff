"""The stage, from tokens to an exported model, by four workers in several layouts, against one process."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.hub import load_model
from lilpipe.stage import Workspace
from lilpipe.training import pretrain
from tests.training.conftest import write_tokens
from tests.training.layout_workers import ADAPTED, BASE, LAYOUTS, PHASED, adapted_inputs, config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    texts = {
        "corpus": {"train": ["the cat sat on the mat. "] * 90, "validation": ["the mat sat on the cat. "] * 9},
        "exercises": {"train": ["1 2 3 -> 3 2 1\n"] * 90, "validation": ["2 1 3 -> 3 1 2\n"] * 9},
    }
    return write_tokens(tmp_path_factory.mktemp("tokens"), tokenizer, texts)


@pytest.fixture(scope="module")
def root(tokens, tmp_path_factory):
    """Where the four workers left what they made."""
    root = tmp_path_factory.mktemp("layouts")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [*torchrun, "-m", "tests.training.layout_workers", str(root), str(tokens.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """One process's workspace and metrics."""
    workspace = Workspace(tmp_path_factory.mktemp("alone"))
    run = PretrainConfig.model_validate(BASE)
    return workspace, pretrain.run(run, {"tokens": tokens}, workspace)


def losses(path):
    """Of each step, as reported last."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    found = {event["done"]: event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})}
    return [found[done] for done in sorted(found)]


def assert_metrics(metrics, expected):
    for key in ("train_loss", "validation_bits_per_byte_corpus", "validation_bits_per_byte_exercises"):
        assert metrics[key] == pytest.approx(expected[key], abs=2e-6), key
    assert metrics["tokens"] == expected["tokens"]


def assert_weights(directory, expected, *, atol):
    (model, _), (one, _) = load_model(directory), load_model(expected)
    for (key, tensor), wanted in zip(model.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_validates_and_exports_the_model_of_one_process(root, alone, name):
    workspace, expected = alone
    assert losses(root / name) == pytest.approx(losses(workspace.root), abs=2e-6)
    metrics = json.loads((root / name / "metrics.json").read_text())
    assert_metrics(metrics, expected)
    assert_weights(root / name / "output", workspace.output, atol=2e-4)
    assert "Wall time by cause" in (root / name / "output" / "report" / "report.html").read_text()


def test_every_layout_trains_the_adapters_of_one_process(root, tokens, tmp_path):
    workspace = Workspace(tmp_path)
    one = PretrainConfig.model_validate(ADAPTED)
    pretrain.run(one, adapted_inputs(root, tokens), workspace)
    for name in ("pipeline and tensor", "shard and context"):
        assert losses(root / f"adapted {name}") == pytest.approx(losses(workspace.root), abs=2e-6)
        assert_weights(root / f"adapted {name}" / "output", workspace.output, atol=1e-4)
        adapters, expected = (
            load_file(path / "output" / "adapter" / "adapter_model.safetensors")
            for path in (root / f"adapted {name}", tmp_path)
        )
        for key, tensor in expected.items():
            torch.testing.assert_close(adapters[key], tensor, rtol=0, atol=1e-4, msg=key)


def test_a_run_killed_in_one_layout_and_taken_up_in_another_ends_as_one_process_does(root, tokens, tmp_path):
    workspace = Workspace(tmp_path)
    expected = pretrain.run(PretrainConfig.model_validate(PHASED), {"tokens": tokens}, workspace)
    assert losses(root / "changed") == pytest.approx(losses(workspace.root), abs=2e-6)
    for rank in range(4):
        assert_metrics(json.loads((root / f"changed-{rank}.json").read_text()), expected)
    assert_weights(root / "changed" / "output", workspace.output, atol=1e-4)
    messages = [json.loads(line).get("message", "") for line in (root / "changed" / "events.jsonl").open()]
    assert any("parallel" in message for message in messages)
    assert "resuming from the checkpoint after step 10" in messages


def test_a_sharded_run_that_was_interrupted_ends_in_the_same_bytes(root):
    digests = [
        hashlib.sha256((root / name / "output" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("same", "shard and context")
    ]
    assert digests[0] == digests[1]


def test_another_number_of_workers_goes_on_with_the_same_losses_and_another_batch_does_not(root, alone, tokens):
    # One process takes up what four have begun, from their last checkpoint but the final one.
    folder = root / "sharded" / "scratch" / "checkpoints"
    (folder / "LATEST").write_text("step-00000008\n")
    changed = config({}, num_workers=1).model_copy(update={"batch_size": 16})
    with pytest.raises(ArtifactError, match="batch_size was 8 and is now 16"):
        pretrain.run(changed, {"tokens": tokens}, Workspace(root / "sharded"))
    pretrain.run(config({}, num_workers=1), {"tokens": tokens}, Workspace(root / "sharded"))
    assert losses(root / "sharded") == pytest.approx(losses(alone[0].root), abs=2e-6)
