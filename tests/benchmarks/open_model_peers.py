"""TRL, transformers and llama.cpp in the jobs of ``open_model``."""

from __future__ import annotations

import importlib
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from lilpipe.schemas.examples import read_prompts
from tests.benchmarks.beside_trl import trl_settings
from tests.benchmarks.open_model_jobs import (
    BATCH,
    GROUP,
    LORA_ALPHA,
    LORA_RANK,
    MICRO_BATCHES,
    MOST_STEPS,
    NEW_TOKENS,
    NUM_PROMPTS,
    REWARD,
    Tell,
    batch,
    grpo_prompts,
    instructions,
    optimizer,
    preferences,
    problems,
    repeat,
)
from tests.benchmarks.turns import Turns


def their_model(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded, AutoTokenizer.from_pretrained(model)


def peft_of(job: str) -> Any:
    if not job.endswith("lora"):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def train_theirs(trainer: Any, turns: Turns, tell: Tell) -> None:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            tell.setdefault("losses", []).append(float((logs or {}).get("loss", "nan")))

    trainer.add_callback(Steps)
    trainer.train()


def counting(trainer: Any, tell: Tell) -> None:
    """Count the tokens of each batch, which the trainer may have put together itself."""
    collate, tell["tokens"] = trainer.data_collator, []

    def counted(features: Any) -> Any:
        found = collate(features)
        tell["tokens"].append(int(found["attention_mask"].sum()))
        return found

    trainer.data_collator = counted


def their_settings(folder: str, job: str, batch_size: int = BATCH, **settings: Any) -> dict[str, Any]:
    found = trl_settings(folder, batch_size=batch_size, optimizer=optimizer(job))
    return found | {"logging_steps": 1, "gradient_checkpointing": False, "seed": 0} | settings


def sft_theirs(settings: dict[str, Any], job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    trl: Any = importlib.import_module("trl")
    from datasets import Dataset

    _, examples = instructions(source, data)
    ordered = [examples[row] for step in range(24) for row in batch(step, len(examples))]
    rows = [
        {
            "input_ids": item.ids,
            "labels": [token if counts else -100 for token, counts in zip(item.ids, item.mask, strict=True)],
        }
        for item in ordered
    ]
    model, tokenizer = their_model(source)
    with tempfile.TemporaryDirectory() as work:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**their_settings(work, job, max_length=None, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_of(job),
        )
        counting(trainer, tell)
        train_theirs(trainer, turns, tell)


def dpo_theirs(settings: dict[str, Any], job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    from datasets import Dataset
    from trl.trainer import dpo_config, dpo_trainer

    ours, rows = preferences(source, data)
    ordered = [rows[row] for step in range(24) for row in batch(step, len(rows))]
    model, tokenizer = their_model(source)
    with tempfile.TemporaryDirectory() as work:
        trainer = dpo_trainer.DPOTrainer(
            model=model,
            args=dpo_config.DPOConfig(**their_settings(work, job, max_length=None, **settings)),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": ours.decode(row.first.prompt),
                        "chosen": ours.decode(row.first.completion),
                        "rejected": ours.decode(row.second.completion),
                    }
                    for row in ordered
                ]
            ),
            processing_class=tokenizer,
            peft_config=peft_of(job),
        )
        counting(trainer, tell)
        train_theirs(trainer, turns, tell)


def grpo_theirs(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig as TheirConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    model, tokenizer = their_model(source)

    def contains(completions: Any, **_: Any) -> Any:
        return [float(bool(re.search(REWARD, completion[0]["content"]))) for completion in completions]

    tell["tokens"] = [NUM_PROMPTS * GROUP] * MOST_STEPS
    with tempfile.TemporaryDirectory() as work:
        asked = [prompt.question for prompt in read_prompts(grpo_prompts(data, Path(work) / "prompts"), "train")]
        settings = their_settings(work, job, batch_size=NUM_PROMPTS * GROUP // MICRO_BATCHES)
        settings |= {"gradient_accumulation_steps": MICRO_BATCHES, "num_train_epochs": 1000}
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=contains,
            args=TheirConfig(
                **settings,
                num_generations=GROUP,
                max_completion_length=NEW_TOKENS,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                beta=0.0,
                loss_type="dapo",
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in asked]),
            processing_class=tokenizer,
        )
        train_theirs(trainer, turns, tell)


def sample_theirs(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    count = 1 if job == "answer" else 64
    model, _ = their_model(source)
    _, prompts = problems(source, data, count)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None

    def sample(step: int) -> None:
        torch.manual_seed(step)
        choice = {"do_sample": False} if count == 1 else {"do_sample": True, "top_k": 0}
        with torch.inference_mode():
            found = model.eval().generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=0, **choice
            )
        assert found.shape[1] == longest + NEW_TOKENS

    repeat(sample, count * NEW_TOKENS, turns, tell)


def answer_llama_cpp(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    prompt = problems(source, data, 1)[1][0]
    threads, path = torch.get_num_threads(), str(source.parent / "gguf/model-F16.gguf")
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(step: int) -> None:
        model.reset()
        drawn = [token for token, _ in zip(model.generate(prompt, temp=0.0), range(NEW_TOKENS), strict=False)]
        assert len(drawn) == NEW_TOKENS

    repeat(answer, NEW_TOKENS, turns, tell)
