"""Rollouts: completions sampled from a policy, and their rewards.

A rollout is a pure function of weights, seed and rollout number, so a killed run resumes from its last checkpoint with
identical bytes. A rollout that is used for several updates is also saved next to the checkpoints, because the weights
that sampled it change with the first update.

Dimensions: P prompts, G completions per prompt, N = P x G completions, T tokens of prompt and completion, less 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilpipe.alignment.rewards.reward_functions import Rewards, Scored
from lilpipe.alignment.rollout.completion_batch import CompletionBatch
from lilpipe.alignment.rollout.completions import Completion, complete, pad_completions
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.order import rows_of_step
from lilpipe.seeds import derive_seed
from lilpipe.tokenizer.encoding import Tokenizer

Sums = dict[str, tuple[float, float]]
"""Metrics as (sum, count)."""


@dataclass(frozen=True)
class Rollout:
    """Completions of one rollout on one worker."""

    completions: CompletionBatch
    metrics: Sums = field(default_factory=dict)


class MicroBatch(NamedTuple):
    """Completions of a micro-batch of an update, and what their loss and metrics need besides the scores."""

    completions: CompletionBatch
    rollout_metrics: Sums
    """Metrics of the whole rollout, attached to its first micro-batch only."""
    rollout: int
    is_fresh: bool
    """Whether the weights are still those that sampled the completions."""
    places: Tensor | None = None
    """Indices of the completions' scores in rows that share prompts; see ``SharedRows``."""


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
