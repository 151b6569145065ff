"""Training speed on one GPU: tokens/s, MFU and peak memory at sequence 2048 in bf16, beside transformers.

    python -m tests.benchmarks.gpu                    # 124M, 350M and 1.3B on a GPU
    python -m tests.benchmarks.gpu --sizes toy        # on a CPU, to see that it runs

Ours is the path that `pretrain` takes: blocks compiled one by one, autocast, scores in parts, fused AdamW, gradients in
one buffer. Theirs is `LlamaForCausalLM` of the same shape in a plain loop with the same optimizer, eager ("nanoGPT
style") and compiled. One runs after the other, as two would not fit in memory; median and spread are printed. MFU
counts attention (PaLM, appendix B) and takes the vendor's dense peak.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ConfigError
from lilpipe.model.devices import device_at_hand, mfu
from lilpipe.model.flops import num_parameters, training_flops_per_token
from lilpipe.model.transformer import Transformer
from lilpipe.training import activation_checkpointing, compilation
from lilpipe.training.optimizer import make_optimizers, take_step
from lilpipe.training.precision import autocast
from lilpipe.training.replica import Loss, Replica
from tests.benchmarks.peers import llama

VOCAB_SIZE = 50_304
SEQ_LEN = 2048


@dataclass(frozen=True)
class Size:
    """A model and the rows of a step that keep a GPU of 80 GB and more busy."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    batch_size: int
    seq_len: int = SEQ_LEN
    vocab_size: int = VOCAB_SIZE

    def model(self) -> ModelConfig:
        return ModelConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_seq_len=self.seq_len,
        )


SIZES = {
    "toy": Size(64, 2, 4, 176, batch_size=2, seq_len=64, vocab_size=512),
    "124M": Size(768, 12, 12, 2048, batch_size=32),
    "350M": Size(1024, 24, 16, 2816, batch_size=16),
    "1.3B": Size(2048, 24, 16, 5632, batch_size=8),
}


def ours(size: Size, device: torch.device, checkpointing: activation_checkpointing.Mode) -> Callable[[], None]:
    """One step of lilpipe's."""
    model = Transformer(size.model(), size.vocab_size)
    model.init_weights(0)
    model = model.to(device)
    activation_checkpointing.apply(model, checkpointing)
    compilation.compile_blocks(model)
    rows = tokens(size, device)

    def loss(module: torch.nn.Module, step: int, micro: int) -> Loss:
        with autocast("bf16", device):
            scores = module(rows[:, :-1], targets_BT=rows[:, 1:])
        return Loss(-scores.logprobs.sum(), count=rows[:, 1:].numel(), num_tokens=rows[:, 1:].numel())

    replica = Replica(model, loss, accumulation_steps=lambda _: 1)
    optimizers = make_optimizers(replica.parts, OptimizerConfig())

    def step() -> None:
        replica.zero_grad()
        (found,) = replica.forward_backward(0)
        replica.reduce(count=found.count, max_norm=1.0)
        take_step(optimizers)

    return step


def theirs(size: Size, device: torch.device, *, compiled: bool) -> Callable[[], None]:
    """One step of transformers'."""
    model = llama(size.model(), size.vocab_size)
    torch.nn.Module.to(model, device)
    forward = torch.compile(model) if compiled else model
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    rows = tokens(size, device)

    def step() -> None:
        adamw.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return step


def tokens(size: Size, device: torch.device) -> torch.Tensor:
    """Rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size.vocab_size, (size.batch_size, size.seq_len + 1), generator=generator).to(device)


def measure(step: Callable[[], None], device: torch.device, *, num_steps: int) -> float:
    """Seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(num_steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / num_steps


def run(name: str, device: torch.device, *, rounds: int, num_steps: int, checkpointing: str) -> None:
    """Print one size's table."""
    size = SIZES[name]
    flops = training_flops_per_token(size.model(), size.vocab_size)
    print(f"\n{name}: {num_parameters(size.model(), size.vocab_size) / 1e6:,.1f} M parameters, {size}")
    try:
        peak = device_at_hand().peak("bf16")
    except ConfigError as error:
        print(f"no MFU: {error}")
        peak = float("inf")
    contestants = {
        "lilpipe": lambda: ours(size, device, checkpointing),  # type: ignore[arg-type]
        "transformers, eager": lambda: theirs(size, device, compiled=False),
        "transformers, compiled": lambda: theirs(size, device, compiled=True),
    }
    for label, make in contestants.items():  # one after the other: two would not fit in memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = make()
            begun = time.perf_counter()
            measure(step, device, num_steps=2)
            cold = time.perf_counter() - begun
            seconds = [measure(step, device, num_steps=num_steps) for _ in range(rounds)]
        except torch.OutOfMemoryError:
            print(f"  {label:24} out of memory at batch {size.batch_size}")
            continue
        rates = [size.batch_size * size.seq_len / each for each in seconds]
        median = statistics.median(rates)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        used = mfu(median, flops_per_token=flops, num_devices=1, peak=peak)
        spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
        print(f"  {label:24} {median:12,.0f} tokens/s ({spread})  MFU {used:.1%}  {memory:.1f} GiB  cold {cold:.0f} s")
        del step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="124M,350M,1.3B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpointing", default="none", choices=["none", "selective", "full"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: no GPU was seen"
    print(f"{name}, torch {torch.__version__}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    for size in arguments.sizes.split(","):
        run(size, device, rounds=arguments.rounds, num_steps=arguments.steps, checkpointing=arguments.checkpointing)


if __name__ == "__main__":
    main()
