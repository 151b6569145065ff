"""The training loop shared by pretraining, fine-tuning, preference and policy optimization.

A step sums the loss and its gradient over all micro-batches of all workers and divides by the global count (of tokens,
pairs, ...). So gradient accumulation and every parallel layout give the same update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from lilpipe import distributed
from lilpipe.config.training import HealthConfig, OptimizerConfig, TrainingSection
from lilpipe.errors import ConfigError, DataError, LilpipeError
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.training.checkpoint import Checkpoints
from lilpipe.training.goodput import Goodput
from lilpipe.training.health import Finding, examine
from lilpipe.training.optimizer import make_optimizers, named_state, take_step
from lilpipe.training.replica import TrainerModule
from lilpipe.training.schedule import lr_scale

Evaluation = Callable[[Any, int], Mapping[str, float]]
"""Maps (model, number of steps done) to metrics. Called on every worker, with the same result on each."""
Gauges = Callable[[int, float], Mapping[str, float]]
"""Maps (tokens, seconds) since the last report to further metrics of that interval."""


@dataclass
class TrainingResult:
    """Statistics of a run, including the attempts before a resume."""

    losses: list[float] = field(default_factory=list)
    """Loss of each step."""
    num_tokens: int = 0
    """Tokens processed on all workers."""
    seconds: float = 0.0
    """Time in steps, without evaluations and checkpoints."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    skipped: list[int] = field(default_factory=list)
    """Steps, from 0, whose batches did not update the weights; see ``HealthConfig``."""
    goodput: float = 0.0
    """Share of the wall time in useful steps."""
    time: dict[str, float] = field(default_factory=dict)
    """Seconds by cause; see ``lilpipe.training.goodput``."""

    @property
    def tokens_per_second(self) -> float:
        """Mean over all steps."""
        return self.num_tokens / self.seconds

    def final_loss(self, num_steps: int = 50) -> float:
        """Return the mean loss of the last steps."""
        tail = [loss for loss in self.losses[-num_steps:] if math.isfinite(loss)]
        return math.fsum(tail) / len(tail)


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
    run = _Run(model, workspace, section, optimizer, num_steps=num_steps, identity=identity or {}, health=health)
    meter = _Meter(workspace, num_steps=num_steps, log_every=section.log_every, gauges=gauges)
    with distributed.honours_stop(), run.saving():
        step = run.resume()
        run.goodput.first_step()
        while step < num_steps:
            started = time.perf_counter()
            distributed.heartbeat(step)
            if step in run.undone_steps:
                step += 1
                continue
            run.seed_dropout(step)
            if before_step:
                before_step(step)
            model.zero_grad()
            totals = _accumulate(model, step)
            grad_norm = model.reduce(count=totals.count, max_norm=optimizer.max_grad_norm)
            finding = run.examine(step, totals.loss, grad_norm)
            if finding:
                run.note_bad_step(step, finding, describe)
                if finding.action == "rollback":
                    step = run.roll_back(step)
                    continue
            scale = _lr_scale(step, num_steps, optimizer)
            balance: Mapping[str, float] = {}
            if finding is None:
                take_step(run.optimizers, scale)
                balance = model.after_update()
            done, seconds = step + 1, time.perf_counter() - started
            run.record(step, totals, grad_norm=grad_norm, seconds=seconds)
            meter.record(
                done,
                totals,
                seconds=seconds,
                lr=scale * optimizer.learning_rate,
                grad_norm=grad_norm,
                goodput=run.goodput.share,
                **balance,
            )
            if done % section.checkpoint_every == 0 or done == num_steps or totals.stop:
                run.save(done)
            if totals.stop and done < num_steps:
                raise distributed.Preempted(f"preempted after step {done} of {num_steps}; the state is saved")
            is_due = done in milestones or (eval_every > 0 and done % eval_every == 0)
            if evaluate and is_due and done < num_steps:
                workspace.progress(done, num_steps, "steps", **run.evaluate(evaluate, done))
            step = done
    if evaluate:
        run.result.metrics = run.evaluate(evaluate, num_steps)
        workspace.progress(num_steps, num_steps, "steps", **run.result.metrics)
    return run.finish()


@dataclass(frozen=True)
class _Totals:
    """Totals of one step over all micro-batches and workers."""

    loss: float
    count: float
    num_tokens: int
    stop: bool
    """Whether any worker was asked to stop."""
    metrics: dict[str, float]


