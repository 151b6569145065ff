"""Run under torchrun: train the toy in many layouts, and write what came of it, one JSON per rank."""

import json
import sys
import time
import traceback
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.parallel.apply import parallelize
from lilpipe.parallel.mesh import Mesh
from tests.parallel import toy
from tests.parallel.layouts import CASES


def train(model):
    """Loss and gradient norm of each step."""
    adamw = toy.optimizer([parameter for part in model.parts for parameter in part.parameters()])
    losses, norms = [], []
    for step in range(toy.NUM_STEPS):
        model.zero_grad()
        parts = model.forward_backward(step)
        total, count = model.mesh.sum(
            [sum(part.total.item() for part in parts), sum(float(part.count) for part in parts)]
        )
        norms.append(model.reduce(count=count, max_norm=1.0))
        adamw.step()
        losses.append(total / count)
    return losses, norms


def run(case, mesh):
    config = case.config()
    data, rank = mesh.layout.data, mesh.data_rank

    def batches(step):
        rows = [column.chunk(data)[rank] for column in toy.batch(step)]
        return [toy.Batch(*parts) for parts in zip(*(rows.chunk(config.accumulation_steps) for rows in rows), strict=True)]

    model = parallelize(config, toy.VOCAB, batches=batches, loss=toy.loss, mesh=mesh, dtype=case.dtype)
    losses, norms = train(model)
    return {"losses": losses, "norms": norms}


def main(root, names):
    torch.set_num_threads(1)
    distributed.init()
    report = {}
    for case in [case for case in CASES if case.name in names]:
        begun = time.perf_counter()
        mesh = Mesh(case.layout)
        if True:
            try:
                report[case.name] = run(case, mesh)
            except Exception as error:
                if len(names) == 1:
                    raise
                traceback.print_exc()
                print("FAILED", case.name, flush=True)
                report[case.name] = {"error": repr(error)}
            if distributed.rank() in (0,):
                print(f"{case.name} {time.perf_counter() - begun:.1f}s", flush=True)
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
