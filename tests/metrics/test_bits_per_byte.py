import math

import pytest
import torch
from torch import nn

from lilpipe.metrics.bits_per_byte import bits_per_byte
from lilpipe.model.scores import Scores


class Fixed(nn.Module):
    """Says the same whatever it reads."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, tokens_BT, *, targets_BT):
        logprobs_BT = self.logits.log_softmax(-1)[targets_BT.clamp(min=0)].where(targets_BT >= 0, 0.0)
        return Scores(logprobs_BT, self.logits.logsumexp(-1).expand_as(logprobs_BT))


def test_bits_are_summed_over_tokens_and_divided_by_bytes():
    model = Fixed([0.5, 0.25, 0.25])
    targets = torch.tensor([[0, 1], [2, 0]])  # 1 + 2 + 2 + 1 bits
    assert bits_per_byte(model, torch.zeros_like(targets), targets, 3) == pytest.approx(2.0)


def test_targets_below_zero_do_not_count():
    model = Fixed([0.5, 0.25, 0.25])
    targets = torch.tensor([[0, -100], [-100, 1]])
    assert bits_per_byte(model, torch.zeros_like(targets), targets, 1) == pytest.approx(3.0)


def test_a_uniform_model_over_bytes_needs_eight_bits_each():
    targets = torch.randint(256, (70, 5), generator=torch.Generator().manual_seed(0))
    assert bits_per_byte(Fixed([1 / 256] * 256), targets, targets, targets.numel()) == pytest.approx(8.0)


def test_the_parts_of_two_workers_add_up_to_the_whole():
    targets = torch.randint(3, (7, 4), generator=torch.Generator().manual_seed(0))
    model = Fixed([0.6, 0.3, 0.1])
    whole = bits_per_byte(model, targets, targets, 50)
    parts = [bits_per_byte(model, targets[rank::2], targets[rank::2], 50) for rank in (0, 1)]
    assert math.fsum(parts) == pytest.approx(whole)
    assert bits_per_byte(model, targets[:0], targets[:0], 50) == 0
