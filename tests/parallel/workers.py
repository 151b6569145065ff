"""Run under torchrun: train the toy in many layouts, and write what came of it, one JSON per rank."""

import json
import sys
import time
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.parallel.apply import parallelize
from lilpipe.parallel.mesh import Mesh
from tests.parallel import toy
from tests.parallel.layouts import CASES, EIGHT


def train(case):
    """What ``toy.plain_losses`` gives, of a model cut over a mesh."""
    config, mesh = case.config(), Mesh(case.layout)

    def batches(step):
        rows = [column[mesh.data_rank :: mesh.layout.data] for column in toy.batch(step)]
        return [toy.Batch(*parts) for parts in zip(*(r.chunk(config.accumulation_steps) for r in rows), strict=True)]

    model = parallelize(config, toy.VOCAB, batches=batches, loss=toy.loss, mesh=mesh, dtype=case.dtype)
    updates = toy.optimizer(config, model.parts, model.replicas)
    losses, norms = [], []
    for step in range(toy.NUM_STEPS):
        model.zero_grad()
        parts = model.forward_backward(step)
        total, count = mesh.sum([sum(part.total.item() for part in parts), sum(float(part.count) for part in parts)])
        norms.append(model.reduce(count=count, max_norm=1.0))
        updates.step(1.0)
        model.after_update()
        losses.append(total / count)
    result = {"losses": losses, "norms": norms, "nats": model.nats(*toy.held_out())}
    return result | {"weights": toy.digest(model.full_tensors())}


def main(root, names):
    torch.set_num_threads(1)
    distributed.init()
    report, seconds = {}, {}
    for case in [case for case in CASES + EIGHT if case.name in names]:
        begun = time.perf_counter()
        report[case.name] = train(case)
        seconds[case.name] = time.perf_counter() - begun
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    if distributed.is_main():
        print("\n".join(f"{spent:6.1f} s {name}" for name, spent in seconds.items()))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
