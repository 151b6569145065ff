"""Supervised fine-tuning on a CPU beside TRL's ``SFTTrainer``: useful tokens/s and peak memory.

    python -m tests.benchmarks.sft [--rounds 5] [--threads 2] [--size small] [--batch-size 16] [--only NAME ...]

Both train the same weights on the same conversations in float32 with fused AdamW, one optimizer step for each
``--batch-size`` conversations (with TRL's packing: for the rows that hold as many). Useful tokens are those of the
conversations, prompt and answer, not padding. The second of two epochs is timed, in a process of its own for each
measurement; systems take turns. The length of questions and answers is that of short instructions: a median of 8 and 7
words, up to 22 and 37. TRL's settings tried: packing or not, batches of like lengths or not, its loss in chunks, and
the allocator's settings that a training process of ours is started with.
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
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from lilpipe.alignment.prompts import Conversation, write_conversations
from lilpipe.config import ModelConfig, OptimizerConfig, SFTConfig
from lilpipe.launch.run import KEEP_MEMORY
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import train as train_tokenizer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune, loop
from lilpipe.training.conversations import encode, read_conversations
from lilpipe.training.supervised import SupervisedTokens
from tests.benchmarks.training_data import standard_library

MODULE = "tests.benchmarks.sft"
MAX_SEQ_LEN = 256
SIZES = {
    "small": (
        1024,
        ModelConfig(
            hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=MAX_SEQ_LEN
        ),
        480,
    ),
    "medium": (
        4096,
        ModelConfig(
            hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=704, max_seq_len=MAX_SEQ_LEN
        ),
        128,
    ),
}
"""Vocabulary, shape, and conversations of an epoch."""
WORDS = {"user": (8, 0.45, 22), "assistant": (7, 0.7, 37)}
"""Median, spread of the logarithm, and most words of a message."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, schedule="constant")
OURS: dict[str, dict[str, Any]] = {"lilpipe": {}, "lilpipe, not packed": {"packing": False}}
THEIRS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, like lengths": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed": {"packing": True, "max_length": MAX_SEQ_LEN},
    "TRL, like lengths, loss in chunks": {"train_sampling_strategy": "group_by_length", "loss_type": "chunked_nll"},
    "TRL, packed, loss in chunks": {"packing": True, "max_length": MAX_SEQ_LEN, "loss_type": "chunked_nll"},
    "TRL, like lengths, our memory settings": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed, our memory settings": {"packing": True, "max_length": MAX_SEQ_LEN},
}


def prepare(root: Path, size: str) -> None:
    """A model, its tokenizer and the conversations."""
    vocab_size, shape, num_conversations = SIZES[size]
    texts = standard_library(2_000_000)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    model = Transformer(shape, vocab_size)
    model.init_weights(0)
    save_model(model, tokenizer, root)
    words, random = " ".join(texts).split(), Random(0)

    def message(role: str) -> Any:
        median, spread, most = WORDS[role]
        count = min(most, max(1, round(median * random.lognormvariate(0, spread))))
        start = random.randrange(len(words) - count)
        return {"role": role, "content": " ".join(words[start : start + count])}

    talks = [
        Conversation(str(number), "", "written", [message("user"), message("assistant")])
        for number in range(num_conversations)
    ]
    write_conversations(root / "conversations.arrow", talks)


# --- the systems --------------------------------------------------------------------------------------------------


class Watch:
    """Notes when the second epoch begins and ends, and the memory at the beginning and at its highest."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.begun = self.processor = 0.0

    def begin(self) -> None:
        """The first epoch is over."""
        self.begun, self.processor = time.perf_counter(), time.process_time()

    def report(self, num_tokens: int) -> None:
        """Print one line of JSON."""
        seconds, processor = time.perf_counter() - self.begun, time.process_time() - self.processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps(
                {
                    "tokens_per_second": num_tokens / seconds,
                    "tokens_per_processor_second": num_tokens / processor,
                    "peak": peak / 2**20,
                    "growth": (peak - self.before) / 2**20,
                }
            )
        )


def run_lilpipe(root: Path, settings: dict[str, Any], *, batch_size: int) -> None:
    """The stage's own objective and loop."""
    config = SFTConfig(seed=0, num_epochs=2, batch_size=batch_size, optimizer=OPTIMIZER, **settings)
    tokenizer = Tokenizer.load(root)
    examples, _ = encode(tokenizer, read_conversations(root), max_len=MAX_SEQ_LEN)
    workers = finetune.Workers(config)
    objective = SupervisedTokens(
        examples, batch_size=batch_size, seed=0, padding_id=tokenizer.padding_id, packing=config.packing
    )
    trainee = finetune.build(config, root, objective, workers, stage="sft")
    steps_of_epoch, watch = len(examples) // batch_size, Watch()
    reached: list[int] = []

    def before_step(step: int) -> None:
        if step == steps_of_epoch:
            watch.begin()
        elif step == 2 * steps_of_epoch:  # the epochs are over, and what follows is no training
            watch.report(sum(len(example.ids) for example in examples))
            reached.append(step)

    with tempfile.TemporaryDirectory() as work:
        loop.train(
            trainee,
            num_steps=2 * steps_of_epoch + 1,
            workspace=Workspace(Path(work)),
            section=config,
            optimizer=config.optimizer,
            before_step=before_step,
        )
    assert reached


