"""Scores under tensor parallelism: each process holds a shard of the vocabulary, and logits are never gathered.

Processes exchange three numbers per token: the maximum, the softmax denominator and the target's logit (Shoeybi et al.
2019, section 3).

Dimensions: B sequences, T tokens, N tokens of all sequences, D width, W tokens of this process's vocabulary shard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lilpipe.model import scores
from lilpipe.model.scores import Scores, soften
from lilpipe.parallel.collectives import gather_sequence, sum_of_parts


class VocabularyScores:
    """``lilpipe.model.scores.token_scores`` for an output layer whose vocabulary is sharded over ``group``.

    Hidden states are slices of the sequence, as from the sequence-parallel norm; targets are whole.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def score(
        self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, softcap: float | None = None
    ) -> Scores:
        """Return scores of all targets, the same on every process of the group."""
        assert isinstance(weight_VD, DTensor)
        weight_WD = weight_VD.to_local()
        hidden_ND, targets_N = gather_sequence(hidden_BTD, self.group).flatten(0, -2), targets_BT.flatten()
        num_at_once = max(1, scores.LOGITS_AT_ONCE // len(weight_WD))
        if len(targets_N) <= num_at_once:
            parts = [self._score(hidden_ND, weight_WD, targets_N, softcap)]
        else:
            parts = [
                checkpoint(self._score, hidden, weight_WD, targets, softcap, use_reentrant=False)
                for hidden, targets in zip(hidden_ND.split(num_at_once), targets_N.split(num_at_once), strict=True)
            ]
        return scores.gather_scores(parts, targets_BT)

    def _score(
        self, hidden_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        logits_NW = F.linear(hidden_ND, weight_WD)
        logits_NW = soften(logits_NW if logits_NW.dtype == torch.float64 else logits_NW.float(), softcap)
        highest_N = logits_NW.detach().amax(-1)
        dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=self.group)
        words_N = targets_N - dist.get_rank(self.group) * len(weight_WD)
        own_N = (words_N >= 0) & (words_N < len(weight_WD))
        chosen_N = logits_NW.gather(1, words_N.where(own_N, 0)[:, None])[:, 0].where(own_N, 0.0)
        total_N = (logits_NW - highest_N[:, None]).exp().sum(-1)
        total_N, chosen_N = sum_of_parts(torch.stack([total_N, chosen_N]), self.group)
        normaliser_N = total_N.log() + highest_N
        return chosen_N - normaliser_N, normaliser_N
