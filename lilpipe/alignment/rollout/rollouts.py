"""Rollouts: completions sampled from a policy, their rewards, and their mini-batches.

A rollout is a pure function of weights, seed and rollout number, so a killed run resumes from its last checkpoint with
identical bytes. A rollout that is used for several updates is also saved next to the checkpoints, because the weights
that sampled it change with the first update.

Dimensions: P prompts, G completions per prompt, N = P x G completions, T tokens of prompt and completion, less 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilpipe.alignment.rewards.reward_functions import Rewards, Scored
from lilpipe.alignment.rollout.collapse_monitor import check_logprob_mismatch
from lilpipe.alignment.rollout.completions import Completion, complete, pad_completions
from lilpipe.config.reinforcement import CollapseMonitorConfig, GRPOConfig, PPOConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.lora import initial_adapters
from lilpipe.model.scores import IGNORED, Scores, token_scores
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.order import rows_of_step
from lilpipe.seeds import derive_seed
from lilpipe.tokenizer.encoding import Tokenizer

Sums = dict[str, tuple[float, float]]
"""Metrics as (sum, count)."""


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


@dataclass(frozen=True)
class Rollout:
    """Completions of one rollout on one worker."""

    completions: CompletionBatch
    metrics: Sums = field(default_factory=dict)


class Group(NamedTuple):
    """Completions to one prompt with their rewards."""

    completions: list[Completion]
    scored: list[Scored]

    @property
    def has_zero_std(self) -> bool:
        """Whether all rewards are equal."""
        return all(answer.total == self.scored[0].total for answer in self.scored)


class Sampler:
    """Samples the completions of rollouts on one data rank."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        config: GRPOConfig | PPOConfig,
        *,
        stage: str,
        num_generations: int,
        data_rank: int,
        num_data_ranks: int,
    ) -> None:
        assert config.seed is not None
        self.tokenizer, self.prompts, self.rewards, self.config = tokenizer, prompts, rewards, config
        self._stage, self._num_generations, self.seed = stage, num_generations, config.seed
        self._rank, self._num_ranks = data_rank, num_data_ranks

    def draw(self, model: Transformer, rollout: int, *, dynamic_sampling_rounds: int = 0) -> tuple[list[Group], int]:
        """Return the groups of a rollout, and how many were replaced because their rewards were all equal."""
        num_rows, seed = len(self.prompts), derive_seed(self.seed, self._stage)
        rows = rows_of_step(rollout, num_rows=num_rows, batch_size=self.config.prompts_per_step, seed=seed)
        rows = rows[self._rank :: self._num_ranks]
        groups = self._sample(model, rows, rollout)
        seen, num_replaced = set(rows), 0
        for number in range(1, dynamic_sampling_rounds + 1):
            flat = [place for place, group in enumerate(groups) if group.has_zero_std]
            further = self._further(rollout, number, seen)[: len(flat)]
            if not further:
                break
            seen.update(further)
            for place, group in zip(flat, self._sample(model, further, rollout, number), strict=False):
                groups[place] = group
            num_replaced += len(further)
        return groups, num_replaced

    def _further(self, rollout: int, number: int, seen: set[int]) -> list[int]:
        """Return prompts not used in this rollout, in a random order for this round."""
        seed = derive_seed(self.seed, f"{self._stage}/resample", rollout, self._rank, number)
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed))
        return [row for row in order.tolist() if row not in seen]

    def _sample(self, model: Transformer, rows: Sequence[int], *position: int) -> list[Group]:
        # Seeded by prompt and not by worker: a rollout does not depend on the number of workers.
        seed = derive_seed(self.seed, f"{self._stage}/rollout", *position)
        groups = complete(
            model,
            self.tokenizer,
            [self.prompts[row] for row in rows],
            form=self.config.prompt_form,
            sampling=self.config.sampling,
            seed=seed,
            num_generations=self._num_generations,
            numbers=rows,
        )
        flat = [completion for group in groups for completion in group]
        scored = iter(self.rewards([c.prompt for c in flat], [c.as_completion_text for c in flat]))
        return [Group(group, [next(scored) for _ in group]) for group in groups]


def as_completion_batch(
    groups: Sequence[Group], tokenizer: Tokenizer, *, mask_truncated_completions: bool, device: torch.device
) -> CompletionBatch:
    """Return the groups as padded tensors; advantages are 0."""
    flat = [completion for group in groups for completion in group.completions]
    completion_ids = [completion.completion_ids for completion in flat]
    tokens, completion_mask_NT = pad_completions(
        [c.prompt_ids for c in flat], completion_ids, padding_id=tokenizer.padding_id
    )
    old_NT = torch.zeros(completion_mask_NT.shape)
    old_NT[completion_mask_NT] = torch.tensor(
        [logprob for c in flat for logprob in c.sample.logprobs[: len(c.completion_ids)]]
    )
    counts_NT = completion_mask_NT
    if mask_truncated_completions:
        counts_NT = completion_mask_NT & torch.tensor([c.verdict.ended for c in flat])[:, None]
    targets_NT = tokens[:, 1:].where(completion_mask_NT, IGNORED)
    tensors = (tokens[:, :-1], targets_NT, counts_NT, old_NT, torch.zeros(len(flat), 1).expand_as(old_NT))
    return CompletionBatch(*(tensor.to(device) for tensor in tensors))


