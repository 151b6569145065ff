"""A model and a task small enough to train in a blink."""

import torch
import torch.nn.functional as F
from torch import nn

from lilpipe import distributed
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.stage import Workspace
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, Replica

VOCAB_SIZE = 11


class ToyModel(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, 8)
        self.hidden = nn.Linear(8, 12)
        self.wide = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, VOCAB_SIZE, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "norm.weight":
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, tokens_BT):
        return self.lm_head(self.norm(self.wide(torch.tanh(self.hidden(self.embed_tokens(tokens_BT))))))


def batch(step):
    """Eight rows of five tokens; the targets of each row count up to a length of its own."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(0, VOCAB_SIZE, (8, 5), generator=generator)
    targets = (inputs * 3 + 1) % VOCAB_SIZE
    lengths = torch.randint(1, 6, (8, 1), generator=generator)
    return inputs, targets.where(torch.arange(5) < lengths, -100)


def loss(model, step, micro, *, accumulation_steps=1):
    parts = [t[distributed.rank() :: distributed.world_size()].chunk(accumulation_steps)[micro] for t in batch(step)]
    inputs, targets = parts
    total = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    correct = (model(inputs).argmax(-1) == targets).sum().item()
    counted = int((targets != -100).sum())
    return Loss(total, counted, inputs.numel(), {"accuracy": (correct, counted)})


def optimizer(**settings):
    return OptimizerConfig(**{"learning_rate": 0.01, "warmup_steps": 3, **settings})


def run(
    root,
    *,
    num_steps=20,
    dtype=torch.float32,
    checkpoint_every=4,
    loss=loss,
    accumulation_steps=1,
    rank=0,
    config=None,
    **options,
):
    """Train a fresh toy model in the workspace ``root``; gives the model and the result."""
    model = ToyModel(dtype)
    config = config or optimizer()
    section = SFTConfig(seed=0, optimizer=config, checkpoint_every=checkpoint_every, log_every=5)
    workspace = Workspace(root, rank=rank)
    replica = Replica(model, loss, accumulation_steps=lambda _: accumulation_steps)
    result = train(replica, num_steps=num_steps, workspace=workspace, section=section, optimizer=config, **options)
    return model, result


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
