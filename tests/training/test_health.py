"""Bad steps: found, named, and left out of the weights as the policy says."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lilpipe.config.training import HealthConfig
from lilpipe.errors import ConfigError
from lilpipe.training.health import examine
from tests.training import toy

SMOOTH = [2.0 + 0.1 * math.sin(step) for step in range(128)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_found_without_a_history(loss, norm):
    finding = examine(loss, norm, losses=[], grad_norms=[], config=HealthConfig(on_nan="skip"))
    assert finding is not None
    assert finding.action == "skip"
    assert "not finite" in finding.reason


@pytest.mark.parametrize(("loss", "norm", "named"), [(9.0, 2.0, "loss 9"), (2.0, 9.0, "gradient norm 9")])
def test_a_spike_lies_far_above_the_last_steps(loss, norm, named):
    config = HealthConfig(on_spike="skip")
    finding = examine(loss, norm, losses=SMOOTH, grad_norms=SMOOTH, config=config)
    assert finding is not None
    assert named in finding.reason
    assert examine(2.2, 2.2, losses=SMOOTH, grad_norms=SMOOTH, config=config) is None
    assert examine(loss, norm, losses=SMOOTH[1:], grad_norms=SMOOTH[1:], config=config) is None  # too few to tell
    assert examine(loss, norm, losses=SMOOTH, grad_norms=SMOOTH, config=HealthConfig()) is None


def poisoned(*steps, factor=math.nan):
    """The toy's loss, spoilt at some steps."""

    def loss(model, step, micro):
        good = toy.loss(model, step, micro)
        return replace(good, total=good.total * factor) if step in steps else good

    return loss


def without(*steps):
    """The toy's loss; it must not be asked for those steps."""

    def loss(model, step, micro):
        assert step not in steps
        return toy.loss(model, step, micro)

    return loss


def messages(root):
    lines = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if "message" in line]


def test_a_skipped_step_has_no_part_in_the_weights_and_its_documents_are_named(tmp_path):
    health = HealthConfig(on_nan="skip")
    model, result = toy.run(
        tmp_path, num_steps=8, loss=poisoned(5), health=health, describe=lambda step: f"documents of {step}"
    )
    assert result.skipped == [5]
    assert math.isnan(result.losses[5])
    assert torch.isfinite(toy.weights(model)).all()
    assert any("step 6: " in line and "documents of 5" in line for line in messages(tmp_path))


def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path):
    config = toy.optimizer(schedule="constant")
    skipped, _ = toy.run(
        tmp_path / "six", num_steps=6, loss=poisoned(5), health=HealthConfig(on_nan="skip"), config=config
    )
    five, _ = toy.run(tmp_path / "five", num_steps=5, config=config)
    assert torch.equal(toy.weights(skipped), toy.weights(five))


def test_a_roll_back_leaves_out_all_batches_since_the_last_checkpoint(tmp_path):
    health = HealthConfig(on_nan="rollback")
    model, result = toy.run(tmp_path, num_steps=12, loss=poisoned(6), health=health, checkpoint_every=4)
    assert result.skipped == [6]
    assert [step for step, loss in enumerate(result.losses) if math.isnan(loss)] == [4, 5, 6]
    # Steps 4 to 6 left out: the same as skipping each of them.
    expected, _ = toy.run(
        tmp_path / "skip", num_steps=12, loss=poisoned(4, 5, 6), health=HealthConfig(on_nan="skip"), checkpoint_every=4
    )
    assert torch.equal(toy.weights(model), toy.weights(expected))
    assert result.time["rollback"] > 0


def test_a_roll_back_before_the_first_checkpoint_goes_back_to_the_start(tmp_path):
    health = HealthConfig(on_nan="rollback")
    model, _ = toy.run(tmp_path, num_steps=6, loss=poisoned(1), health=health, checkpoint_every=4)
    expected, _ = toy.run(tmp_path / "skip", num_steps=6, loss=poisoned(0, 1), health=HealthConfig(on_nan="skip"))
    assert torch.equal(toy.weights(model), toy.weights(expected))


def test_a_resumed_run_remembers_what_was_left_out(tmp_path):
    health = HealthConfig(on_nan="rollback")
    _, result = toy.run(tmp_path, num_steps=12, loss=poisoned(6), health=health, checkpoint_every=4)
    _, again = toy.run(tmp_path, num_steps=12, loss=without(*range(12)), health=health, checkpoint_every=4)
    assert again.skipped == result.skipped
    assert again.losses[:4] == result.losses[:4]


def test_too_many_bad_steps_stop_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"step 4: .*not finite.*lower optimizer.learning_rate"):
        toy.run(tmp_path, loss=poisoned(1, 2, 3), health=HealthConfig(on_nan="skip", max_events=2))


def test_a_spike_in_training_is_skipped(tmp_path):
    health = HealthConfig(on_spike="skip", window=10, spike_deviations=6)
    _, result = toy.run(tmp_path, num_steps=20, loss=poisoned(15, factor=100.0), health=health)
    assert result.skipped == [15]
