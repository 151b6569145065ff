"""Batched decoding with a cache of keys and values.

A prompt is read once and its cache copied to each of its samples. Up to ``batch_size`` sequences advance together by
a token a step; a sequence that ends gives its row to the next one waiting (continuous batching, Yu et al. 2022,
"Orca"), and once none waits the batch shrinks. Each sequence draws from a random stream of its own, so a sample does
not depend on which others share the batch, up to the rounding of matrix products of another size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lilpipe.config import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.sampling import choose, uniforms
from lilpipe.model.attention import KVCache
from lilpipe.model.transformer import Transformer, gather_logprobs

IDLE_SHARE = 1 / 8
"""Rows are refilled or dropped once this share of the batch is idle: each time costs a copy of keys and values."""


@dataclass(frozen=True)
class Sample:
    """One answer.

    ``tokens`` leaves the stop token out. ``logprobs`` are the model's own, at temperature 1 and before ``top_p``, of
    ``tokens`` and of the stop token if ``finished``. An answer that is not finished met ``max_new_tokens`` or
    ``max_seq_len``.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class _Sequence:
    """An answer in the making."""

    prompt: int
    sample: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    seed: int,
    num_samples: int = 1,
) -> list[list[Sample]]:
    """``num_samples`` answers to each prompt, in order.

    Random numbers depend on ``seed``, the prompt's index in ``prompts`` and the sample's index alone. Raises
    ``DataError`` for a prompt that is empty or leaves no room for an answer, and for a model that gives NaN.
    """
    batch = _Batch(model, prompts, sampling=sampling, stop_ids=stop_ids, seed=seed, num_samples=num_samples)
    while batch.advance():
        pass
    return [[Sample(s.tokens, s.logprobs, s.finished) for s in samples] for samples in batch.sequences]


def stream(
    model: Transformer, prompt: Sequence[int], *, sampling: SamplingConfig, stop_ids: Collection[int], seed: int
) -> Iterator[int]:
    """The tokens of one answer, each as soon as it is drawn; the same as ``generate`` gives."""
    batch = _Batch(model, [prompt], sampling=sampling, stop_ids=stop_ids, seed=seed, num_samples=1)
    sequence = batch.sequences[0][0]
    num_sent = 0
    while batch.advance():
        yield from sequence.tokens[num_sent:]
        num_sent = len(sequence.tokens)


