"""Train in forked children that SIGKILL themselves, each at the next write to disk, until one comes through.

Prints how each child ended, and the digests of the final weights: uninterrupted, and after all the kills.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from tests.training import toy

torch.set_num_threads(1)


def train_once(root, *, kill_at_call=None):
    """Train in this process, which dies at that call among all that write or rename."""
    calls = 0

    def counted(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync = counted(os.fsync)
    Path.rename = counted(Path.rename)
    Path.mkdir = counted(Path.mkdir)
    model, _ = toy.run(root, num_steps=10, checkpoint_every=3)
    (root / "digest").write_text(hashlib.sha256(toy.weights(model).numpy().tobytes()).hexdigest())


def in_child(function, *args, **options):
    """Signal or status with which a forked child ends; negative for a signal."""
    child = os.fork()
    if child == 0:
        function(*args, **options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root):
    toy.run(root / "warm", num_steps=1)  # imports once what torch imports late
    assert in_child(train_once, root / "whole") == 0
    signals = []
    for call in range(1, 100):
        signals.append(in_child(train_once, root / "cut", kill_at_call=call))
        if signals[-1] == 0:
            break
    digests = [(root / name / "digest").read_text() for name in ("whole", "cut")]
    print(json.dumps({"signals": signals, "digests": digests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
