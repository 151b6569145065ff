"""A small model, its batches, and ten steps of training it in one process with nothing of ``lilpipe.parallel``."""

import torch
import torch.nn.functional as F

from lilpipe.config import ModelConfig, OptimizerConfig, ParallelConfig, PretrainConfig
from lilpipe.model.transformer import Transformer
from lilpipe.tokens.loader import IGNORED, Batch
from lilpipe.training.replica import Loss

NUM_STEPS = 10
VOCAB = 64
SEQ_LEN = 16
ROWS = 8
MICRO_BATCHES = 4
"""Of a step on each worker; the rows allow fewer where there are more than two data ranks."""
LEARNING_RATE = 1e-2
Z_LOSS = 1e-2


def config(layout, *, within_documents=False, schedule="1f1b", stages_per_worker=1, precision="fp32", **model):
    """Pretraining of the toy in a layout (pipeline, replicate, shard, context, tensor)."""
    pipeline, replicate, shard, context, tensor = layout
    shape = {"hidden_size": 32, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 48}
    return PretrainConfig(
        seed=7,
        num_workers=pipeline * replicate * shard * context * tensor,
        num_steps=NUM_STEPS,
        batch_size=ROWS,
        accumulation_steps=min(MICRO_BATCHES, ROWS // (replicate * shard)),
        model=ModelConfig(**(shape | {"max_seq_len": SEQ_LEN} | model)),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=1.0, warmup_steps=0),
        parallel=ParallelConfig(
            pipeline=pipeline,
            replicate=replicate,
            shard=shard,
            context=context,
            tensor=tensor,
            schedule=schedule,
            stages_per_worker=stages_per_worker,
        ),
        within_documents=within_documents,
        precision=precision,
    )


def batch(step):
    """All rows of a step: several documents each, and some targets that do not count."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=generator)
    starts = torch.rand(ROWS, SEQ_LEN, generator=generator) < 0.2
    targets = tokens[:, 1:].clone()
    targets[torch.rand(ROWS, SEQ_LEN, generator=generator) < 0.1] = IGNORED
    return Batch(tokens[:, :-1], targets, starts.long().cumsum(1), torch.zeros_like(targets))


def loss(scores, part):
    """Cross-entropy and z-loss, summed."""
    total = -scores.logprobs.sum() + Z_LOSS * scores.normaliser.square().sum()
    count = int((part.targets != IGNORED).sum())
    return Loss(total, count, part.targets.numel(), {"normaliser": (scores.normaliser.sum().item(), count)})


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def plain_losses(config, dtype):
    """Loss of each step: whole batches, whole logits, torch's own clipping."""
    model = Transformer(config.model, VOCAB)
    model.init_weights(config.seed)
    model.to(dtype)
    adamw = optimizer(model.parameters())
    losses, norms = [], []
    for step in range(NUM_STEPS):
        rows = batch(step)
        allowed = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()[None]
        if config.within_documents:
            allowed = allowed & (rows.documents[:, :, None] == rows.documents[:, None, :])
        hidden = model.model(rows.inputs, mask=allowed[:, None])
        logits = F.linear(hidden, model.output_weight)
        if config.model.logit_softcap:
            logits = config.model.logit_softcap * torch.tanh(logits / config.model.logit_softcap)
        counts = rows.targets != IGNORED
        total = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="sum")
        total = total + Z_LOSS * logits.logsumexp(-1)[counts].square().sum()
        mean = total / counts.sum()
        adamw.zero_grad()
        mean.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        adamw.step()
        losses.append(mean.item())
    return losses, norms
