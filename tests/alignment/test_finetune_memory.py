"""Memory planned before a model is loaded: shapes of micro-batches against the objectives', and refusals.

The arithmetic is compared with measurements in ``test_memory``.
"""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch

from lilpipe.alignment.preference.data import ROW_TOKENS, Packer, PreferenceRow, PromptCompletion
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.alignment.rewards.reward_model import EncodedRanking, RankingObjective
from lilpipe.config.backend import BackendConfig
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.reward_model import RewardModelConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.errors import ConfigError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import read_model_config
from lilpipe.training import finetune, finetune_memory
from lilpipe.training.conversation_encoding import EncodedConversation
from lilpipe.training.finetune import Workers
from lilpipe.training.finetune_memory import Shape, Workload, largest_batch, largest_padded_batch, planned_memory
from lilpipe.training.memory import total
from lilpipe.training.supervised import SupervisedTokens
from tests.alignment.finetune_workers import MODEL, run, write_inputs

STEPS = 5


@pytest.mark.parametrize("packed", [True, False])
def test_the_largest_micro_batch_of_sft_is_that_of_its_objective(packed):
    lengths = random.Random(0).choices(range(5, 90), k=40)
    examples = [EncodedConversation("", [1] * n, [False] + [True] * (n - 1)) for n in lengths]
    batches = [
        batch
        for rank in range(2)
        for step in range(STEPS)
        for batch in SupervisedTokens(
            examples, batch_size=8, seed=3, padding_id=0, rank=rank, world_size=2, packing=packed
        ).batches(step)
    ]
    found = largest_batch(
        [(n - 1,) for n in lengths], batch_size=8, num_parts=2, seed=3, num_steps=STEPS, packed=packed
    )
    assert found.num_rows * found.num_tokens == max(batch.inputs.numel() for batch in batches)


def test_the_largest_micro_batch_of_dpo_is_that_of_its_objective():
    draw = random.Random(0)
    pairs = [(draw.randint(5, 60), draw.randint(5, 90)) for _ in range(40)]
    rows = [
        PreferenceRow("", PromptCompletion([1, 1], [1] * first), PromptCompletion([1, 1], [1] * second))
        for first, second in pairs
    ]
    packer = Packer(padding_id=0, max_len=160, packed=True, mask_formatting=False, device=torch.device("cpu"))
    config = DPOConfig(batch_size=8, accumulation_steps=2, seed=3)
    objective = PreferenceObjective(rows, config, packer, reference_R2=None, rank=0, world_size=1)
    batches = [batch for step in range(STEPS) for batch in objective.batches(step)]
    found = largest_batch(
        [(first + 1, second + 1) for first, second in pairs],
        batch_size=8,
        num_parts=2,
        seed=3,
        num_steps=STEPS,
        packed=True,
        row_len=ROW_TOKENS,
    )
    assert found.num_rows == max(len(batch.inputs) for batch in batches)
    assert found.num_tokens == pytest.approx(max(batch.inputs.shape[1] for batch in batches), rel=0.1)


@pytest.fixture(scope="module")
def root(prompts, tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    write_inputs(root, prompts.path)
    return root


STAGES = ("sft", "dpo", "reward_model", "classify", "grpo", "ppo")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_cannot_fit_is_refused_before_the_model_is_loaded(root, stage, monkeypatch):
    def loaded(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetune, "load_model", loaded)
    monkeypatch.setattr(finetune, "load_head_model", loaded)
    monkeypatch.setattr(finetune, "load_weights", loaded)
    monkeypatch.setattr(finetune_memory, "_device_bytes", lambda _: 2**18)
    message = rf"{stage}: the estimated peak memory per worker is .* set {stage}\.lora = {{}}.*accumulation_steps"
    with pytest.raises(ConfigError, match=message):
        run(stage, root, "refused", {}, num_workers=1)
    (line,) = [
        event["message"]
        for event in map(json.loads, (root / f"{stage} refused" / "events.jsonl").read_text().splitlines())
        if event.get("message", "").startswith("memory:")
    ]
    assert "0.25 MiB per worker" in line


def test_adapters_need_less_and_a_reference_more(root, monkeypatch):
    planned = partial(_planned, root, monkeypatch)
    whole, adapted = planned("grpo"), planned("grpo", lora={"r": 3})
    assert adapted["gradients"] < 0.2 * whole["gradients"]
    assert (whole["other models"], adapted["other models"]) == (whole["weights"], 0)
    np.testing.assert_allclose(planned("grpo", beta=0.0)["other models"], 0)


def _planned(root, monkeypatch, stage, **changes):
    """Bytes by term, as planned by a stage that is refused for them."""
    said = []
    planning = finetune_memory.planned_memory
    monkeypatch.setattr(finetune_memory, "_device_bytes", lambda _: 1)
    monkeypatch.setattr(finetune_memory, "planned_memory", lambda *a, **k: said.append(planning(*a, **k)) or said[-1])
    with pytest.raises(ConfigError):
        run(stage, root, f"planned {len(changes)}", {}, num_workers=1, **changes)
    monkeypatch.undo()
    return {term.name: term.bytes for term in said[0]}


def test_ppo_trains_a_value_model_beside_the_policy_and_holds_a_reward_model_and_a_reference(root, monkeypatch):
    terms = _planned(root, monkeypatch, "ppo")
    model = num_parameters(*read_model_config(root / "model"))
    assert MODEL.tie_embeddings
    assert terms["value model"] == 16 * (model + MODEL.hidden_size)
    assert terms["other models"] == pytest.approx(4 * 2 * model, rel=0.1)
    adapted = _planned(root, monkeypatch, "ppo", lora={"r": 3})
    assert adapted["value model"] < 0.5 * terms["value model"]
    assert adapted["other models"] < terms["other models"]


def test_a_head_has_no_logits_and_frozen_layers_have_no_gradients(root, monkeypatch):
    whole, frozen = _planned(root, monkeypatch, "classify"), _planned(root, monkeypatch, "frozen")
    assert "logits" not in whole
    assert frozen["weights"] == whole["weights"]
    assert frozen["gradients"] < 0.6 * whole["gradients"]
    assert frozen["optimizer state"] < 0.6 * whole["optimizer state"]


@pytest.mark.parametrize("layout", [{}, {"accumulation_steps": 2}])
def test_the_largest_micro_batch_of_rankings_is_that_of_its_objective(layout):
    draw = random.Random(0)
    rankings = [EncodedRanking("", [[1] * draw.randint(5, 90) for _ in range(draw.choice([2, 3]))]) for _ in range(40)]
    config = RewardModelConfig(batch_size=8, seed=3, **layout)
    objective = RankingObjective(rankings, config, padding_id=0, workers=Workers(config))
    batches = [batch for step in range(STEPS) for batch in objective.batches(step)]
    found = largest_padded_batch([tuple(map(len, ranking.answers)) for ranking in rankings], config, num_steps=STEPS)
    assert found.num_rows * found.num_tokens == max(batch.inputs.numel() for batch in batches)


@pytest.mark.parametrize("lora", [None, {}])
def test_a_class_of_transformers_has_a_lower_bound(lora, tmp_path):
    transformers = pytest.importorskip("transformers")
    stated = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32
    )
    stated.architectures = ["OPTForCausalLM"]
    stated.save_pretrained(tmp_path)
    model = read_model_config(tmp_path)[0]
    assert isinstance(model, BackendConfig)
    section = SFTConfig.model_validate({"lora": lora})
    terms = planned_memory(section, Workload(tmp_path, Shape(4, 16, packed=False)))
    assert total(terms) == (4 if lora is not None else 16) * model.num_parameters
