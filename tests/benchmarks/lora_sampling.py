"""Sampling from a model with adapters on a CPU, by three ways to apply them.

    python -m tests.benchmarks.lora_sampling [--rounds 4] [--threads 1]

8 prompts of 48 tokens, 8 samples of 64 new tokens each, as in a rollout of GRPO; 8 layers of width 384, adapters of
rank 16 on all layers. `modules`: the adapted modules in every step. `fused`: the fused decoder, which copies the
weights anyway, merges the adapters into its copy; the prompts are read by the modules. `scratch`: a second model with
merged weights, which then has a fused decoder. Processor time in seconds, the ways in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import Engine
from lilpipe.model.lora import adapted_layers, add_adapters, merged_tensors, start_adapters
from lilpipe.model.transformer import Transformer

SHAPE = ModelConfig(hidden_size=384, num_layers=8, num_heads=6, num_kv_heads=2, intermediate_size=1024, max_seq_len=256)
VOCAB = 8192
PROMPTS = [[(7 * prompt + place) % VOCAB for place in range(48)] for prompt in range(8)]
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=64, batch_size=64)


def adapted(lora: LoRAConfig) -> Transformer:
    """A model of random weights whose adapters have an effect."""
    model = Transformer(SHAPE, VOCAB)
    model.init_weights(0)
    add_adapters(model.eval(), lora, seed=0, stage="sft")
    start_adapters(model, lora, stage="sft")
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    return model


def draw(model: Transformer, *, fuse: bool) -> None:
    engine = Engine(model, max_rows=64, fuse=fuse)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(prompt, sampling=SAMPLING, stop_ids=(), seed=0, num_generations=8, index=index)
    while engine.step():
        pass


def draw_from_scratch(model: Transformer) -> None:
    plain = Transformer(SHAPE, VOCAB).eval()
    plain.load_state_dict(dict(merged_tensors(model)))
    draw(plain, fuse=True)


WAYS: dict[str, Callable[[Transformer], None]] = {
    "modules": lambda model: draw(model, fuse=False),
    "fused": lambda model: draw(model, fuse=True),
    "scratch": draw_from_scratch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in (LoRAConfig(r=16), LoRAConfig(r=16, use_dora=True)):
        model = adapted(kind)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, work in WAYS.items():
                begun = time.process_time()
                work(model)
                seconds[way].append(time.process_time() - begun)
        for way, times in seconds.items():
            name = "DoRA" if kind.use_dora else "LoRA"
            print(f"{name}, {way}: {min(times):.2f} s ({min(times):.2f}-{max(times):.2f})", flush=True)


if __name__ == "__main__":
    main()
