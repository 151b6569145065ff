"""Quality for time: when does Muon reach the validation bits per byte that AdamW ends with?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.muon ../shared/data

The English documents, a vocabulary of 4,096, a model of 4 layers and width 192. Each optimizer's learning rate is
chosen on documents and a seed that the report does not use; then both run on the same batches, for three seeds. Time is
the processor's in training steps, validation left out.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.metrics.bits_per_byte import bits_per_byte
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.bpe import train_tokenizer as train_tokenizer
from lilpipe.training.optimizer import Optimizer
from lilpipe.training.replica import Loss, Replica
from lilpipe.training.schedule import lr_scale
from tests.benchmarks.english import english_documents

SHAPE = ModelConfig(hidden_size=192, num_layers=4, num_heads=3, num_kv_heads=3, intermediate_size=512, max_seq_len=128)
VOCAB_SIZE, BATCH_SIZE, SEQ_LEN = 4096, 8, 128
NUM_STEPS, TUNING_STEPS, EVAL_EVERY = 500, 150, 20
SEEDS = (1, 2, 3)
TUNING_SEED = 100
RATES = {"adamw": (1.5e-3, 3e-3, 6e-3), "muon": (0.01, 0.02, 0.04)}


class Data:
    """Rows of tokens, drawn by seed and step, and held-out rows."""

    def __init__(self, tokens: torch.Tensor, validation: torch.Tensor, num_bytes: int) -> None:
        self.tokens = tokens
        rows = validation[: len(validation) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1)
        self.inputs, self.targets, self.num_bytes = rows[:, :-1], rows[:, 1:], num_bytes

    def rows(self, seed: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
        starts = torch.randint(len(self.tokens) - SEQ_LEN - 1, (BATCH_SIZE, 1), generator=generator)
        return self.tokens[starts + torch.arange(SEQ_LEN + 1)]


def load() -> tuple[Data, Data]:
    """Data to tune on and data to report, of documents apart."""
    _, documents = english_documents()
    texts = [document["text"] for document in documents][::4]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    halves = []
    for half in (texts[0::2], texts[1::2]):
        num_validation = max(1, len(half) // 50)
        validation, training = half[:num_validation], half[num_validation:]
        encoded = [
            torch.tensor([i for text in part for i in tokenizer.encode(text)[:8000]]) for part in (training, validation)
        ]
        validation_tokens = encoded[1][: 64 * (SEQ_LEN + 1)]
        num_bytes = len(tokenizer.decode(validation_tokens.tolist()).encode())
        halves.append(Data(encoded[0], validation_tokens, num_bytes))
    return halves[0], halves[1]


def train(data: Data, kind: str, rate: float, adam_rate: float, *, seed: int, num_steps: int) -> list[tuple[Any, ...]]:
    """(processor's seconds in steps, bits per byte) along the run."""
    settings: dict[str, Any] = {"learning_rate": rate} if kind == "adamw" else {"muon_learning_rate": rate}
    config = OptimizerConfig(kind=kind, warmup_steps=30, **{"learning_rate": adam_rate, **settings})  # type: ignore[arg-type]
    model = Transformer(SHAPE, VOCAB_SIZE)
    model.init_weights(seed)

    def loss(module: torch.nn.Module, step: int, micro: int) -> Loss:
        rows = data.rows(seed, step)
        scores = module(rows[:, :-1], targets_BT=rows[:, 1:])
        return Loss(-scores.logprobs.sum(), count=rows[:, 1:].numel(), num_tokens=rows[:, 1:].numel())

    replica = Replica(model, loss, accumulation_steps=lambda _: 1)
    optimizer = Optimizer(replica.parts, config)
    seconds, curve = 0.0, []
    for step in range(num_steps):
        begun = time.process_time()
        replica.zero_grad()
        (found,) = replica.forward_backward(step)
        norm = replica.reduce(count=found.count, max_norm=config.max_grad_norm)
        assert math.isfinite(norm)
        optimizer.step(lr_scale(step, num_steps=num_steps, warmup_steps=30, shape="linear", min_ratio=0.0))
        seconds += time.process_time() - begun
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == num_steps:
            curve.append((seconds, bits_per_byte(model, data.inputs, data.targets, data.num_bytes)))
    return curve


def main() -> None:
    torch.set_num_threads(1)
    tuning, reported = load()
    best: dict[str, float] = {}
    for kind, rates in RATES.items():
        ends = {}
        for rate in rates:
            adam_rate = best.get("adamw", rate)
            ends[rate] = train(tuning, kind, rate, adam_rate, seed=TUNING_SEED, num_steps=TUNING_STEPS)[-1][1]
        best[kind] = min(ends, key=lambda rate: ends[rate])
        print(f"{kind}: bits per byte by rate {ends}; {best[kind]} is taken", flush=True)
    shares = []
    for seed in SEEDS:
        curves = {
            kind: train(reported, kind, best[kind], best["adamw"], seed=seed, num_steps=NUM_STEPS) for kind in RATES
        }
        total, target = curves["adamw"][-1]
        reached = next((seconds for seconds, bits in curves["muon"] if bits <= target), math.inf)
        shares.append(reached / total)
        print(
            f"seed {seed}: adamw {target:.4f} bits per byte in {total:.1f} s; muon there in {reached:.1f} s "
            f"({shares[-1]:.1%}), ends at {curves['muon'][-1][1]:.4f} in {curves['muon'][-1][0]:.1f} s",
            flush=True,
        )
    print(f"median {statistics.median(shares):.1%} of AdamW's time ({min(shares):.1%} to {max(shares):.1%})")


if __name__ == "__main__":
    main()
