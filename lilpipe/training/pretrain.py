"""Stage ``pretrain``: next-token training of a fresh model on token shards.

Rows come from the corpus and from the exercises in stated shares; validation is in bits per byte of each.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation.bits_per_byte import bits_per_byte
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.shards import TokenShards
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Evaluation, Loss, LossFunction, train

CORPUS, EXERCISES = "corpus", "exercises"


def run(config: PretrainConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train. Raises ``ConfigError`` if the shares ask for exercises that are not there, ``DataError`` for too little
    text, ``ArtifactError`` if the shards and their tokenizer do not belong together.
    """
    tokens = inputs["tokens"]
    assert isinstance(tokens, Artifact)
    assert config.seed is not None
    shards = TokenShards.open(tokens.path)
    tokenizer = shards.tokenizer  # checked now and not after hours of training
    loader = PretrainLoader(
        shards,
        shares=source_shares(config.exercise_share, shards.sources),
        seq_len=config.model.max_seq_len,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        seed=config.seed,
    )
    model = Transformer(config.model, shards.vocab_size)
    model.init_weights(config.seed)
    model = model.to(distributed.device())
    result = train(
        model,
        loss=next_token_loss(loader, accumulation_steps=config.accumulation_steps),
        num_steps=config.num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        accumulation_steps=config.accumulation_steps,
        evaluate=validation(loader, sources=shards.sources, num_rows=config.eval_rows),
        eval_every=config.eval_every,
        identity={"tokens": tokens.content_digest},
    )
    metrics = {
        **result.metrics,
        "train_loss": result.final_loss(),
        "tokens": float(result.num_tokens),
        "tokens_per_second": result.tokens_per_second,
        "num_parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }
    if distributed.is_main():
        save_model(model, tokenizer, workspace.output)
        write_report(workspace, title="Pretraining", losses=result.losses, config=config, key_figures=metrics)
    return metrics


def source_shares(exercise_share: float, sources: tuple[str, ...]) -> dict[str, float]:
    """Share of rows of each source; a source with none is left out. Raises ``ConfigError`` for one that is missing."""
    shares = {CORPUS: 1 - exercise_share, EXERCISES: exercise_share}
    shares = {name: share for name, share in shares.items() if share > 0}
    if missing := sorted(shares.keys() - set(sources)):
        remedy = {
            CORPUS: "set it below 1 only where the tokens hold a corpus",
            EXERCISES: "set it to 0, or give the step `tokens` an input `prompts`",
        }[missing[0]]
        raise ConfigError(
            f"pretrain.exercise_share: got {exercise_share}, which takes rows from {missing[0]!r}, but the tokens hold "
            f"{', '.join(sources) or 'nothing'} alone; {remedy}"
        )
    return shares


def next_token_loss(loader: PretrainLoader, *, accumulation_steps: int) -> LossFunction:
    """Cross-entropy summed over this worker's rows of a micro-batch."""
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()

    @lru_cache(maxsize=1)
    def rows(step: int) -> tuple[Tensor, Tensor]:
        return loader.batch(step, rank=rank, world_size=world_size)

    def loss(model: nn.Module, step: int, micro: int) -> Loss:
        inputs_BT, targets_BT = (part.chunk(accumulation_steps)[micro].to(device) for part in rows(step))
        logits_NV = model(inputs_BT).flatten(0, 1)
        total = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")
        return Loss(total, count=targets_BT.numel(), num_tokens=targets_BT.numel())

    return loss


def validation(loader: PretrainLoader, *, sources: tuple[str, ...], num_rows: int) -> Evaluation:
    """``validation_bits_per_byte_<source>`` of every source, the rows divided among the workers."""
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    rows = {source: loader.validation(source, num_rows) for source in sources}

    def evaluate(model: nn.Module, done: int) -> Mapping[str, float]:  # noqa: ARG001 (the same rows at any step)
        # A worker's rows over the bytes of all rows: the parts add up to the whole.
        parts = [
            bits_per_byte(
                model, inputs_BT[rank::world_size].to(device), targets_BT[rank::world_size].to(device), num_bytes
            )
            for inputs_BT, targets_BT, num_bytes in rows.values()
        ]
        names = [f"validation_bits_per_byte_{source}" for source in rows]
        return dict(zip(names, distributed.sum_floats(parts), strict=True))

    return evaluate


STAGE = Stage(
    name="pretrain",
    output="Checkpoint",
    config=PretrainConfig,
    run=run,
    inputs={"tokens": "TokenShards"},
    distributed=True,
    main_metric="validation_bits_per_byte_corpus",
)
