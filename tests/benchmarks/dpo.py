"""Preference optimisation on a CPU beside TRL's ``DPOTrainer``: useful tokens/s and peak memory.

    python -m tests.benchmarks.dpo [--rounds 5] [--threads 2] [--size small] [--batch-size 16] [--only NAME ...]

Both train the same weights on the same pairs in float32 with fused AdamW, with the sigmoid loss. Useful tokens are
those of both answers of a pair, each behind its prompt, not padding. The second of two epochs is timed, and the pass of
the reference over all pairs where it is made beforehand: ``an epoch in all`` is both together, which is what a run of
one epoch takes. Every measurement has a process of its own; systems take turns. Prompts and answers are as long as
short instructions: medians of 8 words of a prompt, 7 of a chosen answer, 9 of a rejected one, up to 22, 37 and 45.
TRL's settings tried: the reference beforehand or in every step, batches of like lengths or not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from lilpipe.alignment.dpo import compute_reference, make_packer
from lilpipe.alignment.pairs import PAIR_SCHEMA, PAIRS_FILE, Pair, read_pairs
from lilpipe.alignment.preference_data import encode_pairs
from lilpipe.alignment.preference_objective import PreferenceObjective
from lilpipe.alignment.tables import write_table
from lilpipe.config import DPOConfig, OptimizerConfig
from lilpipe.launch.run import KEEP_MEMORY
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train as train_tokenizer
from lilpipe.tokenizer.chat_template import Message
from lilpipe.training import finetune, loop
from tests.benchmarks.sft import SIZES
from tests.benchmarks.training_data import standard_library

MODULE = "tests.benchmarks.dpo"
NUM_PAIRS = {"small": 480, "medium": 96}
WORDS = {"prompt": (8, 0.45, 22), "chosen": (7, 0.7, 37), "rejected": (9, 0.7, 45)}
"""Median, spread of the logarithm, and most words of a text."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, schedule="constant")
THEIRS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, reference beforehand": {"precompute_ref_log_probs": True},
    "TRL, reference beforehand, like lengths": {
        "precompute_ref_log_probs": True,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "num_tokens",
        "remove_unused_columns": False,  # or the lengths would be among them
    },
}


def prepare(root: Path, size: str, num_pairs: int) -> None:
    """A model, its tokenizer and the pairs."""
    vocab_size, shape, _ = SIZES[size]
    texts = standard_library(2_000_000)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    model = Transformer(shape, vocab_size)
    model.init_weights(0)
    save_model(model, tokenizer, root)
    words, random = " ".join(texts).split(), Random(0)

    def text(kind: str) -> str:
        median, spread, most = WORDS[kind]
        count = min(most, max(1, round(median * random.lognormvariate(0, spread))))
        start = random.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    pairs: list[Pair] = []
    while len(pairs) < num_pairs:  # those that fit the model
        prompt: list[Message] = [{"role": "user", "content": text("prompt")}]
        pair = Pair(str(len(pairs)), "train", prompt, text("chosen"), text("rejected"))
        pairs += [pair] if encode_pairs(tokenizer, [pair], max_len=shape.max_seq_len)[0] else []
    write_table(root / PAIRS_FILE, [vars(pair) for pair in pairs], PAIR_SCHEMA)


# --- the systems --------------------------------------------------------------------------------------------------


class Watch:
    """Notes the time of the reference's pass and of the second epoch, and the memory before and at its highest."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.reference = 0.0
        self.begun = (0.0, 0.0)

    def begin(self) -> None:
        """The first epoch is over."""
        self.begun = time.process_time(), time.perf_counter()

    def report(self, num_tokens: int) -> None:
        """Print one line of JSON."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cpu, seconds = time.process_time() - self.begun[0], time.perf_counter() - self.begun[1]
        print(
            json.dumps(
                {
                    "training": num_tokens / seconds,
                    "in_all": num_tokens / (seconds + self.reference),
                    "training_cpu": num_tokens / cpu,
                    "num_tokens": num_tokens,
                    "peak": peak / 2**20,
                    "growth": (peak - self.before) / 2**20,
                }
            )
        )


