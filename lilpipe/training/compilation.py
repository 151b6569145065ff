"""Compiling the block that a decoder repeats: once for all layers, so that a cold start is short.

A compiled run sums in another order than an eager one; whether a run is compiled therefore follows from its
configuration alone, and a resumed run is compiled as it was.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import partial

from torch import nn

from lilpipe import distributed
from lilpipe.config.training import PretrainConfig
from lilpipe.model.flops import training_flops_per_token
from lilpipe.model.scores import token_scores
from lilpipe.model.transformer import Transformer

WORTH_FLOPS = {"cpu": 1e13, "cuda": 5e17}
"""Operations of one worker from which compiling pays: about twenty times what the device does in a cold compile."""


PROVEN_COMPILER = 12
"""Version of g++ from which it knows every instruction of x86-64 that torch asks for."""


def is_wanted(config: PretrainConfig, vocab_size: int) -> bool:
    """As ``config.compile`` says, else whether the run is long enough to earn the time of compiling."""
    if config.compile is not None:
        return config.compile
    flops = sum(
        (phase.stop - phase.first)
        * phase.batch_size
        * phase.seq_len
        * training_flops_per_token(config.model, vocab_size, seq_len=phase.seq_len)
        for phase in config.resolved_phases
    )
    return flops / config.num_workers >= WORTH_FLOPS[distributed.device().type]


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks of ``model`` in place; those of one kind share what is compiled.

    On a GPU the passes over logits are fused as well. On a CPU that gained nothing: they are in its caches.
    """
    _trust_compiler()
    for block in model.model.layers.values():
        assert isinstance(block, nn.Module)
        block.compile(dynamic=False)
    if distributed.device().type == "cuda" and model.token_scores is token_scores:
        model.token_scores = partial(token_scores, compiled=True)


def _trust_compiler() -> None:
    """Spare torch from compiling samples for every vector unit that the processor says it has: 10 s of a cold start."""
    from torch._inductor import config  # takes half a second, and only what compiles needs it

    if platform.machine() != "x86_64" or config.cpp.vec_isa_ok is not None:
        return
    command = [os.environ.get("CXX", "g++"), "-dumpversion"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        config.cpp.vec_isa_ok = int(version.split(".")[0]) >= PROVEN_COMPILER or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return  # clang numbers its versions otherwise; torch finds out what it can do
