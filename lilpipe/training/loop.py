"""The training loop that pretraining, fine-tuning, preference and policy optimisation share.

A step sums the loss and its gradient over all micro-batches of all workers and divides by the global count (of
tokens, pairs, ...). One rule then covers accumulation and data parallelism: however a batch is cut, the update is
the same. Gradients lie in one flat buffer, so the all-reduce, the norm and the clipping are one call each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.config import OptimizerConfig, TrainingSection
from lilpipe.errors import ConfigError, DataError
from lilpipe.stage import Workspace
from lilpipe.training import checkpoint
from lilpipe.training.optimizer import Optimizer
from lilpipe.training.schedule import lr_scale

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch on one worker."""

    total: Tensor
    """Scalar with a gradient: the loss summed, not averaged."""
    count: float
    """What the sum is divided by, once added up over the whole step: tokens, pairs, ..."""
    num_tokens: int
    """Tokens that went through the model, for tokens/s."""
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Further metrics as (sum, count), averaged like the loss; the same names on every worker."""


LossFunction = Callable[[nn.Module, int, int], Loss]
"""(model, step from 0, micro-batch from 0) to the loss of this worker's rows; a pure function of the three."""
Evaluation = Callable[[nn.Module, int], Mapping[str, float]]
"""(model, number of steps done) to metrics; called on every worker, and the same on each."""


@dataclass
class TrainingResult:
    """How a run went, its interrupted parts included."""

    losses: list[float] = field(default_factory=list)
    """Loss of each step."""
    num_tokens: int = 0
    """Tokens through the model over all workers."""
    seconds: float = 0.0
    """Time in steps; evaluations and checkpoints are left out."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""

    @property
    def tokens_per_second(self) -> float:
        """Over all steps."""
        return self.num_tokens / self.seconds

    def final_loss(self, num_steps: int = 50) -> float:
        """Mean loss of the last steps."""
        tail = self.losses[-num_steps:]
        return math.fsum(tail) / len(tail)


def train(
    model: nn.Module,
    *,
    loss: LossFunction,
    num_steps: int,
    workspace: Workspace,
    section: TrainingSection,
    optimizer: OptimizerConfig,
    accumulation_steps: int = 1,
    evaluate: Evaluation | None = None,
    eval_every: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train ``model`` in place for ``num_steps`` and say how it went.

    State goes to ``workspace.scratch`` every ``section.checkpoint_every`` steps and at the end; called again after
    a kill, the run goes on from there and ends in the same weights, bit for bit. ``evaluate`` runs every
    ``eval_every`` steps (0: never) and at the end. ``identity``, with the section's own, marks the checkpoints;
    those of another run are refused (``ArtifactError``). Raises ``ConfigError`` naming the step if the loss or a
    gradient is not finite, ``DataError`` if a step's count is zero.
    """
    run = _Run(model, Optimizer(model, optimizer), workspace, section, num_steps=num_steps, identity=identity or {})
    gradients = FlatGradients(model)
    meter = _Meter(workspace, num_steps=num_steps, log_every=section.log_every)
    for step in range(run.resume(), num_steps):
        started = time.perf_counter()
        gradients.zero()
        totals = _accumulate(model, loss, step, accumulation_steps)
        grad_norm = gradients.reduce(count=totals.count, max_norm=optimizer.max_grad_norm)
        _check_finite(step, loss=totals.loss, grad_norm=grad_norm, learning_rate=optimizer.learning_rate)
        scale = lr_scale(
            step,
            num_steps=num_steps,
            warmup_steps=optimizer.warmup_steps,
            shape=optimizer.schedule,
            min_ratio=optimizer.min_lr_ratio,
        )
        run.optimizer.step(scale)
        done, seconds = step + 1, time.perf_counter() - started
        run.record(totals, seconds=seconds)
        meter.record(done, totals, seconds=seconds, lr=scale * optimizer.learning_rate, grad_norm=grad_norm)
        if done % section.checkpoint_every == 0 or done == num_steps:
            run.save(done)
        if evaluate and eval_every and done % eval_every == 0 and done < num_steps:
            workspace.progress(done, num_steps, "steps", **_evaluate(model, evaluate, done))
    if evaluate:
        run.result.metrics = _evaluate(model, evaluate, num_steps)
        workspace.progress(num_steps, num_steps, "steps", **run.result.metrics)
    return run.result


