"""Adapters against peft's on the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilpipe.config.lora import LoRAConfig
from lilpipe.errors import ConfigError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.lora import (
    adapted_layers,
    add_adapters,
    initial_adapters,
    load_adapter,
    merge,
    start_adapters,
)
from lilpipe.model.peft_files import save_adapter
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.training.replica import FlatGradients
from tests.model.checkpoints import ARCHITECTURES, SMALL, small_model, small_tokenizer

peft = pytest.importorskip("peft")

CONFIG = LoRAConfig(r=3, lora_alpha=5.0)
KINDS = {
    "LoRA": CONFIG,
    "rsLoRA": LoRAConfig(r=4, lora_alpha=5.0, use_rslora=True),
    "DoRA": LoRAConfig(r=3, lora_alpha=5.0, use_dora=True, target_modules=("q_proj", "v_proj", "down_proj")),
    "both": LoRAConfig(r=4, lora_alpha=3.0, use_dora=True, use_rslora=True),
}
TOKENS = torch.arange(40).view(2, 20) * 5 % 200


def with_adapters(config=CONFIG, shape=SMALL, *, seed=0):
    """A model with fresh adapters."""
    model = small_model(shape)
    add_adapters(model, config, seed=seed, stage="sft")
    start_adapters(model, config, stage="sft")
    return model


def adapted(config=CONFIG, shape=SMALL):
    """A model whose adapters do something."""
    model = with_adapters(config, shape)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model):
        layer.lora_B.data.normal_(generator=generator).mul_(0.3)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.data.mul_(1 + 0.2 * torch.rand(layer.out_features, generator=generator))
    return model


def merged(model):
    """A plain model with the adapters added to its weights, and the adapters."""
    adapters = {}
    plain = Transformer(model.config, model.vocab_size).eval()
    plain.load_state_dict(dict(merge(model.state_dict().items(), adapted_layers(model)[0].config, adapters)))
    return plain, adapters


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_fresh_adapters_leave_the_model_as_it_is(config):
    expected = small_model()(TOKENS)
    model = with_adapters(config)
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == (3 if config.use_dora else 2) * len(config.projections) * SMALL.num_layers
    assert all(".lora_" in name for name in trained)
    assert FlatGradients(model).buffer.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["Llama with grouped heads, tied", "Llama not tied", "Qwen 3"])
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path, name, config):
    model = adapted(config, SMALL.model_copy(update=ARCHITECTURES[name]))
    plain = small_model(model.config)(TOKENS)
    expected = model(TOKENS)
    assert (expected - plain).abs().max() > 0.1
    weights = {layer.name: layer.full_weight for layer in adapted_layers(model)}
    model, _ = merged(model)
    torch.testing.assert_close(model(TOKENS), expected, atol=2e-5, rtol=1e-5)
    for layer, weight in weights.items():
        torch.testing.assert_close(model.get_submodule(layer).weight, weight)
    save_model(model, small_tokenizer(), tmp_path)
    torch.testing.assert_close(load_model(tmp_path)[0](TOKENS), expected, atol=2e-5, rtol=1e-5)


def test_a_pipeline_stage_gets_the_adapters_that_its_layers_have_in_the_whole_model():
    model = small_model()
    stage = Transformer(SMALL, model.vocab_size, ModelPart(range(1, SMALL.num_layers), first=False, last=True))
    for part in (model, stage):
        add_adapters(part, CONFIG, seed=0, stage="sft")
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
    names = {layer.name.split(".", 3)[-1] for layer in adapted_layers(model)}
    assert names == {"self_attn.q_proj", "self_attn.v_proj"}


def test_a_model_whose_layers_have_other_names_in_peft_is_refused():
    model = small_model(SMALL.model_copy(update=ARCHITECTURES["GPT-2"]))
    with pytest.raises(ConfigError, match=r"dpo.lora: got a model of type 'gpt2', expected one of llama, mistral"):
        add_adapters(model, CONFIG, seed=0, stage="dpo")


# --- against peft -------------------------------------------------------------------------------------------------


def their_model(model, directory, *, dropout=0.0):
    """peft's, loaded from what we write."""
    config = adapted_layers(model)[0].config.model_copy(update={"lora_dropout": dropout})
    save_model(small_model(model.config), small_tokenizer(), directory)
    save_adapter(merged(model)[1], config, directory / "adapter", has_head=False)
    base = AutoModelForCausalLM.from_pretrained(directory)
    return peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["Llama with grouped heads, tied", "Qwen 3"])
