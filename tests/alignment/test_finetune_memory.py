"""Memory planned before a model is loaded: shapes of micro-batches against the objectives', and refusals.

The arithmetic is compared with measurements in ``test_memory``.
"""

import json
import random

import numpy as np
import pytest
import torch

from lilpipe.alignment.preference.data import ROW_TOKENS, Packer, PreferenceRow, PromptCompletion
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.config.dpo import DPOConfig
from lilpipe.errors import ConfigError
from lilpipe.training import finetune, finetune_memory
from lilpipe.training.conversation_encoding import EncodedConversation
from lilpipe.training.finetune_memory import largest_batch
from lilpipe.training.supervised import SupervisedTokens
from tests.alignment.finetune_workers import run, write_inputs

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


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_stage_that_cannot_fit_is_refused_before_the_model_is_loaded(root, stage, monkeypatch):
    def loaded(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetune, "load_model", loaded)
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
    def planned(stage, **changes):
        said = []
        monkeypatch.setattr(finetune_memory, "_device_bytes", lambda _: 1)
        monkeypatch.setattr(finetune_memory, "total", lambda terms: said.append(terms) or 10.0)
        with pytest.raises(ConfigError):
            run(stage, root, f"planned {len(changes)}", {}, num_workers=1, **changes)
        return {term.name: term.bytes for term in said[0]}

    whole, adapted = planned("grpo"), planned("grpo", lora={"r": 3})
    assert adapted["gradients"] < 0.2 * whole["gradients"]
    assert (whole["other models"], adapted["other models"]) == (whole["weights"], 0)
    np.testing.assert_allclose(planned("grpo", beta=0.0)["other models"], 0)
