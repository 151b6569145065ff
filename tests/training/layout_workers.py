"""Run under torchrun on four workers: the whole pretraining stage in several layouts, one of them changed half way."""

import json
import sys
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.config.training import PretrainConfig
from lilpipe.stage import Workspace
from lilpipe.training import pretrain
from lilpipe.training.next_token import NextToken
from tests.alignment.conftest import as_artifact

BASE = {
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_len": 32,
    },
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
    "num_steps": 12,
    "batch_size": 8,
    "accumulation_steps": 2,
    "seed": 0,
    "eval_every": 5,
    "validation_rows": 6,
    "checkpoint_every": 4,
    "intra_document_masking": True,
    "compile": False,
    "log_every": 1,
}
PHASED = {
    **BASE,
    "model": {**BASE["model"], "dropout": 0.1, "moe": {"num_experts": 4, "moe_intermediate_size": 16}},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
    "num_steps": 20,
    "seq_len": 16,
    "phases": [{"from_step": 10, "seq_len": 32, "rope_theta": 50_000.0}],
    "checkpoint_every": 5,
    "eval_every": 10,
}
"""Experts, dropout, and a second phase with longer sequences and another rotary base."""
ADAPTED = {
    **BASE,
    "num_steps": 4,
    "lora": {"r": 3, "use_dora": True, "lora_dropout": 0.2},
    "activation_checkpointing": "selective",
}
"""Adapters, from the checkpoint that replicas trained."""
LAYOUTS = {
    "replicas": {},
    "sharded": {"shard": 4},
    "pipeline and tensor": {"pipeline": 2, "tensor": 2},
    "shard and context": {"shard": 2, "context": 2},
}


def config(parallel, num_workers=4, base=BASE):
    return PretrainConfig.model_validate({**base, "num_workers": num_workers, "parallel": parallel})


class Killed(BaseException):
    pass


def interrupted(run, tokens, workspace, *, at_step):
    """Train up to a step that does not come."""
    batches = NextToken.batches

    def dying(self, step):
        if step == at_step:
            raise Killed
        return batches(self, step)

    NextToken.batches = dying
    try:
        pretrain.run(run, {"tokens": tokens}, workspace)
    except Killed:
        pass
    finally:
        NextToken.batches = batches
    distributed.barrier()


def adapted_inputs(root, tokens):
    """What continued pretraining reads."""
    return {"tokens": tokens, "model": as_artifact(root / "replicas" / "output", kind="Checkpoint")}


def main(root, folder):
    torch.set_num_threads(1)
    distributed.init()
    tokens = as_artifact(folder, kind="TokenShards")
    for name, parallel in LAYOUTS.items():
        workspace = Workspace(root / name, rank=distributed.rank())
        metrics = pretrain.run(config(parallel), {"tokens": tokens}, workspace)
        if distributed.is_main():
            (root / name / "metrics.json").write_text(json.dumps(metrics))
    for name in ("pipeline and tensor", "shard and context"):
        workspace = Workspace(root / f"adapted {name}", rank=distributed.rank())
        pretrain.run(config(LAYOUTS[name], base=ADAPTED), adapted_inputs(root, tokens), workspace)
    workspace = Workspace(root / "changed", rank=distributed.rank())
    interrupted(config({"pipeline": 2, "shard": 2}, base=PHASED), tokens, workspace, at_step=13)
    metrics = pretrain.run(config({"context": 2, "tensor": 2}, base=PHASED), {"tokens": tokens}, workspace)
    (root / f"changed-{distributed.rank()}.json").write_text(json.dumps(metrics))
    workspace = Workspace(root / "same", rank=distributed.rank())
    interrupted(config(LAYOUTS["shard and context"]), tokens, workspace, at_step=6)
    pretrain.run(config(LAYOUTS["shard and context"]), {"tokens": tokens}, workspace)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
