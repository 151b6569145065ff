"""Stage ``pretrain``: next-token training of a fresh model on token shards.

Tokens come from the streams of the corpus and from the exercises in stated shares; validation is in bits per byte of
each.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch.nn.functional as F
from torch import nn

from lilpipe import distributed
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import PretrainConfig
from lilpipe.evaluation.bits_per_byte import bits_per_byte
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokens.loader import IGNORED, Batch, PretrainLoader, corpus_validation_shares, validation_rows
from lilpipe.tokens.plan import open_loader, plan_stretches
from lilpipe.tokens.shards import CORPUS, EXERCISES, TokenShards
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Evaluation, Loss, LossFunction, train
from lilpipe.training.mixture_report import measure_mixture, mixture_section, unmet_shares


def run(config: PretrainConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train. Raises ``ConfigError`` if the shares ask for exercises that are not there, ``DataError`` for too little
    text, ``ArtifactError`` if the shards and their tokenizer do not belong together.
    """
    tokens = inputs["tokens"]
    assert isinstance(tokens, Artifact)
    assert config.seed is not None
    shards = TokenShards.open(tokens.path)
    tokenizer = shards.tokenizer  # checked now and not after hours of training
    loader = open_loader(config, shards)
    planned = plan_stretches(config, shards)
    for line in unmet_shares(planned):
        workspace.log(line)
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
        evaluate=validation(shards, seq_len=config.model.max_seq_len, num_rows=config.eval_rows),
        eval_every=config.eval_every,
        identity={"tokens": tokens.content_digest},
    )
    metrics = {
        **result.metrics,
        "train_loss": result.final_loss(),
        "tokens": float(result.num_tokens),
        "tokens_per_second": result.tokens_per_second,
        "num_parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        **measure_mixture(loader),
    }
    if distributed.is_main():
        save_model(model, tokenizer, workspace.output)
        write_report(
            workspace,
            title="Pretraining",
            losses=result.losses,
            config=config,
            key_figures={name: value for name, value in metrics.items() if not name.startswith(("share_", "epochs_"))},
            sections={"Mixture": mixture_section(planned, loader)},
        )
    return metrics


def next_token_loss(loader: PretrainLoader, *, accumulation_steps: int) -> LossFunction:
    """Cross-entropy summed over this worker's rows of a micro-batch."""
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()

    @lru_cache(maxsize=1)
    def rows(step: int) -> Batch:
        return loader.batch(step, rank=rank, world_size=world_size)

    def loss(model: nn.Module, step: int, micro: int) -> Loss:
        batch = rows(step)
        inputs_BT, targets_BT = (part.chunk(accumulation_steps)[micro] for part in (batch.inputs, batch.targets))
        count = int((targets_BT != IGNORED).sum())
        logits_NV = model(inputs_BT.to(device)).flatten(0, 1)
        total = F.cross_entropy(logits_NV, targets_BT.flatten().to(device), reduction="sum", ignore_index=IGNORED)
        return Loss(total, count=count, num_tokens=targets_BT.numel())

    return loss


def validation(shards: TokenShards, *, seq_len: int, num_rows: int) -> Evaluation:
    """``validation_bits_per_byte_<stream>`` of every stream, the rows divided among the workers.

    ``validation_bits_per_byte_corpus`` of a corpus in several streams is their mean by ``corpus_validation_shares``.
    """
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    corpus = corpus_validation_shares(shards, seq_len=seq_len)
    names = [*corpus, *(name for name in shards.streams if name == EXERCISES)]
    rows = {name: validation_rows(shards, name, num_rows=num_rows, seq_len=seq_len) for name in names}

    def evaluate(model: nn.Module, done: int) -> Mapping[str, float]:  # noqa: ARG001 (the same rows at any step)
        # A worker's rows over the bytes of all rows: the parts add up to the whole.
        parts = [
            bits_per_byte(
                model, inputs_BT[rank::world_size].to(device), targets_BT[rank::world_size].to(device), num_bytes
            )
            for inputs_BT, targets_BT, num_bytes in rows.values()
        ]
        bits = dict(zip(rows, distributed.sum_floats(parts), strict=True))
        if corpus:
            bits[CORPUS] = sum(share * bits[name] for name, share in corpus.items())
        return {f"validation_bits_per_byte_{name}": value for name, value in bits.items()}

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
