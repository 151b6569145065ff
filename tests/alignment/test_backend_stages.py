"""Post-training of a model that a class of transformers computes: the oracle is the decoder, on a model of both."""

import json
import os
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lilpipe.errors import ConfigError
from lilpipe.model.hub import load_model
from lilpipe.model.lora import load_adapter
from lilpipe.model.weights import stored_tensors
from lilpipe.training import finetune
from tests.alignment.finetune_workers import STAGES, run, write_inputs
from tests.alignment.test_finetune_layouts import losses
from tests.model.published import publish


@pytest.fixture(scope="module", autouse=True)
def light():
    """Draw no reports, which takes longer than training here, and train little."""
    with pytest.MonkeyPatch.context() as patch:
        module, section, settings = STAGES["sft"]
        patch.setitem(STAGES, "sft", (module, section, {**settings, "max_demonstrations": 16}))
        for module in {stage[0] for stage in STAGES.values()}:
            if hasattr(module, "write_report"):
                patch.setattr(module, "write_report", lambda *args, **options: None)
        patch.setattr("lilpipe.alignment.rl.reinforcement.write_report", lambda *args, **options: None)
        yield


@pytest.fixture(scope="module")
def root(prompts, tmp_path_factory):
    root = tmp_path_factory.mktemp("backend")
    write_inputs(root, prompts.path)
    return root


@pytest.fixture
def through_transformers(monkeypatch):
    """Let the class compute a Llama, which the decoder computes as well."""

    def switch():
        monkeypatch.setattr("lilpipe.model.hub.LAYOUTS", ())

    return switch


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model", "classify", "frozen", "grpo", "ppo"])
def test_a_stage_trains_the_class_as_it_trains_the_decoder(root, stage, through_transformers):
    run(stage, root, "decoder", {}, num_workers=1)
    expected = losses(root / f"{stage} decoder")
    through_transformers()
    run(stage, root, "class", {}, num_workers=1)
    assert losses(root / f"{stage} class") == pytest.approx(expected, abs=1e-4)
    ours, theirs = (dict(stored_tensors(root / f"{stage} {name}" / "output")) for name in ("decoder", "class"))
    assert ours.keys() - {"lm_head.weight"} == theirs.keys() - {"lm_head.weight"}
    for name in ours.keys() & theirs.keys():
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model", "classify", "grpo", "ppo"])
def test_a_stage_trains_adapters_of_the_class_as_those_of_the_decoder(root, stage, through_transformers):
    settings = {"lora": {"r": 3, "use_dora": stage == "sft"}}
    run(stage, root, "adapted decoder", {}, num_workers=1, **settings)
    expected = losses(root / f"{stage} adapted decoder")
    through_transformers()
    run(stage, root, "adapted class", {}, num_workers=1, **settings)
    assert losses(root / f"{stage} adapted class") == pytest.approx(expected, abs=1e-4)
    files = [root / f"{stage} adapted {name}" / "output" / "adapter" for name in ("decoder", "class")]
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in files)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-3, rtol=0, msg=name)
    stated = [json.loads((path / "adapter_config.json").read_text()) for path in files]
    assert stated[0] == stated[1]


@pytest.mark.parametrize("kind", ["opt", "mamba", "phi"])
def test_peft_computes_the_adapter_of_a_class(prompts, tmp_path, kind):
    peft = pytest.importorskip("peft")
    write_inputs(tmp_path, prompts.path)
    _, tokenizer = load_model(tmp_path / "model")
    theirs = publish(kind, tmp_path / "model", tokenizer=tokenizer, max_position_embeddings=160)
    run("sft", tmp_path, "adapted", {}, num_workers=1, lora={"r": 2, "use_rslora": True})
    output = tmp_path / "sft adapted" / "output"
    written, _ = load_model(output)
    tokens = torch.arange(3, 23)[None]
    assert not torch.allclose(written(tokens), theirs(tokens).logits, atol=1e-3)
    base, _ = load_model(tmp_path / "model")
    load_adapter(base, output / "adapter")
    torch.testing.assert_close(base(tokens), written(tokens), atol=1e-4, rtol=1e-4)
    adapted = peft.PeftModel.from_pretrained(theirs, output / "adapter")
    torch.testing.assert_close(adapted(input_ids=tokens).logits, written(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"packing": False}, {"activation_checkpointing": "full"}, {"precision": "bf16"}])
