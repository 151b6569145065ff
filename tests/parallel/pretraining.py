"""Run under torchrun: the stage `pretrain`, cut over four workers, killed, and taken up in another layout."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lilpipe import distributed
from lilpipe.config import PretrainConfig
from lilpipe.parallel.model import ParallelModel
from lilpipe.stage import Workspace
from lilpipe.training import pretrain
from tests.alignment.conftest import as_artifact

MODEL = {
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 32,
    "max_seq_len": 32,
    "dropout": 0.1,
    "moe": {"num_experts": 4, "expert_size": 16},
}
DIES_AT = 13


class Killed(BaseException):
    pass


def config(**settings):
    """Two phases, the second with longer sequences and another rotary base."""
    values = {
        "seed": 3,
        "model": MODEL,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "num_steps": 20,
        "batch_size": 8,
        "accumulation_steps": 2,
        "seq_len": 16,
        "phases": [{"from_step": 10, "seq_len": 32, "rope_theta": 50_000.0}],
        "within_documents": True,
        "checkpoint_every": 5,
        "eval_every": 10,
        "eval_rows": 5,
    }
    return PretrainConfig.model_validate(values | settings)


def run(root, **settings):
    """The stage's metrics, in the one workspace that all runs here share."""
    tokens = as_artifact(root / "tokens", kind="TokenShards")
    return pretrain.run(config(**settings), {"tokens": tokens}, Workspace(root / "run", rank=distributed.rank()))


def run_until_killed(root, **settings):
    """Leave the run at a step that no checkpoint was made after."""
    original = ParallelModel.forward_backward

    def dying(model, step):
        if step == DIES_AT:
            raise Killed
        return original(model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParallelModel, "forward_backward", dying)
        with pytest.raises(Killed):
            run(root, **settings)


def main(root):
    torch.set_num_threads(1)
    distributed.init()
    run_until_killed(root, num_workers=4, parallel={"pipeline": 2, "shard": 2})
    distributed.barrier()
    metrics = run(root, num_workers=4, parallel={"context": 2, "tensor": 2})
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(metrics))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
