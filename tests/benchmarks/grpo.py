"""GRPO on a CPU beside TRL's ``GRPOTrainer``: the same model, prompts, group size and steps, to the end of the run.

    python -m tests.benchmarks.grpo [--steps 100] [--rounds 3] [--threads 2]

A model of 0.4 M parameters that has learnt to copy and reverse lists a little, 16 prompts x 8 answers of up to 20
tokens a step, one update for each, the verifier as reward. Every run has a process of its own; the systems take turns.
Time runs from the call that trains to its return, with the saved model; what comes before, imports and reading the
checkpoint, does not count. TRL has its best settings for this: one batch for each step, no activation checkpointing,
no second pass for old log-probabilities (it does none where there is one update).

What both have learnt is measured alike, by our sampler on held-out prompts; its standard error is over the prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lilpipe import distributed
from lilpipe.alignment.questions import prompts as prompts_stage
from lilpipe.alignment.rewards.reward_functions import judge, reward
from lilpipe.alignment.rl import grpo, reinforcement
from lilpipe.alignment.rollout.completions import complete
from lilpipe.config.model import ModelConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.training import OptimizerConfig, TrainingSection
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model.heads import pad_rows
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Prompt, read_conversations, read_prompts
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train_tokenizer as train_tokenizer
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, Replica
from tests.alignment.conftest import as_artifact
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.training_data import standard_library

MODULE = "tests.benchmarks.grpo"
SHAPE = ModelConfig(hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=128)
PROMPTS = PromptsConfig(
    families=("copy", "reverse"),
    difficulty={"copy": (2, 5), "reverse": (2, 5)},
    num_documents=0,
    num_demonstrations=3_000,
    num_train=2_000,
    num_validation=100,
    num_test=200,
    max_filler_sentences=0,
)
NUM_START_STEPS, START_BATCH = 300, 32
NUM_PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 16, 8, 20
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, warmup_steps=3, weight_decay=0.0, schedule="linear")
LAST_STEPS = 10
"""Steps at the end whose mean reward is told."""


def prepare(root: Path) -> None:
    """Prompts, and a model that answers some of them, under ``root``."""
    workspace = Workspace(root / "prompts")
    prompts_stage.run(PROMPTS, {}, workspace)
    tokenizer = train_tokenizer(standard_library(1_000_000), vocab_size=1024)
    model = Transformer(SHAPE, tokenizer.vocab_size)
    model.init_weights(0)
    rows = [render(tokenizer, item.messages)[0] for item in read_conversations(workspace.output)]

    def loss(model: Any, step: int, micro: int) -> Loss:
        chosen = torch.randint(len(rows), (START_BATCH,), generator=torch.Generator().manual_seed(step)).tolist()
        tokens_BT, lengths_B = pad_rows([rows[row] for row in chosen], padding_id=tokenizer.padding_id)
        counts_BT = torch.arange(1, tokens_BT.shape[1]) < lengths_B[:, None]
        scores = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:].where(counts_BT, IGNORED))
        return Loss(-scores.logprobs.sum(), float(counts_BT.sum()), num_tokens=int(lengths_B.sum()))

    train(
        Replica(model, loss, accumulation_steps=lambda _: 1),
        num_steps=NUM_START_STEPS,
        workspace=Workspace(root / "start"),
        section=TrainingSection(seed=0, log_every=100),
        optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, warmup_steps=25, schedule="linear"),
    )
    save_model(model, tokenizer, root / "model")


def solves(prompt: Prompt, text: str, *, ended: bool) -> float:
    """The reward of both systems."""
    return reward(judge(prompt, text.strip(), ended=ended))


# --- the systems --------------------------------------------------------------------------------------------------


def run_lilpipe(root: Path, output: Path, *, steps: int) -> dict[str, float]:
    """The stage as a pipeline runs it; what it measures on held-out prompts before and after is in the time."""
    config = GRPOConfig(
        seed=0,
        optimizer=OPTIMIZER,
        num_steps=steps,
        prompts_per_step=NUM_PROMPTS,
        num_generations=GROUP_SIZE,
        log_every=1,
        num_workers=distributed.world_size(),
        threads_per_worker=torch.get_num_threads(),
        sampling=SamplingConfig(max_new_tokens=MAX_NEW_TOKENS),
    )
    inputs = {
        "model": as_artifact(root / "model", kind="Checkpoint"),
        "prompts": as_artifact(root / "prompts/output", kind="Prompts"),
    }
    workspace = Workspace(output, rank=distributed.rank())
    reinforcement.write_report = lambda *_, **__: None  # pictures for people
    started = time.perf_counter()
    grpo.run(config, inputs, workspace)
    seconds = time.perf_counter() - started
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    rewards = [event["metrics"]["reward"] for event in events if "reward" in event.get("metrics", {})]
    return {"seconds": seconds, "reward": statistics.fmean(rewards[-LAST_STEPS:])}


def run_trl(root: Path, output: Path, *, steps: int) -> dict[str, float]:
    """TRL's trainer, with our verifier as reward function."""
    import transformers
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.grpo_config import GRPOConfig as TRLConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    disable_progress_bars()
    by_id = {prompt.id: prompt for prompt in read_prompts(root / "prompts/output", "train")}
    rows = [{"prompt": [{"role": "user", "content": p.question}], "prompt_id": p.id} for p in by_id.values()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    turn_end = Tokenizer.load(root / "model").turn_end_id
    rewards: list[float] = []

    def verified(completion_ids: list[list[int]], prompt_id: list[str], **_: Any) -> Any:
        ended = [ids[-1] == turn_end for ids in completion_ids]
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        found = [
            solves(by_id[name], text, ended=has_ended)
            for name, text, has_ended in zip(prompt_id, texts, ended, strict=True)
        ]
        rewards.append(statistics.fmean(found))
        return found

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=verified,
        args=TRLConfig(
            output_dir=str(output / "trainer"),
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE // distributed.world_size(),
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            epsilon=0.2,
            loss_type="dapo",
            learning_rate=OPTIMIZER.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=OPTIMIZER.warmup_steps,
            weight_decay=0.0,
            adam_beta1=OPTIMIZER.beta1,
            adam_beta2=OPTIMIZER.beta2,
            max_grad_norm=OPTIMIZER.max_grad_norm,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=LAST_STEPS,
            disable_tqdm=True,
            report_to=[],
            seed=0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    trainer.save_model(str(output / "output"))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "reward": statistics.fmean(rewards[-LAST_STEPS:])}


# --- the comparison -----------------------------------------------------------------------------------------------


class System(NamedTuple):
    """One of the compared: whose, and how it uses the cores."""

    name: Literal["lilpipe", "trl"]
    workers: int
    threads: int


def measured(system: System, root: Path, *, steps: int) -> dict[str, float]:
    """One run in fresh processes, and what its model solves."""
    output = Path(tempfile.mkdtemp(dir=root))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={system.workers}"]
    command = [sys.executable, *(torchrun if system.workers > 1 else ()), "-m", MODULE, "--system", system.name]
    command += ["--root", str(root), "--output", str(output), "--steps", str(steps), "--threads", str(system.threads)]
    memory = KEEP_MEMORY if system.name == "lilpipe" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(system.threads), "HF_HUB_OFFLINE": "1", **memory}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    folder = Path(tempfile.mkdtemp(dir=root))
    shutil.copytree(root / "model", folder, dirs_exist_ok=True)
    shutil.copy(output / "output/model.safetensors", folder)
    return result | held_out(root, folder)


