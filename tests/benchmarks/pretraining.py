"""Pretraining on a CPU beside transformers' Llama in a plain loop with the same fused AdamW.

    python -m tests.benchmarks.pretraining [--rounds 8] [--threads 2] [--only lilpipe --only transformers]

Both train the same shape, 5.5 M parameters, in float32 on batches of 16 x 256 tokens; see ``turns`` for how they are
measured. ``lilpipe`` is the stage's own trainer and loop, compiled as it is for a run of this size, with the memory
settings that a training process is started with; the peer's loop is given these settings too in one row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokens.data_phase_plan import open_loader
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.shards import TokenShards
from lilpipe.training import pretrain
from lilpipe.training.loop import train
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.training_data import standard_library, token_shards
from tests.benchmarks.turns import Finished, System, Turns, take_turns

MODULE = "tests.benchmarks.pretraining"
SHAPE = ModelConfig(hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=704, max_seq_len=256)
VOCAB_SIZE, BATCH_SIZE = 4096, 16
TOKENS = BATCH_SIZE * SHAPE.max_seq_len
STEPS_PER_TURN = 3
OPTIMIZER = OptimizerConfig()
LOADER_BATCHES = 100
SAVES, LOGGED = 3, 100
KINDS = {
    "lilpipe": ("lilpipe", "compiled", KEEP_MEMORY),
    "lilpipe, eager": ("lilpipe", "eager", KEEP_MEMORY),
    "transformers": ("transformers", "eager", {}),
    "transformers, compiled": ("transformers", "compiled", {}),
    "transformers, our memory settings": ("transformers", "eager", KEEP_MEMORY),
    "matrix products alone": ("products", "eager", KEEP_MEMORY),
}


def config(*, compiled: bool, **settings: int) -> PretrainConfig:
    """The run that both sides take."""
    values = {
        "seed": 0,
        "model": SHAPE,
        "optimizer": OPTIMIZER,
        "num_steps": 600,
        "batch_size": BATCH_SIZE,
        "exercise_ratio": 0.0,
        "checkpoint_every": 600,
        "compile": compiled,
        **settings,
    }
    return PretrainConfig.model_validate(values)


# --- the systems --------------------------------------------------------------------------------------------------


def run_lilpipe(shards: TokenShards, root: Path, *, compiled: bool) -> None:
    """The stage's trainer in its own loop."""
    chosen = config(compiled=compiled)
    trainer_module, _ = pretrain.build(chosen, shards.vocab_size, open_loader(chosen, shards))
    train(
        trainer_module,
        num_steps=chosen.num_steps,
        workspace=Workspace(root),
        section=chosen,
        optimizer=chosen.optimizer,
        before_step=Turns(STEPS_PER_TURN),
    )


def run_transformers(shards: TokenShards, *, compiled: bool) -> None:
    """The plain loop: ``model(input_ids, labels).loss``, backward pass, clipping, fused AdamW."""
    from tests.benchmarks.peers import llama

    model = llama(SHAPE, VOCAB_SIZE, use_cache=False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    called = torch.compile(model) if compiled else model
    loader, turns = open_loader(config(compiled=False), shards), Turns(STEPS_PER_TURN)
    for step in range(10_000):
        turns(step)
        batch = loader.batch(step, rank=0, world_size=1)
        optimizer.zero_grad()
        loss = called(input_ids=batch.inputs, labels=batch.targets, shift_labels=batch.targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        loss.item()


def run_products() -> None:
    """Nothing but the products of weights: the rate that a step could at most come near to (attention has more)."""
    model = Transformer(SHAPE, VOCAB_SIZE)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)] + [model.output_weight]
    weights = [torch.rand_like(weight) for weight in weights]
    inputs: dict[int, Tensor] = {size: torch.rand(TOKENS, size) for weight in weights for size in weight.shape}
    turns = Turns(STEPS_PER_TURN)
    for step in range(10_000):
        turns(step)
        for weight in weights:
            outputs, width = weight.shape
            torch.mm(inputs[width], weight.t())
            torch.mm(inputs[outputs], weight)
            torch.mm(inputs[outputs].t(), inputs[width])


# --- what is not training -----------------------------------------------------------------------------------------


