"""Adapters on weights of 4 bits, against bitsandbytes' dequantized weights, on the CPU."""

import sys

import pytest
import torch

from lilpipe.config.dpo import DPOConfig
from lilpipe.config.lora import LoRAConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.lora import adapted_layers, add_adapters, load_adapter, merged_tensors, start_adapters
from lilpipe.model.nf4 import NF4LoRALinear
from lilpipe.training import finetune
from tests.alignment.finetune_workers import run, write_inputs
from tests.alignment.test_finetune_layouts import losses
from tests.model.checkpoints import small_model, small_tokenizer

TOKENS = torch.arange(40).view(2, 20) * 5 % 200
KINDS = {"LoRA": LoRAConfig(r=3, load_in_4bit=True), "DoRA": LoRAConfig(r=3, use_dora=True, load_in_4bit=True)}


def dequantized(model):
    """The model with each adapted weight rounded to 4 bits by bitsandbytes, and no adapters."""
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                packed, state = functional.quantize_4bit(parameter, quant_type="nf4", compress_statistics=True)
                parameter.copy_(functional.dequantize_4bit(packed, state))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(small_model(), small_tokenizer(), directory)
    return directory


def load(checkpoint, config, **settings):
    """A model in 4 bits, and one of the same rounded weights in 32, both with the same adapters that do something."""
    pytest.importorskip("bitsandbytes")
    section = SFTConfig(lora=config, seed=0, **settings)
    found = finetune.load(section, checkpoint, stage="sft")
    plain = dequantized(small_model())
    add_adapters(plain, config.model_copy(update={"load_in_4bit": False}), seed=0, stage="sft")
    start_adapters(plain, config, stage="sft")
    for model in (found, plain):
        generator = torch.Generator().manual_seed(1)
        for layer in adapted_layers(model):
            layer.lora_B.data.normal_(generator=generator).mul_(0.3)
    return found, plain


def test_fresh_adapters_on_4_bits_compute_the_rounded_model(checkpoint):
    for config in KINDS.values():
        pytest.importorskip("bitsandbytes")
        found = finetune.load(SFTConfig(lora=config, seed=0), checkpoint, stage="sft")
        torch.testing.assert_close(found(TOKENS), dequantized(small_model())(TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_the_merged_model_are_those_of_the_rounded_weights(checkpoint, kind):
    found, plain = load(checkpoint, KINDS[kind])
    gradients = []
    for model in (found, plain):
        logits = model(TOKENS)
        logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found(TOKENS), plain(TOKENS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)
    assert all("lora_" in name for name in gradients[0])
    merged = small_model()
    merged.load_state_dict(dict(merged_tensors(found)))
    torch.testing.assert_close(merged(TOKENS), plain(TOKENS), atol=1e-3, rtol=1e-3)


def test_the_frozen_weights_take_4_bits(checkpoint):
    found, plain = load(checkpoint, KINDS["LoRA"])
    for layer, other in zip(adapted_layers(found), adapted_layers(plain), strict=True):
        assert layer.weight is None
        assert isinstance(layer, NF4LoRALinear)
        assert layer.packed.dtype == torch.uint8
        assert layer.packed.numel() * 2 == other.weight.numel()
        assert torch.equal(layer.frozen_weight, other.weight)
    assert not [name for name, p in found.named_parameters() if "_proj" in name and "lora_" not in name]


def test_bf16_computes_about_the_same(checkpoint):
    found, plain = load(checkpoint, KINDS["LoRA"])
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = found(TOKENS), plain(TOKENS)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_trains_on_4_bits_nearly_as_on_32_and_writes_the_rounded_base_with_the_adapter(
    prompts, tmp_path, stage
):
    pytest.importorskip("bitsandbytes")
    write_inputs(tmp_path, prompts.path)
    lora = {"r": 3, "use_rslora": True}
    run(stage, tmp_path, "in 4", {}, num_workers=1, lora={**lora, "load_in_4bit": True})
    output = tmp_path / f"{stage} in 4" / "output"
    base = dequantized(load_model(tmp_path / "model")[0])
    load_adapter(base, output / "adapter")
    torch.testing.assert_close(load_model(output)[0](TOKENS), base(TOKENS), atol=1e-4, rtol=1e-4)
    if stage != "grpo":  # which samples other completions
        run(stage, tmp_path, "in 32", {}, num_workers=1, lora=lora)
        found, expected = (losses(tmp_path / f"{stage} in {bits}") for bits in (4, 32))
        assert found == pytest.approx(expected, rel=0.1)
        assert found != pytest.approx(expected, rel=1e-6)


def test_without_the_package_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"sft.lora.load_in_4bit: bitsandbytes cannot be imported .*lilpipe\[qlora\]"):
        finetune.load(SFTConfig(lora=KINDS["LoRA"]), tmp_path, stage="sft")


def test_what_cannot_be_in_4_bits_is_refused():
    lora = {"load_in_4bit": True}
    for settings in ({"compile": True}, {"num_workers": 2, "parallel": {"shard": 2}}):
        with pytest.raises(ValueError, match=r"load_in_4bit: expected only parallel\.replicate, and compile = false"):
            DPOConfig.model_validate({"lora": lora, "batch_size": 8, **settings})
    with pytest.raises(ValueError, match="load_in_4bit: pretraining does not support it"):
        PretrainConfig.model_validate({"lora": lora})
