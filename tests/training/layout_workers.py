"""Run under torchrun on four workers: the whole pretraining stage in several layouts, one of them changed half way."""

import json
import sys
from pathlib import Path

import torch

from lilpipe import distributed
from lilpipe.config import PretrainConfig
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
    "eval_rows": 6,
    "checkpoint_every": 4,
    "within_documents": True,
    "compile": False,
    "log_every": 1,
}
LAYOUTS = {
    "replicas": {},
    "sharded": {"shard": 4},
    "pipeline and tensor": {"pipeline": 2, "tensor": 2},
    "shard and context": {"shard": 2, "context": 2},
}


def config(parallel, num_workers=4):
    return PretrainConfig.model_validate({**BASE, "num_workers": num_workers, "parallel": parallel})


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


def main(root, folder):
    torch.set_num_threads(1)
    distributed.init()
    tokens = as_artifact(folder, kind="TokenShards")
    for name, parallel in LAYOUTS.items():
        workspace = Workspace(root / name, rank=distributed.rank())
        metrics = pretrain.run(config(parallel), {"tokens": tokens}, workspace)
        if distributed.is_main():
            (root / name / "metrics.json").write_text(json.dumps(metrics))
    workspace = Workspace(root / "changed", rank=distributed.rank())
    interrupted(config(LAYOUTS["pipeline and tensor"]), tokens, workspace, at_step=6)
    pretrain.run(config(LAYOUTS["sharded"]), {"tokens": tokens}, workspace)
    workspace = Workspace(root / "same", rank=distributed.rank())
    interrupted(config(LAYOUTS["shard and context"]), tokens, workspace, at_step=6)
    pretrain.run(config(LAYOUTS["shard and context"]), {"tokens": tokens}, workspace)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