def group_metrics(groups: Sequence[Group], num_replaced: int) -> Sums:
    """Return the metrics of a rollout."""
    completions = [completion for group in groups for completion in group.completions]
    scored = [answer for group in groups for answer in group.scored]
    num_completions, num_tokens = float(len(completions)), float(sum(len(c.completion_ids) for c in completions))
    ended = float(sum(completion.verdict.ended for completion in completions))
    logprob = sum(sum(c.sample.logprobs[: len(c.completion_ids)]) for c in completions)
    parts = {f"reward/{name}": sum(answer.parts[name] for answer in scored) for name in scored[0].parts}
    return {
        "reward": (sum(answer.total for answer in scored), num_completions),
        **{name: (total, num_completions) for name, total in parts.items()},
        "frac_reward_zero_std": (
            float(sum(group.has_zero_std for group in groups)),
            float(len(groups)),
        ),  # these give no gradient
        "replaced_groups": (float(num_replaced), float(len(groups))),
        "entropy": (-logprob, num_tokens),  # Monte Carlo estimate from the sampled tokens, in nats
        "length": (num_tokens, num_completions),
        "words": (float(sum(c.verdict.num_words for c in completions)), num_completions),
        "ended": (ended, num_completions),
        "truncated": (num_completions - ended, num_completions),
    }


def means(metrics: Sums, sum_floats: Callable[[list[float]], list[float]]) -> dict[str, float]:
    """Average metrics over all workers; ``sum_floats`` is an all-reduce."""
    totals = sum_floats([value for pair in metrics.values() for value in pair])
    pairs = zip(totals[::2], totals[1::2], strict=True)
    return {name: total / max(count, 1e-12) for name, (total, count) in zip(metrics, pairs, strict=True)}


# --- mini-batches -------------------------------------------------------------------------------------------------


def micro_batches(
    completions: CompletionBatch, update: int, config: GRPOConfig | PPOConfig, *, seed: int
) -> list[CompletionBatch]:
    """Return the micro-batches of an update; each epoch shuffles all completions anew."""
    rows = torch.arange(len(completions.inputs))
    if config.num_mini_batches > 1:
        epoch, part = divmod(update, config.num_mini_batches)
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        rows = torch.randperm(len(rows), generator=generator).chunk(config.num_mini_batches)[part]
    chosen = completions.take(rows)
    return [chosen.take(part) for part in by_length(chosen, config.accumulation_steps)]


def by_length(completions: CompletionBatch, parts: int) -> list[Tensor]:
    """Split rows into parts of completions of similar length, to reduce padding."""
    return list(completions.lengths.argsort(stable=True).tensor_split(parts))


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


# --- resuming -----------------------------------------------------------------------------------------------------


class Rollouts:
    """Rollout of each update.

    ``make`` samples one with the current weights. If a rollout has several updates, it is saved in ``directory`` until
    two more rollouts exist, so that a run that stopped between updates can resume.
    """

    def __init__(
        self,
        make: Callable[[int], Rollout],
        directory: Path,
        *,
        updates: int,
        data_rank: int,
        num_data_ranks: int,
        device: torch.device,
    ) -> None:
        self._make, self._directory, self._updates, self._device = make, directory, updates, device
        self._part = f"{data_rank}-of-{num_data_ranks}"
        self._current: tuple[int, Rollout] | None = None

    def at(self, step: int) -> tuple[Rollout, int, int]:
        """Return the rollout of an update, its number, and the index of the update in it."""
        number, update = divmod(step, self._updates)
        if update == 0:
            self._current = number, self._make(number)
            if self._updates > 1:
                self._directory.mkdir(parents=True, exist_ok=True)
                write_rollout(self._path(number), self._current[1])
                self._path(number - 2).unlink(missing_ok=True)
        elif self._current is None or self._current[0] != number:
            self._current = number, self._kept(number)
        return self._current[1], number, update

    def _path(self, number: int) -> Path:
        return self._directory / f"rollout-{number:06d}.{self._part}.safetensors"

    def _kept(self, number: int) -> Rollout:
        path = self._path(number)
        if not path.exists():
            raise ArtifactError(
                f"{path}: does not exist, expected the completions of the next update: the run stopped between two "
                f"updates of rollout {number + 1}; resume with the same number of workers, or delete its last "
                "checkpoint"
            )
        return read_rollout(path, self._device)


def write_rollout(path: Path, rollout: Rollout) -> None:
    """Write a rollout atomically."""
    tensors = {name: t.contiguous() for name, t in rollout.completions._asdict().items() if t is not None}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # workers of one data rank write the same file
    save_file(tensors, temporary, metadata={"metrics": json.dumps(rollout.metrics)})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_rollout(path: Path, device: torch.device) -> Rollout:
    """Read a rollout written by ``write_rollout``."""
    with safe_open(path, framework="pt") as file:
        tensors: Mapping[str, Tensor] = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (no mapping)
        metrics = {name: (total, count) for name, (total, count) in json.loads(file.metadata()["metrics"]).items()}
    return Rollout(CompletionBatch(**tensors), metrics)
