"""Run under torchrun: train the toy in many layouts, and write what came of it, one JSON per rank."""

import json
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from lilpipe import distributed
from lilpipe.config.parallel import ParallelDims
from lilpipe.model import scores
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.transformer import Transformer
from lilpipe.parallel import gradients
from lilpipe.parallel.mesh import Mesh
from lilpipe.training import build_sharded as apply
from tests.parallel import toy
from tests.parallel.layouts import BFLOAT16, CASES, EIGHT, MORE

mesh_of = cache(Mesh)


def train(case):
    """What ``toy.plain_losses`` gives, of a model cut over a mesh."""
    config, mesh = case.config(), mesh_of(case.layout)

    def batches(step):
        rows = [column[mesh.data_rank :: mesh.layout.data] for column in toy.batch(step)]
        return [toy.Batch(*parts) for parts in zip(*(r.chunk(config.accumulation_steps) for r in rows), strict=True)]

    model = apply.parallelize(
        config,
        config.model,
        toy.VOCAB,
        batches=batches,
        loss=toy.loss,
        mesh=mesh,
        intra_document_masking=config.intra_document_masking,
        compiled=bool(config.compile),
        dtype=case.dtype,
    )
    updates = toy.optimizer(config, model.parts, model.replicas)
    losses, norms = [], []
    for step in range(toy.NUM_STEPS):
        model.zero_grad()
        for part in model.parts:
            assert isinstance(part, Transformer)
            part.set_dropout_seed(config.seed, step)
        parts = model.forward_backward(step)
        total, count = mesh.sum([sum(part.total.item() for part in parts), sum(float(part.count) for part in parts)])
        norms.append(model.reduce(count=count, max_norm=1.0))
        updates.step(1.0)
        model.after_update()
        losses.append(total / count)
    result = {"losses": losses, "norms": norms, "nats": model.nats(*toy.held_out())}
    return result | {"weights": toy.digest(model.full_tensors())}


def train_patched(name, module, attribute, value):
    """Losses of a case with something of the library replaced."""
    case = next(case for case in CASES if case.name == name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, attribute, value)
        return train(case)["losses"]


def memory():
    """The largest share of the model's weights that was ever made on this worker, and the share that it holds.

    Whole weights are made one at a time, to be cut.
    """
    made = []

    def value(*args, **options):
        whole = initial_value(*args, **options)
        made.append(whole.numel())
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "initial_value", value)
        config = toy.config(
            ParallelDims(pipeline=2, replicate=1, shard=2, context=1, tensor=1), model={"num_layers": 8}
        )
        model = apply.parallelize(config, config.model, toy.VOCAB, batches=lambda step: [], loss=toy.loss)
    held = sum(gradients.local(tensor).numel() for tensor in model.tensors().values())
    whole = sum(parameter.numel() for parameter in Transformer(config.model, toy.VOCAB).parameters())
    return {"held": held / whole, "largest": max(made) / whole}


def main(root, names):
    torch.set_num_threads(1)
    distributed.init()
    report, seconds = {}, {}
    if "cp2" in names:
        report["memory"] = memory()
        report["gradients not summed"] = train_patched("cp2", gradients, "sum_over", lambda tensors, group: None)
        report["few logits at once"] = train_patched("tp2", scores, "LOGITS_AT_ONCE", 5 * toy.VOCAB)
    for case in [case for case in CASES + MORE + BFLOAT16 + EIGHT if case.name in names]:
        begun = time.process_time()
        report[case.name] = train(case)
        seconds[case.name] = time.process_time() - begun
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    if distributed.is_main():
        print("\n".join(f"{spent:6.1f} s of CPU: {name}" for name, spent in seconds.items()))
    distributed.barrier()
    mesh_of.cache_clear()
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
