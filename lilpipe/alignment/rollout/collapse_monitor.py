"""Gates of reinforcement learning: a run that has collapsed stops and says what went wrong.

What is watched is the same on all workers, and is kept beside the checkpoints from rollout to rollout, so that a run
that was killed stops where an uninterrupted one would.
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
    """A bound on a metric of rollouts."""

    quantity: str
    setting: str
    value: float
    is_ceiling: bool
    remedy: str

    def is_passed(self, value: float) -> bool:
        """Whether the value lies on the wrong side; NaN does."""
        return not (value <= self.value if self.is_ceiling else value >= self.value)


def limits(config: CollapseMonitorConfig) -> list[Limit]:
    """The bounds that a section states."""
    slower = "lower optimizer.learning_rate"
    return [
        Limit(
            "frac_reward_zero_std",
            "max_frac_reward_zero_std",
            config.max_frac_reward_zero_std,
            is_ceiling=True,
            remedy="answers to a prompt are all right or all wrong: take prompts of another difficulty, a larger "
            "num_generations, a reward with degrees, or dynamic_sampling_rounds",
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
            remedy=f"the policy has left its reference behind: {slower}, or raise beta",
        ),
        Limit(
            "length",
            "min_length",
            config.min_length,
            is_ceiling=False,
            remedy=f"answers are all but empty: {slower}, and see that the rewards do not pay for saying nothing",
        ),
        Limit(
            "truncated",
            "max_truncated_ratio",
            config.max_truncated_ratio,
            is_ceiling=True,
            remedy="answers do not end: raise sampling.max_new_tokens, add a reward of kind 'length', or start from a "
            "model that ends its answers",
        ),
    ]


class CollapseMonitor:
    """What each rollout was like so far, and whether to go on.

    ``path`` keeps it, a line for each rollout; only the worker that ``writes`` writes there. ``log`` takes alarms.
    """

    def __init__(self, config: CollapseMonitorConfig, path: Path, *, writes: bool, log: Callable[[str], None]) -> None:
        self.config = config
        self.history = _read(path) if path.exists() else []
        self._path, self._writes, self._log = path, writes, log
        self._num_kept = -1  # lines of the file, once this process has written it

    def before(self, rollout: int) -> list[dict[str, float]]:
        """What the rollouts before this one were like. Raises ``ArtifactError`` if that is not known."""
        if len(self.history) < rollout:
            raise ArtifactError(
                f"{self._path}: holds {len(self.history)} rollouts, expected {rollout}, as many as the checkpoint has "
                "seen; delete the workspace and run the step again"
            )
        return self.history[:rollout]

    def note(self, rollout: int, values: Mapping[str, float]) -> None:
        """Keep what a rollout was like. Raises ``DataError`` if the run has collapsed."""
        self.history = [*self.before(rollout), dict(values)]
        if self._writes:
            self._keep()
        for limit in limits(self.config):
            self._hold(limit)
        self._hold_reward()

    def _keep(self) -> None:
        """Add the last rollout to the file, or write it anew where it holds others than those before."""
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
    """The lines of the file; what a power cut left of a last one is none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def check_logprob_mismatch(gap: float, config: CollapseMonitorConfig, *, rollout: int) -> None:
    """Raise ``DataError`` if sampler and trainer do not see the same model."""
    if not gap <= config.max_logprob_mismatch:
        raise DataError(
            f"rollout {rollout + 1}: the sampler's log-probabilities differ from the trainer's by {gap:.3g} nats a "
            "token on average, expected at most collapse_monitor.max_logprob_mismatch "
            f"{config.max_logprob_mismatch:g}: what was sampled is not the model that is trained; look for dropout, "
            "reduced precision, or weights that were not handed over"
        )
