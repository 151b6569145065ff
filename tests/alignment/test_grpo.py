import json

import pytest
import torch

from lilpipe.alignment import rewards
from lilpipe.alignment.grpo import run
from lilpipe.config import GRPOConfig, SamplingConfig
from lilpipe.model.hub import load_model
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

CONFIG = GRPOConfig(
    seed=0,
    num_steps=6,
    prompts_per_step=4,
    group_size=4,
    checkpoint_every=2,
    log_every=1,
    sampling=SamplingConfig(max_new_tokens=6),
)


def changed(**settings):
    return GRPOConfig(**{**dict(CONFIG), **settings})


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here; test_reports draws them."""
    monkeypatch.setattr("lilpipe.alignment.grpo.write_report", lambda *args, **options: None)


@pytest.fixture
def inputs(make_checkpoint, prompts):
    return {"model": make_checkpoint(), "prompts": prompts}


@pytest.fixture
def even_words(monkeypatch):
    """A reward that a model of random weights meets now and then."""

    def even(config, reward_model):
        return lambda prompts, responses: [float(len(r.text.split()) % 2 == 0) for r in responses]

    monkeypatch.setitem(rewards.KINDS, "answer", even)


def steps_of(workspace):
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [event["metrics"] for event in events if "reward" in event.get("metrics", {})]


def test_the_sampler_and_the_trainer_agree_on_probabilities(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    run(CONFIG, inputs, workspace)
    steps = steps_of(workspace)
    assert len(steps) == 6
    assert all(step["sampler_gap"] < 1e-5 and step["clipped"] == 0 for step in steps)
    assert any(0 < step["reward"] < 1 for step in steps)


def test_the_reward_rises(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 1e-2})
    run(changed(num_steps=25, group_size=8, optimizer=optimizer), inputs, workspace)
    rewards = [step["reward"] for step in steps_of(workspace)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_groups_without_spread_teach_nothing_and_are_counted(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    run(CONFIG, inputs, workspace)  # random weights solve nothing
    assert [step["flat_groups"] for step in steps_of(workspace)] == [1] * 6
    before = load_model(inputs["model"].path)[0].state_dict()
    after = load_model(workspace.output)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, inputs, even_words, monkeypatch, killed_at):
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        progress(done, total, unit, **metrics)
        if done == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, killed)
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))
    changed = load_model(killed.output)[0].state_dict()
    assert any(not torch.equal(t, changed[n]) for n, t in load_model(inputs["model"].path)[0].state_dict().items())


def test_the_kl_to_the_first_policy_starts_at_zero_and_is_logged(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    run(changed(kl_coefficient=0.05), inputs, workspace)
    divergences = [step["kl"] for step in steps_of(workspace)]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 3}, "prompts_per_step 4 must be a multiple of the 3 workers"),
        ({"minibatches_per_rollout": 3}, "minibatches_per_rollout 3 must divide the 16 answers"),
        ({"sampling": SamplingConfig(temperature=0)}, "sampling.temperature must be above 0"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "sampling.top_p 0.9 must be 1"),
        ({"normalize_std": False, "std_over": "batch"}, "std_over 'batch' would be ignored"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        changed(**settings)
