"""Recipe ``adapt`` with all training steps, on the decoder and on a class of transformers."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilpipe.model.hub import save_model
from lilpipe.pipeline.run import run_step
from lilpipe.recipes import load
from lilpipe.store import Store
from tests.model.checkpoints import small_model, small_tokenizer
from tests.model.published import publish

pytestmark = pytest.mark.slow

TREES = ("oak", "ash", "elm", "yew", "fir", "fig")
PLACES = ("garden", "park", "forest", "valley", "town")
STEPS = ("corpus", "tokens", "pretrain", "preferences", "dpo", "grpo")
REWARD = """
def brief(prompt, completion):
    return 1.0 / (1 + len(completion.text))
"""


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_data(folder):
    draw = random.Random(0)
    sentences = [f"The old {tree} in the {place} is what we have to look at" for tree in TREES for place in PLACES]
    documents = [". ".join(draw.sample(sentences, 12)) + f". That was day {i} of the year." for i in range(200)]
    write_rows(folder / "documents.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(documents)])
    asked = [{"role": "user", "content": "Which tree?"}]
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"{asked[0]['content']} {i}"},
                {"role": "assistant", "content": tree},
            ]
        }
        for i in range(60)
        for tree in [draw.choice(TREES)]
    ]
    write_rows(folder / "conversations.jsonl", conversations)
    preferences = [
        {"prompt": f"Name tree {i}.", "chosen": draw.choice(TREES), "rejected": "I do not know."} for i in range(60)
    ]
    write_rows(folder / "preferences.jsonl", preferences)
    (folder / "reward.py").write_text(REWARD)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_every_training_step_adapts_the_model_before_it(kind, tmp_path):
    if kind == "llama":
        save_model(small_model(), small_tokenizer(), tmp_path / "base")
    else:
        publish(kind, tmp_path / "base")
    write_data(tmp_path)
    config = load(
        "adapt",
        overrides={
            **{f"enable.{step}": True for step in STEPS},
            **{"enable.register": False, "import_model.path": str(tmp_path / "base")},
            "prompts.sources": [str(tmp_path / "conversations.jsonl"), str(tmp_path / "preferences.jsonl")],
            "corpus.sources": [{"name": "own", "kind": "jsonl", "path": str(tmp_path / "documents.jsonl")}],
            **{"corpus.quality.gopher_repetition": False, "corpus.minhash.enabled": False},
            "tokens.validation_ratio": 0.1,
            "pretrain.num_steps": 4,
            **{"pretrain.batch_size": 4, "sft.batch_size": 8, "dpo.batch_size": 8},
            **{"grpo.num_steps": 2, "grpo.prompts_per_step": 4, "grpo.sampling.max_new_tokens": 8},
            "grpo.rewards": [{"kind": "brief", "file": str(tmp_path / "reward.py")}],
            "release.name": "mine",
        },
    )
    store = Store(str(tmp_path / "store"))
    made = {step: run_step(config, step, store=store, pipeline_run="run")[0] for step in config.steps}
    weights = [made[step].path / "model.safetensors" for step in ("import_model", "pretrain", "sft", "dpo", "grpo")]
    assert len({path.read_bytes() for path in weights}) == len(weights)
    [released] = Path(made["release"].path).rglob("model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(released.parent)
    tokenizer = AutoTokenizer.from_pretrained(released.parent)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Which tree?"}], add_generation_prompt=True)
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}[kind]
    assert len(tokenizer.decode(ids["input_ids"])) > 0