class _Batch:
    """Rows that are decoded together; ``advance`` until it says that all is done.

    Row r holds one sequence or none: the token drawn last, which stands at ``positions[r]`` and is not in the cache
    yet.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        stop_ids: Collection[int],
        seed: int,
        num_samples: int,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.seed = seed
        rooms = [_room(model, index, prompt, sampling) for index, prompt in enumerate(prompts)]
        self.sequences = [[_Sequence(i, k, room) for k in range(num_samples)] for i, room in enumerate(rooms)]
        self.waiting = deque(
            samples[start : start + sampling.batch_size]
            for samples in self.sequences
            for start in range(0, num_samples, sampling.batch_size)
        )
        num_rows = min(sampling.batch_size, len(prompts) * num_samples)
        max_len = max((len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)), default=0)
        self.rows: list[_Sequence | None] = [None] * num_rows
        self.num_busy = 0
        self.cache = KVCache.empty(model, num_rows=num_rows, max_len=max_len)
        self.tokens, self.positions, self.num_drawn = torch.zeros(3, num_rows, dtype=torch.int64, device=model.device)
        self.uniforms = torch.zeros(num_rows, sampling.max_new_tokens, device=model.device)

    @torch.inference_mode()
    def advance(self) -> bool:
        """Give idle rows to waiting sequences, or else draw a token in every busy row. False if there is none."""
        num_idle = len(self.rows) - self.num_busy
        worthwhile = num_idle >= IDLE_SHARE * len(self.rows)
        if self.waiting and worthwhile and num_idle >= len(self.waiting[0]):
            self._admit()
        elif self.num_busy == 0:
            return False
        else:
            if worthwhile and not self.waiting:
                self._drop_idle()
            self._step()
        return True

    def _admit(self) -> None:
        """Read prompts, each once, copy their caches to the rows of their samples, and draw the first tokens."""
        idle = [row for row, sequence in enumerate(self.rows) if sequence is None]
        groups: list[list[_Sequence]] = []
        entering: list[_Sequence] = []
        while self.waiting and len(entering) + len(self.waiting[0]) <= len(idle):
            groups.append(self.waiting.popleft())
            entering += groups[-1]
        device = self.tokens.device
        rows_B = torch.tensor(idle[: len(entering)], device=device)
        parents_B = torch.tensor([parent for parent, group in enumerate(groups) for _ in group], device=device)
        logits_PV, lengths_P, cache = self._prefill([self.prompts[group[0].prompt] for group in groups])
        self.cache.copy_rows(rows_B, cache, parents_B)
        self.positions[rows_B] = lengths_P[parents_B]
        self.num_drawn[rows_B] = 0
        num_tokens = self.uniforms.shape[1]
        streams = [uniforms(self.seed, sequence.prompt, sequence.sample, num_tokens) for sequence in entering]
        self.uniforms[rows_B] = torch.stack(streams).to(device)
        for row, sequence in zip(idle, entering, strict=False):
            self.rows[row] = sequence
        self.num_busy += len(entering)
        self._draw(rows_B, logits_PV[parents_B])

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, KVCache]:
        """Logits after each prompt ``[P, V]``, the prompts' lengths ``[P]`` and their cache."""
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=self.tokens.device)
        max_len = max(map(len, prompts))
        # Padding stands on the right, where no prompt can see it and where the answer will overwrite it.
        padded = [[*prompt, *[0] * (max_len - len(prompt))] for prompt in prompts]
        tokens_PT = torch.tensor(padded, device=self.tokens.device)
        cache = KVCache.empty(self.model, num_rows=len(prompts), max_len=max_len)
        hidden_PTD = self.model.model(tokens_PT, cache=cache)
        last_PD = hidden_PTD[torch.arange(len(prompts), device=lengths_P.device), lengths_P - 1]
        return self.model.logits(last_PD), lengths_P, cache

    def _step(self) -> None:
        """Feed the last token of every row and draw the next in the busy ones."""
        logits_BV = self.model(self.tokens[:, None], positions_BT=self.positions[:, None], cache=self.cache)[:, 0]
        busy = [row for row, sequence in enumerate(self.rows) if sequence is not None]
        busy_B = torch.tensor(busy, device=self.tokens.device)
        self.positions[busy_B] += 1
        self._draw(busy_B, logits_BV[busy_B])

    def _draw(self, rows_B: Tensor, logits_BV: Tensor) -> None:
        """Draw a token for each of these rows and record it; a sequence that ends leaves its row."""
        if not math.isfinite(logits_BV.sum().item()):
            raise DataError("the model's logits are not finite: its training has diverged; train it again")
        uniforms_B = self.uniforms[rows_B, self.num_drawn[rows_B]]
        sampling = self.sampling
        tokens_B = choose(logits_BV, uniforms_B, temperature=sampling.temperature, top_p=sampling.top_p)
        logprobs = gather_logprobs(logits_BV, tokens_B).tolist()
        self.tokens[rows_B] = tokens_B
        self.num_drawn[rows_B] += 1
        for row, token, logprob in zip(rows_B.tolist(), tokens_B.tolist(), logprobs, strict=True):
            sequence = self.rows[row]
            assert sequence is not None
            sequence.logprobs.append(logprob)
            if token in self.stop_ids:
                sequence.finished = True
            else:
                sequence.tokens.append(token)
            if sequence.finished or len(sequence.tokens) == sequence.max_tokens:
                self.rows[row] = None
                self.num_busy -= 1

    def _drop_idle(self) -> None:
        """Make the batch smaller by the rows that are idle."""
        busy = [row for row, sequence in enumerate(self.rows) if sequence is not None]
        busy_B = torch.tensor(busy, device=self.tokens.device)
        self.rows = [self.rows[row] for row in busy]
        self.cache = self.cache.select_rows(busy_B)
        self.tokens, self.positions = self.tokens[busy_B], self.positions[busy_B]
        self.uniforms, self.num_drawn = self.uniforms[busy_B], self.num_drawn[busy_B]


def _room(model: Transformer, index: int, prompt: Sequence[int], sampling: SamplingConfig) -> int:
    """Most tokens that an answer to the prompt can have."""
    max_seq_len = model.config.max_seq_len
    if not 0 < len(prompt) < max_seq_len:
        raise DataError(
            f"prompt {index}: got {len(prompt)} tokens, expected 1 to {max_seq_len - 1}, so that prompt and answer fit "
            f"in max_seq_len = {max_seq_len}; shorten the prompt or train a model with a larger model.max_seq_len"
        )
    return min(sampling.max_new_tokens, max_seq_len - len(prompt))
