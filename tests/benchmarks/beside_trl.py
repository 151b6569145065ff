"""What the comparisons of fine-tuning with TRL's trainers share: the texts, the peer's settings, a watch and a table.

Both train the same weights in float32 with fused AdamW. The second of two epochs is timed, in a process of its own for
each measurement; systems take turns. Useful tokens are those of the examples, not padding. A process of ours, and one
of TRL's whose name says so, has the allocator's settings that a pipeline starts its workers with.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig, TrainingSection
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train_tokenizer as train_tokenizer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune, loop
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.training_data import standard_library

MAX_SEQ_LEN = 256
SIZES = {
    "small": (
        1024,
        ModelConfig(
            hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=MAX_SEQ_LEN
        ),
    ),
    "medium": (
        4096,
        ModelConfig(
            hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=704, max_seq_len=MAX_SEQ_LEN
        ),
    ),
}
"""Vocabulary and shape: 0.4 M and 5.5 M parameters."""
COLUMNS = {"training": "useful tokens/s", "in_all": "an epoch in all", "training_cpu": "per CPU second"}
"""What is told of a run, and what it is called: ``in_all`` counts the pass of the reference too, where there is one."""
System = Callable[[Path, int], None]
"""Trains what lies in a folder, so many examples a step, and tells of it by a ``Watch``."""


class Excerpts:
    """Texts of random lengths out of Python's standard library."""

    def __init__(self, texts: list[str]) -> None:
        self._words, self._random = " ".join(texts).split(), Random(0)

    def draw(self, length: tuple[int, float, int]) -> str:
        """So many words: their median, the spread of the logarithm, and the most."""
        median, sigma, most = length
        count = min(most, max(1, round(median * self._random.lognormvariate(0, sigma))))
        start = self._random.randrange(len(self._words) - count)
        return " ".join(self._words[start : start + count])


def save_start(root: Path, size: str) -> tuple[Tokenizer, Excerpts]:
    """The model that all begin with and its tokenizer, under ``root``, and texts to make examples of."""
    vocab_size, shape = SIZES[size]
    texts = standard_library(2_000_000)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    model = Transformer(shape, vocab_size)
    model.init_weights(0)
    save_model(model, tokenizer, root)
    return tokenizer, Excerpts(texts)


# --- the systems --------------------------------------------------------------------------------------------------


class Watch:
    """Notes the time of the second epoch and of the reference's pass, and the memory before and at its highest."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.reference = 0.0
        self._begun: tuple[float, float] | None = None

    def begin(self) -> None:
        """The first epoch is over."""
        self._begun = time.process_time(), time.perf_counter()

    def report(self, num_tokens: int) -> None:
        """Print one line of JSON: tokens a second, memory in bytes."""
        assert self._begun is not None, "the second epoch never began"
        cpu, seconds = time.process_time() - self._begun[0], time.perf_counter() - self._begun[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {
            "training": num_tokens / seconds,
            "in_all": num_tokens / (seconds + self.reference),
            "training_cpu": num_tokens / cpu,
            "num_tokens": num_tokens,
            "peak": peak,
            "growth": peak - self.before,
        }
        print(json.dumps(told), flush=True)


def train_ours(
    trainer_module: finetune.TrainerModule,
    workspace: Workspace,
    config: TrainingSection,
    optimizer: OptimizerConfig,
    *,
    steps_of_epoch: int,
    watch: Watch,
    num_tokens: int,
) -> None:
    """Two epochs by the stages' own loop."""
    reached: list[int] = []

    def before_step(step: int) -> None:
        if step == steps_of_epoch:
            watch.begin()
        elif step == 2 * steps_of_epoch:  # the epochs are over, and what follows is no training
            watch.report(num_tokens)
            reached.append(step)

    loop.train(
        trainer_module,
        num_steps=2 * steps_of_epoch + 1,
        workspace=workspace,
        section=config,
        optimizer=optimizer,
        before_step=before_step,
    )
    assert reached


def trl_settings(folder: str, *, batch_size: int, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Two epochs as TRL's documentation says, without saves and progress bars."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        "num_train_epochs": 2,
        "per_device_train_batch_size": batch_size,
        "optim": "adamw_torch_fused",
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }


def train_theirs(trainer: Any, *, watch: Watch, num_tokens: int) -> None:
    """Two epochs by a trainer of TRL's."""
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch >= 1:
                watch.begin()

    trainer.add_callback(Epochs)
    trainer.train()
    watch.report(num_tokens)


# --- the parent ---------------------------------------------------------------------------------------------------


def measure(module: str, name: str, root: Path, *, batch_size: int, threads: int) -> dict[str, float]:
    """One run of a system in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": cache, "TQDM_DISABLE": "1"}
        environment |= KEEP_MEMORY if name.startswith("lilpipe") or name.endswith("our memory settings") else {}
        arguments = [sys.executable, "-m", module, "--system", name, str(root), "--batch-size", str(batch_size)]
        found = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in found.stdout.splitlines() if line.startswith('{"training"')))


def table(runs: Mapping[str, list[dict[str, float]]], columns: list[str]) -> str:
    """Speeds, memory, and how many times as fast ours is by each of the columns, in the same rounds."""
    rows = []
    for name, found in runs.items():
        row = [name, *(spread([run[key] for run in found]) for key in columns)]
        row += [f"{statistics.median(run[key] for run in found) / 2**20:,.0f}" for key in ("peak", "growth")]
        if (ours := runs.get("lilpipe")) is None or name == "lilpipe":
            row += ["" for _ in columns]
        else:
            row += [ratio([run[key] for run in ours], [run[key] for run in found]) for key in columns]
        rows.append(row)
    called = [COLUMNS[key] for key in columns]
    ratios = [f"lilpipe is, {name}" for name in called]
    return markdown(["system", *called, "peak memory, MiB", "in training, MiB", *ratios], rows)


def compare(
    module: str,
    systems: Mapping[str, System],
    prepare: Callable[[Path, str, int], None],
    *,
    examples: Mapping[str, int],
    columns: list[str],
) -> None:
    """Measure all in turns and print a table; or be measured.

    ``prepare`` writes the model and the examples of an epoch into a folder; ``examples`` says how many at each size.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(examples), default="small")
    parser.add_argument("--examples", type=int, help="in an epoch; as many as the size has unless given")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=list(systems),
        metavar="NAME",
        help=f"may be repeated: {'; '.join(systems)}",
    )
    parser.add_argument("--system", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.system:
        name, root = given.system
        return systems[name](Path(root), given.batch_size)
    num_examples = given.examples or examples[given.size]
    if not num_examples or num_examples % given.batch_size:
        parser.error(f"--examples {num_examples}: expected whole steps of {given.batch_size}, one at least")
    print(
        f"{given.size}, {num_examples} examples, {given.batch_size} a step, {given.threads} threads, "
        f"{given.rounds} rounds, torch {torch.__version__}\n"
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in given.only or systems}
    counts: set[float] = set()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.size, num_examples)
        for turn in range(given.rounds):
            for name, found in runs.items():
                run = measure(module, name, Path(folder), batch_size=given.batch_size, threads=given.threads)
                found.append(run)
                print(f"round {turn + 1}, {name}: {run['training']:,.0f} tokens/s", file=sys.stderr, flush=True)
                counts.add(run["num_tokens"])
                assert len(counts) == 1, f"not the same tokens: {counts}"
    print(table(runs, columns))
