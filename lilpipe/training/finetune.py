"""Training a checkpoint further, whatever the layout of workers: what post-training has in common.

An objective says what is scored and what the loss of the scores is, or of what a head gives in their place. It sees
the rows of its data rank and no worker group, so that one worker, replicas, and a model that is cut over a mesh train
on the same thing.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.config.parallel_checks import check_micro_batches, check_model
from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError
from lilpipe.model.heads import HeadModel, load_head_model, load_head_weights, read_labels, save_head_tensors, with_head
from lilpipe.model.hub import load_model, load_weights, read_model_config, save_tensors
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import NamedTensors
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import activation_checkpointing, compilation, precision
from lilpipe.training.replica import Loss, Replica, TrainerModule

if TYPE_CHECKING:
    from lilpipe.parallel.mesh import Mesh


Head = int | Literal["stored"] | None
"""What a model ends in: a fresh head of so many outputs, the head that the checkpoint has, or the output layer."""


class TokenBatch(NamedTuple):
    """A micro-batch: what goes in, and which tokens are scored; int64 [B, T] each."""

    inputs: Tensor
    targets: Tensor
    """The token that follows; ``IGNORED`` where it is not scored. A head takes no notice of them."""
    documents: Tensor | None = None
    """Which sequence of its row a token belongs to; attention stays inside. None where a row holds one sequence."""
    positions: Tensor | None = None
    """Place in its sequence, where rows hold several and positions are learned."""
    mask: Tensor | None = None
    """What may attend to what, [B, 1, T, T], in place of ``documents``; whole models alone take it."""
    extra: Any = None
    """What the loss needs beside the scores: advantages, stored log-probabilities."""


class Objective(Protocol):
    """What to train on, for one data rank."""

    def batches(self, step: int, /) -> Sequence[TokenBatch]:
        """The micro-batches of a step: as many on every data rank."""
        ...

    def loss(self, scores: Any, batch: TokenBatch, /) -> Loss:
        """The loss of a micro-batch, summed; the names of metrics do not depend on the batch.

        It takes ``Scores``, or of a model with a head its outputs [B, T, O]; both may be padded on the right and below.
        """
        ...


class Workers:
    """The processes of a stage, and this one's place among them."""

    def __init__(self, section: ParallelSection) -> None:
        self.mesh: Mesh | None = None
        self.data_rank, self.num_data_ranks = distributed.rank(), distributed.world_size()
        if section.layout.replicate < section.num_workers:
            from lilpipe.parallel.mesh import Mesh  # experimental parts of torch, which others do without

            self.mesh = Mesh(section.layout)
            self.data_rank, self.num_data_ranks = self.mesh.data_rank, section.layout.data


def build(
    section: ParallelSection,
    source: Path,
    objective: Objective,
    workers: Workers,
    *,
    stage: str,
    head: Head = None,
    prepare: Callable[[Transformer], None] | None = None,
) -> TrainerModule:
    """The checkpoint of ``source`` as this worker holds it in training.

    ``prepare`` changes the model, or each pipeline stage of it that this worker holds, before it is trained, as LoRA
    does; where it is cut the stage has no memory yet, and new parameters get their ``initial_value``.
    Raises ``ConfigError``, naming the setting of ``stage``, for a layout in which the model cannot be cut.
    """
    precision.check(section, distributed.device())
    if workers.mesh is not None:
        return _build_cut(section, source, objective, workers.mesh, stage=stage, head=head, prepare=prepare)
    model = _load(source, head, seed=section.seed or 0).to(distributed.device())
    if prepare is not None:
        prepare(model)
    activation_checkpointing.apply(model, section.activation_checkpointing)
    if section.precision == "fp8":
        precision.convert_fp8(model)
    if section.compile:
        compilation.compile_blocks(model)
    # A step's micro-batches are made once, when the first is asked for.
    current: dict[int, Sequence[TokenBatch]] = {}

    def batches(step: int) -> Sequence[TokenBatch]:
        if step not in current:
            current.clear()
            current[step] = objective.batches(step)
        return current[step]

    def loss(model: nn.Module, step: int, micro: int) -> Loss:
        batch = batches(step)[micro]
        with precision.autocast(section.precision, distributed.device()):
            scores = model(
                batch.inputs,
                targets_BT=batch.targets,
                documents_BT=batch.documents,
                positions_BT=batch.positions,
                mask=batch.mask,
            )
        return objective.loss(scores, batch)

    return Replica(model, loss, accumulation_steps=lambda step: len(batches(step)))


def _load(source: Path, head: Head, *, seed: int) -> Transformer:
    if head == "stored":
        return load_head_model(source)[0]
    model, _ = load_model(source)
    return model if head is None else with_head(model, head, seed=seed)


