"""Pipeline parallelism: processes hold different layers, and micro-batches pass through them (Narayanan et al. 2021).

The schedules are torch's: 1F1B (one forward, one backward); interleaved 1F1B, where a process holds several
non-consecutive stages, with smaller bubbles; zero bubble (Qi et al. 2023), which computes weight gradients in the
bubbles. ``torch.distributed.pipelining`` is experimental in torch 2.13 and used only here.

Dimensions: B rows of a micro-batch, T tokens of each row on this process, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from lilpipe.config.parallel import ParallelConfig
from lilpipe.model.heads import HeadModel
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.parallel.mesh import Mesh

_INTERLEAVED = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


def split_model(num_layers: int, num_stages: int) -> list[ModelPart]:
    """Divide layers evenly over stages; earlier stages, which have no output layer, take the remainder."""
    each, left_over = divmod(num_layers, num_stages)
    stops = [each * (stage + 1) + min(stage + 1, left_over) for stage in range(num_stages)]
    starts = [0, *stops[:-1]]
    return [
        ModelPart(range(start, stop), first=start == 0, last=stop == num_layers)
        for start, stop in zip(starts, stops, strict=True)
    ]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of a micro-batch, the same on every process of the pipeline."""

    tokens_BT: Tensor
    inputs: dict[str, Tensor]
    """Further inputs of every stage, by the names in ``Transformer.forward``."""


class Pipeline:
    """The stages of this process, and communication with the others."""

    def __init__(self, parts: Sequence[Transformer], config: ParallelConfig, mesh: Mesh, *, dtype: torch.dtype) -> None:
        """``dtype`` is that of the hidden states that stages exchange."""
        self.parts = parts
        self.mesh = mesh
        self._config = config
        self._dtype = dtype
        self._score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._num_stages = config.pipeline * config.stages_per_worker
        self._loss: Callable[[Any, int], Tensor] | None = None
        self._schedule = lru_cache(maxsize=1)(self._build_schedule)

    def forward_backward(self, batches: Sequence[MicroBatch], loss: Callable[[Any, int], Tensor]) -> None:
        """Run the schedule. ``loss`` is called on the last stage.

        It takes the scores, or a head's outputs, and the index of the micro-batch.
        """
        self._loss = loss
        shape = batches[0].tokens_BT.shape
        schedule = self._schedule(len(batches), shape[0], shape[1])
        inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
        tokens = [torch.cat([batch.tokens_BT for batch in batches])] if self.mesh.holds_first_stage else []
        numbers = torch.arange(len(batches)) if self.mesh.holds_last_stage else None
        schedule.step(*tokens, target=numbers, losses=[], return_outputs=False, **inputs)
        self._loss = None

    def forward(self, batch: MicroBatch) -> Scores:
        """Return scores of one micro-batch, the same on every process of the pipeline; without gradients."""
        rank, group = self.mesh.coordinate.pipeline, self.mesh.pipeline_group
        peers = dist.get_process_group_ranks(group)
        shape = batch.inputs["targets_BT"].shape
        result = torch.empty(2, *shape, dtype=self._score_dtype, device=batch.tokens_BT.device)
        for number in range(self._num_stages):
            if number % len(peers) != rank:
                continue
            stage = self.parts[number // len(peers)]
            x = batch.tokens_BT
            if number > 0:
                x = torch.empty(self._hidden_shape(*shape), dtype=self._dtype, device=x.device)
                dist.recv(x, peers[(number - 1) % len(peers)], group=group)
            y = stage(x, **batch.inputs)
            if isinstance(y, Scores):
                result = torch.stack([y.logprobs, y.normaliser])
            else:
                dist.send(y.contiguous(), peers[(number + 1) % len(peers)], group=group)
        dist.broadcast(result, peers[-1], group=group)
        return Scores(*result)

    def _build_schedule(self, num_batches: int, num_rows: int, num_tokens: int) -> Any:
        stages = [self._stage(local, part, num_rows, num_tokens) for local, part in enumerate(self.parts)]
        options = {"n_microbatches": num_batches, "loss_fn": self._loss_of, "scale_grads": False}
        if self._config.schedule == "1f1b":
            return Schedule1F1B(stages[0], **options)
        return _INTERLEAVED[self._config.schedule](stages, **options)

    def _stage(self, local: int, part: Transformer, num_rows: int, num_tokens: int) -> PipelineStage:
        """Return a stage with given input and output shapes, so that torch does not run the model to infer them."""
        hidden = torch.empty(self._hidden_shape(num_rows, num_tokens), dtype=self._dtype, device="meta")
        tokens = torch.empty(num_rows, num_tokens, dtype=torch.int64, device="meta")
        return _Stage(
            part,
            local * self.mesh.layout.pipeline + self.mesh.coordinate.pipeline,
            self._num_stages,
            part.device,
            input_args=tokens if part.part.first else hidden.requires_grad_(),
            output_args=self._outputs(part, num_rows, num_tokens) if part.part.last else hidden.requires_grad_(),
            group=self.mesh.pipeline_group,
        )

    def _outputs(self, part: Transformer, num_rows: int, num_tokens: int) -> Tensor | tuple[Tensor, Tensor]:
        """Return the last stage's outputs on the meta device: scores, or a head's outputs."""
        if isinstance(part, HeadModel):
            return torch.empty(num_rows, num_tokens, part.num_outputs, device="meta").requires_grad_()
        score = torch.empty(num_rows, num_tokens, dtype=self._score_dtype, device="meta")
        return score.requires_grad_(), score

    def _hidden_shape(self, num_rows: int, num_tokens: int) -> tuple[int, int, int]:
        return num_rows, num_tokens // self.mesh.layout.tensor, self.parts[0].config.hidden_size

    def _loss_of(self, outputs: Tensor | tuple[Tensor, Tensor], number: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(outputs if isinstance(outputs, Tensor) else Scores(*outputs), int(number))


class _Stage(PipelineStage):
    """A stage that returns scores as a plain tuple; torch treats a named tuple as a single output."""

    def forward_maybe_with_nosync(self, *args: Any, **inputs: Any) -> Any:
        """Run the module."""
        output = super().forward_maybe_with_nosync(*args, **inputs)
        return tuple(output) if isinstance(output, Scores) else output
