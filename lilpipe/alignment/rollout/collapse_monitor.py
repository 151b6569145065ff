"""Stops a reinforcement learning run that has collapsed, with the reason.

All workers see the same metrics. They are saved next to the checkpoints after each rollout, so that a resumed run stops
where an uninterrupted one would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lilpipe.artifact import write_atomically
from lilpipe.config.reinforcement import CollapseMonitorConfig
from lilpipe.errors import ArtifactError, DataError


class Limit(NamedTuple):
    """Bound on a metric of rollouts."""

    quantity: str
    setting: str
    value: float
    is_ceiling: bool
    remedy: str

    def is_passed(self, value: float) -> bool:
        """Return whether the value violates the bound; NaN does."""
        return not (value <= self.value if self.is_ceiling else value >= self.value)


def limits(config: CollapseMonitorConfig) -> list[Limit]:
    """Return the bounds of a config section."""
    slower = "lower optimizer.learning_rate"
    return [
        Limit(
            "frac_reward_zero_std",
            "max_frac_reward_zero_std",
            config.max_frac_reward_zero_std,
            is_ceiling=True,
            remedy="completions to a prompt are all correct or all incorrect: use prompts of another difficulty, a "
            "larger num_generations, a graded reward, or dynamic_sampling_rounds",
        ),
        Limit(
            "entropy",
            "min_entropy",
            config.min_entropy,
            is_ceiling=False,
            remedy=f"the policy has stopped exploring: {slower}, or raise epsilon_high or sampling.temperature",
        ),
        Limit(
            "kl",
            "max_kl",
            config.max_kl,
            is_ceiling=True,
            remedy=f"the policy has diverged from its reference: {slower}, or raise beta",
        ),
        Limit(
            "length",
            "min_length",
            config.min_length,
            is_ceiling=False,
            remedy=f"completions are almost empty: {slower}, and check that the rewards do not favour empty ones",
        ),
        Limit(
            "truncated",
            "max_truncated_ratio",
            config.max_truncated_ratio,
            is_ceiling=True,
            remedy="completions are truncated: raise sampling.max_new_tokens, add a reward of kind 'length', or start "
            "from a model that ends its completions",
        ),
    ]


class CollapseMonitor:
    """Metrics of each rollout so far, and checks for collapse.

    ``path`` stores a line per rollout; only the worker with ``writes`` writes it. ``log`` receives warnings.
    """

    def __init__(self, config: CollapseMonitorConfig, path: Path, *, writes: bool, log: Callable[[str], None]) -> None:
        self.config = config
        self.history = _read(path) if path.exists() else []
        self._path, self._writes, self._log = path, writes, log
        self._num_kept = -1  # lines that this process has written to the file

    def before(self, rollout: int) -> list[dict[str, float]]:
        """Return the metrics of the previous rollouts. Raises ``ArtifactError`` if any are missing."""
        if len(self.history) < rollout:
            raise ArtifactError(
                f"{self._path}: has {len(self.history)} rollouts, expected {rollout}, as many as the checkpoint; "
                "delete the workspace and run the step again"
            )
        return self.history[:rollout]

    def note(self, rollout: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a rollout. Raises ``DataError`` if the run has collapsed."""
        self.history = [*self.before(rollout), dict(values)]
        if self._writes:
            self._keep()
        for limit in limits(self.config):
            self._hold(limit)
        self._hold_reward()

    def _keep(self) -> None:
        """Append the last rollout to the file, or rewrite the file if it has other rollouts."""
        if self._num_kept == len(self.history) - 1:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        else:
            write_atomically(self._path, "".join(json.dumps(values) + "\n" for values in self.history))
        self._num_kept = len(self.history)

    def _hold(self, limit: Limit) -> None:
        if limit.quantity not in self.history[-1]:
            return
        times = 0
        for values in reversed(self.history):
            if not limit.is_passed(values[limit.quantity]):
                break
            times += 1
        got = f"{limit.quantity} {self.history[-1][limit.quantity]:.4g}"
        bound = (
            f"expected at {'most' if limit.is_ceiling else 'least'} collapse_monitor.{limit.setting} {limit.value:g}"
        )
        said = f"rollout {len(self.history)}: {got} for {times} rollouts in a row, {bound}; {limit.remedy}"
        if times >= self.config.patience:
            raise DataError(said)
        if times == -(-self.config.patience // 2):
            self._log(f"alarm: {said}")

    def _hold_reward(self) -> None:
        patience, rewards = self.config.patience, [values["reward"] for values in self.history]
        if len(rewards) <= patience:
            return
        sums = [sum(rewards[:patience])]
        for leaving, entering in zip(rewards, rewards[patience:], strict=False):
            sums.append(sums[-1] + entering - leaving)
        best, now = max(sums) / patience, sums[-1] / patience
        if not best - now <= self.config.max_reward_drop:
            raise DataError(
                f"rollout {len(rewards)}: the mean reward of the last {patience} rollouts is {now:.4g}, expected at "
                f"most collapse_monitor.max_reward_drop {self.config.max_reward_drop:g} below the best, {best:.4g}: "
                "the policy has collapsed; lower optimizer.learning_rate, or raise beta"
            )


def _read(path: Path) -> list[dict[str, float]]:
    """Read the lines of the file; ignore an incomplete last line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def check_logprob_mismatch(gap: float, config: CollapseMonitorConfig, *, rollout: int) -> None:
    """Raise ``DataError`` if the log-probabilities of sampler and trainer differ too much."""
    if not gap <= config.max_logprob_mismatch:
        raise DataError(
            f"rollout {rollout + 1}: the sampler's log-probabilities differ from the trainer's by {gap:.3g} nats per "
            "token on average, expected at most collapse_monitor.max_logprob_mismatch "
            f"{config.max_logprob_mismatch:g}: the sampler does not use the trained model; check dropout, reduced "
            "precision, and the transfer of weights"
        )