def _accumulate(model: TrainerModule, step: int) -> _Totals:
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
    return _Totals(
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


class _Run:
    """State of a run that survives a kill: weights, optimizer state, and recorded losses."""

    def __init__(
        self,
        model: TrainerModule,
        workspace: Workspace,
        section: TrainingSection,
        optimizer: OptimizerConfig,
        *,
        num_steps: int,
        identity: Mapping[str, Any],
        health: HealthConfig | None,
    ) -> None:
        self.model = model
        self.optimizers = make_optimizers(model.parts, optimizer, replicas=model.replicas)
        self.health = health or HealthConfig()
        self.result = TrainingResult()
        self.undone_steps: set[int] = set()
        """Steps to leave out after a rollback."""
        self._learning_rate = optimizer.learning_rate
        self._seed = section.seed or 0
        self._workspace = workspace
        self._losses, self._grad_norms, self._step_seconds = torch.full((3, num_steps), math.nan, dtype=torch.float64)
        account = workspace.scratch / "goodput.json" if distributed.is_main() else None
        self.goodput = Goodput(account, process_started=psutil.Process().create_time())
        directory: Path = workspace.scratch / "checkpoints"
        whole = {**section.identity(), "num_steps": num_steps, "world_size": distributed.world_size(), **identity}
        self.checkpoints = Checkpoints(
            directory,
            identity=whole,
            safe=section.rounding_fields() | {"world_size"},
            keep_last=section.keep_last,
            keep_every=section.keep_every,
            log=workspace.log,
        )

    def examine(self, step: int, loss: float, grad_norm: float) -> Finding | None:
        """Return a finding if the step is bad. Loss and norm are global, so all workers decide alike."""
        used = [done for done in range(max(0, step - 2 * self.health.window), step) if done not in self.undone_steps]
        finding = examine(
            loss,
            grad_norm,
            losses=self._losses[used].tolist() if self.health.on_spike != "ignore" else [],
            grad_norms=self._grad_norms[used].tolist() if self.health.on_spike != "ignore" else [],
            config=self.health,
        )
        if finding is not None and (finding.action == "stop" or len(self.result.skipped) >= self.health.max_events):
            raise ConfigError(
                f"step {step + 1}: {finding.reason}: training has diverged; lower optimizer.learning_rate (now "
                f"{self._learning_rate}) or increase optimizer.warmup_steps"
            )
        return finding

    def note_bad_step(self, step: int, finding: Finding, describe: Callable[[int], str] | None) -> None:
        """Log a bad step and the contents of its batch."""
        self.result.skipped.append(step)
        self.undone_steps.add(step)
        made_of = f"; batch: {describe(step)}" if describe else ""
        self._workspace.log(f"step {step + 1}: {finding.reason}; {finding.action}{made_of}")

    def roll_back(self, step: int) -> int:
        """Load the last checkpoint and leave out the batches from there to ``step``. Returns the step to resume at."""
        skipped, undone_steps = list(self.result.skipped), set(self.undone_steps)
        undone = float(torch.nansum(self._step_seconds[:step]))
        self.checkpoints.wait()
        done = self._load()
        self.goodput.undo(undone - float(torch.nansum(self._step_seconds[:done])))
        self.undone_steps = undone_steps | set(range(done, step + 1))
        self.result.skipped = skipped
        return done

    def seed_dropout(self, step: int) -> None:
        """Seed dropout from the seed, the step and the worker."""
        for module in (module for part in self.model.parts for module in part.modules()):
            if isinstance(module, Transformer) and module.config.dropout:
                module.set_dropout_seed(self._seed, step, distributed.rank())

    def record(self, step: int, totals: _Totals, *, grad_norm: float, seconds: float) -> None:
        """Record one step."""
        self._losses[step], self._grad_norms[step], self._step_seconds[step] = totals.loss, grad_norm, seconds
        self.result.num_tokens += totals.num_tokens
        self.goodput.step(step + 1, seconds, undone=step in self.undone_steps)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context in which saves run in the background; waits for them on exit, also on an error of all workers.

        It does not wait on an error of a single worker, because a save is collective.
        """
        try:
            yield
        except BaseException as error:
            if distributed.world_size() == 1 or isinstance(error, LilpipeError | distributed.Preempted):
                self.checkpoints.wait()
            raise
        self.checkpoints.wait()

    def save(self, done: int) -> None:
        """Save the state after ``done`` steps, in the background."""
        with self.goodput.measure("save"):
            record = {
                "num_tokens": self.result.num_tokens,
                "skipped": self.result.skipped,
                "undone_steps": sorted(self.undone_steps),
            }
            self.checkpoints.save(done, self._tensors(), record)

    def resume(self) -> int:
        """Load the last readable checkpoint; returns the number of steps done."""
        self.checkpoints.check_space(self._tensors())
        done = self._load()
        if done:
            self._workspace.log(f"resuming from the checkpoint after step {done}")
        elif self.health.on_nan == "rollback" or self.health.on_spike == "rollback":
            self.save(0)
        return done

    def _load(self) -> int:
        found = self.checkpoints.load_latest(self._tensors())
        done, record = found or (0, {})
        if distributed.sum_floats([float(done)]) != [float(done) * distributed.world_size()]:
            raise RuntimeError("workers found different checkpoints; they must share the workspace's directory")
        self.result.num_tokens = record.get("num_tokens", 0)
        self.result.skipped = list(record.get("skipped", []))
        self.undone_steps = set(record.get("undone_steps", []))
        for values in (self._losses, self._grad_norms, self._step_seconds):
            values[done:] = math.nan
        return done

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.model.tensors().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in named_state(self.optimizers).items()}
        record = {"losses": self._losses, "grad_norms": self._grad_norms, "seconds": self._step_seconds}
        return tensors | {f"record/{name}": tensor for name, tensor in record.items()}

    def evaluate(self, evaluate: Evaluation, done: int) -> dict[str, float]:
        """Call ``evaluate`` without gradients, in evaluation mode."""
        for part in self.model.parts:
            part.eval()
        with self.goodput.measure("evaluation"), torch.inference_mode():
            return dict(evaluate(self.model, done))

    def finish(self) -> TrainingResult:
        """Return the completed result."""
        self.goodput.write()
        self.result.losses = self._losses.tolist()
        self.result.seconds = float(torch.nansum(self._step_seconds))
        self.result.goodput = self.goodput.share
        self.result.time = dict(self.goodput.seconds)
        return self.result


class _Meter:
    """Reports progress every ``log_every`` steps, with means over the interval."""

    def __init__(self, workspace: Workspace, *, num_steps: int, log_every: int, gauges: Gauges | None) -> None:
        self._workspace = workspace
        self._num_steps = num_steps
        self._log_every = log_every
        self._gauges = gauges
        self._window: list[_Totals] = []
        self._seconds = 0.0

    def record(self, done: int, totals: _Totals, *, seconds: float, **values: float) -> None:
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
