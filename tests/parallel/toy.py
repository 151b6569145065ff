"""A small model, its batches, and ten steps of training it in one process with nothing of ``lilpipe.parallel``."""

from math import prod

import torch
import torch.nn.functional as F

from lilpipe.config.training import PretrainConfig
from lilpipe.model.transformer import Transformer
from lilpipe.tokens.loader import IGNORED, Batch
from lilpipe.training.optimizer import Optimizer
from lilpipe.training.replica import Loss

NUM_STEPS = 10
VOCAB = 64
SEQ_LEN = 16
ROWS = 8
LEARNING_RATE = 1e-2
Z_LOSS = 1e-2
SHAPE = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 48, "max_seq_len": SEQ_LEN}
PARALLEL = ("schedule", "stages_per_worker")


def config(layout, *, model=None, optimizer="adamw", **settings):
    """Pretraining of the toy in a layout; ``settings`` are those of the whole or of ``parallel``."""
    parallel = layout._asdict() | {name: settings.pop(name) for name in PARALLEL if name in settings}
    num_stages = parallel["pipeline"] * parallel.get("stages_per_worker", 1)
    values = {
        "seed": 7,
        "num_workers": prod(layout),
        "num_steps": NUM_STEPS,
        "batch_size": ROWS,
        "accumulation_steps": min(2 * layout.pipeline, ROWS // layout.data),
        "model": SHAPE | {"num_layers": max(2, num_stages)} | (model or {}),
        "optimizer": {"kind": optimizer, "learning_rate": LEARNING_RATE, "max_grad_norm": 1.0, "warmup_steps": 0},
        "parallel": parallel,
    }
    return PretrainConfig.model_validate(values | settings)


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


class AdamW:
    """torch's own, with decay on every parameter."""

    def __init__(self, parts):
        parameters = [parameter for part in parts for parameter in part.parameters()]
        self._adamw = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, lr_scale):
        self._adamw.step()


def optimizer(config, parts, replicas=None):
    """torch's AdamW, or ours where Muon is asked for."""
    return Optimizer(parts, config.optimizer, replicas=replicas) if config.optimizer.kind == "muon" else AdamW(parts)


def plain_losses(config, dtype):
    """Loss and gradient norm of each step: whole batches, whole logits, torch's own clipping. Then what it learnt."""
    model = Transformer(config.model, VOCAB)
    model.init_weights(config.seed)
    model.to(dtype)
    updates = optimizer(config, [model])
    losses, norms = [], []
    for step in range(NUM_STEPS):
        rows = batch(step)
        model.set_dropout_seed(config.seed, step)
        mean = _mean_loss(model, rows, intra_document_masking=config.intra_document_masking)
        model.zero_grad()
        mean.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        updates.step(1.0)
        model.balance_experts(lambda loads: loads)
        losses.append(mean.item())
    return {"losses": losses, "norms": norms, "nats": nats(model), "weights": digest(model.state_dict().items())}


def _mean_loss(model, rows, *, intra_document_masking):
    allowed = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()[None]
    if intra_document_masking:
        allowed = allowed & (rows.documents[:, :, None] == rows.documents[:, None, :])
    logits = F.linear(model.model(rows.inputs, mask=allowed[:, None]), model.output_weight)
    if cap := model.config.logit_softcap:
        logits = cap * torch.tanh(logits / cap)
    counts = rows.targets != IGNORED
    total = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="sum")
    return (total + Z_LOSS * logits.logsumexp(-1)[counts].square().sum()) / counts.sum()


def held_out():
    """Five rows, which no number of data ranks here divides, of a length that no layout divides."""
    rows = batch(NUM_STEPS)
    return rows.inputs[:5, :13], rows.targets[:5, :13]


@torch.no_grad()
def nats(model):
    inputs, targets = held_out()
    return -model.eval()(inputs, targets_BT=targets).logprobs.double().sum().item()


def digest(tensors):
    """Each tensor by two numbers."""
    return {name: [t.double().sum().item(), t.double().square().sum().item()] for name, t in sorted(tensors)}
