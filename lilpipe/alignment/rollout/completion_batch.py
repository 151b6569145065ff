"""Completions as padded tensors: their mini-batches and their log-probabilities under a model.

Dimensions: N completions, T tokens of prompt and completion, less 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lilpipe.alignment.rollout.collapse_monitor import check_logprob_mismatch
from lilpipe.config.reinforcement import CollapseMonitorConfig, GRPOConfig, PPOConfig
from lilpipe.errors import ConfigError
from lilpipe.model.lora import initial_adapters
from lilpipe.model.scores import Scores, token_scores
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed


class CompletionBatch(NamedTuple):
    """Tensors [N, T] of completions; column t refers to the token that follows input t."""

    inputs: Tensor
    targets: Tensor
    """``IGNORED`` except at tokens sampled by the policy."""
    counts: Tensor
    """True at sampled tokens that count in the loss."""
    old_logprobs: Tensor
    """Log-probabilities under the policy that sampled, at the sampling temperature."""
    advantages: Tensor
    reference_logprobs: Tensor | None = None
    """Log-probabilities under the initial policy."""
    old_values: Tensor | None = None
    returns: Tensor | None = None

    @property
    def completion_mask(self) -> Tensor:
        """True at tokens sampled by the policy."""
        return self.targets >= 0

    @property
    def lengths(self) -> Tensor:
        """Number of inputs of each row up to its last target ``[N]``."""
        return ((torch.arange(self.targets.shape[1], device=self.targets.device) + 1) * self.completion_mask).amax(
            dim=1
        )

    def take(self, rows: Tensor) -> CompletionBatch:
        """Return some rows, trimmed to the longest of them."""
        longest = int(self.lengths[rows].max())
        tensors = {name: t[rows, :longest] for name, t in self._asdict().items() if t is not None}
        return self._replace(**tensors)


def by_length(completions: CompletionBatch, parts: int) -> list[Tensor]:
    """Split rows into parts of completions of similar length, to reduce padding."""
    return list(completions.lengths.argsort(stable=True).tensor_split(parts))


Split = Callable[[CompletionBatch, int], list[Tensor]]
"""Divides the rows of a batch into a number of parts."""


def micro_batches(
    completions: CompletionBatch,
    update: int,
    config: GRPOConfig | PPOConfig,
    *,
    seed: int,
    split: Split = by_length,
) -> list[CompletionBatch]:
    """Return the micro-batches of an update; each epoch shuffles all completions anew.

    ``split`` divides the rows of an update.
    """
    rows = torch.arange(len(completions.inputs))
    if config.num_mini_batches > 1:
        epoch, part = divmod(update, config.num_mini_batches)
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        rows = torch.randperm(len(rows), generator=generator).chunk(config.num_mini_batches)[part]
    chosen = completions.take(rows)
    return [chosen.take(part) for part in split(chosen, config.accumulation_steps)]


def num_parts(config: GRPOConfig | PPOConfig) -> int:
    """Number of parts of a rollout that have the size of a micro-batch."""
    return config.num_mini_batches * config.accumulation_steps


def in_parts(function: Callable[[CompletionBatch], Tensor], completions: CompletionBatch, parts: int) -> Tensor:
    """Apply a function to parts; return ``[N, T]``, 0 in padding, without gradient."""
    result_NT = torch.zeros_like(completions.old_logprobs)
    with torch.no_grad():
        for rows in by_length(completions, parts):
            part = completions.take(rows)
            result_NT[rows, : part.inputs.shape[1]] = function(part)
    return result_NT


def completion_logprobs(
    model: Transformer, completions: CompletionBatch, *, parts: int, temperature: float = 1.0
) -> Tensor:
    """Return log-probabilities of the sampled tokens ``[N, T]``, 0 elsewhere, without gradient."""

    def logprobs(part: CompletionBatch) -> Tensor:
        scores = at_targets(token_scores, temperature)
        softcap = model.config.logit_softcap
        return scores(model.model(part.inputs), model.output_weight, part.targets, softcap=softcap).logprobs

    return in_parts(logprobs, completions, parts)


def reference_logprobs(
    policy: Transformer, reference: Transformer | None, completions: CompletionBatch, *, parts: int, temperature: float
) -> Tensor:
    """Return ``completion_logprobs`` under the initial policy: ``reference`` or, if None, ``policy`` without what its
    adapters learned.
    """
    with initial_adapters(policy) if reference is None else nullcontext(reference) as model:
        return completion_logprobs(model, completions, parts=parts, temperature=temperature)


def at_temperature(
    model: Transformer, completions: CompletionBatch, config: GRPOConfig | PPOConfig, *, rollout: int
) -> CompletionBatch:
    """Replace log-probabilities, which the sampler gives at temperature 1, with those at the sampling temperature.

    Raises ``DataError`` if the log-probabilities of sampler and trainer differ too much.
    """
    measure_logprob_mismatch(
        completion_logprobs(model, completions, parts=num_parts(config)),
        completions,
        config.collapse_monitor,
        rollout=rollout,
    )
    temperature = config.sampling.temperature
    old_NT = completion_logprobs(model, completions, parts=num_parts(config), temperature=temperature)
    return completions._replace(old_logprobs=old_NT)


def measure_logprob_mismatch(
    logprobs_NT: Tensor, completions: CompletionBatch, config: CollapseMonitorConfig, *, rollout: int
) -> tuple[float, float]:
    """Return sum and count of |trainer's - sampler's| log-probabilities of the sampled tokens.

    Raises ``DataError`` if the mean is too large.
    """
    gap_N = (logprobs_NT - completions.old_logprobs)[completions.completion_mask].abs()
    check_logprob_mismatch(gap_N.mean().item(), config, rollout=rollout)
    return gap_N.sum().item(), float(len(gap_N))


def at_targets(scores: Callable[..., Scores], temperature: float = 1.0) -> Callable[..., Scores]:
    """Wrap ``lilpipe.model.scores.token_scores``: apply the output layer only at targets, with a temperature."""

    def score(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, **options: object) -> Scores:
        rows_N = (targets_BT >= 0).flatten().nonzero()[:, 0]
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, rows_N)
        if temperature != 1:
            if options.get("softcap") is not None:
                raise ConfigError(f"sampling.temperature: got {temperature}, expected 1 for a model with logit_softcap")
            hidden_ND = hidden_ND / temperature
        found = scores(hidden_ND[None], weight_VD, targets_BT.flatten()[rows_N][None], **options)
        zeros = torch.zeros(targets_BT.numel(), dtype=found.logprobs.dtype, device=targets_BT.device)
        return Scores(*(zeros.index_copy(0, rows_N, values[0]).view(targets_BT.shape) for values in found))

    return score
