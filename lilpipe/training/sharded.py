"""A model sharded over processes, as a trainer module.

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
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lilpipe import distributed
from lilpipe.config.training import ParallelSection
from lilpipe.model.adapter_dropout import adapter_dropout
from lilpipe.model.scores import IGNORED, Scores
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import held_tensors
from lilpipe.parallel import gradients
from lilpipe.parallel.collectives import gather
from lilpipe.parallel.context import head_and_tail
from lilpipe.parallel.mesh import Mesh
from lilpipe.parallel.pipeline_parallel import MicroBatch, Pipeline
from lilpipe.training.next_token import rows_of
from lilpipe.training.replica import Loss, clip_sum

Batches = Callable[[int], Sequence[Any]]
"""Maps a step, from 0, to the micro-batches of this process's data rank, each of whole rows: named tuples with
``inputs``, ``targets`` and ``documents`` [B, T]. Under context parallelism every column must have this shape."""
Objective = Callable[[Any, Any], Loss]
"""Maps the scores of a micro-batch's targets, or a head's outputs, to its loss; both may be slices of the rows."""
ROWS_AT_ONCE = 32
"""Rows of a data rank per forward pass in evaluation."""


class ParallelModel:
    """The pipeline stages that this process holds, with forward, backward and collectives."""

    def __init__(
        self,
        stages: Sequence[Transformer],
        mesh: Mesh,
        section: ParallelSection,
        *,
        batches: Batches,
        loss: Objective,
        intra_document_masking: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take the stages over from ``parallelize``. ``dtype`` is that of hidden states."""
        self.parts: list[nn.Module] = list(stages)
        """For the optimizer and checkpoints: parameters have their names in the whole model."""
        self.mesh = mesh
        self._model = stages[0].config
        self._within_documents = intra_document_masking
        self._names: list[str] | None = None
        self._stages = list(stages)
        self._lora, self._seed = section.lora, section.seed or 0
        self._batches = batches
        self._loss = loss
        self._pipeline = Pipeline(stages, section.parallel, mesh, dtype=dtype) if mesh.layout.pipeline > 1 else None

    # --- training step ----------------------------------------------------------------------------------------------

    def forward_backward(self, step: int) -> list[Loss]:
        """Accumulate gradients over this process's micro-batches and return their losses.

        The losses of all processes sum to those of the step. A process that repeats the computation of another, or does
        not hold the output layer, returns zeros.
        """
        whole = self._batches(step)
        batches = [self._part_of_rows(batch) for batch in whole]
        inputs = [self._inputs(batch, number) for number, batch in enumerate(batches)]
        for number, (batch, micro_batch) in enumerate(zip(whole, inputs, strict=True)):
            micro_batch.inputs.update(self._adapter_dropout(batch, number, step))
        losses: dict[int, Loss] = {}

        def loss_of(outputs: Any, number: int) -> Tensor:
            losses[number] = self._loss(outputs, batches[number])
            return losses[number].total

        if self._pipeline is not None:
            self._pipeline.forward_backward(inputs, loss_of)
        else:
            for number, batch in enumerate(inputs):
                for module in self._sharded():
                    module.set_requires_gradient_sync(number == len(batches) - 1)
                loss_of(self._stages[0](batch.tokens_BT, **batch.inputs), number).backward()
        names = self._metric_names(losses)
        return [self._weigh(losses[number]) if number in losses else _no_loss(names) for number in range(len(batches))]

    def zero_grad(self) -> None:
        """Delete the last step's gradients."""
        for parameter in self._parameters():
            parameter.grad = None
        for stage in self._stages:
            stage.model.expert_loads.clear()  # from a skipped step

    def reduce(self, *, count: float, max_norm: float) -> float:
        """Sum gradients over processes, divide by ``count``, clip to ``max_norm``; return the norm before clipping."""
        return clip_sum(self, count=count, max_norm=max_norm)

    def sum_gradients(self) -> float:
        """Sum gradients over processes; return the global norm of the sum."""
        parameters = self._parameters()
        gradients.fill_in(parameters)
        if not self._sharded():  # FSDP sums in the backward pass
            gradients.sum_over(gradients.local_gradients(parameters), self.mesh.summing_group)
        gradients.sum_over(gradients.local_gradients(gradients.undivided(parameters)), self.mesh.tensor_group)
        counted = parameters
        if self.mesh.ends_group is not None and self._model.tie_embeddings:
            embeddings = [stage.model.embed_tokens.weight for stage in self._stages if stage.model.embed_tokens]
            gradients.sum_over(gradients.local_gradients(embeddings), self.mesh.ends_group)
            if self.mesh.holds_last_stage:
                counted = [parameter for parameter in parameters if parameter is not embeddings[-1]]
        return gradients.norm(counted, self.mesh)

    def scale_gradients(self, factor: float) -> None:
        """Multiply gradients by ``factor``."""
        for part in gradients.local_gradients(self._parameters()):
            part.mul_(factor)

    @property
    def replicas(self) -> ProcessGroup:
        """The processes that hold the same stages, and the same values of plain tensors."""
        return self.mesh.stage_group

    def after_update(self) -> Mapping[str, float]:
        """Balance the experts by the token counts of all processes; `expert_imbalance` is the maximum over layers."""
        if self._model.moe is None:
            return {}

        def add_up(loads_LE: Tensor) -> Tensor:
            dist.all_reduce(loads_LE, group=self.mesh.summing_group)
            dist.all_reduce(loads_LE, group=self.mesh.tensor_group)
            return loads_LE

        found = [value for stage in self._stages for value in stage.balance_experts(add_up).values()]
        worst = torch.tensor(max(found, default=0.0), dtype=torch.float64, device=distributed.device())
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.mesh.pipeline_group)
        return {"expert_imbalance": worst.item()}

    def _metric_names(self, losses: Mapping[int, Loss]) -> list[str]:
        """Return the metric names of the loss, broadcast from the last stage once; they are the same in all steps."""
        if self._names is None:
            found: list[Any] = [list(losses[0].metrics) if losses else None]
            if self._pipeline is not None:
                group = self.mesh.pipeline_group
                last = self.mesh.layout.pipeline - 1
                dist.broadcast_object_list(found, group=group, group_src=last)
            self._names = found[0]
        assert self._names is not None
        return self._names

    def _weigh(self, loss: Loss) -> Loss:
        """Return the loss on one of the processes that compute it, and a zero loss on the others."""
        if self.mesh.coordinate.tensor == 0 and self.mesh.holds_last_stage:
            return replace(loss, total=loss.total.detach())
        return _no_loss(list(loss.metrics))

    # --- rows and their slices --------------------------------------------------------------------------------------

    def _part_of_rows(self, batch: Any) -> Any:
        """Return this process's slice of the tokens under context parallelism."""
        if self.mesh.layout.context == 1:
            return batch
        places = self._places(batch.inputs.shape[1], self.mesh.coordinate.context).to(batch.inputs.device)
        return type(batch)(*(column[:, places] for column in batch))

    def _places(self, seq_len: int, part: int) -> Tensor:
        return head_and_tail(seq_len, part=part, num_parts=self.mesh.layout.context)

    def _inputs(self, batch: Any, number: int) -> MicroBatch:
        """Return the stages' inputs of micro-batch ``number`` of the step."""
        inputs = {"targets_BT": batch.targets, **self._positions(batch.inputs)}
        if self._within_documents:
            inputs["documents_BT"] = batch.documents
        if self._model.dropout:
            inputs["rows_B"] = self._rows(batch, number)
        return MicroBatch(batch.inputs, inputs)

    def _rows(self, batch: Any, number: int) -> Tensor:
        """Return the indices in the step's batch of the rows of micro-batch ``number``, ``[B]``."""
        rank, world_size = self.mesh.data_rank, self.mesh.layout.data
        rows_B = rows_of(number * len(batch.inputs), len(batch.inputs), rank=rank, world_size=world_size)
        return rows_B.to(batch.inputs.device)

    def _adapter_dropout(self, batch: Any, number: int, step: int) -> dict[str, Tensor]:
        """Return the stages' input for the dropout of adapters, if any; ``batch`` has whole rows."""
        sequences_BT = getattr(batch, "sequences", None)  # in fine-tuning; otherwise each row is a sequence
        if sequences_BT is None:
            sequences_BT = self._rows(batch, number)[:, None].expand_as(batch.inputs)
        found = adapter_dropout(self._lora, sequences_BT, self._seed, step)
        if self.mesh.layout.context == 1:
            return found
        places = self._places(batch.inputs.shape[1], self.mesh.coordinate.context).to(batch.inputs.device)
        return {name: numbers_BT[:, places] for name, numbers_BT in found.items()}

    def _positions(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        """Return positions of tokens in their rows, if a stage cannot derive them from the shape of its input."""
        layout = self.mesh.layout
        if layout.context == 1 and (layout.tensor == 1 or layout.pipeline == 1):
            return {}
        places = self._places(tokens_BT.shape[1] * layout.context, self.mesh.coordinate.context)
        return {"positions_BT": places.to(tokens_BT.device).repeat(len(tokens_BT), 1)}

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        """Return the negative log-likelihood of all targets. Every process gets all rows and returns the same number.

        The rows are divided among the data ranks.
        """
        if len(inputs_BT) == 0:
            return 0.0
        num_ranks = self.mesh.layout.data
        padding = (0, 0, 0, -len(inputs_BT) % num_ranks)
        inputs_BT, targets_BT = F.pad(inputs_BT, padding), F.pad(targets_BT, padding, value=IGNORED)
        mine = slice(self.mesh.data_rank, None, num_ranks)
        total = -self.score(inputs_BT[mine], targets_BT[mine]).logprobs.double().sum()
        dist.all_reduce(total, group=self.mesh.data_group)
        return total.item()

    @property
    def data_ranks(self) -> tuple[int, int]:
        """Rank and number of data ranks."""
        return self.mesh.data_rank, self.mesh.layout.data

    @torch.no_grad()
    def score(self, inputs_BT: Tensor, targets_BT: Tensor) -> Scores:
        """Return scores of targets. All processes of a data rank pass the same rows.

        Collective: all data ranks must pass the same number of rows.
        """
        seq_len, device = inputs_BT.shape[1], distributed.device()
        # Padding on the right does not change earlier tokens.
        padding = (0, -seq_len % self.mesh.layout.seq_len_multiple)
        inputs_BT, targets_BT = F.pad(inputs_BT, padding), F.pad(targets_BT, padding, value=IGNORED)
        places = self._places(inputs_BT.shape[1], self.mesh.coordinate.context)
        was_training = [part.training for part in self.parts]
        for part in self.parts:
            part.eval()
        found_2BT = torch.cat(
            [
                self._score_part(tokens[:, places].to(device), targets[:, places].to(device))
                for tokens, targets in zip(inputs_BT.split(ROWS_AT_ONCE), targets_BT.split(ROWS_AT_ONCE), strict=True)
            ],
            dim=1,
        )
        for part, training in zip(self.parts, was_training, strict=True):
            part.train(training)
        for module in self._sharded():
            module.reshard()  # otherwise weights loaded later would be ignored
        found_2TB = gather(found_2BT.transpose(1, 2), self.mesh.context_group)
        order = torch.cat([self._places(inputs_BT.shape[1], part) for part in range(self.mesh.layout.context)])
        return Scores(*found_2TB[:, order.argsort()[:seq_len]].transpose(1, 2))

    def _score_part(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return log-probabilities and normalizers ``[2, B, T]`` of this process's tokens."""
        batch = MicroBatch(tokens_BT, {"targets_BT": targets_BT, **self._positions(tokens_BT)})
        if self._pipeline is not None:
            return torch.stack(self._pipeline.forward(batch))
        return torch.stack(self._stages[0](tokens_BT, **batch.inputs))

    # --- names and tensors ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return this process's parameters and persistent buffers by their names in the whole model."""
        return {name: tensor for part in self.parts for name, tensor in held_tensors(part)}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the whole model on the CPU of the mesh's first process, one at a time.

        Collective: all processes must iterate; the others get nothing.
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
        """Return what each pipeline process holds; tied embeddings, which two hold, are listed with the first."""
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


def _no_loss(names: Sequence[str]) -> Loss:
    """Zero loss of a process that repeats another's loss or does not hold the output layer."""
    return Loss(torch.zeros(()), count=0.0, num_tokens=0, metrics=dict.fromkeys(names, (0.0, 0.0)))


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
