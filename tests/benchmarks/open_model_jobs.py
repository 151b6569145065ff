"""The jobs of ``open_model``: data, sizes and learning rates, the same for every system."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lilpipe.alignment.preference.data import PreferenceRow, encode_pairs
from lilpipe.alignment.questions import prompts as prompts_stage
from lilpipe.config.lora import LoRAConfig
from lilpipe.config.prompts import PromptsConfig, PromptSource
from lilpipe.config.training import OptimizerConfig
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message
from lilpipe.schemas.order import rows_of_step
from lilpipe.schemas.pairs import Pair
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.conversation_encoding import EncodedConversation, encode
from tests.benchmarks.turns import Turns

MAX_LEN, BATCH, NUM_PAIRS = 1024, 16, 128
NUM_PROMPTS, GROUP, NEW_TOKENS, MICRO_BATCHES = 8, 8, 64, 8
RATES = {"sft": 1.4e-4, "lora": 1e-3, "dpo": 3.6e-6, "dpo_lora": 3.6e-5, "grpo": 7e-6}
"""Learning rates of recipe ``adapt`` for 135 M parameters."""
LORA_RANK, LORA_ALPHA = 16, 32
REWARD = r"\btotal\b"
"""A completion of GRPO has the reward 1 if it contains this: some do, and some do not."""
MOST_STEPS = 1000
Tell = dict[str, Any]


def optimizer(job: str) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=RATES[job], warmup_steps=0, weight_decay=0.0, schedule="constant")


def lora_of(job: str) -> LoRAConfig | None:
    return LoRAConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA) if job.endswith("lora") else None


def question(row: dict[str, str]) -> list[Message]:
    return [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()}]


def instructions(model: Path, data: Path) -> tuple[Tokenizer, list[EncodedConversation]]:
    """All instructions, in the order of the first epoch."""
    tokenizer = Tokenizer.load(model)
    rows = json.loads((data / "instruction-data.json").read_text())
    talks = [
        Conversation(str(n), "", "", [*question(row), {"role": "assistant", "content": row["output"]}])
        for n, row in enumerate(rows)
    ]
    return tokenizer, encode(tokenizer, talks, max_len=MAX_LEN).fitting


def preferences(model: Path, data: Path) -> tuple[Tokenizer, list[PreferenceRow]]:
    """The first pairs of two different completions: the reference's pass over all would take longer than the turns."""
    tokenizer = Tokenizer.load(model)
    rows = json.loads((data / "instruction-data-with-preference.json").read_text())
    pairs = [Pair(str(n), "train", question(row), row["chosen"], row["rejected"]) for n, row in enumerate(rows)]
    pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    return tokenizer, encode_pairs(tokenizer, pairs, max_len=MAX_LEN)[0][:NUM_PAIRS]


def problems(model: Path, data: Path, count: int) -> tuple[Tokenizer, list[list[int]]]:
    """Token ids of questions in the chat template."""
    tokenizer = Tokenizer.load(model)
    with gzip.open(data / "gsm8k-train.jsonl.gz", "rt") as lines:
        asked = [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]
    return tokenizer, [
        render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in asked
    ]


def batch(step: int, num_rows: int) -> list[int]:
    return rows_of_step(step, num_rows=num_rows, batch_size=BATCH, seed=0)


def repeat(work: Callable[[int], None], tokens: int, turns: Turns, tell: Tell) -> None:
    tell["tokens"] = [tokens] * MOST_STEPS
    for step in range(MOST_STEPS):
        turns(step)
        work(step)


def grpo_prompts(data: Path, root: Path) -> Path:
    """Prompts of the stage, under ``root``."""
    source = PromptSource(path=str(data / "gsm8k-train.jsonl.gz"), kind="gsm8k", max_rows=400, demonstrations_ratio=0)
    config = PromptsConfig(families=(), num_documents=0, num_demonstrations=0, sources=(source,))
    workspace = Workspace(root)
    prompts_stage.run(config, {}, workspace)
    return workspace.output