def test_outputs_and_gradients_are_pefts(tmp_path, name, config):
    model = adapted(config, SMALL.model_copy(update=ARCHITECTURES[name]))
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
    assert len(gradients) == sum(1 for p in model.parameters() if p.requires_grad)
    for layer in adapted_layers(model):
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if config.use_dora else 2]:
            expected = gradients[f"base_model.model.{layer.name}.{part}.weight"]
            torch.testing.assert_close(getattr(layer, part).grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_peft_merges_our_adapters_into_our_merged_weights(tmp_path, config):
    model = adapted(config)
    theirs = their_model(model, tmp_path).merge_and_unload()
    expected = dict(theirs.named_parameters())
    for name, parameter in merged(model)[0].named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_adapter_that_peft_made_loads_with_its_logits(tmp_path, config):
    model = small_model()
    save_model(model, small_tokenizer(), tmp_path)
    options = config.model_dump(exclude={"path", "load_in_4bit", "target_modules"})
    modules = list(config.projections) if config.target_modules != "all-linear" else "all-linear"
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **options))
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape)).add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.eval()(input_ids=TOKENS).logits
    assert (expected - model(TOKENS)).abs().max() > 0.1
    found = load_adapter(model, tmp_path / "adapter")
    assert found == config.model_copy(update={"path": str(tmp_path / "adapter")})
    torch.testing.assert_close(model(TOKENS), expected, atol=2e-5, rtol=1e-5)


def test_dropout_of_dora_acts_where_pefts_does(tmp_path, monkeypatch):
    """With the same elements dropped in both."""
    model = adapted(LoRAConfig(r=3, use_dora=True, lora_dropout=0.5))
    theirs = their_model(model, tmp_path, dropout=0.5).train()

    def every_second(x):
        return 2 * x * (torch.arange(x.shape[-1]) % 2)

    monkeypatch.setattr("lilpipe.model.lora.drop", lambda x, *_, **__: every_second(x))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: every_second(x) if self.training else x)
    torch.testing.assert_close(model.train()(TOKENS), theirs(input_ids=TOKENS).logits, atol=2e-5, rtol=1e-5)


# --- the model before training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_initial_model_is_the_base_with_the_adapters_off(config):
    model = adapted(config)
    now = model(TOKENS)
    with initial_adapters(model) as same:
        assert same is model
        assert torch.equal(model(TOKENS), small_model()(TOKENS))
    assert torch.equal(model(TOKENS), now)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_initial_model_of_a_loaded_adapter_is_that_adapter(tmp_path, config):
    first = adapted(config)
    save_adapter(merged(first)[1], config, tmp_path, has_head=False)
    model = with_adapters(config.model_copy(update={"path": str(tmp_path)}), seed=7)
    expected = model(TOKENS)
    assert torch.equal(expected, first(TOKENS))
    for layer in adapted_layers(model):
        layer.lora_B.data.add_(0.1)
    assert not torch.equal(model(TOKENS), expected)
    with initial_adapters(model):
        assert torch.equal(model(TOKENS), expected)


def test_an_adapter_of_other_settings_is_refused(tmp_path):
    save_adapter(merged(adapted())[1], CONFIG, tmp_path, has_head=False)
    for settings, message in (
        ({"r": 4}, r"sft.lora.r: got 4, expected 3 as in the adapter"),
        ({"lora_alpha": 1.0}, r"sft.lora.lora_alpha: got 1.0, expected 5.0"),
        ({"target_modules": ("q_proj",)}, r"sft.lora.target_modules: got \('q_proj',\), expected 'all-linear'"),
        ({"use_dora": True}, r"sft.lora.use_dora: got True, expected False"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_adapters(CONFIG.model_copy(update={"path": str(tmp_path), **settings}))
