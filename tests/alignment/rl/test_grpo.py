import json

import pytest
import torch

from lilpipe.alignment.rewards import reward_functions as rewards
from lilpipe.alignment.rl import grpo
from lilpipe.alignment.rl.grpo import run
from lilpipe.alignment.rollout import rollouts
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.reinforcement import CollapseMonitorConfig, GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.distributed import Preempted
from lilpipe.errors import ArtifactError, DataError
from lilpipe.model.hub import load_model, save_model
from lilpipe.schemas.examples import PROMPT_SCHEMA
from lilpipe.schemas.tables import read_rows, write_rows
from lilpipe.stage import Workspace
from tests.alignment.conftest import as_artifact, digest_of

CONFIG = GRPOConfig(
    seed=0,
    num_steps=6,
    prompts_per_step=4,
    num_generations=4,
    checkpoint_every=2,
    log_every=1,
    sampling=SamplingConfig(max_new_tokens=6),
)


def changed(**settings):
    return GRPOConfig(**{**dict(CONFIG), **settings})


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here; test_reports draws them."""
    monkeypatch.setattr("lilpipe.alignment.rl.reinforcement.write_report", lambda *args, **options: None)


@pytest.fixture
def inputs(make_checkpoint, prompts):
    return {"model": make_checkpoint(), "prompts": prompts}


@pytest.fixture
def even_words(monkeypatch):
    """A reward that a model of random weights meets now and then."""

    def even(config, reward_model):
        return lambda prompts, completions: [(float(len(r.text.split()) % 2 == 0), "") for r in completions]

    monkeypatch.setitem(rewards.KINDS, "answer", even)


def steps_of(workspace):
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [event["metrics"] for event in events if "reward" in event.get("metrics", {})]


def test_the_sampler_and_the_trainer_agree_on_probabilities(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    run(CONFIG, inputs, workspace)
    steps = steps_of(workspace)
    assert len(steps) == 6
    assert all(step["logprob_mismatch"] < 1e-5 and step["clip_ratio"] == 0 for step in steps)
    assert any(0 < step["reward"] < 1 for step in steps)


def test_answers_that_stop_strings_end_are_learnt_as_drawn(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    run(changed(num_steps=2, sampling=SamplingConfig(max_new_tokens=6, stop=letters)), inputs, workspace)
    steps = steps_of(workspace)
    assert all(step["logprob_mismatch"] < 1e-5 for step in steps)
    assert all(0 < step["ended"] < 1 for step in steps)


@pytest.mark.slow
def test_the_reward_rises(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 1e-2})
    run(changed(num_steps=25, num_generations=8, optimizer=optimizer), inputs, workspace)
    rewards = [step["reward"] for step in steps_of(workspace)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_groups_without_spread_teach_nothing_and_are_counted(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    run(CONFIG, inputs, workspace)  # random weights solve nothing
    assert [step["frac_reward_zero_std"] for step in steps_of(workspace)] == [1] * 6
    before = load_model(inputs["model"].path)[0].state_dict()
    after = load_model(workspace.output)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("killed_at", [1, 6])
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
    run(changed(beta=0.05), inputs, workspace)
    divergences = [step["kl"] for step in steps_of(workspace)]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 3}, "prompts_per_step 4 must be a multiple of the 3 data-parallel workers"),
        ({"num_mini_batches": 3}, "num_mini_batches 3 must divide the 16 completions"),
        ({"sampling": SamplingConfig(temperature=0)}, "sampling.temperature must be above 0"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "sampling.top_p 0.9 must be 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        changed(**settings)


# --- several updates of a rollout ---------------------------------------------------------------------------------

SEVERAL = {"num_steps": 3, "num_iterations": 2, "num_mini_batches": 2, "checkpoint_every": 1}
"""Twelve updates: four of each rollout."""


def test_a_rollout_is_learned_from_several_times_and_clipped(tmp_path, inputs, even_words):
    workspace = Workspace(tmp_path)
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 1e-2})
    run(changed(**SEVERAL, optimizer=optimizer, epsilon=1e-3), inputs, workspace)
    steps = steps_of(workspace)
    assert len(steps) == 12
    assert all(step["logprob_mismatch"] < 1e-5 for step in steps)
    clipped = [step["clip_ratio"] for step in steps]
    assert clipped[0::4] == [0, 0, 0]
    assert max(clipped[1::4]) > 0.5
    rewards = [step["reward"] for step in steps]
    assert len(set(rewards[:4])) == 1  # of the rollout, not of the update


@pytest.mark.parametrize("stopped_at", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_run_stopped_between_two_updates_of_a_rollout_goes_on_with_its_answers(
    tmp_path, inputs, even_words, monkeypatch, stopped_at
):
    config = changed(**SEVERAL, dynamic_sampling_rounds=1, beta=0.01)
    run(config, inputs, Workspace(tmp_path / "whole"))
    updates = iter(range(1, 100))
    monkeypatch.setattr("lilpipe.distributed.stop_requested", lambda: next(updates) == stopped_at)
    killed = Workspace(tmp_path / "killed")
    with pytest.raises(Preempted, match=f"after step {stopped_at} of 12"):
        run(config, inputs, killed)
    monkeypatch.setattr("lilpipe.distributed.stop_requested", lambda: False)
    run(config, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))
    assert (tmp_path / "killed/scratch/rollouts.jsonl").read_text() == (
        tmp_path / "whole/scratch/rollouts.jsonl"
    ).read_text()


@pytest.mark.parametrize("killed_in", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_killed_in_a_rollout_ends_in_the_bytes_of_an_uninterrupted_one(
    tmp_path, inputs, even_words, monkeypatch, killed_in
):
    config = changed(**SEVERAL)
    run(config, inputs, Workspace(tmp_path / "whole"))
    complete, calls = rollouts.complete, iter(range(1, 100))

    def dying(*args, **options):
        groups = complete(*args, **options)
        if next(calls) == killed_in:
            raise KeyboardInterrupt
        return groups

    killed = Workspace(tmp_path / "killed")
    monkeypatch.setattr(rollouts, "complete", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config, inputs, killed)
    run(config, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


def test_without_the_answers_that_the_next_update_needs_a_run_does_not_go_on(tmp_path, inputs, even_words, monkeypatch):
    config = changed(**SEVERAL)
    monkeypatch.setattr("lilpipe.distributed.stop_requested", lambda: True)
    with pytest.raises(Preempted):
        run(config, inputs, Workspace(tmp_path))
    for path in (tmp_path / "scratch/rollouts").iterdir():
        path.unlink()
    with pytest.raises(ArtifactError, match="between two updates of rollout 1; resume with the same number of workers"):
        run(config, inputs, Workspace(tmp_path))


# --- the family ---------------------------------------------------------------------------------------------------


def first_steps(tmp_path, inputs, **settings):
    workspace = Workspace(tmp_path)
    run(changed(num_steps=2, **settings), inputs, workspace)
    return steps_of(workspace)


def test_groups_without_spread_are_replaced_by_those_of_further_prompts(tmp_path, inputs, even_words):
    plain = first_steps(tmp_path / "plain", inputs, num_generations=2)
    resampled = first_steps(tmp_path / "resampled", inputs, num_generations=2, dynamic_sampling_rounds=20)
    assert plain[0]["frac_reward_zero_std"] > 0
    assert plain[0]["replaced_groups"] == 0
    assert resampled[0]["frac_reward_zero_std"] == 0
    assert resampled[0]["replaced_groups"] >= plain[0]["frac_reward_zero_std"]


def test_a_run_whose_answers_are_all_too_long_and_masked_learns_nothing(tmp_path, inputs, even_words, monkeypatch):
    before = load_model(inputs["model"].path)[0].state_dict()
    workspace = Workspace(tmp_path)
    sampling = SamplingConfig(max_new_tokens=1)
    run(changed(num_steps=2, mask_truncated_completions=True, sampling=sampling), inputs, workspace)
    steps = steps_of(workspace)
    assert steps[0]["truncated"] > 0.9
    after = load_model(workspace.output)[0].state_dict()
    if steps[0]["truncated"] == steps[1]["truncated"] == 1:
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_at_another_temperature_the_first_update_is_not_clipped(tmp_path, inputs, even_words):
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.7)
    steps = first_steps(tmp_path, inputs, sampling=sampling, num_iterations=2, beta=0.1)
    assert steps[0]["clip_ratio"] == 0
    assert steps[0]["logprob_mismatch"] < 1e-5
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_each_reward_is_logged_apart(tmp_path, inputs, even_words, monkeypatch):
    named = (
        RewardConfig(kind="answer", weight=2.0, name="even"),
        RewardConfig(kind="reward_model", weight=-1.0, name="liked"),
    )
    monkeypatch.setattr(grpo, "reward_model_of", lambda inputs: Liking())
    step = first_steps(tmp_path, inputs, rewards=named)[0]
    assert step["reward/liked"] == 0.25
    assert step["reward"] == pytest.approx(2 * step["reward/even"] - 0.25)


class Liking:
    """A reward model that likes everything a little."""

    def score(self, conversations):
        return [0.25 for _ in conversations]


def test_a_base_model_is_trained_on_text_up_to_the_end_of_a_paragraph(tmp_path, inputs, even_words):
    steps = first_steps(tmp_path, inputs, prompt_form="text")
    assert all(step["logprob_mismatch"] < 1e-5 for step in steps)


# --- gates --------------------------------------------------------------------------------------------------------


def test_a_sampler_that_sees_another_model_than_the_trainer_stops_the_run(tmp_path, inputs, even_words, monkeypatch):
    complete = rollouts.complete

    def stale(model, *args, **options):
        other, _ = load_model(inputs["model"].path)
        other.output_weight.data.mul_(1.3)
        return complete(other, *args, **options)

    monkeypatch.setattr(rollouts, "complete", stale)
    with pytest.raises(
        DataError, match=r"rollout 1: the sampler's log-probabilities differ .*max_logprob_mismatch 0.01"
    ):
        run(CONFIG, inputs, Workspace(tmp_path))


def test_a_run_whose_groups_all_lack_spread_raises_an_alarm_and_stops(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    with pytest.raises(DataError, match="rollout 4: frac_reward_zero_std 1 for 4 rollouts in a row, expected at most"):
        run(
            changed(collapse_monitor=CollapseMonitorConfig(patience=4)), inputs, workspace
        )  # random weights solve nothing
    assert "alarm: rollout 2: frac_reward_zero_std" in workspace.events.read_text()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"sampling": SamplingConfig(max_new_tokens=1)}, "length 1 for 2 rollouts in a row, .*min_length"),
        ({"sampling": SamplingConfig(max_new_tokens=2)}, "truncated .* for 2 rollouts in a row, .*max_truncated_ratio"),
        (
            {"optimizer": CONFIG.optimizer.model_copy(update={"learning_rate": 0.3}), "beta": 1e-6},
            "kl .* for 2 rollouts in a row, .*max_kl",
        ),
    ],
)
def test_a_run_that_collapses_stops_and_says_how(tmp_path, inputs, even_words, fault, message):
    collapse_monitor = CollapseMonitorConfig(
        patience=2, max_frac_reward_zero_std=1, max_kl=0.5, max_truncated_ratio=0.9 if "sampling" in fault else 1
    )
    with pytest.raises(DataError, match=message):
        run(changed(collapse_monitor=collapse_monitor, **fault), inputs, Workspace(tmp_path))


def test_a_policy_that_has_stopped_exploring_stops_the_run(tmp_path, inputs, even_words):
    model, tokenizer = load_model(inputs["model"].path)
    model.output_weight.data.mul_(1e4)
    save_model(model, tokenizer, inputs["model"].path)
    collapse_monitor = CollapseMonitorConfig(
        patience=2, max_frac_reward_zero_std=1, max_truncated_ratio=1, max_logprob_mismatch=100
    )
    with pytest.raises(DataError, match=r"entropy .* for 2 rollouts in a row, .*min_entropy"):
        run(changed(collapse_monitor=collapse_monitor), inputs, Workspace(tmp_path))


def test_a_reward_that_is_lost_stops_the_run(tmp_path, inputs, monkeypatch):
    worths = [*[1.0] * 3, *[0.0] * 9]  # of all answers to the validation prompts, then of each rollout

    def falling(config, reward_model):
        worth = iter(worths)
        return lambda prompts, completions: [(value, "") for value in [next(worth)] * len(completions)]

    monkeypatch.setitem(rewards.KINDS, "answer", falling)
    collapse_monitor = CollapseMonitorConfig(patience=2, max_frac_reward_zero_std=1, max_truncated_ratio=1)
    with pytest.raises(DataError, match=r"rollout 3: the mean reward of the last 2 rollouts is 0.5, .*max_reward_drop"):
        run(changed(collapse_monitor=collapse_monitor), inputs, Workspace(tmp_path))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_question_among_those_to_train_on_is_refused(tmp_path, inputs, split):
    rows = read_rows(inputs["prompts"].path / "prompts.arrow")
    held_out = next(row for row in rows if row["split"] == split)
    leaked = {**held_out, "id": "train/leaked", "split": "train", "question": held_out["question"].upper()}
    write_rows(tmp_path / "prompts.arrow", [*rows, leaked], PROMPT_SCHEMA)
    leaking = as_artifact(tmp_path, kind="Prompts", stage="prompts")
    with pytest.raises(DataError, match="1 training questions occur in the validation or test split"):
        run(CONFIG, {**inputs, "prompts": leaking}, Workspace(tmp_path / "run"))