def held_out(root: Path, model_directory: Path) -> dict[str, float]:
    """Mean reward on the test prompts: of the greedy completion, and of 8 drawn at temperature 1, with its error."""
    model, tokenizer = load_model(model_directory)
    prompts = read_prompts(root / "prompts/output", "test")
    figures: dict[str, float] = {}
    for name, temperature, num_generations in (("greedy", 0.0, 1), ("drawn", 1.0, 8)):
        sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature)
        groups = complete(
            model, tokenizer, prompts, form="chat", sampling=sampling, seed=1, num_generations=num_generations
        )
        values = [statistics.fmean(reward(answer.verdict) for answer in group) for group in groups]
        figures[name] = statistics.fmean(values)
        figures[f"{name}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return figures


def table(runs: dict[System, list[dict[str, float]]], *, steps: int) -> str:
    """Each system, and how many times as fast ours is where both are at their best, in the same rounds."""
    seconds = {system: [run["seconds"] for run in found] for system, found in runs.items()}
    best = min((system for system in runs if system.name == "lilpipe"), key=lambda s: statistics.median(seconds[s]))
    rows = []
    for system, found in runs.items():
        median = {key: statistics.median(run[key] for run in found) for key in found[0]}
        rows.append(
            [
                f"{system.name}, {system.workers} x {system.threads}",
                spread(seconds[system], digits=1),
                f"{1e3 * median['seconds'] / steps:,.0f}",
                f"{median['reward']:.3f}",
                *(f"{median[name]:.3f} ± {median[f'{name}_error']:.3f}" for name in ("greedy", "drawn")),
                f"{median['memory_mib']:,.0f}",
                "" if system is best else ratio(seconds[system], seconds[best]),
            ]
        )
    titles = ["workers x threads", "seconds to the end", "ms a step", "reward at the end"]
    titles += ["held out, greedy", "held out, drawn", "peak memory, MiB a worker", "lilpipe at its best is"]
    return markdown(titles, rows)


def main() -> None:
    """Compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of the machine")
    parser.add_argument("--root", type=Path, help="where the start lies from an earlier run")
    parser.add_argument("--system", choices=("lilpipe", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.system:
        distributed.init()
        run = run_lilpipe if arguments.system == "lilpipe" else run_trl
        result = run(arguments.root, arguments.output, steps=arguments.steps)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        result |= {"memory_mib": usage.ru_maxrss / 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        if distributed.is_main():
            print(json.dumps(result))
        return
    root = arguments.root or Path(tempfile.mkdtemp())
    if not (root / "model").exists():
        prepare(root)
    start = held_out(root, root / "model")
    print(f"{root}: before, greedy {start['greedy']:.3f}, drawn {start['drawn']:.3f}")
    cores = arguments.threads
    systems = [System(name, workers, cores // workers) for name in ("lilpipe", "trl") for workers in (1, cores)]
    runs: dict[System, list[dict[str, float]]] = {system: [] for system in systems}
    for _ in range(arguments.rounds):
        for system, results in runs.items():
            results.append(measured(system, root, steps=arguments.steps))
            print(f"{system}: {results[-1]}", flush=True)
    print(f"\n{table(runs, steps=arguments.steps)}")


if __name__ == "__main__":
    main()