class FlatGradients:
    """The gradients of a model as views of one buffer [number of parameters]."""

    def __init__(self, model: nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, view in zip(parameters, self.buffer.split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)

    def zero(self) -> None:
        """Forget the last step's gradients."""
        self.buffer.zero_()

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum over workers, divide by ``count``, clip to ``max_norm``; gives the norm before clipping."""
        distributed.all_reduce_sum(self.buffer)
        norm = torch.linalg.vector_norm(self.buffer).item() / count
        self.buffer.mul_(min(1.0, max_norm / (norm + CLIP_EPSILON)) / count)
        return norm


@dataclass(frozen=True)
class _Totals:
    """One step over all micro-batches and workers."""

    loss: float
    count: float
    num_tokens: int
    metrics: dict[str, float]


def _accumulate(model: nn.Module, loss: LossFunction, step: int, accumulation_steps: int) -> _Totals:
    """Add up gradients over this worker's micro-batches, and the numbers beside them over all workers."""
    model.train()
    sums: dict[str, float] = {"loss": 0.0, "count": 0.0, "tokens": 0.0}
    for micro in range(accumulation_steps):
        part = loss(model, step, micro)
        part.total.backward()
        values = {"loss": part.total.item(), "count": part.count, "tokens": part.num_tokens}
        for name, (total, count) in part.metrics.items():
            values |= {f"sum/{name}": total, f"count/{name}": count}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    sums = dict(zip(sums, distributed.sum_floats(list(sums.values())), strict=True))
    if sums["count"] <= 0:
        raise DataError(f"step {step + 1}: there is nothing to learn from in this batch; check the data's masks")
    names = [name.removeprefix("sum/") for name in sums if name.startswith("sum/")]
    return _Totals(
        loss=sums["loss"] / sums["count"],
        count=sums["count"],
        num_tokens=int(sums["tokens"]),
        metrics={name: sums[f"sum/{name}"] / max(sums[f"count/{name}"], 1e-12) for name in names},
    )


def _check_finite(step: int, *, loss: float, grad_norm: float, learning_rate: float) -> None:
    """Stop before the weights are spoilt. Loss and norm are global, so all workers stop together."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ConfigError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: training has diverged; lower "
            f"optimizer.learning_rate (now {learning_rate}) or lengthen optimizer.warmup_steps"
        )


def _evaluate(model: nn.Module, evaluate: Evaluation, done: int) -> dict[str, float]:
    model.eval()
    with torch.inference_mode():
        return dict(evaluate(model, done))


class _Run:
    """What must outlive a kill: weights, optimizer state, and the record of losses."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        workspace: Workspace,
        section: TrainingSection,
        *,
        num_steps: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.optimizer = optimizer
        self.result = TrainingResult()
        self._parameters = dict(model.named_parameters())
        self._workspace = workspace
        self._directory: Path = workspace.scratch / "checkpoints"
        world_size = distributed.world_size()
        self._identity = {**section.identity(), "num_steps": num_steps, "world_size": world_size, **identity}

    def record(self, totals: _Totals, *, seconds: float) -> None:
        """Note down one step."""
        self.result.losses.append(totals.loss)
        self.result.seconds += seconds
        self.result.num_tokens += totals.num_tokens

    def save(self, done: int) -> None:
        """Write the state after ``done`` steps; rank 0 does, as every worker holds the same."""
        if not distributed.is_main():
            return
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors["losses"] = torch.tensor(self.result.losses, dtype=torch.float64)
        tensors["num_tokens"] = torch.tensor(self.result.num_tokens)
        tensors["seconds"] = torch.tensor(self.result.seconds, dtype=torch.float64)
        checkpoint.save(self._directory, checkpoint.Checkpoint(done, tensors), identity=self._identity)

    def resume(self) -> int:
        """Take over the last state that can be read; gives the number of steps done."""
        found = checkpoint.load_latest(self._directory, identity=self._identity, log=self._workspace.log)
        done = found.step if found else 0
        if distributed.sum_floats([float(done)]) != [float(done) * distributed.world_size()]:
            raise RuntimeError(f"workers found different checkpoints in {self._directory}; they must share the folder")
        if found:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(found.tensors[f"model/{name}"])
            state = {k.removeprefix("optimizer/"): v for k, v in found.tensors.items() if k.startswith("optimizer/")}
            self.optimizer.load_state(state)
            self.result.losses = found.tensors["losses"].tolist()
            self.result.num_tokens = int(found.tensors["num_tokens"])
            self.result.seconds = float(found.tensors["seconds"])
            self._workspace.log(f"going on from the checkpoint after step {done}")
        return done


class _Meter:
    """Reports every ``log_every`` steps, with means over the steps since the last report."""

    def __init__(self, workspace: Workspace, *, num_steps: int, log_every: int) -> None:
        self._workspace = workspace
        self._num_steps = num_steps
        self._log_every = log_every
        self._window: list[_Totals] = []
        self._seconds = 0.0

    def record(self, done: int, totals: _Totals, *, seconds: float, lr: float, grad_norm: float) -> None:
        """One step has ended."""
        self._window.append(totals)
        self._seconds += seconds
        if done % self._log_every == 0 or done == self._num_steps:
            self._report(done, lr=lr, grad_norm=grad_norm)

    def _report(self, done: int, *, lr: float, grad_norm: float) -> None:
        window = self._window
        metrics = {name: math.fsum(t.metrics[name] for t in window) / len(window) for name in window[-1].metrics}
        self._workspace.progress(
            done,
            self._num_steps,
            "steps",
            loss=math.fsum(totals.loss for totals in window) / len(window),
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=sum(totals.num_tokens for totals in window) / self._seconds,
            **metrics,
        )
        self._window, self._seconds = [], 0.0
