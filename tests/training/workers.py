"""Run under torchrun: train the toy model in several ways and write what came of it, one JSON per rank."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.errors import ConfigError
from tests.training import toy

CASES = [(kind, dtype) for kind in ("adamw", "muon") for dtype in (torch.float64, torch.float32)]


class Killed(BaseException):
    pass


def train(root, kind, dtype):
    """Losses of ten steps."""
    _, result = toy.run(root, num_steps=10, dtype=dtype, config=toy.optimizer(kind=kind), rank=distributed.rank())
    return result.losses


def resumed_digest(root, *, dies_at):
    """Digest of the weights of a run that each rank leaves at a step, and takes up again."""

    def loss(model, step, micro):
        if step == dies_at:
            raise Killed
        return toy.loss(model, step, micro)

    try:
        model, _ = toy.run(root, num_steps=10, loss=loss, rank=distributed.rank(), config=toy.optimizer(kind="muon"))
    except Killed:
        distributed.barrier()
        model, _ = toy.run(root, num_steps=10, rank=distributed.rank(), config=toy.optimizer(kind="muon"))
    return hashlib.sha256(toy.weights(model).numpy().tobytes()).hexdigest()


def error_of_one_bad_rank(root):
    """The message that this rank gets if rank 1 alone has a loss that is not finite."""

    def loss(model, step, micro):
        good = toy.loss(model, step, micro)
        bad = step == 2 and distributed.rank() == 1
        return replace(good, total=good.total * float("nan")) if bad else good

    try:
        toy.run(root, loss=loss, rank=distributed.rank())
    except ConfigError as error:
        return str(error)
    return "none"


def main(root):
    torch.set_num_threads(1)
    distributed.init()
    rank = distributed.rank()
    report = {
        "rank": rank,
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "sum": distributed.sum_floats([1.0, 10.0 * rank]),
        "losses": {f"{kind}-{dtype}": train(root / f"{kind}-{dtype}", kind, dtype) for kind, dtype in CASES},
        "whole": resumed_digest(root / "whole", dies_at=-1),
        "resumed": resumed_digest(root / "resumed", dies_at=6),
        "error": error_of_one_bad_rank(root / "bad"),
    }
    distributed.shutdown()
    report["threads"] = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (root / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
