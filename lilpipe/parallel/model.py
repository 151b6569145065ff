"""A model that is cut over processes, as the training loop sees it.

Dimensions: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lilpipe import distributed
from lilpipe.config import PretrainConfig
from lilpipe.model.scores import IGNORED, Scores
from lilpipe.model.transformer import Transformer
from lilpipe.parallel import gradients
from lilpipe.parallel.collectives import gather
from lilpipe.parallel.context import head_and_tail
from lilpipe.parallel.mesh import Mesh
from lilpipe.parallel.pipeline import MicroBatch, Pipeline
from lilpipe.tokens.loader import PADDING_DOCUMENT, Batch
from lilpipe.training.replica import Loss

Batches = Callable[[int], Sequence[Batch]]
"""Step, from 0, to the micro-batches of this process's data rank, whole rows each."""
Objective = Callable[[Scores, Batch], Loss]
"""Scores of a micro-batch's targets to its loss; both may be parts of the rows."""
ROWS_AT_ONCE = 32
"""Rows of a data rank that go through the model together in an evaluation."""


class ParallelModel:
    """The stages of the model that this process holds, and what it takes to train them with the others."""

    def __init__(
        self,
        stages: Sequence[Transformer],
        mesh: Mesh,
        config: PretrainConfig,
        *,
        batches: Batches,
        loss: Objective,
        dtype: torch.dtype,
    ) -> None:
        """Take the stages over; ``dtype`` is that of hidden states. Made by ``parallelize``."""
        self.parts: list[nn.Module] = list(stages)
        """For the optimizer and the checkpoints: their parameters have their names in the whole model."""
        self.mesh = mesh
        self._config = config
        self._stages = list(stages)
        self._batches = batches
        self._loss = loss
        self._pipeline = Pipeline(stages, config.parallel, mesh, dtype=dtype) if mesh.layout.pipeline > 1 else None

    # --- a training step ------------------------------------------------------------------------------------------

    def forward_backward(self, step: int) -> list[Loss]:
        """Add the gradients of this process's micro-batches up, and give their losses.

        The losses of all processes add up to those of the step: one that computes what another does too, or has no
        part in the output layer, gives zeros.
        """
        batches = [self._part_of_rows(batch) for batch in self._batches(step)]
        losses: dict[int, Loss] = {}

        def loss_of(scores: Scores, number: int) -> Tensor:
            losses[number] = self._loss(scores, batches[number])
            return losses[number].total

        if self._pipeline is not None:
            self._pipeline.forward_backward([self._inputs(batch) for batch in batches], loss_of)
        else:
            for number, batch in enumerate(batches):
                for module in self._sharded():
                    module.set_requires_gradient_sync(number == len(batches) - 1)
                loss_of(self._forward(self._inputs(batch)), number).backward()
        return [self._weigh(losses.get(number) or self._no_loss(batch)) for number, batch in enumerate(batches)]

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over processes, divide by ``count``, clip to ``max_norm``; the global norm before clipping."""
        parameters = self._parameters()
        gradients.fill_in(parameters)
        if not self._sharded():  # which FSDP has summed in the backward pass
            gradients.sum_over(gradients.local_gradients(parameters), self.mesh.summing_group)
        counted = parameters
        if self.mesh.ends_group is not None and self._config.model.tie_embeddings:
            embeddings = [stage.model.embed_tokens.weight for stage in self._stages if stage.model.embed_tokens]
            gradients.sum_over(gradients.local_gradients(embeddings), self.mesh.ends_group)
            if self.mesh.holds_last_stage:
                counted = [parameter for parameter in parameters if parameter is not embeddings[-1]]
        norm = gradients.norm(counted, self.mesh) / count
        gradients.clip(parameters, norm=norm, count=count, max_norm=max_norm)
        return norm

    def _forward(self, batch: MicroBatch) -> Scores:
        if self._pipeline is not None:
            return self._pipeline.forward(batch)
        return self._stages[0](batch.tokens_BT, **batch.inputs)

    def _weigh(self, loss: Loss) -> Loss:
        """The loss, for one process of those that compute it; a loss of zeros for the others."""
        if self.mesh.coordinate.tensor == 0 and self.mesh.holds_last_stage:
            return replace(loss, total=loss.total.detach())
        metrics = dict.fromkeys(loss.metrics, (0.0, 0.0))
        return Loss(torch.zeros(()), count=0.0, num_tokens=0, metrics=metrics)

    def _no_loss(self, batch: Batch) -> Loss:
        """For the names of metrics, where the output layer is on another process."""
        return self._loss(Scores(*torch.zeros(2, *batch.targets.shape, device=batch.targets.device)), batch)

    # --- rows and their parts -------------------------------------------------------------------------------------

    def _part_of_rows(self, batch: Batch) -> Batch:
        """The tokens of this process under context parallelism."""
        if self.mesh.layout.context == 1:
            return batch
        places = self._places(batch.inputs.shape[1], self.mesh.coordinate.context).to(batch.inputs.device)
        return Batch(*(column[:, places] for column in batch))

    def _places(self, seq_len: int, part: int) -> Tensor:
        return head_and_tail(seq_len, part=part, num_parts=self.mesh.layout.context)

    def _inputs(self, batch: Batch) -> MicroBatch:
        inputs = {"targets_BT": batch.targets}
        if self._config.within_documents:
            inputs["documents_BT"] = batch.documents
        layout = self.mesh.layout
        if layout.context > 1 or (layout.tensor > 1 and layout.pipeline > 1):
            seq_len = batch.inputs.shape[1] * layout.context
            places = self._places(seq_len, self.mesh.coordinate.context).to(batch.inputs.device)
            inputs["positions_BT"] = places.expand(len(batch.inputs), -1).contiguous()
        return MicroBatch(batch.inputs, inputs)

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """Scores ``[B, T]`` of rows that every process gives alike, the same bits on every process.

        The rows are divided among the data ranks.
        """
        num_rows, seq_len = batch.inputs.shape
        layout = self.mesh.layout
        padded = _pad(batch, rows_to=layout.data, length_to=2 * layout.context * layout.tensor)
        own = [column.chunk(layout.data)[self.mesh.data_rank] for column in padded]
        modes = [part.training for part in self.parts]
        for part in self.parts:
            part.eval()
        pieces = zip(*(column.split(ROWS_AT_ONCE) for column in own), strict=True)
        found = [torch.stack(self._forward(self._inputs(self._part_of_rows(Batch(*piece))))) for piece in pieces]
        for module in self._sharded():
            module.reshard()  # else weights loaded after this would not be seen
        for part, mode in zip(self.parts, modes, strict=True):
            part.train(mode)
        scores_2TB = gather(torch.cat(found, dim=1).transpose(1, 2), self.mesh.context_group)
        order = torch.cat([self._places(padded.inputs.shape[1], part) for part in range(layout.context)])
        scores_2BT = gather(scores_2TB[:, order.argsort()].transpose(1, 2), self.mesh.data_group)
        return Scores(*scores_2BT[:, :num_rows, :seq_len])

    # --- names and tensors ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of this process by their names in the whole model."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            saved = part.state_dict().keys()
            named = dict(part.named_parameters()) | dict(part.named_buffers())
            found |= {name: tensor.detach() for name, tensor in named.items() if name in saved}
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this process by their names in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the whole model on the CPU of the mesh's first process, one at a time.

        All processes must run through it together; to the others it gives nothing.
        """
        held = self.tensors()
        stage = self.mesh.coordinate.pipeline
        senders = [self.mesh.rank_of(pipeline=number) for number in range(self.mesh.layout.pipeline)]
        for number, described in enumerate(self._tensors_by_stage(held)):
            for name, (shape, dtype) in described.items():
                whole = _whole(held[name]) if stage == number else None
                if dist.get_rank() == senders[0]:
                    if whole is None:
                        whole = torch.empty(shape, dtype=dtype, device=distributed.device())
                        dist.recv(whole, senders[number])
                    yield name, whole.cpu()
                elif dist.get_rank() == senders[number] and whole is not None:
                    dist.send(whole, senders[0])

    def _tensors_by_stage(self, held: Mapping[str, Tensor]) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
        """What each process of the pipeline holds; what several hold, tied embeddings, stands with the first."""
        own = {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()}
        found: list[Any] = [own] * self.mesh.layout.pipeline
        dist.all_gather_object(found, own, group=self.mesh.pipeline_group)
        seen: set[str] = set()
        result = []
        for described in found:
            result.append({name: about for name, about in described.items() if name not in seen})
            seen |= described.keys()
        return result

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.parameters() if parameter.requires_grad]

    def _sharded(self) -> list[FSDPModule]:
        return [module for stage in self._stages for module in stage.modules() if isinstance(module, FSDPModule)]


def _pad(batch: Batch, *, rows_to: int, length_to: int) -> Batch:
    """With rows and, on the right, tokens added that do not count, up to multiples of both."""
    num_rows, seq_len = batch.inputs.shape
    padding = (0, -seq_len % length_to, 0, -num_rows % rows_to)
    return Batch(
        inputs=F.pad(batch.inputs, padding),
        targets=F.pad(batch.targets, padding, value=IGNORED),
        documents=F.pad(batch.documents, padding, value=PADDING_DOCUMENT),
        positions=F.pad(batch.positions, padding),
    )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
