"""How a training step's time grows with layers, width, sequence and workers, beside what arithmetic says.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.scaling_time [PICTURE.png]

One thread a worker. Along each dimension the others stay; the slope is that of a line through the medians in
log-log, theory's that of the operations of a step (for workers: of the operations of each).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from lilpipe import distributed
from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.model.flops import training_flops_per_token
from lilpipe.model.transformer import Transformer
from lilpipe.training.optimizer import make_optimizers, take_step
from lilpipe.training.replica import Loss, Replica

VOCAB_SIZE = 1024
BASE = {"num_layers": 4, "hidden_size": 128, "seq_len": 128, "workers": 1}
VALUES = {
    "num_layers": (2, 4, 8, 16),
    "hidden_size": (64, 128, 256, 512),
    "seq_len": (64, 128, 256, 512, 1024),
    "workers": (1, 2),
}
BATCH_SIZE, NUM_STEPS = 8, 7


def shape(point: dict[str, int]) -> ModelConfig:
    width = point["hidden_size"]
    return ModelConfig(
        hidden_size=width,
        num_layers=point["num_layers"],
        num_heads=width // 32,
        num_kv_heads=width // 32,
        intermediate_size=width * 8 // 3 // 16 * 16,
        max_seq_len=point["seq_len"],
    )


def flops(point: dict[str, int]) -> float:
    """Operations of a step on each worker."""
    tokens = BATCH_SIZE * point["seq_len"] / point["workers"]
    return tokens * training_flops_per_token(shape(point), VOCAB_SIZE)


def seconds(point: dict[str, int]) -> list[float]:
    """Wall seconds of each step, in this process as one of the workers."""
    torch.set_num_threads(1)
    model = Transformer(shape(point), VOCAB_SIZE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(distributed.rank())
    rows = torch.randint(VOCAB_SIZE, (BATCH_SIZE // point["workers"], point["seq_len"] + 1), generator=generator)

    def loss(module: torch.nn.Module, step: int, micro: int) -> Loss:
        scores = module(rows[:, :-1], targets_BT=rows[:, 1:])
        return Loss(-scores.logprobs.sum(), count=rows[:, 1:].numel(), num_tokens=rows[:, 1:].numel())

    replica = Replica(model, loss, accumulation_steps=lambda _: 1)
    optimizers = make_optimizers(replica.parts, OptimizerConfig())
    found = []
    for step in range(NUM_STEPS + 2):
        begun = time.perf_counter()
        replica.zero_grad()
        (part,) = replica.forward_backward(step)
        replica.reduce(count=part.count, max_norm=1.0)
        take_step(optimizers)
        found.append(time.perf_counter() - begun)
    return found[2:]


def under_torchrun(point: dict[str, int]) -> list[float]:
    """The same by several workers."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point['workers']}"]
    command = [*torchrun, "-m", "tests.benchmarks.scaling_time", "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(picture_file: Path | None) -> None:
    picture = Figure(figsize=(11, 3), layout="constrained")
    for position, (name, sizes) in enumerate(VALUES.items(), start=1):
        points = [{**BASE, name: size} for size in sizes]
        rounds = [under_torchrun(point) if point["workers"] > 1 else seconds(point) for point in points]
        medians = [statistics.median(each) for each in rounds]
        measured, theory = slope(list(sizes), medians), slope(list(sizes), [flops(point) for point in points])
        times = ", ".join(f"{size}: {median * 1e3:.1f} ms" for size, median in zip(sizes, medians, strict=True))
        print(f"{name:12} slope {measured:5.2f}, of the operations {theory:5.2f}   {times}", flush=True)
        axes = picture.add_subplot(1, len(VALUES), position)
        axes.loglog(sizes, medians, "o-", label=f"measured, slope {measured:.2f}")
        scale = medians[-1] / flops(points[-1])
        axes.loglog(sizes, [scale * flops(point) for point in points], "--", label=f"operations, {theory:.2f}")
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(fontsize=7)
        if position == 1:
            axes.set_ylabel("seconds a step")
    if picture_file is not None:
        picture.savefig(picture_file, dpi=130)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        distributed.init()
        found = seconds({**BASE, "workers": distributed.world_size()})
        if distributed.is_main():
            print(*found)
        distributed.shutdown()
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
