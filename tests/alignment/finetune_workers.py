"""Run under torchrun on two workers: the stages of post-training, each cut over them in several layouts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lilpipe import distributed
from lilpipe.alignment.preference import dpo
from lilpipe.alignment.rewards import reward_model
from lilpipe.alignment.rl import grpo, ppo
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.config.reward_model import ClassifyConfig, RewardModelConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import DataError
from lilpipe.model.heads import save_head_model, with_head
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.pairs import PAIR_SCHEMA, Pair
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.training import classify, sft
from tests.alignment.conftest import as_artifact

MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, max_seq_len=160)

COMMON = {
    "seed": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "accumulation_steps": 2,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.0},
}
STAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (sft, SFTConfig, {"batch_size": 8, "num_epochs": 1}),
    "dpo": (dpo, DPOConfig, {"batch_size": 4}),
    "reward_model": (
        reward_model,
        RewardModelConfig,
        {"batch_size": 4, "margin": 0.1, "center_rewards_coefficient": 0.01},
    ),
    "classify": (classify, ClassifyConfig, {"batch_size": 8, "num_epochs": 1}),
    "frozen": (
        classify,
        ClassifyConfig,
        {"batch_size": 8, "num_epochs": 1, "frozen_layers": 1, "freeze_embedding": True},
    ),
    "grpo": (
        grpo,
        GRPOConfig,
        {
            # Rounding may make another word of a draw, which then makes other weights: one rollout is compared.
            "num_steps": 1,
            "num_iterations": 2,
            "prompts_per_step": 4,
            "num_generations": 4,
            "sampling": {"max_new_tokens": 8},
            "rewards": [{"kind": "letters", "file": __file__}],
            "beta": 0.05,
        },
    ),
    "ppo": (
        ppo,
        PPOConfig,
        {
            "num_steps": 1,
            "num_iterations": 2,
            "prompts_per_step": 8,
            "sampling": {"max_new_tokens": 8},
            "rewards": [{"kind": "letters", "file": __file__}],
        },
    ),
}
LORA = {"lora": {"r": 3, "use_dora": True}, "optimizer": {**COMMON["optimizer"], "learning_rate": 3e-3}}
ADAPTED = ("dpo", "reward_model", "classify", "grpo", "ppo")
STAGES |= {f"lora {stage}": (*STAGES[stage][:2], {**STAGES[stage][2], **LORA}) for stage in ADAPTED}
LAYOUTS = {"replicas": {}, "sharded": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


CASES = [(stage, name) for stage in STAGES for name in LAYOUTS if (stage, name) != ("frozen", "pipeline")]
RESUMED = ("reward_model", "frozen", "lora dpo")


def letters(prompt, completion):
    """A reward that fresh models' answers differ in."""
    return len(completion.text) % 4


def write_inputs(root, prompts):
    """What the stages read: a small model, a reward model, pairs and texts."""
    (root / "prompts").symlink_to(prompts)
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = BytePairTokenizer(ranks, TokenizerConfig().pattern)
    model = Transformer(MODEL, tokenizer.vocab_size)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than fresh weights, so that answers differ from noise
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    save_model(model, tokenizer, root / "model")
    save_head_model(with_head(model, 1, seed=1), tokenizer, root / "rewards", labels=["reward"])
    pairs = [
        Pair(f"{split}/{i}", split, [{"role": "user", "content": f"Copy {i}."}], f"Answer: {i}", f"Sure. Answer: {i}")
        for split, first, count in (("train", 0, 12), ("validation", 50, 3))
        for i in range(first, first + count)
    ]
    texts = [{"text": f"Win ${i}00 now! {i * 37}", "label": "spam"} for i in range(20)]
    texts += [{"text": f"See you at {i}, {i * 91}", "label": "ham"} for i in range(20)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (root / "preferences").mkdir()
    write_rows(root / "preferences" / "pairs.arrow", [vars(pair) for pair in pairs], PAIR_SCHEMA)


def run(stage, root, name, parallel, *, num_workers, **changes):
    """One stage in one layout; gives its metrics."""
    module, section, settings = STAGES[stage]
    layout = {"parallel": parallel, "num_workers": num_workers}
    config = section.model_validate({**COMMON, **settings, **layout, **changes})
    if module is classify:
        config = config.model_copy(update={"path": str(root / "texts.jsonl")})
    inputs = {
        "model": as_artifact(root / "model", kind="Checkpoint", stage="sft"),
        "prompts": as_artifact(root / "prompts", kind="Prompts"),
        "preferences": as_artifact(root / "preferences", kind="Preferences"),
        "reward_model": as_artifact(root / "rewards", kind="Checkpoint", stage="reward_model"),
    }
    taken = {**module.STAGE.inputs, **({} if module is grpo else module.STAGE.optional_inputs)}  # which needs no judge
    workspace = Workspace(root / f"{stage} {name}", rank=distributed.rank())
    return module.run(config, {role: item for role, item in inputs.items() if role in taken}, workspace)


def stop_and_go_on(stage, root, parallel):
    """One stage that fails after its first checkpoint, and is called again."""
    made = Workspace.progress

    def failing(self, done, *args, **options):
        if done == 3:
            raise DataError("planted")
        made(self, done, *args, **options)

    Workspace.progress = failing
    with pytest.raises(DataError, match="planted"):
        run(stage, root, "resumed", parallel, num_workers=2)
    Workspace.progress = made
    run(stage, root, "resumed", parallel, num_workers=2)


def main(root, adapted):
    torch.set_num_threads(1)
    distributed.init()
    for stage, name in CASES:
        if stage.startswith("lora ") == adapted:
            run(stage, root, name, LAYOUTS[name], num_workers=2)
    for stage in RESUMED:
        if stage.startswith("lora ") == adapted:
            stop_and_go_on(stage, root, LAYOUTS["sharded"])
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), adapted=sys.argv[2] == "adapted")
