"""Sampling on a CPU beside transformers' ``generate``, with the same weights.

    python -m tests.benchmarks.generation [--rounds 5] [--threads 2] [--shape small] [--only lilpipe ...]

64 prompts of 16 to 40 tokens, 8 samples of 64 new tokens each, in float32, at temperature 1 without filters or stop
tokens. transformers' ``LlamaForCausalLM`` has scaled-dot-product attention, prompts padded on the left and
``num_return_sequences`` 8, and as many rows at once as its name says; see ``turns`` for how all are measured. Tokens
are those that were drawn; memory is the process's largest, and the cache's share of it by the token it stands for.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import Engine
from lilpipe.generation.pages import PAGE_SIZE, cache_widths
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model.transformer import Transformer
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.turns import Finished, System, Turns, take_turns

MODULE = "tests.benchmarks.generation"
SHAPES = {
    "tiny": (
        ModelConfig(hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=256),
        1024,
    ),
    "small": (
        ModelConfig(hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=4, intermediate_size=704, max_seq_len=256),
        4096,
    ),
}
"""Shape and vocabulary: 0.4 M and 5.5 M parameters."""
NUM_PROMPTS, NUM_SAMPLES, NEW_TOKENS = 64, 8, 64
TOKENS = NUM_PROMPTS * NUM_SAMPLES * NEW_TOKENS
ROWS = NUM_PROMPTS * NUM_SAMPLES
KINDS = {
    "lilpipe": ("lilpipe", 512, KEEP_MEMORY),
    "lilpipe, 256 rows": ("lilpipe", 256, KEEP_MEMORY),
    "transformers, 64 rows": ("transformers", 64, {}),
    "transformers, 256 rows": ("transformers", 256, {}),
    "transformers, 512 rows": ("transformers", 512, {}),
    "transformers, 512 rows, our memory settings": ("transformers", 512, KEEP_MEMORY),
}


def cache_bytes_per_token(model):
    """Bytes that a cached token takes in all layers, without what is free in its page."""
    heads, key_width, value_width = cache_widths(model.config)
    return model.config.num_layers * heads * (key_width + value_width) * next(model.parameters()).element_size()


def build(shape: str) -> tuple[Transformer, list[list[int]]]:
    """The model and the prompts that all meet."""
    config, vocab_size = SHAPES[shape]
    model = Transformer(config, vocab_size)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 41, (NUM_PROMPTS,), generator=generator).tolist()
    return model.eval(), [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def ours(model: Transformer, prompts: list[list[int]], num_rows: int) -> Callable[[int], int]:
    """Draws all samples; gives the bytes of the cache."""
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=num_rows)

    def sample(seed: int) -> int:
        engine = Engine(model, max_rows=num_rows)
        requests = [
            engine.submit(prompt, sampling=sampling, stop_ids=(), seed=seed, num_generations=NUM_SAMPLES, index=index)
            for index, prompt in enumerate(prompts)
        ]
        while engine.step():
            pass
        assert sum(len(sample.tokens) for request in requests for sample in request.samples) == TOKENS
        pages = engine.rows.answers.capacity + engine.rows.prompts.capacity
        return pages * PAGE_SIZE * cache_bytes_per_token(model)

    return sample


def theirs(model: Transformer, prompts: list[list[int]], num_rows: int) -> Callable[[int], int]:
    """The same by transformers."""
    from tests.benchmarks.peers import llama

    peer = llama(model.config, model.vocab_size, pad_token_id=0, bos_token_id=None, eos_token_id=None).eval()
    missing = peer.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"])
    assert not missing.unexpected_keys
    with torch.no_grad():
        ids = torch.tensor(prompts[:1])
        torch.testing.assert_close(peer(ids).logits, model(ids), atol=1e-4, rtol=1e-4)

    @torch.inference_mode()
    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        at_once, most = num_rows // NUM_SAMPLES, 0
        for start in range(0, NUM_PROMPTS, at_once):
            chunk = prompts[start : start + at_once]
            longest = max(map(len, chunk))
            result = cast(Any, peer).generate(
                input_ids=torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in chunk]),
                attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in chunk]),
                do_sample=True,
                top_k=0,
                num_return_sequences=NUM_SAMPLES,
                max_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
            )
            assert result.sequences.shape == (len(chunk) * NUM_SAMPLES, longest + NEW_TOKENS)
            layers = result.past_key_values.layers
            most = max(most, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        return most

    return sample


def take_part(kind: str, num_rows: int, shape: str, told: Path) -> None:
    """Be one of the systems; memory goes to a file."""
    model, prompts = build(shape)
    sample = (ours if kind == "lilpipe" else theirs)(model, prompts, num_rows)
    turns, cache = Turns(steps_per_turn=1), 0
    try:
        for step in range(10_000):
            turns(step)
            cache = sample(step)
    except Finished:
        cached = num_rows * (sum(map(len, prompts)) / NUM_PROMPTS + NEW_TOKENS - 1)
        told.write_text(
            json.dumps(
                {
                    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "per_token": cache / cached,
                    "least_per_token": cache_bytes_per_token(model),
                }
            )
        )


def print_table(shape: str, systems: list[System], folder: Path) -> None:
    """Speed and memory, and how many times as fast as each peer ours is."""
    print(f"\n{shape}: {sum(p.numel() for p in build(shape)[0].parameters()) / 1e6:.1f} M parameters\n")
    mine = next((system for system in systems if system.name == "lilpipe"), None)
    rows = []
    for system in systems:
        memory = json.loads(told_at(folder, shape, system.name).read_text())
        rows.append(
            [
                system.name,
                spread([TOKENS / seconds for seconds in system.seconds]),
                "" if mine is None or system is mine else ratio(system.seconds, mine.seconds),
                f"{memory['peak'] / 2**20:,.0f}",
                f"{memory['per_token']:,.0f} (of {memory['least_per_token']:,})",
            ]
        )
    print(markdown(["system", "tokens/s", "lilpipe is", "peak memory, MiB", "cache, bytes a token"], rows))


def told_at(folder: Path, shape: str, name: str) -> Path:
    """Where a system leaves what it tells of its memory."""
    return folder / f"{shape}, {name}.json"


def compare(shape: str, folder: Path, *, rounds: int, threads: int, only: list[str]) -> None:
    """Measure all at one shape and print."""
    chosen = {name: kind for name, kind in KINDS.items() if not only or name in only}
    systems = [
        System(
            name,
            [MODULE, "--system", kind, str(num_rows), shape, str(told_at(folder, shape, name))],
            {"OMP_NUM_THREADS": str(threads), **environment},
        )
        for name, (kind, num_rows, environment) in chosen.items()
    ]
    take_turns(systems, rounds=rounds)
    print_table(shape, systems, folder)


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", action="append", default=[], choices=list(SHAPES))
    parser.add_argument("--only", action="append", default=[], choices=list(KINDS))
    parser.add_argument("--system", nargs=4)
    arguments = parser.parse_args()
    if arguments.system:
        kind, num_rows, shape, told = arguments.system
        return take_part(kind, int(num_rows), shape, Path(told))
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shape or list(SHAPES):
            compare(shape, Path(folder), rounds=arguments.rounds, threads=arguments.threads, only=arguments.only)


if __name__ == "__main__":
    main()