def run_lilpipe(root: Path, *, batch_size: int) -> None:
    """The stage's own reference pass, objective and loop."""
    config = DPOConfig(seed=0, num_epochs=2, batch_size=batch_size, optimizer=OPTIMIZER, nll_coefficient=0.0)
    model, tokenizer = load_model(root)
    rows, _ = encode_pairs(tokenizer, read_pairs(root, "train"), max_len=model.config.max_seq_len)
    num_tokens = sum(row.first.num_tokens + row.second.num_tokens for row in rows)
    steps_of_epoch, watch, workers = len(rows) // batch_size, Watch(), finetune.Workers(config)
    with tempfile.TemporaryDirectory() as work:
        workspace = Workspace(Path(work))
        begun = time.perf_counter()
        packer = make_packer(model, tokenizer, config)
        _, reference_R2 = compute_reference(model, rows, packer, config, workspace)
        watch.reference = time.perf_counter() - begun
        objective = PreferenceObjective(rows, config, packer, reference_R2=reference_R2, rank=0, world_size=1)
        trainee = finetune.build(config, root, objective, workers, stage="dpo")
        del model

        def before_step(step: int) -> None:
            if step == steps_of_epoch:
                watch.begin()
            elif step == 2 * steps_of_epoch:  # the epochs are over, and what follows is no training
                watch.report(num_tokens)

        loop.train(
            trainee,
            num_steps=2 * steps_of_epoch + 1,
            workspace=workspace,
            section=config,
            optimizer=config.optimizer,
            before_step=before_step,
        )


def run_trl(root: Path, settings: dict[str, Any], *, batch_size: int) -> None:
    """``DPOTrainer`` as its documentation says, without saves and progress bars."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer import dpo_config, dpo_trainer

    class Trainer(dpo_trainer.DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **options)
            watch.reference = time.perf_counter() - begun
            return result

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch >= 1:
                watch.begin()

    tokenizer, watch = AutoTokenizer.from_pretrained(root), Watch()
    _, ours = load_model(root)
    encoded, _ = encode_pairs(ours, read_pairs(root, "train"), max_len=10_000)
    rows = [
        {
            "prompt": pair.prompt,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "num_tokens": max(row.first.num_tokens, row.second.num_tokens),
        }
        for pair, row in zip(read_pairs(root, "train"), encoded, strict=True)
    ]
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(root),
            args=dpo_config.DPOConfig(
                output_dir=work,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=10,
                num_train_epochs=2,
                per_device_train_batch_size=batch_size,
                optim="adamw_torch_fused",
                learning_rate=OPTIMIZER.learning_rate,
                lr_scheduler_type="constant",
                max_length=None,
                dataloader_pin_memory=False,
                dataloader_drop_last=True,
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = zip(*(trainer.train_dataset[name] for name in columns), strict=True)
        num_tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in lengths)
        trainer.add_callback(Epochs)
        trainer.train()
        watch.report(num_tokens)


# --- the parent ---------------------------------------------------------------------------------------------------


def measure(name: str, root: Path, *, batch_size: int, threads: int) -> dict[str, float]:
    """One run of a system in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": cache}
        environment |= KEEP_MEMORY if name == "lilpipe" else {}
        arguments = [sys.executable, "-m", MODULE, "--system", name, str(root), "--batch-size", str(batch_size)]
        found = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in found.stdout.splitlines() if line.startswith('{"training"')))


COLUMNS = {"training": "useful tokens/s", "in_all": "an epoch in all", "training_cpu": "per CPU second"}


def compare(names: list[str], root: Path, *, rounds: int, batch_size: int, threads: int) -> None:
    """Measure all in turns and print a table in Markdown."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(measure(name, root, batch_size=batch_size, threads=threads))
    assert len({run["num_tokens"] for found in runs.values() for run in found}) == 1, "not the same tokens"
    titles = [*COLUMNS.values(), "peak memory, MiB", "of it in training", "lilpipe is (each column)"]
    print(f"| system | {' | '.join(titles)} |\n| --- |{' --- |' * len(titles)}")
    for name, found in runs.items():
        cells = [_spread([run[key] for run in found]) for key in COLUMNS]
        cells += [f"{statistics.median(run[key] for run in found):,.0f}" for key in ("peak", "growth")]
        cells.append(_ratios(runs.get("lilpipe", []), found))
        print(f"| {name} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    """How many times a system's tokens/s ours are, in the same rounds."""
    cells = []
    for key in COLUMNS:
        ratios = [a[key] / b[key] for a, b in zip(ours, theirs, strict=False)]
        cells.append(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "")
    return ", ".join(cells)


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(NUM_PAIRS), default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", action="append", default=[], choices=["lilpipe", *THEIRS])
    parser.add_argument("--system", nargs=2)
    arguments = parser.parse_args()
    if arguments.system:
        name, root = arguments.system
        if name == "lilpipe":
            return run_lilpipe(Path(root), batch_size=arguments.batch_size)
        return run_trl(Path(root), THEIRS[name], batch_size=arguments.batch_size)
    print(
        f"{arguments.size}, {arguments.batch_size} pairs a step, {arguments.threads} threads, "
        f"{arguments.rounds} rounds, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as root:
        prepare(Path(root), arguments.size, NUM_PAIRS[arguments.size])
        compare(
            arguments.only or ["lilpipe", *THEIRS],
            Path(root),
            rounds=arguments.rounds,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )


if __name__ == "__main__":
    main()
