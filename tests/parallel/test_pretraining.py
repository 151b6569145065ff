"""The stage `pretrain` in layouts of four workers, of which one takes up what the other left."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lilpipe.config import TokenizerConfig
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import pretrain
from tests.parallel import pretraining
from tests.training.conftest import write_tokens

TEXTS = {
    "corpus": {"train": ["the cat sat on the mat. "] * 60, "validation": ["the mat sat on the cat. "] * 60},
    "exercises": {"train": ["1 2 3 -> 3 2 1\n"] * 60, "validation": ["2 1 3 -> 3 1 2\n"] * 6},
}


@pytest.mark.distributed
def test_a_run_killed_in_one_layout_and_taken_up_in_another_ends_as_one_process_does(tmp_path):
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)
    tokens = write_tokens(tmp_path / "tokens", tokenizer, TEXTS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [*torchrun, "-m", "tests.parallel.pretraining", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    whole = Workspace(tmp_path / "whole")
    expected = pretrain.run(pretraining.config(), {"tokens": tokens}, whole)
    for rank in range(4):
        got = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for name in ("train_loss", "validation_bits_per_byte_corpus", "validation_bits_per_byte_exercises"):
            assert got[name] == pytest.approx(expected[name], abs=1e-6), name
    got, expected = (load_file(tmp_path / run / "output" / "model.safetensors") for run in ("run", "whole"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-4, msg=name)
