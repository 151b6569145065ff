"""State of a training run: weights, optimizer state and the record of each step, which survive a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from lilpipe import distributed
from lilpipe.config.training import HealthConfig, OptimizerConfig, TrainingSection
from lilpipe.errors import ConfigError, LilpipeError
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.training.checkpoint import Checkpoints
from lilpipe.training.goodput import Goodput
from lilpipe.training.health import Finding, examine
from lilpipe.training.optimizer import make_optimizers, named_state
from lilpipe.training.replica import TrainerModule

Evaluation = Callable[[Any, int], Mapping[str, float]]
"""Maps (model, number of steps done) to metrics. Called on every worker, with the same result on each."""


@dataclass(frozen=True)
class StepTotals:
    """Totals of one step over all micro-batches and workers."""

    loss: float
    count: float
    num_tokens: int
    stop: bool
    """Whether any worker was asked to stop."""
    metrics: dict[str, float]


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


class TrainingState:
    """State of a run: what its checkpoints hold, with the rules for bad steps and rollbacks."""

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

    def record(self, step: int, totals: StepTotals, *, grad_norm: float, seconds: float) -> None:
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
        """Return what a checkpoint holds: not the frozen weights, which a resumed run has loaded already."""
        named = (item for part in self.model.parts for item in part.named_parameters())
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        tensors = {f"model/{name}": held for name, held in self.model.tensors().items() if name not in frozen}
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
