"""Run under torchrun on two workers: SFT with adapters and with noise on embeddings, in several layouts.

``layouts`` also begins a run that kills itself between steps, which ``resumed`` takes up.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.config.sft import SFTConfig
from lilpipe.stage import Workspace
from lilpipe.training import sft
from lilpipe.training.loop import train
from tests.alignment.conftest import as_artifact

OPTIONS = {"adapters": {"lora": {"r": 3, "lora_alpha": 7.0}}, "noise": {"neftune_noise_alpha": 5.0}}
OPTIONS["both"] = {**OPTIONS["adapters"], **OPTIONS["noise"]}
OPTIONS["dropping"] = {
    "lora": {"r": 3, "lora_alpha": 4.0, "use_rslora": True, "use_dora": True, "lora_dropout": 0.2},
    "activation_checkpointing": "full",
    **OPTIONS["noise"],
}
LAYOUTS = {
    "replicas": {},
    "sharded": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "zero bubble": {"pipeline": 2, "stages_per_worker": 2, "schedule": "zero_bubble"},
}
KILLED_AT = 2
"""Step, from 0, before which the run is killed."""


def run(options, root, name, parallel, *, num_workers):
    """SFT in one layout."""
    config = SFTConfig.model_validate(
        {
            "seed": 0,
            "log_every": 1,
            "checkpoint_every": 1,
            "accumulation_steps": 2,
            "batch_size": 16,
            "num_epochs": 2,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.1},
            "parallel": parallel,
            "num_workers": num_workers,
            **OPTIONS[options],
        }
    )
    inputs = {
        "model": as_artifact(root / "model", kind="Checkpoint", stage="sft"),
        "conversations": as_artifact(root / "conversations", kind="Conversations"),
    }
    return sft.run(config, inputs, Workspace(root / f"{options} {name}", rank=distributed.rank()))


def run_sharded(root):
    """The run that is killed, or what is left of it."""
    run("dropping", root, "in two parts", LAYOUTS["sharded"], num_workers=2)


def dying(*args, **options):
    """``train`` in a process that dies between steps."""

    def die_at(step):
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(*args, before_step=die_at, **options)


def main(root, part):
    torch.set_num_threads(1)
    distributed.init()
    if part == "layouts":
        for options in OPTIONS:
            for name, parallel in LAYOUTS.items():
                run(options, root, name, parallel, num_workers=2)
        (root / "layouts").touch()
        sft.train = dying
    run_sharded(root)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
