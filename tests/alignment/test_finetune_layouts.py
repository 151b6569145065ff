"""The stages of post-training by two workers in several layouts, against one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.model.heads import load_head_model, save_head_model, with_head
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.pairs import PAIR_SCHEMA, Pair
from lilpipe.schemas.tables import write_rows
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.alignment.finetune_workers import CASES, RESUMED, STAGES, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, max_seq_len=160)

HEADS = ("reward_model", "classify", "frozen")


@pytest.fixture(scope="module")
def root(prompts, tmp_path_factory):
    """Where the two workers and the one left what they made."""
    root = tmp_path_factory.mktemp("finetuning")
    (root / "prompts").symlink_to(prompts.path)
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = BytePairTokenizer(ranks, TokenizerConfig().pattern)
    model = Transformer(MODEL, tokenizer.vocab_size)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than fresh weights, so that answers differ from noise
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    save_model(model, tokenizer, root / "model")
    save_head_model(with_head(model, 1, seed=1), tokenizer, root / "rewards", labels=["reward"])
    pairs = [
        Pair(f"{split}/{i}", split, [{"role": "user", "content": f"Copy {i}."}], f"Answer: {i}", f"Sure. Answer: {i}")
        for split, first, count in (("train", 0, 12), ("validation", 50, 3))
        for i in range(first, first + count)
    ]
    texts = [{"text": f"Win ${i}00 now! {i * 37}", "label": "spam"} for i in range(20)]
    texts += [{"text": f"See you at {i}, {i * 91}", "label": "ham"} for i in range(20)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (root / "preferences").mkdir()
    write_rows(root / "preferences" / "pairs.arrow", [vars(pair) for pair in pairs], PAIR_SCHEMA)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.alignment.finetune_workers", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        run(stage, root, "alone", {}, num_workers=1)
    return root


def losses(path):
    """Of each step, as reported last."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    found = {event["done"]: event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})}
    return [found[done] for done in sorted(found)]


@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_every_layout_comes_to_the_model_of_one_process(root, stage, layout):
    expected = losses(root / f"{stage} alone")
    assert len(expected) >= 2
    assert losses(root / f"{stage} {layout}") == pytest.approx(expected, abs=2e-6)
    load = load_head_model if stage in HEADS else load_model
    model, _ = load(root / f"{stage} {layout}" / "output")
    one, _ = load(root / f"{stage} alone" / "output")
    # Adam divides a gradient by its size: where one is nearly zero, as few texts make it, rounding decides on a step.
    tolerance = 5e-5 if stage == "classify" else 1e-5
    compare(model, one, tolerance)
    if stage == "ppo":
        value, wanted = (load_head_model(root / f"ppo {name}" / "output" / "value")[0] for name in (layout, "alone"))
        compare(value, wanted, tolerance)


def compare(model, one, tolerance):
    for (key, tensor), wanted in zip(model.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("stage", RESUMED)
def test_a_sharded_run_that_stopped_halfway_ends_in_the_bytes_of_one_that_did_not(root, stage):
    stopped, whole = (root / f"{stage} {name}" for name in ("resumed", "sharded"))
    assert "resuming from the checkpoint after step 2" in (stopped / "events.jsonl").read_text()
    for name in ("model.safetensors", "config.json"):
        assert (stopped / "output" / name).read_bytes() == (whole / "output" / name).read_bytes()