def test_settings_of_training_work_with_a_class(root, settings, through_transformers):
    name = "decoder " + next(iter(settings))
    run("sft", root, name, {}, num_workers=1, **settings)
    expected = losses(root / f"sft {name}")
    through_transformers()
    name = "class " + next(iter(settings))
    run("sft", root, name, {}, num_workers=1, **settings)
    tolerance = 2e-2 if "precision" in settings else 1e-4
    assert losses(root / f"sft {name}") == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", ["opt", "mamba"])
def test_a_trained_model_is_of_the_same_class(prompts, tmp_path, kind):
    write_inputs(tmp_path, prompts.path)
    _, tokenizer = load_model(tmp_path / "model")
    theirs = publish(kind, tmp_path / "model", tokenizer=tokenizer, max_position_embeddings=160)
    run("sft", tmp_path, "trained", {}, num_workers=1)
    found = losses(tmp_path / "sft trained")
    assert found[-1] < found[0]
    output = tmp_path / "sft trained" / "output"
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert type(loaded) is type(theirs)
    tokens = torch.arange(3, 23)[None]
    torch.testing.assert_close(loaded(tokens).logits, load_model(output)[0](tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded(tokens).logits, theirs(tokens).logits, atol=1e-2)
    stated = json.loads((output / "generation_config.json").read_text())
    assert tokenizer.turn_end_id in stated["eos_token_id"]


@pytest.mark.parametrize(
    ("parallel", "settings", "message"),
    [
        ({"tensor": 2}, {"num_workers": 2}, r"sft\.parallel\.tensor: got 2, expected 1 for LlamaForCausalLM"),
        ({"pipeline": 2}, {"num_workers": 2}, r"sft\.parallel\.pipeline: got 2, expected 1 for LlamaForCausalLM"),
        ({}, {"compile": True}, r"sft\.compile: got True, expected False"),
        ({}, {"lora": {"lora_dropout": 0.5}}, r"sft\.lora\.lora_dropout: got 0\.5, expected 0\.0"),
        ({}, {"lora": {"load_in_4bit": True}}, r"sft\.lora\.load_in_4bit: got True, expected False"),
        ({}, {"neftune_noise_alpha": 5.0}, r"sft\.neftune_noise_alpha: got 5\.0, expected 0\.0"),
    ],
)
def test_what_a_class_cannot_do_is_refused_before_weights_are_loaded(
    root, parallel, settings, message, through_transformers, monkeypatch
):
    through_transformers()
    monkeypatch.setattr("lilpipe.training.finetune.load_model", None)
    _, section, values = STAGES["sft"]
    config = section.model_validate({**values, "seed": 0, "parallel": parallel, **settings})
    with pytest.raises(ConfigError, match=message):
        finetune.build(config, root / "model", cast(Any, None), cast(Any, None), stage="sft")


@pytest.fixture(scope="module", params=["opt", "mamba"])
def by_two(request, prompts, tmp_path_factory):
    """Where two workers and one left what they made."""
    root = tmp_path_factory.mktemp("two")
    write_inputs(root, prompts.path)
    _, tokenizer = load_model(root / "model")
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 160}
    publish(request.param, root / "model", tokenizer=tokenizer, **size)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.alignment.backend_workers", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_replicas_and_shards_come_to_the_model_of_one_process(by_two, stage, monkeypatch):
    monkeypatch.setitem(STAGES, "sft", (*STAGES["sft"][:2], {"batch_size": 8, "num_epochs": 1}))
    run(stage, by_two, "alone", {}, num_workers=1)
    expected = dict(stored_tensors(by_two / f"{stage} alone" / "output"))
    for layout in ("replicas", "sharded"):
        assert losses(by_two / f"{stage} {layout}") == pytest.approx(losses(by_two / f"{stage} alone"), abs=1e-5)
        found = dict(stored_tensors(by_two / f"{stage} {layout}" / "output"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=5e-4, rtol=0, msg=f"{layout} {name}")
