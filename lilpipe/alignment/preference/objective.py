"""Objective of direct preference optimization and variants: batches, loss and metrics.

Dimensions: N rows of a micro-batch, each with a first and a second completion; S = 2N completions, all first ones
before all second ones; A tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lilpipe.alignment.preference.data import Packer, Places, PreferenceRow
from lilpipe.alignment.preference.losses import ipo_loss, kto_baseline, kto_loss, orpo_loss, sigmoid_loss, simpo_loss
from lilpipe.config.dpo import DPOConfig
from lilpipe.errors import DataError
from lilpipe.extensions import load
from lilpipe.model.scores import Scores
from lilpipe.schemas.order import rows_of_step
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.replica import Loss

TIE_NATS = 1e-4
"""Differences of log-probability up to this size are rounding errors and count as ties."""


class Extra(NamedTuple):
    """Inputs of the loss of a micro-batch other than the scores."""

    places: Places
    reference_S: Tensor
    """Log-probabilities of the completions under the reference, summed over tokens; zeros without a reference."""
    desirable_N: Tensor
    nll_weights_N: Tensor
    """Weights of the NLL of each first completion; they average it over the optimizer step's batch."""
    num_tokens: int


class PreferenceObjective:
    """Preference objective of one data rank."""

    def __init__(
        self,
        rows: Sequence[PreferenceRow],
        config: DPOConfig,
        packer: Packer,
        *,
        reference_R2: Tensor | None,
        rank: int,
        world_size: int,
    ) -> None:
        """``reference_R2``: log-probabilities of each row's completions, required by losses with a reference."""
        assert config.seed is not None
        self._rows = rows
        self._config = config
        self._packer = packer
        self._reference_R2 = torch.zeros(len(rows), 2) if reference_R2 is None else reference_R2
        self._rank, self._world_size = rank, world_size
        self._seed = config.seed

    # --- batches --------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> list[TokenBatch]:
        """Return the micro-batches of an optimizer step.

        Rows are distributed by length, so that workers have similar amounts of work. For ``kto``, rows that share an
        estimate of the KL divergence stay together: the loss does not depend on the number of workers or
        micro-batches.
        """
        config = self._config
        rows = rows_of_step(step, num_rows=len(self._rows), batch_size=config.batch_size, seed=self._seed)
        size = config.kl_examples if config.loss_type == "kto" else 1
        units = [rows[start : start + size] for start in range(0, len(rows), size)]
        units.sort(key=lambda unit: sum(self._num_tokens(row) for row in unit))
        parts = config.accumulation_steps * self._world_size
        weights = self._nll_weights(rows)
        return [
            self._batch([row for unit in units[first::parts] for row in unit], weights)
            for first in range(self._rank, parts, self._world_size)
        ]

    def _batch(self, rows: Sequence[int], weights: dict[int, float]) -> TokenBatch:
        members = [self._rows[row] for row in rows]
        batch, places = self._packer([row.first for row in members] + [row.second for row in members])
        device = batch.inputs.device
        extra = Extra(
            places=places,
            reference_S=self._reference_R2[torch.tensor(rows)].t().flatten().to(device),
            desirable_N=torch.tensor([row.desirable for row in members], device=device),
            nll_weights_N=torch.tensor([weights[row] for row in rows], device=device),
            num_tokens=sum(map(self._num_tokens, rows)),
        )
        assert batch.sequences is not None
        ids_S = torch.tensor([2 * row + side for side in range(2) for row in rows], device=device)
        sequences = ids_S[batch.sequences.clamp(min=0)].where(batch.sequences >= 0, -1)
        return batch._replace(extra=extra, sequences=sequences)

    def _nll_weights(self, rows: Sequence[int]) -> dict[int, float]:
        """Return the weight of each row's NLL (summed over tokens) in the total loss of the optimizer step."""
        by_sequence = self._config.nll_normalisation == "sequence"
        learnt = {row: len(self._rows[row].first.completion) for row in rows if self._rows[row].desirable}
        total = len(learnt) if by_sequence else sum(learnt.values())
        scale = len(rows) / max(total, 1)
        return dict.fromkeys(rows, 0.0) | {row: scale / n if by_sequence else scale for row, n in learnt.items()}

    def _num_tokens(self, row: int) -> int:
        return self._rows[row].first.num_tokens + self._rows[row].second.num_tokens

    # --- loss -----------------------------------------------------------------------------------------------------

    def loss(self, scores: Scores, batch: TokenBatch) -> Loss:
        """Return the preference loss plus the NLL term, summed over rows."""
        config, extra = self._config, batch.extra
        assert isinstance(extra, Extra)
        logprobs_SA = extra.places.read(scores)
        logprobs_S = (logprobs_SA * extra.places.counted_SA).sum(dim=1)
        ratios_S = log_ratios(logprobs_S, extra.reference_S, extra.places, config)
        nll_N = -logprobs_SA.chunk(2)[0].sum(dim=1)
        loss_N = config.preference_coefficient * preference_loss(ratios_S, extra.desirable_N, config)
        loss_N = loss_N + config.rpo_alpha * extra.nll_weights_N * nll_N
        lengths_N = extra.places.present_SA.chunk(2)[0].sum(dim=1)
        measure = completion_metrics if config.loss_type == "kto" else pair_metrics
        metrics = measure(logprobs_S.detach(), ratios_S.detach(), extra, config)
        likelihoods = (nll_N.detach() / lengths_N)[extra.desirable_N]
        metrics["chosen_nll"] = (likelihoods.sum(), float(len(likelihoods)))
        return Loss(loss_N.sum(), count=float(len(loss_N)), num_tokens=extra.num_tokens, metrics=metrics)


