"""Pretrain in forked children that are killed at random moments, until one comes through.

Prints where the kills fell, and the digests of the exported weights: uninterrupted, and after all the kills.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path

import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.stage import Workspace
from lilpipe.training import pretrain
from lilpipe.training.checkpoint import Checkpoints
from lilpipe.training.next_token import NextToken
from lilpipe.training.validation import Validation
from tests.alignment.conftest import as_artifact

torch.set_num_threads(1)

CONFIG = PretrainConfig(
    model=ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64, max_seq_len=32),
    optimizer=OptimizerConfig(kind="muon", warmup_steps=5),
    num_steps=60,
    batch_size=8,
    seed=0,
    checkpoint_every=5,
    eval_every=7,
    validation_rows=2,
    log_every=1,
    compile=False,
)


def train(root, tokens, num_steps, death=None):
    """The stage in this process; ``death`` says in what, at which call and after how many seconds it is killed."""
    where = root / "where"
    calls = Counter()

    def mortal(name, function):
        def call(*args, **options):
            calls[name] += 1
            if death and death[:2] == (name, calls[name]):
                where.write_text(name)
                threading.Timer(death[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return function(*args, **options)

        return call

    NextToken.batches = mortal("training", NextToken.batches)
    Validation.__call__ = mortal("validation", Validation.__call__)
    Checkpoints._write = mortal("save", Checkpoints._write)
    config = CONFIG.model_copy(update={"num_steps": num_steps})
    pretrain.run(config, {"tokens": as_artifact(tokens, kind="TokenShards")}, Workspace(root))
    weights = (root / "output" / "model.safetensors").read_bytes()
    (root / "digest").write_text(hashlib.sha256(weights).hexdigest())


def start(root, *arguments):
    """Process id of a child that trains."""
    child = os.fork()
    if child == 0:
        with (root / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            train(root, *arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return child


def ended(child, root):
    """Wait for the child; whether it came through. An error of its own is ours."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), (root / "log").read_text()
    return status == 0


def main(root, tokens, num_kills):
    draws = random.Random(0)
    num_steps = 12 * num_kills
    for name in ("warm", "whole", "cut"):
        (root / name).mkdir(parents=True)
    train(root / "warm", tokens, 6)  # imports once what torch imports late
    assert ended(start(root / "whole", tokens, num_steps), root / "whole")
    places = []
    for number in range(num_kills):
        place = ("training", "training", "save", "training", "validation")[number % 5]
        call = draws.randint(1, 12) if place == "training" else 1
        if ended(start(root / "cut", tokens, num_steps, (place, call, draws.uniform(0, 0.01))), root / "cut"):
            break
        places.append((root / "cut" / "where").read_text())
    assert ended(start(root / "cut", tokens, num_steps), root / "cut")
    digests = [(root / name / "digest").read_text() for name in ("whole", "cut")]
    print(json.dumps({"places": places, "digests": digests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
