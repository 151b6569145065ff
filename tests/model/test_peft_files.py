"""Files of adapters that are damaged, or of settings that are not supported."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilpipe.config.lora import LoRAConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.heads import with_head
from lilpipe.model.lora import add_adapters, load_adapter, merge
from lilpipe.model.peft_files import read_adapter, save_adapter
from tests.model.checkpoints import SMALL, small_model

CONFIG = LoRAConfig(r=2, lora_alpha=3.0, use_rslora=True, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def directory(tmp_path):
    """Holds an adapter."""
    model, adapters = small_model(), {}
    add_adapters(model, CONFIG, seed=0, stage="sft")
    dict(merge(model.state_dict().items(), CONFIG, adapters))
    save_adapter(adapters, CONFIG, tmp_path, has_head=False)
    return tmp_path


def state(directory, **changes):
    """Change settings in the file."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_read_is_what_was_written(directory):
    config, tensors = read_adapter(directory)
    assert config == CONFIG.model_copy(update={"path": str(directory)})
    assert len(tensors) == 2 * 2 * SMALL.num_layers
    assert tensors["model.layers.1.mlp.down_proj.lora_A"].shape == (2, SMALL.intermediate_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', expected 'LORA'"),
        ({"bias": "all"}, "bias: got 'all', expected 'none'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: got"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern: got"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow: got 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', which changes the weights of the base"),
        ({"r": 0}, "r: "),
        ({"r": "many"}, "r: "),
    ],
)
def test_settings_that_compute_something_else_are_refused(directory, changes, message):
    state(directory, **changes)
    with pytest.raises(ArtifactError, match=f"adapter_config.json: {message}"):
        read_adapter(directory)


def test_settings_without_effect_are_accepted(directory):
    expected = read_adapter(directory)[0]
    state(directory, bias="none", rank_pattern={}, peft_version="1", init_lora_weights="gaussian", lora_bias=False)
    assert read_adapter(directory)[0] == expected


def test_pickled_and_damaged_adapters_are_refused_by_name(directory):
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: cannot be read as safetensors"):
        read_adapter(directory)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: cannot be read"):
        read_adapter(directory)
    (directory / "adapter_model.bin").touch()
    with pytest.raises(ArtifactError, match=r"adapter_model.bin: got pickled weights, which can run code"):
        read_adapter(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(min(stored)), r"mlp.down_proj.lora_A: got nothing, expected it"),
        (lambda stored: stored.update({min(stored): torch.zeros(2, 5)}), r"lora_A: got \(2, 5\), expected \(2, 48\)"),
        (
            lambda stored: stored.update({min(stored).replace("down_proj", "up_proj"): torch.zeros(2, 32)}),
            r"up_proj.lora_B: got nothing, expected it",
        ),
        (lambda stored: stored.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "got an unknown tensor"),
        (lambda stored: stored.update({"base_model.model.score.weight": torch.zeros(1, 32)}), "score.weight: got it"),
        (
            lambda stored: stored.update(
                {"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.zeros(1)}
            ),
            r"layers.9.mlp.down_proj.lora_A: got it, expected nothing",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(directory, change, message):
    path = directory / "adapter_model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(small_model(), directory)


def test_a_head_is_saved_with_the_adapter_and_trained(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    from lilpipe.model.heads import save_head_model
    from tests.model.checkpoints import small_tokenizer

    model, adapters = with_head(small_model(), 3, seed=0), {}
    save_head_model(model, small_tokenizer(), tmp_path, labels=["a", "b", "c"])
    add_adapters(model, CONFIG, seed=0, stage="classify")
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == {"score.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    dict(merge(model.state_dict().items(), CONFIG, adapters))
    save_adapter(adapters, CONFIG, tmp_path / "adapter", has_head=True)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = torch.arange(1, 21)[None]
    torch.testing.assert_close(theirs(input_ids=tokens).logits, model(tokens)[:, -1], atol=1e-5, rtol=1e-5)
    again = with_head(small_model(), 3, seed=5)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens), model(tokens))
