"""Training and sampling speed of the tiny recipe's model, beside transformers' Llama in the same run, on one thread.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.model_speed

Rounds alternate, so that all meet the same load of the machine, and time is the processor's; the best and the median
round are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lilpipe.config.model import ModelConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import generate
from lilpipe.model.transformer import Transformer
from tests.benchmarks.peers import llama

SHAPE = ModelConfig(hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=128)
VOCAB_SIZE = 1024
BATCH_SIZE, SEQ_LEN = 8, 128
NUM_PROMPTS, NUM_NEW_TOKENS = 256, 24
ROUNDS = 9


def models() -> dict[str, torch.nn.Module]:
    """The same weights in ours and in theirs, with both of their attentions."""
    ours = Transformer(SHAPE, VOCAB_SIZE)
    ours.init_weights(0)
    found: dict[str, torch.nn.Module] = {"lilpipe": ours}
    for attention in ("eager", "sdpa"):
        theirs = llama(SHAPE, VOCAB_SIZE, attention=attention)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        found[f"transformers, {attention}"] = theirs
    return found


def training_step(model: torch.nn.Module) -> int:
    """Forward and backward pass of one batch; gives the number of tokens."""
    tokens_BT = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    output = model(tokens_BT[:, :-1])
    logits = output if isinstance(output, torch.Tensor) else output.logits
    F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=False)
    return BATCH_SIZE * SEQ_LEN


def sampling_run(model: torch.nn.Module, *, num_generations: int) -> int:
    """Answers to prompts of 16 tokens; gives the number of new tokens."""
    num_prompts = NUM_PROMPTS // num_generations
    prompts = torch.randint(0, VOCAB_SIZE, (num_prompts, 16), generator=torch.Generator().manual_seed(0))
    if isinstance(model, Transformer):
        sampling = SamplingConfig(max_new_tokens=NUM_NEW_TOKENS, batch_size=NUM_PROMPTS)
        generate(model, prompts.tolist(), sampling=sampling, stop_ids=(), seed=0, num_generations=num_generations)
    else:
        model.generate(  # pyright: ignore[reportCallIssue]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
            do_sample=True,
            top_k=0,
            num_return_sequences=num_generations,
            pad_token_id=0,
        )
    return NUM_PROMPTS * NUM_NEW_TOKENS


def measure(title: str, work: Callable[[torch.nn.Module], int], *, repeats: int) -> None:
    """Print tokens per second of each model."""
    compared = models()
    speeds: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(ROUNDS):
        for name, model in compared.items():
            start = time.process_time()
            num_tokens = sum(work(model) for _ in range(repeats))
            if turn:  # the first is for warming up
                speeds[name].append(num_tokens / (time.process_time() - start))
    print(title)
    for name, values in speeds.items():
        print(f"  {name:22} best {max(values):8,.0f}  median {statistics.median(values):8,.0f} tokens/s")


def main() -> None:
    """Measure all."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    measure("forward and backward", training_step, repeats=8)
    for samples in (1, 8):
        title = f"sampling, {NUM_PROMPTS} sequences, {samples} of each prompt"
        measure(title, lambda model, samples=samples: sampling_run(model, num_generations=samples), repeats=1)


if __name__ == "__main__":
    main()
