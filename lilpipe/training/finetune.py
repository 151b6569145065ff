"""Training from a checkpoint in any parallel layout: the common part of post-training.

An objective defines what is scored, and the loss of the scores or of a head's outputs. It sees the rows of its data
rank and no process groups, so that one worker, replicas and a sharded model train on the same data.

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
from lilpipe.config.backend import BackendConfig
from lilpipe.config.lora import ADAPTER_DIRECTORY, LoRAConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.training import ParallelSection
from lilpipe.model.adapter_dropout import adapter_dropout
from lilpipe.model.heads import HeadModel, load_head_model, load_head_weights, read_labels, save_head_tensors, with_head
from lilpipe.model.hub import load_model, load_weights, read_model_config, save_tensors
from lilpipe.model.lora import LoRALinear, adapted_layers, add_adapters, merge, start_adapters, with_frozen_weights
from lilpipe.model.nf4 import nf4_layers
from lilpipe.model.origin import copy_origin
from lilpipe.model.peft_files import save_adapter
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import held_tensors
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import activation_checkpointing, compilation, precision
from lilpipe.training.model_limits import check_division, check_limits
from lilpipe.training.replica import Loss, Replica, TrainerModule

if TYPE_CHECKING:
    from lilpipe.parallel.mesh import Mesh


Head = int | Literal["stored"] | None
"""Output of a model: a new head with this many outputs, the checkpoint's head, or the output layer (None)."""


class TokenBatch(NamedTuple):
    """A micro-batch; int64 [B, T] each unless stated."""

    inputs: Tensor
    targets: Tensor
    """Next tokens; ``IGNORED`` where not scored. Models with a head ignore them."""
    documents: Tensor | None = None
    """Sequence id of each token in its row; attention stays within a sequence. None if a row holds one sequence."""
    positions: Tensor | None = None
    """Position in the sequence, if rows hold several sequences and positions are learned."""
    mask: Tensor | None = None
    """Attention mask [B, 1, T, T] instead of ``documents``; only for models that are not sharded."""
    extra: Any = None
    """Further inputs of the loss: advantages, stored log-probabilities."""
    sequences: Tensor | None = None
    """Index in the step's batch, over all data ranks, of each token's sequence; for the dropout of adapters."""


class Objective(Protocol):
    """Batches and loss of one data rank."""

    def batches(self, step: int, /) -> Sequence[TokenBatch]:
        """Return the micro-batches of a step; equally many on every data rank."""
        ...

    def loss(self, scores: Any, batch: TokenBatch, /) -> Loss:
        """Return the loss of a micro-batch, summed. The names of metrics must not depend on the batch.

        ``scores`` are ``Scores``, or for a model with a head its outputs [B, T, O]; both may be padded on the right and
        with rows.
        """
        ...


class Workers:
    """The processes of a stage, and the data rank of this one."""

    def __init__(self, section: ParallelSection) -> None:
        self.mesh: Mesh | None = None
        self.data_rank, self.num_data_ranks = distributed.rank(), distributed.world_size()
        if section.layout.replicate < section.num_workers:
            from lilpipe.parallel.mesh import Mesh  # torch modules that other layouts do not need

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
    """Load the checkpoint ``source`` as a trainer module of this worker.

    ``prepare`` modifies the model, or each pipeline stage of this worker, before training; sharded stages are then on
    the meta device. Raises ``ConfigError``, naming the setting of ``stage``, for a layout or adapters that do not fit
    the model.
    """
    precision.check(section, distributed.device())
    shape, _ = read_model_config(source)
    if isinstance(shape, BackendConfig):
        check_limits(section, class_name=shape.class_name, stage=stage)
    if workers.mesh is not None:
        return _build_cut(section, source, objective, workers.mesh, stage=stage, head=head, prepare=prepare)
    model = load(section, source, stage=stage, head=head)
    if prepare is not None:
        prepare(model)
    activation_checkpointing.apply(model, section.activation_checkpointing)
    if section.precision == "fp8":
        precision.convert_fp8(model)
    if section.compile:
        compilation.compile_blocks(model)
    # A step's micro-batches are created once, when the first is requested.
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
                **adapter_dropout(section.lora, batch.sequences, section.seed or 0, step),
            )
        return objective.loss(scores, batch)

    return Replica(model, loss, accumulation_steps=lambda step: len(batches(step)))


