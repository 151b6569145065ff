"""Completions of random tokens, lengths and log-probabilities."""

import torch

from lilpipe.alignment.rollout.completion_batch import CompletionBatch
from lilpipe.model.scores import IGNORED


def random_completions(num_rows=6, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (num_rows, width + 1), generator=generator)
    lengths = torch.randperm(width - 2, generator=generator)[:num_rows] + 3
    drawn = (torch.arange(width) >= 1) & (torch.arange(width) < lengths[:, None])
    targets = tokens[:, 1:].where(drawn, IGNORED)
    old = torch.randn(num_rows, width, generator=generator).where(drawn, 0.0)
    return CompletionBatch(tokens[:, :-1], targets, drawn, old, old + 1)