def run_trl(root: Path, settings: dict[str, Any], *, batch_size: int) -> None:
    """``SFTTrainer`` on the assistant's tokens, as its documentation says, without saves and progress bars."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trl: Any = import_module("trl")
    tokenizer = AutoTokenizer.from_pretrained(root)
    talks = [item.messages for item in read_conversations(root)]
    num_tokens = sum(len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks)
    if settings.get("packing"):  # rows that hold as many conversations as a batch of the others
        batch_size = max(1, round(batch_size * num_tokens / len(talks) / MAX_SEQ_LEN))
    with tempfile.TemporaryDirectory() as work:
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(root),
            args=trl.SFTConfig(
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
                assistant_only_loss=True,
                dataloader_pin_memory=False,
                dataloader_drop_last=not settings.get("packing"),
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in talks]),
            processing_class=tokenizer,
        )

        class Epochs(TrainerCallback):
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.epoch >= 1:
                    watch.begin()

        trainer.add_callback(Epochs)
        watch = Watch()
        trainer.train()
        watch.report(num_tokens)


# --- the parent ---------------------------------------------------------------------------------------------------


def measure(name: str, root: Path, *, batch_size: int, threads: int) -> dict[str, float]:
    """One run of a system in a process of its own."""
    keeps = name in OURS or name.endswith("our memory settings")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(KEEP_MEMORY if keeps else {})}
    arguments = [sys.executable, "-m", MODULE, "--system", name, str(root), "--batch-size", str(batch_size)]
    found = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in found.stdout.splitlines() if line.startswith('{"tokens_per_second"')))


def compare(names: list[str], root: Path, *, rounds: int, batch_size: int, threads: int) -> None:
    """Measure all in turns and print a table in Markdown."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(measure(name, root, batch_size=batch_size, threads=threads))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    columns = {"tokens_per_second": "useful tokens/s", "tokens_per_processor_second": "per CPU second"}
    titles = [*columns.values(), "peak memory, MiB", "of it in training", "lilpipe is"]
    print(f"| system | {' | '.join(titles)} |\n| --- |{' --- |' * len(titles)}")
    for name in names:
        cells = [_spread([run[key] for run in runs[name]]) for key in columns]
        cells += [f"{statistics.median(run[key] for run in runs[name]):,.0f}" for key in ("peak", "growth")]
        cells.append(_ratio(runs.get("lilpipe", []), runs[name]))
        print(f"| {name} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    """How many times a system's tokens/s ours are, in the same rounds: by time, and by the processor's."""
    cells = []
    for key in ("tokens_per_second", "tokens_per_processor_second"):
        ratios = [a[key] / b[key] for a, b in zip(ours, theirs, strict=False)]
        cells.append(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "")
    return f"{cells[0]}, CPU {cells[1]}"


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", action="append", default=[], choices=[*OURS, *THEIRS])
    parser.add_argument("--system", nargs=2)
    arguments = parser.parse_args()
    if arguments.system:
        name, root = arguments.system
        run = run_lilpipe if name in OURS else run_trl
        run(Path(root), {**OURS, **THEIRS}[name], batch_size=arguments.batch_size)
        return
    print(
        f"{arguments.size}, {arguments.batch_size} conversations a step, {arguments.threads} threads, "
        f"{arguments.rounds} rounds, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as root:
        prepare(Path(root), arguments.size)
        compare(
            arguments.only or [*OURS, *THEIRS],
            Path(root),
            rounds=arguments.rounds,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )


if __name__ == "__main__":
    main()
