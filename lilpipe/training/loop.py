"""The training loop shared by pretraining, fine-tuning, preference and policy optimization.

A step sums the loss and its gradient over all micro-batches of all workers and divides by the global count (of tokens,
pairs, ...). So gradient accumulation and every parallel layout give the same update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lilpipe import distributed
from lilpipe.config.training import HealthConfig, OptimizerConfig, TrainingSection
from lilpipe.errors import DataError
from lilpipe.stage import Workspace
from lilpipe.training.optimizer import take_step
from lilpipe.training.replica import TrainerModule
from lilpipe.training.schedule import lr_scale
from lilpipe.training.training_state import Evaluation, StepTotals, TrainingResult, TrainingState

Gauges = Callable[[int, float], Mapping[str, float]]
"""Maps (tokens, seconds) since the last report to further metrics of that interval."""


def train(
    model: TrainerModule,
    *,
    num_steps: int,
    workspace: Workspace,
    section: TrainingSection,
    optimizer: OptimizerConfig,
    evaluate: Evaluation | None = None,
    eval_every: int = 0,
    milestones: Collection[int] = (),
    identity: Mapping[str, Any] | None = None,
    health: HealthConfig | None = None,
    before_step: Callable[[int], None] | None = None,
    describe: Callable[[int], str] | None = None,
    gauges: Gauges | None = None,
) -> TrainingResult:
    """Train ``model`` in place for ``num_steps`` and return statistics.

    State is saved to ``workspace.scratch`` every ``section.checkpoint_every`` steps and at the end. Called again after
    a kill, the run resumes from the last checkpoint and ends in the same weights, bit for bit.

    Args:
        model: The model and its objective.
        num_steps: Optimizer steps, including skipped ones.
        workspace: Directory for checkpoints and progress.
        section: The stage's settings.
        optimizer: Optimizer and schedule.
        evaluate: Called every ``eval_every`` steps (0: never) and at the end.
        eval_every: Steps between evaluations.
        milestones: Further numbers of steps after which to evaluate.
        identity: Identifies the run, together with the section's identity; checkpoints of another run are rejected.
        health: How to handle non-finite values and spikes.
        before_step: Called with the index of each step before it.
        describe: Returns the contents of a step's batch, for the log of a bad step.
        gauges: Further metrics for each report.

    Raises:
        ArtifactError: The workspace holds checkpoints of another run.
        ConfigError: The loss or a gradient is bad and ``health`` says stop; names the step.
        DataError: The count of a step is zero.
        Preempted: The process received SIGTERM; the state is saved.
    """
    state = TrainingState(
        model, workspace, section, optimizer, num_steps=num_steps, identity=identity or {}, health=health
    )
    meter = _Meter(workspace, num_steps=num_steps, log_every=section.log_every, gauges=gauges)
    with distributed.honours_stop(), state.saving():
        step = state.resume()
        state.goodput.first_step()
        while step < num_steps:
            started = time.perf_counter()
            distributed.heartbeat(step)
            if step in state.undone_steps:
                step += 1
                continue
            state.seed_dropout(step)
            if before_step:
                before_step(step)
            model.zero_grad()
            totals = _accumulate(model, step)
            grad_norm = model.reduce(count=totals.count, max_norm=optimizer.max_grad_norm)
            finding = state.examine(step, totals.loss, grad_norm)
            if finding:
                state.note_bad_step(step, finding, describe)
                if finding.action == "rollback":
                    step = state.roll_back(step)
                    continue
            scale = _lr_scale(step, num_steps, optimizer)
            balance: Mapping[str, float] = {}
            if finding is None:
                take_step(state.optimizers, scale)
                balance = model.after_update()
            done, seconds = step + 1, time.perf_counter() - started
            state.record(step, totals, grad_norm=grad_norm, seconds=seconds)
            meter.record(
                done,
                totals,
                seconds=seconds,
                lr=scale * optimizer.learning_rate,
                grad_norm=grad_norm,
                goodput=state.goodput.share,
                **balance,
            )
            if done % section.checkpoint_every == 0 or done == num_steps or totals.stop:
                state.save(done)
            if totals.stop and done < num_steps:
                raise distributed.Preempted(f"preempted after step {done} of {num_steps}; the state is saved")
            is_due = done in milestones or (eval_every > 0 and done % eval_every == 0)
            if evaluate and is_due and done < num_steps:
                workspace.progress(done, num_steps, "steps", **state.evaluate(evaluate, done))
            step = done
    if evaluate:
        state.result.metrics = state.evaluate(evaluate, num_steps)
        workspace.progress(num_steps, num_steps, "steps", **state.result.metrics)
    return state.finish()


def _accumulate(model: TrainerModule, step: int) -> StepTotals:
    """Accumulate gradients over this worker's micro-batches, and sum losses and metrics over all workers."""
    for part in model.parts:
        part.train()
    sums: dict[str, float] = {"loss": 0.0, "count": 0.0, "tokens": 0.0}
    for part in model.forward_backward(step):
        values = {"loss": part.total.item(), "count": part.count, "tokens": part.num_tokens}
        for name, (total, count) in part.metrics.items():
            values |= {f"sum/{name}": float(total), f"count/{name}": count}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    sums["stop"] = float(distributed.stop_requested())
    sums = dict(zip(sums, distributed.sum_floats(list(sums.values())), strict=True))
    if sums["count"] <= 0:
        raise DataError(
            f"step {step + 1}: got a batch without targets, expected at least one; check the loss masks of the data"
        )
    names = [name.removeprefix("sum/") for name in sums if name.startswith("sum/")]
    return StepTotals(
        loss=sums["loss"] / sums["count"],
        count=sums["count"],
        num_tokens=int(sums["tokens"]),
        stop=sums["stop"] > 0,
        metrics={name: sums[f"sum/{name}"] / max(sums[f"count/{name}"], 1e-12) for name in names},
    )


def _lr_scale(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    return lr_scale(
        step,
        num_steps=num_steps,
        warmup_steps=optimizer.warmup_steps,
        shape=optimizer.schedule,
        min_ratio=optimizer.min_lr_ratio,
        decay_ratio=optimizer.decay_ratio,
    )


class _Meter:
    """Reports progress every ``log_every`` steps, with means over the interval."""

    def __init__(self, workspace: Workspace, *, num_steps: int, log_every: int, gauges: Gauges | None) -> None:
        self._workspace = workspace
        self._num_steps = num_steps
        self._log_every = log_every
        self._gauges = gauges
        self._window: list[StepTotals] = []
        self._seconds = 0.0

    def record(self, done: int, totals: StepTotals, *, seconds: float, **values: float) -> None:
        """Record one step; report if due."""
        self._window.append(totals)
        self._seconds += seconds
        if done % self._log_every == 0 or done == self._num_steps:
            self._report(done, **values)

    def _report(self, done: int, **values: float) -> None:
        window = self._window
        metrics = {name: math.fsum(t.metrics[name] for t in window) / len(window) for name in window[-1].metrics}
        num_tokens = sum(totals.num_tokens for totals in window)
        gauges = self._gauges(num_tokens, self._seconds) if self._gauges else {}
        self._workspace.progress(
            done,
            self._num_steps,
            "steps",
            loss=math.fsum(totals.loss for totals in window) / len(window),
            tokens_per_second=num_tokens / self._seconds,
            **values,
            **metrics,
            **gauges,
        )
        self._window, self._seconds = [], 0.0
