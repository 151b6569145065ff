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
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lilpipe import distributed
from lilpipe.errors import ArtifactError, StoreError
from lilpipe.training import checkpoint_files
from lilpipe.training.checkpoint import Checkpoints
from lilpipe.training.optimizer import make_optimizers, named_state, take_step
from tests.training import toy

TOUCHING = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
KINDS = ("adamw", "muon")


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
        save(tensors, path)

    save = counted(checkpoint_files.save_file)
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
    open_checkpoints(root / "left").save(1, small_state(1), {})  # and leaves without waiting
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


class Model(nn.Module):
    """Matrices, some of which do not divide evenly, experts [E, O, I] and vectors shorter than the world."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.up_again = nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)
        self.uneven = nn.Linear(10, 7, bias=False)
        self.few = nn.Linear(6, 2)
        self.experts = nn.Parameter(torch.empty(6, 4, 9))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.double()


def fsdp(model, mesh):
    fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    """With both orders of division: a part of the rows and a part of the columns."""
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "up_again": ColwiseParallel(), "down": RowwiseParallel()})


def tensor_parallel_and_fsdp(model, mesh):
    tensor_parallel(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["shard"])


LAYOUTS = {
    "whole": ((4,), ("world",), lambda model, mesh: None),
    "fsdp": ((4,), ("shard",), fsdp),
    "hsdp": ((2, 2), ("replicate", "shard"), fsdp),
    "tensor": ((4,), ("tensor",), tensor_parallel),
    "tensor x fsdp": ((2, 2), ("shard", "tensor"), tensor_parallel_and_fsdp),
}


def whole_value(name, step):
    """The value of a parameter at the start (step -1), or its gradient at a step."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(dict(Model().named_parameters())[name].shape, generator=generator, dtype=torch.float64)


def part_of(value, like):
    """The value laid out as another tensor is."""
    if not isinstance(like, DTensor):
        return value
    mesh, placements = like.device_mesh, like.placements
    shape, offsets = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    here = value[tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))]
    return DTensor.from_local(
        here.contiguous(), mesh, placements, shape=like.shape, stride=torch.empty(like.shape, device="meta").stride()
    )


def build(layout, kind):
    """The model at its start, and its optimizers."""
    model = Model()
    if layout != "one process":
        shape, names, apply = LAYOUTS[layout]
        apply(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(part_of(whole_value(name, -1), parameter))
    return model, make_optimizers(model, toy.optimizer(kind=kind, weight_decay=0.1))


def take_steps(model, optimizers, steps):
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = part_of(whole_value(name, step), parameter)
        take_step(optimizers)


def state_of(model, optimizers):
    tensors = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    return tensors | {f"optimizer/{name}": tensor for name, tensor in named_state(optimizers).items()}


def gathered(tensors):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def updated(layout, kind):
    """Model and state after three steps."""
    model, optimizers = build(layout, kind)
    take_steps(model, optimizers, range(3))
    return gathered(state_of(model, optimizers))


def updated_in_stages(kind, expected):
    """Largest difference where two stages hold plain parts of the model, two processes each."""
    model, stage = Model(), distributed.rank() // 2
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica")).get_group("replica")
    parts = [nn.ModuleDict({name: part}) for name, part in list(model.named_children())[stage::2]]
    named = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(whole_value(name, -1))
    optimizers = make_optimizers(parts, toy.optimizer(kind=kind, weight_decay=0.1), replicas=replicas)
    for step in range(3):
        for name, parameter in named.items():
            parameter.grad = whole_value(name, step)
        take_step(optimizers)
    return max((parameter - expected[f"model/{name}"]).abs().max().item() for name, parameter in named.items())


def largest_difference(tensors, others):
    assert tensors.keys() == others.keys()
    return max((tensors[name] - others[name]).abs().max().item() for name in tensors)


def resharded(root, kind):
    """Saved under FSDP while training goes on; of the layouts that read it, those that got other bits."""
    model, optimizers = build("fsdp", kind)
    take_steps(model, optimizers, range(3))
    checkpoints = open_checkpoints(root)
    saved = gathered(state_of(model, optimizers))
    checkpoints.save(3, state_of(model, optimizers), {"rank": distributed.rank()})
    take_steps(model, optimizers, range(3, 6))  # with collectives of its own
    checkpoints.wait()
    if distributed.is_main():
        save_file(saved, root / "saved.safetensors")
    wrong = []
    for layout in LAYOUTS:
        other, other_optimizers = build(layout, kind)
        tensors = state_of(other, other_optimizers)
        found = open_checkpoints(root).load_latest(tensors)
        equal = all(torch.equal(tensor, saved[name]) for name, tensor in gathered(tensors).items())
        if found != (3, {"rank": 0}) or not equal:
            wrong.append(layout)
    return wrong


def bytes_on_disk(root, layout):
    """Of all tensors, saved under a layout that holds copies, and the number of files they lie in."""
    checkpoints = open_checkpoints(root)
    checkpoints.save(1, state_of(*build(layout, "adamw")), {})
    checkpoints.wait()
    found = list((root / "step-00000001").glob("*.safetensors"))
    return sum(tensor.nbytes for path in found for tensor in load_file(path).values()), len(found)


def stages(root):
    """Saved by the stages of a pipeline, two processes each."""
    stage = distributed.rank() // 2
    checkpoints = open_checkpoints(root)
    checkpoints.save(1, {f"model/layers.{stage}": torch.full((3,), float(stage)), "model/shared": torch.ones(2)}, {})
    checkpoints.wait()


def raised(error, function, *args):
    try:
        function(*args)
    except error as caught:
        return str(caught)
    return "nothing"


def failures(root):
    """What each rank is told if one of them cannot write, if files of one are damaged, if a setting has changed."""
    checkpoints, state = open_checkpoints(root, identity={"seed": 1}), state_of(*build("fsdp", "adamw"))
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    checkpoints.wait()
    write = checkpoint_files.save_file
    if distributed.rank() == 2:
        checkpoint_files.save_file = full_disk
    checkpoints.save(3, state, {})
    told = {"disk": raised(StoreError, checkpoints.wait)}
    checkpoint_files.save_file = write
    told["setting"] = raised(ArtifactError, open_checkpoints(root, identity={"seed": 2}).load_latest, state)
    distributed.barrier()
    if distributed.is_main():
        (root / "step-00000002" / "model-00003.safetensors").write_bytes(b"")
    distributed.barrier()
    found = checkpoints.load_latest(state)
    return {**told, "found": found and found[0]}


def full_disk(*args):
    raise OSError(28, "No space left on device")


def main(root):
    torch.set_num_threads(1)
    distributed.init()
    expected = {kind: load_file(root / f"{kind}.safetensors") for kind in KINDS}
    report = {
        "muon and adamw": {
            f"{kind} {layout}": largest_difference(updated(layout, kind), expected[kind])
            for kind in KINDS
            for layout in LAYOUTS
        },
        "stages": {kind: updated_in_stages(kind, expected[kind]) for kind in KINDS},
        "resharded": {kind: resharded(root / f"resharded-{kind}", kind) for kind in KINDS},
        "bytes": {layout: bytes_on_disk(root / layout, layout) for layout in ("whole", "hsdp")},
        "failures": failures(root / "failures"),
    }
    stages(root / "stages")
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