def load(section: ParallelSection, source: Path, *, stage: str, head: Head = None) -> Transformer:
    """Load the whole model as training starts from it: on this worker's device, with adapters if configured."""
    seed, lora = section.seed or 0, section.lora
    make = nf4_layers(distributed.device(), stage=stage) if lora is not None and lora.load_in_4bit else LoRALinear
    if head == "stored":
        model: Transformer = load_head_model(source)[0]
    else:
        model, _ = load_model(source)
        model = model if head is None else with_head(model, head, seed=seed)
    if lora is not None:  # before the move, so that a GPU never holds all weights that get 4 bits
        add_adapters(model, lora, seed=seed, stage=stage, make=make)
    model = model.to(distributed.device())
    if lora is not None:
        start_adapters(model, _starting_at(lora, head), stage=stage)
    return model


def _starting_at(lora: LoRAConfig, head: Head) -> LoRAConfig:
    """Return the settings that a model's adapters start from: PPO's value model does not share the policy's adapter."""
    return lora.model_copy(update={"path": None}) if head == "stored" else lora


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
    check_division(section, config, stage=stage)
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
        stage=stage,
    )
    (load_head_weights if head == "stored" else load_weights)(trainer_module.tensors(), source)
    if section.lora is not None:
        for part in trainer_module.parts:
            assert isinstance(part, Transformer)
            start_adapters(part, _starting_at(section.lora, head), stage=stage)
    return trainer_module


def _even(batches: Sequence[TokenBatch], section: ParallelSection) -> list[TokenBatch]:
    """Pad rows to a length divisible by tensor parallelism, and a pipeline's micro-batches to one shape."""
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
                sequences=None if batch.sequences is None else F.pad(batch.sequences, padding, value=-1),
            )
        )
    return result


def whole_model(trainer_module: TrainerModule, into: Transformer | None = None) -> Transformer:
    """Return the whole model on every worker, for sampling or evaluation.

    If the model is sharded, this is collective, every worker needs memory for the whole, and ``into`` is filled if
    given. A model without adapters gets them merged into its weights.
    """
    if isinstance(trainer_module, Replica):
        assert isinstance(trainer_module.model, Transformer)
        return trainer_module.model
    part = trainer_module.parts[0]
    assert isinstance(part, Transformer)
    model = into or _whole_like(part).to(distributed.device())
    # Sharded tensors are not inference tensors, but evaluation runs in inference mode.
    with torch.inference_mode(mode=False), torch.no_grad():
        tensors, lora = trainer_module.full_tensors(), _adapters_of(part)
        found = dict(tensors if lora is None or adapted_layers(model) else merge(tensors, lora, {}))
        for name, tensor in held_tensors(model):
            if distributed.is_main():
                tensor.copy_(found[name])
            dist.broadcast(tensor, 0)
    return model.eval()


def whole_head_model(trainer_module: TrainerModule, into: HeadModel | None = None) -> HeadModel:
    """``whole_model`` for a model with a head."""
    model = whole_model(trainer_module, into)
    assert isinstance(model, HeadModel)
    return model


def _whole_like(part: Transformer) -> Transformer:
    if isinstance(part, HeadModel):
        return HeadModel(part.config, part.vocab_size, part.num_outputs)
    return Transformer(part.config, part.vocab_size)


def _adapters_of(part: nn.Module) -> LoRAConfig | None:
    """Return the settings of a model's adapters; None without."""
    layers = adapted_layers(part)
    return layers[0].config if layers else None


def export(
    trainer_module: TrainerModule,
    tokenizer: Tokenizer,
    workspace: Workspace,
    *,
    source: Path | None,
    config: ModelConfig | None = None,
    labels: Sequence[str] | None = None,
    folder: str = "",
) -> None:
    """Write the model in Hugging Face's layout, tensor by tensor if it is sharded.

    Adapters are merged into the weights and also written to the subdirectory ``adapter``. ``source``: the checkpoint
    that training started from, whose record of an imported model is copied. ``config`` replaces the model's; ``labels``
    names a head's outputs; ``folder`` is the model's directory in the output.
    """
    part = trainer_module.parts[0]
    assert isinstance(part, Transformer)
    tensors, directory = trainer_module.full_tensors(), workspace.output / folder
    if not distributed.is_main():
        for _ in tensors:  # gathering is collective
            pass
        return
    adapters: dict[str, Tensor] = {}
    lora = _adapters_of(part)
    tensors = tensors if lora is None else merge(with_frozen_weights(part, tensors), lora, adapters)
    save = save_tensors if labels is None else partial(save_head_tensors, labels=labels)
    save(config or part.config, part.vocab_size, tensors, tokenizer, directory)
    if source is not None:
        copy_origin(source, directory)
    if lora is not None:
        save_adapter(adapters, lora, directory / ADAPTER_DIRECTORY, has_head=labels is not None)
