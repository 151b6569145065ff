"""Adapters of each family against peft's on transformers' model."""

import pytest
import torch

from lilpipe.errors import ConfigError
from lilpipe.model import lora
from lilpipe.model.hub import load_model

families = pytest.importorskip("tests.model.test_families")
peft = pytest.importorskip("peft")

NAMES = [name for name in families.CASES if name.split(",")[0].split(" ")[0] in lora.ADAPTABLE]
OTHERS = [name for name in families.CASES if name not in NAMES]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


def test_every_dense_family_of_plain_layers_can_be_adapted():
    assert {name.split(",")[0].split(" ")[0] for name in OTHERS} == {"phi3", "gpt_neox"} | {
        name.split(",")[0].split(" ")[0] for name in families.CASES if "moe" in name or "mixtral" in name
    }


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_peft_gives_its_logits(name, use_dora, root, tmp_path):
    directory, _ = families.saved(name, root)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3, use_dora=use_dora)
    theirs = peft.get_peft_model(families.theirs(name), config)
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            scale = 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            parameter.data.mul_(scale).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    tokens = families.tokens()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens).logits
        model, _ = load_model(directory)
        base = model(tokens)
        lora.load_adapter(model, tmp_path)
        found = model(tokens)
    assert families.relative(base, expected) > 1e-2
    assert families.relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_families_with_other_layers_are_refused(name, root):
    model, _ = load_model(families.saved(name, root)[0])
    with pytest.raises(ConfigError, match=r"sft.lora: got a model of type"):
        lora.add_adapters(model, lora.LoRAConfig(), seed=0, stage="sft")
