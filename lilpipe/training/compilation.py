"""Compilation of the transformer blocks: compiled once for all layers, so that a cold start is short.

A compiled run adds in another order than an eager one. So the config alone decides whether a run is compiled, and a
resumed run makes the same choice.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import partial

from torch import nn

from lilpipe import distributed
from lilpipe.config.backend import BackendConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.model.flops import training_flops_per_token
from lilpipe.model.scores import token_scores
from lilpipe.model.transformer import Transformer

WORTH_FLOPS = {"cpu": 1e13, "cuda": 5e17}
"""FLOPs per worker from which compiling pays off: about twenty times what the device computes during a cold compile."""


PROVEN_COMPILER = 12
"""First g++ version that supports all x86-64 instructions that torch uses."""


def is_wanted(config: PretrainConfig, vocab_size: int) -> bool:
    """Return ``config.compile`` if set, else whether the run is long enough for compilation to pay off."""
    if config.compile is not None or isinstance(config.model, BackendConfig):
        return bool(config.compile)
    flops = sum(
        (phase.stop - phase.first)
        * phase.batch_size
        * phase.seq_len
        * training_flops_per_token(config.model, vocab_size, seq_len=phase.seq_len)
        for phase in config.resolved_phases
    )
    return flops / config.num_workers >= WORTH_FLOPS[distributed.device().type]


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks of ``model`` in place; blocks of one kind share the compiled code.

    On a GPU the passes over logits are fused as well. On a CPU this gained nothing, because they fit in its caches.
    """
    _trust_compiler()
    for block in model.model.layers.values():
        assert isinstance(block, nn.Module)
        block.compile(dynamic=False)
    if distributed.device().type == "cuda" and model.token_scores is token_scores:
        model.token_scores = partial(token_scores, compiled=True)


def _trust_compiler() -> None:
    """Skip torch's test compilations for each vector instruction set of the CPU, which take 10 s of a cold start."""
    from torch._inductor import config  # the import takes 0.5 s and is needed only for compilation

    if platform.machine() != "x86_64" or config.cpp.vec_isa_ok is not None:
        return
    command = [os.environ.get("CXX", "g++"), "-dumpversion"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        config.cpp.vec_isa_ok = int(version.split(".")[0]) >= PROVEN_COMPILER or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return  # clang has other version numbers; torch then runs its tests