def _build_cut(
    section: ParallelSection,
    source: Path,
    objective: Objective,
    mesh: Mesh,
    *,
    stage: str,
    head: Head,
    prepare: Callable[[Transformer], None] | None,
) -> TrainerModule:
    from lilpipe.training.build_sharded import parallelize

    config, vocab_size = read_model_config(source)
    try:
        check_model(section.parallel, section.layout, config, activation_checkpointing=section.activation_checkpointing)
        check_micro_batches(section.parallel, section.accumulation_steps)
    except ValueError as error:
        raise ConfigError(f"{stage}: {error}") from error
    if section.layout.context > 1:
        raise ConfigError(
            f"{stage}.parallel.context: got {section.layout.context}, expected 1: an answer is kept whole"
        )
    trainer_module = parallelize(
        section,
        config,
        vocab_size,
        batches=lambda step: _even(objective.batches(step), section),
        loss=objective.loss,
        mesh=mesh,
        intra_document_masking=True,
        compiled=bool(section.compile),
        head=len(read_labels(source)) if head == "stored" else head,
        prepare=prepare,
    )
    (load_head_weights if head == "stored" else load_weights)(trainer_module.tensors(), source)
    return trainer_module


def _even(batches: Sequence[TokenBatch], section: ParallelSection) -> list[TokenBatch]:
    """Rows as long as tensor parallelism can divide; micro-batches of a pipeline alike in shape."""
    multiple, alike = section.layout.seq_len_multiple, section.layout.pipeline > 1
    num_rows = max(len(batch.inputs) for batch in batches) if alike else 0
    num_tokens = max(batch.inputs.shape[1] for batch in batches) if alike else 0
    result = []
    for batch in batches:
        wide = max(num_tokens, batch.inputs.shape[1])
        padding = (0, wide + -wide % multiple - batch.inputs.shape[1], 0, max(0, num_rows - len(batch.inputs)))
        documents = torch.zeros_like(batch.inputs) if batch.documents is None else batch.documents
        result.append(
            batch._replace(
                inputs=F.pad(batch.inputs, padding),
                targets=F.pad(batch.targets, padding, value=IGNORED),
                documents=F.pad(documents, padding, value=-1),
            )
        )
    return result


def whole_model(trainer_module: TrainerModule, into: Transformer | None = None) -> Transformer:
    """The model on every worker, to sample from or to measure; ``into`` is filled where the trainer module's is cut.

    Where it is cut, all workers must call this together, and each has memory for the whole.
    """
    if isinstance(trainer_module, Replica):
        assert isinstance(trainer_module.model, Transformer)
        return trainer_module.model
    part = trainer_module.parts[0]
    assert isinstance(part, Transformer)
    model = into or _whole_like(part).to(distributed.device())
    # Sharded tensors are no tensors of inference, and an evaluation is in that mode.
    with torch.inference_mode(mode=False), torch.no_grad():
        found = dict(trainer_module.full_tensors())
        for name, tensor in model.state_dict().items():
            if distributed.is_main():
                tensor.copy_(found[name])
            dist.broadcast(tensor, 0)
    return model.eval()


def whole_head_model(trainer_module: TrainerModule, into: HeadModel | None = None) -> HeadModel:
    """``whole_model`` of a model with a head."""
    model = whole_model(trainer_module, into)
    assert isinstance(model, HeadModel)
    return model


def _whole_like(part: Transformer) -> Transformer:
    if isinstance(part, HeadModel):
        return HeadModel(part.config, part.vocab_size, part.num_outputs)
    return Transformer(part.config, part.vocab_size)


def export(
    trainer_module: TrainerModule,
    tokenizer: Tokenizer,
    workspace: Workspace,
    *,
    labels: Sequence[str] | None = None,
    folder: str = "",
    change: Callable[[NamedTensors], NamedTensors] | None = None,
) -> None:
    """Write the model in Hugging Face layout, tensor by tensor where no worker holds the whole.

    ``labels`` are the names of a head's outputs, ``folder`` is where in the output the model goes. ``change`` makes
    the tensors that are written of those that were trained, on the first worker.
    """
    part = trainer_module.parts[0]
    assert isinstance(part, Transformer)
    tensors = trainer_module.full_tensors()
    if distributed.is_main():
        tensors = change(tensors) if change else tensors
        save = save_tensors if labels is None else partial(save_head_tensors, labels=labels)
        save(part.config, part.vocab_size, tensors, tokenizer, workspace.output / folder)
    else:
        for _ in tensors:  # the others' part in gathering
            pass