def measure_shares(shards: TokenShards, root: Path) -> dict[str, float]:
    """Seconds of a step that go into the loader, checkpoints at their default interval, and tracking."""
    chosen = config(compiled=False, num_steps=2 * SAVES, checkpoint_every=2, log_every=1)
    loader = open_loader(chosen, shards)
    trainer_module, objective = pretrain.build(chosen, shards.vocab_size, loader)
    workspace = Workspace(root)
    result = train(trainer_module, num_steps=2 * SAVES, workspace=workspace, section=chosen, optimizer=chosen.optimizer)
    default = PretrainConfig(seed=0)
    return {
        "loader": _loader_seconds(loader),
        "waiting for data": objective.waited / (2 * SAVES),
        "checkpoints": result.time["save"] / SAVES / default.checkpoint_every,
        "tracking": _tracking_seconds(workspace, root) / default.log_every,
    }


def _loader_seconds(loader: PretrainLoader) -> float:
    begun = time.process_time()
    for step in range(LOADER_BATCHES):
        loader.batch(step % 6, rank=0, world_size=1)
    return (time.process_time() - begun) / LOADER_BATCHES


def _tracking_seconds(workspace: Workspace, root: Path) -> float:
    """To write one report of all metrics and to deliver it to MLflow, in batches as the tracker does."""
    from mlflow import MlflowClient

    from lilpipe.tracking.curve import Curve
    from lilpipe.tracking.events import read_events

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    curve = Curve(client.create_run(client.create_experiment("speed")).info.run_id, {})
    metrics = read_events(workspace.events)[-1]["metrics"]
    begun = time.perf_counter()
    for done in range(LOGGED):
        workspace.progress(1_000 + done, 2_000, "steps", **metrics)
    curve.add(read_events(workspace.events)[-LOGGED:])
    curve.deliver(client)
    return (time.perf_counter() - begun) / LOGGED


# --- the parent ---------------------------------------------------------------------------------------------------


def print_speeds(systems: list[System]) -> None:
    """Speed by system, and how many times that of each peer ours is."""
    by_name = {system.name: system for system in systems}
    rows = []
    for system in systems:
        speeds = [STEPS_PER_TURN * TOKENS / seconds for seconds in system.seconds]
        faults = f"{statistics.median(system.faults) / STEPS_PER_TURN:,.0f}"
        ratios = [
            "" if ours is None or ours is system else ratio(system.seconds, ours.seconds)
            for ours in (by_name.get("lilpipe"), by_name.get("lilpipe, eager"))
        ]
        rows.append([system.name, spread(speeds), faults, f"{system.first_seconds:.1f}", *ratios])
    titles = ["system", "tokens/s", "page faults a step", "first step, s", "lilpipe is", "lilpipe, eager is"]
    print(markdown(titles, rows))


def compare(root: Path, *, rounds: int, threads: int, only: list[str]) -> None:
    """Measure all and print."""
    token_shards(root / "tokens", standard_library(), vocab_size=VOCAB_SIZE)
    limits = {"OMP_NUM_THREADS": str(threads)}
    systems = [
        System(name, [MODULE, "--system", kind, mode, str(root / "tokens")], {**limits, **environment})
        for name, (kind, mode, environment) in KINDS.items()
        if not only or name in only
    ]
    take_turns(systems, rounds=rounds)
    print(f"torch {torch.__version__}, {threads} threads, {rounds} rounds of {STEPS_PER_TURN} steps\n")
    print_speeds(systems)
    if "lilpipe" not in {system.name for system in systems}:
        return
    torch.set_num_threads(threads)
    step = statistics.median(systems[0].seconds) / STEPS_PER_TURN
    print(f"\nOf a step of {1e3 * step:.0f} ms:")
    for name, seconds in measure_shares(TokenShards.open(root / "tokens"), root / "shares").items():
        print(f"- {name}: {1e3 * seconds:.2f} ms, {seconds / step:.2%}")


def take_part(kind: str, mode: str, tokens: Path) -> None:
    """Be one of the systems."""
    compiled = mode == "compiled"
    if kind == "products":
        return run_products()
    shards = TokenShards.open(tokens)
    if kind == "transformers":
        return run_transformers(shards, compiled=compiled)
    with tempfile.TemporaryDirectory() as root:
        return run_lilpipe(shards, Path(root), compiled=compiled)


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], choices=list(KINDS))
    parser.add_argument("--system", nargs=3)
    arguments = parser.parse_args()
    if arguments.system:
        kind, mode, tokens = arguments.system
        try:
            take_part(kind, mode, Path(tokens))
        except Finished:
            return
    with tempfile.TemporaryDirectory() as root:
        compare(Path(root), rounds=arguments.rounds, threads=arguments.threads, only=arguments.only)


if __name__ == "__main__":
    main()
