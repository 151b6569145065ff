"""SFT with adapters and with noise on embeddings by two workers in several layouts, against one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lilpipe.artifact import content_digest, list_files
from lilpipe.config.model import ModelConfig
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.config.reward_model import ClassifyConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Conversation, write_conversations
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.training.lora_workers import LAYOUTS, OPTIONS, run

distributed = [pytest.mark.distributed, pytest.mark.timeout(400)]

MODEL = ModelConfig(hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=64, max_seq_len=64)
WITH_ADAPTERS = ("adapters", "both")
"""Options whose change of the weights is the product of the adapters' matrices."""


def torchrun(root, part):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.training.lora_workers", str(root), part]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the two workers and the one left what they made."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)
    model = Transformer(MODEL, tokenizer.vocab_size)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than fresh weights, so that gradients stand out of rounding
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    save_model(model, tokenizer, root / "model")
    (root / "conversations").mkdir()
    write_conversations(root / "conversations" / "conversations.arrow", [talk(number) for number in range(32)])
    done = torchrun(root, "layouts")
    assert (root / "layouts").exists(), done.stdout + done.stderr
    assert done.returncode != 0, "the run was not killed"
    done = torchrun(root, "resumed")
    assert done.returncode == 0, done.stdout + done.stderr
    for options in OPTIONS:
        run(options, root, "alone", {}, num_workers=1)
    return root


def talk(number):
    question, answer = "say " + "it " * (number % 4) + str(number), f"Answer: {number % 7}" + "!" * (number % 3)
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(f"talk/{number}", f"prompt/{number}", "sampled", messages)


def losses(path):
    """Of each step."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return [event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})]


def read(path):
    """The tensors of a model, and those of its adapters."""
    adapters = path / "adapter" / "adapter_model.safetensors"
    return load_model(path)[0].state_dict(), load_file(adapters) if adapters.exists() else {}


def faults(before, after, adapters):
    """Matrices of adapters that training left as they were, and weights that are not the old ones and the adapters'."""
    expected, (lora, prefix) = dict(before), (OPTIONS["adapters"]["lora"], "base_model.model.")
    for name in before:
        layer = prefix + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapters:
            change = adapters[f"{layer}.lora_B.weight"] @ adapters[f"{layer}.lora_A.weight"]
            expected[name] = before[name] + lora["lora_alpha"] / lora["r"] * change
    untrained = [name for name, tensor in adapters.items() if "lora_B" in name and not tensor.any()]
    return untrained + [name for name in before if (after[name] - expected[name]).abs().max() > 1e-7]


class TestLayouts:
    pytestmark = distributed

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_every_layout_comes_to_the_model_and_the_adapters_of_one_process(self, root, options, layout):
        expected = losses(root / f"{options} alone")
        assert len(expected) == 4
        assert losses(root / f"{options} {layout}") == pytest.approx(expected, abs=2e-6)
        wanted = read(root / f"{options} alone" / "output")
        for found, tensors in zip(read(root / f"{options} {layout}" / "output"), wanted, strict=True):
            assert found.keys() == tensors.keys()
            for key, tensor in found.items():
                torch.testing.assert_close(
                    tensor, tensors[key], rtol=0, atol=1e-5, msg=f"{key}: {tensor - tensors[key]}"
                )

    def test_noise_changes_what_is_learnt(self, root):
        """Else a layout without it would pass."""
        quiet, noisy = losses(root / "adapters alone"), losses(root / "both alone")
        assert min(abs(one - other) for one, other in zip(quiet, noisy, strict=True)) > 1e-4

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("options", WITH_ADAPTERS)
    def test_every_adapter_is_trained_and_nothing_else(self, root, options, layout):
        before, _ = read(root / "model")
        after, adapters = read(root / f"{options} {layout}" / "output")
        assert len(adapters) == 2 * 7 * MODEL.num_layers
        assert faults(before, after, adapters) == []
        # What the check is worth: an adapter that is as it was, and frozen weights that are not.
        weight = "model.layers.3.mlp.up_proj.weight"
        adapter = "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"
        assert faults(before, after, {**adapters, adapter: torch.zeros_like(adapters[adapter])}) == [adapter, weight]
        for name in ("model.norm.weight", weight):
            assert faults(before, {**after, name: after[name] + 1e-6}, adapters) == [name]

    @pytest.mark.parametrize("layout", ["sharded", "tensor", "pipeline"])
    @pytest.mark.parametrize("options", ["both", "dropping"])
    def test_peft_loads_the_adapters_and_computes_what_the_merged_model_does(self, root, options, layout):
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        output = root / f"{options} {layout}" / "output"
        base = transformers.AutoModelForCausalLM.from_pretrained(root / "model")
        tokens = torch.arange(40).view(2, 20) * 5 % 200
        with torch.no_grad():
            plain = base(input_ids=tokens).logits
            theirs = peft.PeftModel.from_pretrained(base, output / "adapter")(input_ids=tokens).logits
            ours = load_model(output)[0](tokens)
        assert (ours - plain).abs().max() > 1e-2
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)

    def test_a_run_killed_between_steps_ends_in_the_same_bytes(self, root):
        parts = root / "dropping in two parts"
        assert "resuming from the checkpoint" in (parts / "events.jsonl").read_text()
        whole = content_digest(list_files(root / "dropping sharded" / "output"))
        assert content_digest(list_files(parts / "output")) == whole


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (SFTConfig, {"precision": "fp8"}, "lora: got precision fp8"),
        (
            ClassifyConfig,
            {"frozen_layers": 1},
            "frozen_layers 1 and freeze_embedding False would be ignored",
        ),
        (GRPOConfig, {}, "lora.lora_dropout 0.1 must be 0"),
        (PPOConfig, {}, "lora.lora_dropout 0.1 must be 0"),
    ],
)
def test_settings_that_adapters_do_not_fit_are_refused(section, settings, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate({"lora": {"lora_dropout": 0.1}, **settings})
