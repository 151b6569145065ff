import math

import pytest

from lilpipe.alignment.rollout.collapse_monitor import CollapseMonitor, check_logprob_mismatch
from lilpipe.config.reinforcement import CollapseMonitorConfig
from lilpipe.errors import ArtifactError, DataError

HEALTHY = {"reward": 0.5, "frac_reward_zero_std": 0.3, "entropy": 0.4, "kl": 0.1, "length": 9.0, "truncated": 0.1}


@pytest.fixture
def alarms():
    return []


@pytest.fixture
def collapse_monitor(tmp_path, alarms):
    return CollapseMonitor(
        CollapseMonitorConfig(patience=4), tmp_path / "rollouts.jsonl", writes=True, log=alarms.append
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"frac_reward_zero_std": 1.0},
            "frac_reward_zero_std 1 for 4 .* at most collapse_monitor.max_frac_reward_zero_std 0.99; "
            ".*dynamic_sampling_rounds",
        ),
        ({"entropy": 1e-6}, "entropy 1e-06 for 4 .* at least collapse_monitor.min_entropy 0.0001; .*learning_rate"),
        ({"kl": 7.0}, "kl 7 for 4 .* at most collapse_monitor.max_kl 5; .*beta"),
        ({"length": 1.0}, "length 1 for 4 .* at least collapse_monitor.min_length 1.5; .*empty ones"),
        ({"entropy": math.nan}, "entropy nan for 4 .* at least collapse_monitor.min_entropy 0.0001"),
        ({"kl": math.nan}, "kl nan for 4 .* at most collapse_monitor.max_kl 5"),
        (
            {"truncated": 1.0},
            "truncated 1 for 4 .* at most collapse_monitor.max_truncated_ratio 0.99; .*max_new_tokens",
        ),
    ],
)
def test_a_collapse_raises_an_alarm_and_then_stops_the_run(collapse_monitor, alarms, fault, message):
    collapse_monitor.note(0, HEALTHY)
    for rollout in range(1, 4):
        collapse_monitor.note(rollout, HEALTHY | fault)
    assert len(alarms) == 1
    with pytest.raises(DataError, match=f"^rollout 5: {message}"):
        collapse_monitor.note(4, HEALTHY | fault)


def test_a_limit_must_be_passed_without_a_break(collapse_monitor):
    for rollout in range(20):
        collapse_monitor.note(rollout, HEALTHY | ({} if rollout % 4 == 3 else {"kl": 9.0}))


def test_a_reward_that_falls_below_its_best_stops_the_run(collapse_monitor):
    rewards = [0.1, 0.2, 0.6, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4]
    for rollout, reward in enumerate(rewards):
        collapse_monitor.note(rollout, HEALTHY | {"reward": reward})
    # Best mean of four: (0.8 + 0.8 + 0.8 + 0.7) / 4. Now (0.6 + 0.5 + 0.4 + 0.1) / 4.
    with pytest.raises(DataError, match=r"the last 4 rollouts is 0.4, expected .*max_reward_drop 0.3 below .* 0.775"):
        collapse_monitor.note(len(rewards), HEALTHY | {"reward": 0.1})


def test_a_reward_that_is_no_number_stops_the_run(collapse_monitor):
    for rollout in range(4):
        collapse_monitor.note(rollout, HEALTHY)
    with pytest.raises(DataError, match="the last 4 rollouts is nan"):
        collapse_monitor.note(4, HEALTHY | {"reward": math.nan})


@pytest.mark.parametrize(("patience", "rollouts"), [(1, 0), (5, 3), (6, 3)])
def test_the_alarm_comes_halfway_to_the_stop(tmp_path, alarms, patience, rollouts):
    collapse_monitor = CollapseMonitor(
        CollapseMonitorConfig(patience=patience), tmp_path / "rollouts.jsonl", writes=True, log=alarms.append
    )
    for rollout in range(patience - 1):
        assert len(alarms) == (rollout >= rollouts > 0)
        collapse_monitor.note(rollout, HEALTHY | {"kl": 9.0})
    with pytest.raises(DataError, match="kl 9"):
        collapse_monitor.note(patience - 1, HEALTHY | {"kl": 9.0})


def test_what_is_not_measured_is_not_watched(collapse_monitor):
    for rollout in range(8):
        collapse_monitor.note(rollout, {"reward": 1.0, "length": 3.0})
    assert collapse_monitor.before(2) == [{"reward": 1.0, "length": 3.0}] * 2


def test_a_killed_run_stops_where_an_uninterrupted_one_would(tmp_path, collapse_monitor):
    for rollout in range(3):
        collapse_monitor.note(rollout, HEALTHY | {"kl": 9.0})
    again = CollapseMonitor(collapse_monitor.config, tmp_path / "rollouts.jsonl", writes=True, log=print)
    again.note(2, HEALTHY | {"kl": 9.0})  # from a checkpoint before the third rollout
    with pytest.raises(DataError, match="rollout 4"):
        again.note(3, HEALTHY | {"kl": 9.0})


def test_what_a_power_cut_left_of_a_line_is_not_read_and_the_next_rollout_takes_its_place(tmp_path, collapse_monitor):
    collapse_monitor.note(0, HEALTHY)
    path = tmp_path / "rollouts.jsonl"
    with path.open("a") as file:
        file.write('{"reward": 0.')
    again = CollapseMonitor(collapse_monitor.config, path, writes=True, log=print)
    for rollout in (1, 2):
        again.note(rollout, HEALTHY | {"kl": rollout / 10})
    assert CollapseMonitor(collapse_monitor.config, path, writes=True, log=print).before(3) == again.before(3)
    assert len(path.read_text().splitlines()) == 3


def test_a_history_that_is_shorter_than_the_checkpoints_is_refused(collapse_monitor):
    collapse_monitor.note(0, HEALTHY)
    with pytest.raises(ArtifactError, match="has 1 rollouts, expected 3"):
        collapse_monitor.note(3, HEALTHY)


@pytest.mark.parametrize("gap", [0.02, float("nan")])
def test_a_sampler_that_is_not_the_trainer_is_found_out(gap):
    check_logprob_mismatch(0.005, CollapseMonitorConfig(), rollout=0)
    with pytest.raises(DataError, match=r"rollout 8: .* expected at most collapse_monitor.max_logprob_mismatch 0.01"):
        check_logprob_mismatch(gap, CollapseMonitorConfig(), rollout=7)
