"""Two programs that the tests of checkpoints start.

``killed``: saves in forked children, each killed at the next call that touches the disk; prints what was left.
Under torchrun: saves under one layout and loads under others, and compares Muon on shards with Muon on one process;
one JSON per rank.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from lilpipe.training import checkpoint_files
from lilpipe.training.checkpoint import Checkpoints

TOUCHING = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def open_checkpoints(directory, *, identity=None, safe=(), keep_last=2, keep_every=None, log=print):
    return Checkpoints(
        directory, identity=identity or {}, safe=safe, keep_last=keep_last, keep_every=keep_every, log=log
    )


def small_state(value):
    return {
        "model/matrix": torch.full((2, 3), float(value)),
        "optimizer/matrix/step": torch.tensor(float(value)),
        "optimizer/matrix/exp_avg": torch.full((2, 3), float(value), dtype=torch.float64),
    }


def die_at(call):
    """SIGKILL this process at that call, from now on, of those that touch the disk."""
    calls = 0

    def counted(function):
        def wrapped(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return wrapped

    def half(tensors, path):
        Path(path).write_bytes(b"half")
        save_file(tensors, path)

    save_file = counted(checkpoint_files.save_file)
    checkpoint_files.save_file = half
    for name in TOUCHING:
        setattr(os, name, counted(getattr(os, name)))


def killed(root):
    before = root / "before"
    checkpoints = open_checkpoints(before, keep_last=2, keep_every=2)
    for step in (3, 4):
        checkpoints.save(step, small_state(step), {"step": step})
    checkpoints.wait()
    found = []
    for call in range(1, 200):
        directory = root / str(call)
        shutil.copytree(before, directory)
        child = os.fork()
        if child == 0:
            die_at(call)
            checkpoints = open_checkpoints(directory, keep_last=1, keep_every=2)
            checkpoints.save(5, small_state(5), {"step": 5})
            checkpoints.wait()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found.append({"status": status, "found": what_lies_in(directory), "again": save_again(directory)})
        if status == 0:
            break
    print(json.dumps(found))


def what_lies_in(directory):
    """Step, record and values of the latest checkpoint, and what was logged."""
    said, state = [], small_state(-1)
    loaded = open_checkpoints(directory, log=said.append).load_latest(state)
    return [*(loaded or ()), sorted({value for tensor in state.values() for value in tensor.flatten().tolist()}), said]


def save_again(directory):
    """What a run that comes by again leaves behind."""
    checkpoints = open_checkpoints(directory, keep_last=1, keep_every=2)
    checkpoints.save(5, small_state(5), {"step": 5})
    checkpoints.wait()
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]))
