"""Run under torchrun on two workers: SFT, DPO and GRPO, each cut over them in several layouts."""

import sys
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.alignment import dpo, grpo
from lilpipe.config import DPOConfig, GRPOConfig, SFTConfig
from lilpipe.stage import Workspace
from lilpipe.training import sft
from tests.alignment.conftest import as_artifact

COMMON = {
    "seed": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "accumulation_steps": 2,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.0},
}
STAGES = {
    "sft": (sft, SFTConfig, {"batch_size": 8, "num_epochs": 1}),
    "dpo": (dpo, DPOConfig, {"batch_size": 4}),
    "grpo": (
        grpo,
        GRPOConfig,
        {
            # Rounding may make another word of a draw, which then makes other weights: one rollout is compared.
            "num_steps": 1,
            "epochs_per_rollout": 2,
            "prompts_per_step": 4,
            "group_size": 4,
            "sampling": {"max_new_tokens": 8},
            "rewards": [{"kind": "file", "path": __file__, "function": "letters"}],
            "kl_coefficient": 0.05,
        },
    ),
}
LAYOUTS = {"replicas": {}, "sharded": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


def letters(prompt, response):
    """A reward that fresh models' answers differ in."""
    return len(response.text) % 4


def run(stage, root, name, parallel, *, num_workers):
    """One stage in one layout; gives its metrics."""
    module, section, settings = STAGES[stage]
    config = section.model_validate({**COMMON, **settings, "parallel": parallel, "num_workers": num_workers})
    inputs = {
        "model": as_artifact(root / "model", kind="Checkpoint", stage="sft"),
        "prompts": as_artifact(root / "prompts", kind="Prompts"),
        "preferences": as_artifact(root / "preferences", kind="Preferences"),
    }
    taken = {**module.STAGE.inputs, **module.STAGE.optional_inputs}
    workspace = Workspace(root / f"{stage} {name}", rank=distributed.rank())
    return module.run(config, {role: item for role, item in inputs.items() if role in taken}, workspace)


def main(root):
    torch.set_num_threads(1)
    distributed.init()
    for stage in STAGES:
        for name, parallel in LAYOUTS.items():
            run(stage, root, name, parallel, num_workers=2)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