def log_ratios(logprobs_S: Tensor, reference_S: Tensor, places: Places, config: DPOConfig) -> Tensor:
    """Return log-ratios to the reference [S], length-normalised if configured."""
    ratios_S = logprobs_S - reference_S
    return ratios_S / places.counted_SA.sum(dim=1) if config.normalises_length else ratios_S


def preference_loss(ratios_S: Tensor, desirable_N: Tensor, config: DPOConfig) -> Tensor:
    """Return the loss of each row [N] for ``config.loss_type``."""
    first_N, second_N = ratios_S.chunk(2)
    match config.loss_type:
        case "sigmoid":
            robust = config.smoothing == "robust"
            return sigmoid_loss(
                first_N - second_N, beta=config.beta, label_smoothing=config.label_smoothing, robust=robust
            )
        case "ipo":
            return ipo_loss(first_N - second_N, beta=config.beta)
        case "simpo":
            return simpo_loss(
                first_N, second_N, beta=config.beta, gamma=config.gamma, label_smoothing=config.label_smoothing
            )
        case "orpo":
            return orpo_loss(first_N, second_N, beta=config.beta)
        case "kto":
            return kto_loss(
                first_N,
                desirable_N,
                kto_baseline(second_N, num_examples=config.kl_examples),
                beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            )
        case _:
            return _own_loss(first_N, second_N, config)


def _own_loss(chosen_N: Tensor, rejected_N: Tensor, config: DPOConfig) -> Tensor:
    """The loss of a user's function. Raises ``DataError`` if it is not one value for each pair."""
    extension = config.extension()
    assert extension is not None
    loss_N = load(extension)(chosen_N, rejected_N, beta=config.beta, **config.options)
    if not isinstance(loss_N, Tensor) or loss_N.shape != chosen_N.shape:
        got = list(loss_N.shape) if isinstance(loss_N, Tensor) else type(loss_N).__name__
        raise DataError(
            f"dpo.loss_type {config.loss_type!r}: got {got}, expected a tensor of shape {list(chosen_N.shape)}"
        )
    return loss_N


def positive_ratio(values_N: Tensor) -> float:
    """Return the share of positive values; a tie counts half."""
    wins = (values_N > TIE_NATS).sum() + 0.5 * (values_N.abs() <= TIE_NATS).sum()
    return wins.item() / len(values_N)


Metrics = dict[str, tuple[float | Tensor, float]]
"""(sum, count) by name. Names follow TRL, but margins are in nats; rewards are beta times log-ratios."""


def pair_metrics(logprobs_S: Tensor, ratios_S: Tensor, extra: Extra, config: DPOConfig) -> Metrics:
    """Return the metrics of pairs."""
    chosen_N, rejected_N = logprobs_S.chunk(2)
    count = float(len(chosen_N))
    margin_N = torch.sub(*ratios_S.chunk(2))
    sums = {
        "margin": margin_N.sum(),
        "reward_margin": config.beta * margin_N.sum(),
        "chosen_logprob": chosen_N.sum(),
        "rejected_logprob": rejected_N.sum(),
    }
    for side, ratio_N in zip(("chosen", "rejected"), ratios_S.chunk(2), strict=True):
        sums[f"reward_{side}"] = config.beta * ratio_N.sum()
    if config.uses_reference:
        sums["chosen_change"] = (chosen_N - extra.reference_S.chunk(2)[0]).sum()
    accuracy = positive_ratio(margin_N) * count
    return {"preference_accuracy": (accuracy, count), **{name: (total, count) for name, total in sums.items()}}


def completion_metrics(logprobs_S: Tensor, ratios_S: Tensor, extra: Extra, config: DPOConfig) -> Metrics:
    """Return the metrics of ``kto``'s unpaired completions; `kl` is the reference point."""
    answer_N, ratio_N = logprobs_S.chunk(2)[0], ratios_S.chunk(2)[0]
    baseline_N = kto_baseline(ratios_S.chunk(2)[1], num_examples=config.kl_examples)
    metrics: Metrics = {"kl": (baseline_N.sum(), float(len(baseline_N)))}
    for side, members_N in (("chosen", extra.desirable_N), ("rejected", ~extra.desirable_N)):
        count = float(members_N.sum())
        metrics[f"reward_{side}"] = (config.beta * ratio_N[members_N].sum(), count)
        metrics[f"{side}_logprob"] = (answer_N[members_N].sum(), count)
    return metrics
