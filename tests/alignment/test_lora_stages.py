"""Adapters in the stages of post-training, by one process."""

import gc
import json
from typing import Any

import pytest
import torch

from lilpipe.model.heads import load_head_model
from lilpipe.model.hub import load_model
from lilpipe.model.lora import load_adapter
from lilpipe.training import finetune
from tests.alignment.finetune_workers import ADAPTED, STAGES, run, write_inputs
from tests.alignment.test_finetune_layouts import losses

TOKENS = torch.arange(40).view(2, 20) * 5 % 200
DROPPING = {"lora": {"r": 3, "use_dora": True, "lora_dropout": 0.3}}


@pytest.fixture(scope="module", autouse=True)
def light():
    """Draw no reports, which takes longer than training here, and train on one thread, little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        module, section, settings = STAGES["sft"]
        patch.setitem(STAGES, "sft", (module, section, {**settings, "max_demonstrations": 16}))
        for module in {stage[0] for stage in STAGES.values()}:
            if hasattr(module, "write_report"):
                patch.setattr(module, "write_report", lambda *args, **options: None)
        patch.setattr("lilpipe.alignment.rl.reinforcement.write_report", lambda *args, **options: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(prompts, tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    write_inputs(root, prompts.path)
    (root / "model" / "origin.json").write_text('{"license": "mit"}')
    return root


@pytest.mark.parametrize("stage", ["sft", *ADAPTED])
def test_the_base_with_the_written_adapter_is_the_written_model(root, stage):
    run(stage, root, "adapted", {}, num_workers=1, lora={"r": 3, "use_rslora": True})
    assert (root / f"{stage} adapted" / "output" / "origin.json").read_text() == '{"license": "mit"}'
    pairs = [(root / f"{stage} adapted" / "output", root / "model")]
    if stage == "ppo":
        pairs.append((root / f"{stage} adapted" / "output" / "value", root / "rewards"))
    for output, source in pairs:
        has_head = "id2label" in (output / "config.json").read_text()
        written = (load_head_model if has_head else load_model)(output)[0]
        base = load_head_model(source)[0] if source.name == "rewards" else load_model(source)[0]
        plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        if has_head and source.name != "rewards":
            base = finetune.with_head(base, len(written.state_dict()["score.weight"]), seed=9)
        load_adapter(base, output / "adapter")
        torch.testing.assert_close(base(TOKENS), written(TOKENS), atol=1e-4, rtol=1e-5)
        differing = {n for n, t in written.state_dict().items() if n in plain and not torch.equal(t, plain[n])}
        assert differing - {"score.weight"}
        assert all("proj" in name or name == "score.weight" for name in differing)
        assert "score.weight" in differing or not has_head or source.name == "model"


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model", "classify"])
def test_what_is_dropped_does_not_depend_on_how_a_batch_is_computed(root, stage):
    changes: dict[str, dict[str, Any]] = {"one": {"accumulation_steps": 1}, "two": {"accumulation_steps": 2}}
    if stage == "sft":
        changes["recomputed"] = {"accumulation_steps": 1, "activation_checkpointing": "full"}
        changes["padded"] = {"accumulation_steps": 4, "packing": False}
    found = {}
    for name, settings in changes.items():
        run(stage, root, f"dropping {name}", {}, num_workers=1, **DROPPING, **settings)
        found[name] = losses(root / f"{stage} dropping {name}")
    for values in found.values():
        assert values == pytest.approx(found["one"], abs=2e-6)
    run(stage, root, "keeping", {}, num_workers=1, lora={**DROPPING["lora"], "lora_dropout": 0})
    kept = losses(root / f"{stage} keeping")
    assert max(abs(a - b) for a, b in zip(kept, found["one"], strict=True)) > 1e-4


# --- the reference model ------------------------------------------------------------------------------------------


def bytes_held():
    """Of all weights in memory, shared ones once."""
    gc.collect()
    parameters = [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


def held_in_training(stage, root, name, monkeypatch, **changes):
    """Bytes of weights when training begins, beyond those before, in units of the model."""
    module, found = STAGES[stage][0], []
    before = bytes_held()
    made = module.train

    def measured(*args, **options):
        found.append(bytes_held() - before)
        return made(*args, **options)

    monkeypatch.setattr(module, "train", measured)
    run(stage, root, name, {}, num_workers=1, **changes)
    model = sum(tensor.nbytes for tensor in load_model(root / "model")[0].state_dict().values())
    return found[0] / model


@pytest.mark.parametrize(("stage", "copies"), [("dpo", 1), ("grpo", 2), ("ppo", 4)])
def test_with_adapters_no_second_copy_of_the_model_is_held(root, stage, copies, monkeypatch):
    """``copies`` of a model without adapters: the policy, a reference, and for PPO a value and a reward model."""
    settings = {"rewards": [{"kind": "reward_model"}]} if stage == "ppo" else {}
    whole = held_in_training(stage, root, "held whole", monkeypatch, **settings)
    lora = {"r": 1, "target_modules": ["q_proj"]}
    adapted = held_in_training(stage, root, "held adapted", monkeypatch, lora=lora, **settings)
    assert whole == pytest.approx(copies, abs=0.05)
    assert adapted == pytest.approx(copies - (stage != "dpo"), abs=0.05)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_the_divergence_from_the_reference_is_that_from_a_second_copy(root, stage, monkeypatch):
    """The copy is the model that the stage would load without adapters."""
    settings = {
        "num_steps": 2,
        "num_iterations": 1,
        "lora": {"r": 3, "lora_alpha": 64.0},
        "optimizer": {"learning_rate": 1e-2},
    }
    run(stage, root, "off", {}, num_workers=1, **settings)
    module = STAGES[stage][0]

    def copied(config, source, model, workers, *, needed):
        return None, load_model(source)[0]

    monkeypatch.setattr(module, "scratch_and_reference", copied)
    run(stage, root, "copied", {}, num_workers=1, **settings)
    found, expected = (divergences(root / f"{stage} {name}") for name in ("off", "copied"))
    assert found == expected
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[-1] > 1e-5


def divergences(path):
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return [event["metrics"]["kl"] for event in events if "kl" in event.get("metrics", {})]


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_training_goes_on_from_an_adapter_with_it_as_the_reference(root, stage):
    sft = root / "sft before" / "output"
    if not sft.exists():
        run("sft", root, "before", {}, num_workers=1, lora={"r": 3}, num_epochs=2)
    lora = {"r": 3, "path": str(sft / "adapter")}
    run(stage, root, "after", {}, num_workers=1, lora=lora)
    events = [json.loads(line) for line in (root / f"{stage} after" / "events.jsonl").read_text().splitlines()]
    metrics = [event["metrics"] for event in events if "loss" in event.get("metrics", {})]
    if stage == "dpo":  # the first step's policy is the reference
        assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4)
    else:
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    # The written adapter is one of the base, not of the model that it went on from.
    base, _ = load_model(root / "model")
    load_adapter(base, root / f"{stage} after" / "output" / "adapter")
    written, before = (load_model(path)[0](TOKENS) for path in (root / f"{stage} after" / "output", sft))
    torch.testing.assert_close(base(TOKENS), written, atol=1e-4, rtol=1e-5)
    assert not torch.equal(written, before)
