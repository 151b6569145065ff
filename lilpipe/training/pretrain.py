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

from lilpipe import distributed, report
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import PretrainConfig
from lilpipe.evaluation.bits_per_byte import bits_per_byte
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokens.loader import IGNORED, Batch, PretrainLoader, corpus_validation_shares, validation_rows
from lilpipe.tokens.mixture import Part, largest_total
from lilpipe.tokens.plan import corpus_mixture, open_loader
from lilpipe.tokens.shards import CORPUS, EXERCISES, TokenShards
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Evaluation, Loss, LossFunction, train


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
    parts = corpus_mixture(config, shards)
    for name, part in parts.items():
        if part.reason:
            workspace.log(f"mixture: {name} gives {part.reached:.1%} of {part.asked:.1%} asked for: {part.reason}")
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
            sections={"Mixture": mixture_section(config, loader, parts)},
        )
    return metrics


def measure_mixture(loader: PretrainLoader) -> Metrics:
    """Of each stream the share of the training tokens that it gives, and how often each of its tokens is a target."""
    targets = {name: loader.num_targets(name) for name in loader.streams}
    metrics: Metrics = {}
    for name, count in targets.items():
        metrics[f"share_{name}"] = count / sum(targets.values())
        metrics[f"epochs_{name}"] = loader.epochs(name)
    return metrics


def mixture_section(config: PretrainConfig, loader: PretrainLoader, parts: Mapping[str, Part]) -> str:
    """What was asked of each stream, what was reached, and why not; and how far the weights would go."""
    reached = measure_mixture(loader)
    corpus = 1 - config.exercise_share
    rows: list[dict[str, report.Cell]] = [
        {
            "stream": name,
            "tokens": loader.shards.stream(name, "train").num_tokens,
            "% asked": 100 * (parts[name].asked * corpus if name in parts else config.exercise_share),
            "% reached": 100 * reached.get(f"share_{name}", 0.0),
            "epochs": reached.get(f"epochs_{name}", 0.0),
            "most epochs": parts[name].max_epochs if name in parts else "",
            "why": parts[name].reason if name in parts else "",
        }
        for name in loader.shards.streams
        if name in parts or name in loader.streams
    ]
    if not parts:
        return report.table(rows)
    weights = {name: part.asked for name, part in parts.items()}
    limits = {name: part.max_epochs for name, part in parts.items()}
    most = largest_total(weights, {name: part.tokens for name, part in parts.items()}, limits) / corpus
    note = f"These weights can be kept, within the limits on epochs, up to {most:,.0f} training tokens."
    return report.table(rows) + report.note(note)


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
