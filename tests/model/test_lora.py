"""Adapters against peft's on the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilpipe.config.sft import LoRAConfig
from lilpipe.errors import ConfigError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.lora import LoRALinear, add_adapters, merge, save_adapters
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.training.replica import FlatGradients
from tests.model.checkpoints import ARCHITECTURES, SMALL, small_model, small_tokenizer

CONFIG = LoRAConfig(rank=3, alpha=5.0)
TOKENS = torch.arange(40).view(2, 20) * 5 % 200


def adapted(config=CONFIG, shape=SMALL):
    """A model whose adapters do something."""
    model = small_model(shape)
    add_adapters(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(model):
        layer.lora_B.data.normal_(generator=generator).mul_(0.3)
    return model


def adapted_layers(model):
    """Every layer with an adapter, by name."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def merged(model):
    """A plain model with the adapters added to its weights, and the adapters."""
    adapters = {}
    plain = Transformer(model.config, model.vocab_size).eval()
    plain.load_state_dict(dict(merge(model.state_dict().items(), CONFIG, adapters)))
    return plain, adapters


def test_fresh_adapters_leave_the_model_as_it_is():
    model = small_model()
    expected = model(TOKENS)
    add_adapters(model, CONFIG, seed=0)
    assert torch.equal(model(TOKENS), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * SMALL.num_layers
    assert all(".lora_" in name for name in trained)
    assert FlatGradients(model).buffer.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["Llama with grouped heads, tied", "Llama not tied", "Qwen 3"])
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path, name):
    model = adapted(shape=SMALL.model_copy(update=ARCHITECTURES[name]))
    plain = small_model(model.config)(TOKENS)
    expected = model(TOKENS)
    assert (expected - plain).abs().max() > 0.1
    model, _ = merged(model)
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=1e-5)
    save_model(model, small_tokenizer(), tmp_path)
    torch.testing.assert_close(load_model(tmp_path)[0](TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_stage_gets_the_adapters_that_its_layers_have_in_the_whole_model():
    model = small_model()
    stage = Transformer(SMALL, model.vocab_size, ModelPart(range(1, SMALL.num_layers), first=False, last=True))
    for part in (model, stage):
        add_adapters(part, CONFIG, seed=0)
    found, whole = dict(stage.named_parameters()), dict(model.named_parameters())
    adapters = {name for name, parameter in found.items() if parameter.requires_grad}
    assert len(adapters) == 2 * 7 * (SMALL.num_layers - 1)
    for name in adapters:
        assert torch.equal(found[name], whole[name])
    matrices = [found[name] for name in sorted(adapters) if name.endswith("lora_A")]
    assert all(0.8 < (a.abs().max() * a.shape[1] ** 0.5).item() <= 1 for a in matrices)  # peft's bound
    assert not torch.equal(matrices[0], matrices[2])
    assert not any(found[name].any() for name in adapters if name.endswith("lora_B"))


def test_only_the_layers_that_are_named_get_adapters():
    model = adapted(LoRAConfig(target_modules=("q_proj", "v_proj")))
    names = {name.split(".", 3)[-1] for name, _ in adapted_layers(model)}
    assert names == {"self_attn.q_proj", "self_attn.v_proj"}


def test_a_model_whose_layers_have_other_names_in_peft_is_refused():
    model = small_model(SMALL.model_copy(update=ARCHITECTURES["GPT-2"]))
    with pytest.raises(ConfigError, match=r"sft.lora: got a model of type 'gpt2', expected one of llama, qwen3"):
        add_adapters(model, CONFIG, seed=0)


def their_model(model, tmp_path):
    """peft's, loaded from what we write."""
    peft = pytest.importorskip("peft")
    plain = small_model(model.config)
    save_model(plain, small_tokenizer(), tmp_path)
    save_adapters(merged(model)[1], CONFIG, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    return peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)


@pytest.mark.parametrize("name", ["Llama with grouped heads, tied", "Qwen 3"])
def test_outputs_and_gradients_are_pefts(tmp_path, name):
    model = adapted(shape=SMALL.model_copy(update=ARCHITECTURES[name]))
    theirs = their_model(model, tmp_path)
    targets = TOKENS.roll(-1, 1)
    ours = model(TOKENS, targets_BT=targets).logprobs.mean()
    logits = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, model(TOKENS), atol=1e-5, rtol=1e-5)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    ours.backward()
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 7 * SMALL.num_layers
    for layer_name, layer in adapted_layers(model):
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{layer_name}.{part}.weight"]
            torch.testing.assert_close(getattr(layer, part).grad, expected, atol=1e-5, rtol=1e-5)


def test_peft_merges_our_adapters_into_our_merged_weights(tmp_path):
    model = adapted()
    theirs = their_model(model, tmp_path).merge_and_unload()
    expected = dict(theirs.named_parameters())
    for name, parameter in merged(model)[0].named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_the_adapters_alone_and_follows_the_generator():
    model = adapted(LoRAConfig(rank=3, dropout=0.5)).train()
    torch.manual_seed(0)
    first, second = model(TOKENS), model(TOKENS)
    torch.manual_seed(0)
    assert torch.equal(model(TOKENS), first)
    assert not torch.equal(first, second)
    for _, layer in adapted_layers(model):
        layer.lora_B.data.zero_()
    assert torch.equal(model(TOKENS), model(TOKENS))
