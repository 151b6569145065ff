"""Rows: the completions that are decoded together, with their tokens, random numbers and pages.

Dimensions: B rows, V vocabulary, N random numbers, M pages of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe.errors import DataError
from lilpipe.generation.batch_layout import layout
from lilpipe.generation.paged_attention import DecodeView, Scratch
from lilpipe.generation.pages import PAGE_SIZE, PagePool
from lilpipe.generation.requests import Row, SamplingParams
from lilpipe.generation.sampling import draw, uniforms
from lilpipe.model.transformer import Transformer

COMPACT_AT = 1 / 2
"""Pages are compacted when less than this fraction of the pages up to the last used one is in use."""


class Rows:
    """Row b holds the last token of one completion, which is not cached yet. Rows have no order.

    With ``padded``, a step's shapes are rounded up to few sizes: empty rows follow the others and write to their own
    page.
    """

    def __init__(self, model: Transformer, *, padded: bool = False) -> None:
        self.config, self.vocab_size, self.device = model.config, model.vocab_size, model.device
        self.answers, self.prompts = PagePool(model), PagePool(model)
        self.rows: list[Row] = []
        self._tokens_B = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._num_drawn_B = np.zeros(0, dtype=np.int64)
        self._uniforms_BN = np.zeros((0, 0), dtype=np.float32)
        self._seen_BV: Tensor | None = None
        self._by_params: dict[SamplingParams, list[int]] | None = None
        self._num_asking = 0
        """Number of rows whose requests ask for top log-probabilities."""
        self._view: DecodeView | None = None
        self._steps_left = 0
        self._scratch = Scratch()
        self._sink = self.answers.take(1) if padded else []
        """The page of the empty rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)

    # --- adding and removing --------------------------------------------------------------------------------------

    def add(self, entering: Sequence[Row], logits_BV: Tensor) -> None:
        """Add completions and sample the first token of each."""
        first = len(self.rows)
        self.rows += entering
        self._num_asking += sum(row.request.num_top_logprobs > 0 for row in entering)
        zeros_B = torch.zeros(len(entering), dtype=torch.int64, device=self.device)
        self._tokens_B = torch.cat([self._tokens_B, zeros_B])
        self._num_drawn_B = np.concatenate([self._num_drawn_B, np.zeros(len(entering), dtype=np.int64)])
        streams = [uniforms(row.request.seed, row.request.index, row.number, row.room).numpy() for row in entering]
        width = max(self._uniforms_BN.shape[1], *(len(stream) for stream in streams))
        grown_BN = np.zeros((len(self.rows), width), dtype=np.float32)
        grown_BN[:first, : self._uniforms_BN.shape[1]] = self._uniforms_BN
        for number, stream in enumerate(streams, first):
            grown_BN[number, : len(stream)] = stream
        self._uniforms_BN = grown_BN
        self._see(entering)
        self._by_params = self._view = None
        self.draw(logits_BV, first)

    def _see(self, entering: Sequence[Row]) -> None:
        """Record the prompts' tokens for the repetition penalty, if any row has one."""
        if self._seen_BV is None and all(row.request.params.repetition_penalty == 1 for row in entering):
            return
        num_before = len(self.rows) - len(entering)
        if self._seen_BV is None:
            self._seen_BV = torch.zeros(num_before, self.vocab_size, dtype=torch.bool, device=self.device)
        new_BV = torch.zeros(len(entering), self.vocab_size, dtype=torch.bool, device=self.device)
        for seen_V, row in zip(new_BV, entering, strict=True):
            seen_V[torch.tensor(row.request.prompt, device=self.device)] = True
        self._seen_BV = torch.cat([self._seen_BV, new_BV])

    def remove(self, numbers: Collection[int]) -> None:
        """Remove rows and free their pages; a prompt's pages are freed with its last completion."""
        if not numbers:
            return
        for number in numbers:
            row = self.rows[number]
            self.answers.give(row.pages)
            request = row.request
            request.num_ended += 1
            self._num_asking -= request.num_top_logprobs > 0
            if request.done:
                self.prompts.give(request.pages)
                request.pages = []
        stays_B = np.ones(len(self.rows), dtype=bool)
        stays_B[list(numbers)] = False
        kept = np.flatnonzero(stays_B)
        self.rows = [self.rows[number] for number in kept]
        self._num_drawn_B, self._uniforms_BN = self._num_drawn_B[kept], self._uniforms_BN[kept]
        kept_B = torch.from_numpy(kept).to(self.device)
        self._tokens_B = self._tokens_B[kept_B]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[kept_B] if self.rows else None
        self._by_params = self._view = None

    # --- decode step ----------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Tensor, Tensor, DecodeView]:
        """Return the last token of each row and its position, ``[B, 1]`` each, and the view of the KV cache.

        With padding there are more rows than completions.
        """
        if self._view is None or self._steps_left == 0:
            self._view = self._lay_out()
        else:
            self._positions_B += 1
            self._view.advance()
            self._steps_left -= 1
        missing = self._view.layout.num_rows - len(self.rows)
        tokens_B = F.pad(self._tokens_B, (0, missing)) if missing else self._tokens_B
        return tokens_B[:, None], self._positions_B[:, None], self._view

    def _lay_out(self) -> DecodeView:
        """Allocate a page for each row that starts one, and compute the layout."""
        own_B = self._num_drawn_B - 1
        index_B, place_B = np.divmod(own_B, PAGE_SIZE)
        begin = [row for row, index in zip(self.rows, index_B.tolist(), strict=True) if index == len(row.pages)]
        for row, page in zip(begin, self.answers.take(len(begin)), strict=True):
            row.pages.append(page)
        self._compact()
        answers, prompts = [row.pages for row in self.rows], [row.request.pages for row in self.rows]
        lengths_B = np.array([len(row.request.prompt) for row in self.rows])
        positions_B = lengths_B + own_B
        self._steps_left = int((PAGE_SIZE - 1 - place_B).min())
        if self._sink:
            missing = round_up(len(self.rows)) - len(self.rows)
            answers, prompts = answers + missing * [self._sink], prompts + missing * [[]]
            arrays = (index_B, place_B, positions_B, lengths_B)
            index_B, place_B, positions_B, lengths_B = (np.pad(values, (0, missing)) for values in arrays)
        rounded = round_up if self._sink else int
        answers_BM, prompts_BM = table(answers, rounded), table(prompts, rounded)
        plan = layout(answers_BM, prompts_BM, self.config, self.device, rounded, prompt_lengths_B=lengths_B)
        self.answers.reserve(plan.num_answer_pages)
        self.prompts.reserve(plan.num_prompt_pages)
        self._positions_B = torch.from_numpy(positions_B).to(self.device)
        page_B = torch.from_numpy(answers_BM[np.arange(len(answers)), index_B]).to(self.device)
        place_B = torch.from_numpy(place_B).to(self.device)
        return DecodeView(self.answers, self.prompts, plan, page_B, place_B, self._scratch)

    def _compact(self) -> None:
        if self.answers.num_used < COMPACT_AT * self.answers.extent:
            moved = self.answers.compact()
            self._sink = [moved.get(page, page) for page in self._sink]
            for row in self.rows:
                row.pages = [moved.get(page, page) for page in row.pages]
        if self.prompts.num_used < COMPACT_AT * self.prompts.extent:
            moved = self.prompts.compact()
            for request in dict.fromkeys(row.request for row in self.rows):
                request.pages = [moved.get(page, page) for page in request.pages]

    def draw(self, logits_BV: Tensor, first: int = 0) -> None:
        """Sample a token in each row from ``first`` on; rows whose completion ends are removed."""
        uniforms_B = torch.from_numpy(self._uniforms_BN[np.arange(first, len(self.rows)), self._num_drawn_B[first:]])
        tokens_B, logprobs_B = self._choose(logits_BV, uniforms_B.to(self.device), first)
        self._tokens_B[first:] = tokens_B
        self._num_drawn_B[first:] += 1
        if self._seen_BV is not None:
            self._seen_BV[first:].scatter_(1, tokens_B[:, None], True)
        logprobs = logprobs_B.tolist()
        if not math.isfinite(sum(logprobs)):
            raise DataError("the model's logits are not finite: its training diverged; train it again")
        self._note_top_logprobs(logits_BV, first)
        drawn = zip(self.rows[first:], tokens_B.tolist(), logprobs, strict=True)
        self.remove([number for number, (row, *values) in enumerate(drawn, first) if row.record(*values)])

    def _note_top_logprobs(self, logits_BV: Tensor, first: int) -> None:
        """Record the most likely tokens of rows whose requests ask for them."""
        rows = enumerate(self.rows[first:]) if self._num_asking else ()
        asking = [(number, row) for number, row in rows if row.request.num_top_logprobs]
        if not asking:
            return
        most = min(max(row.request.num_top_logprobs for _, row in asking), self.vocab_size)
        logprobs_NC, tokens_NC = logits_BV[[number for number, _ in asking]].log_softmax(dim=-1).topk(most)
        for (_, row), tokens, logprobs in zip(asking, tokens_NC.tolist(), logprobs_NC.tolist(), strict=True):
            row.sample.top_logprobs.append(list(zip(tokens, logprobs, strict=True))[: row.request.num_top_logprobs])

    def _choose(self, logits_BV: Tensor, uniforms_B: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return tokens and log-probabilities; rows with the same sampling parameters are sampled together."""
        seen_BV = None if self._seen_BV is None else self._seen_BV[first:]
        by_params = self._sampling_params(first)
        if len(by_params) == 1:
            return draw(logits_BV, uniforms_B, next(iter(by_params)), seen_BV)
        tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=self.device)
        logprobs_B = torch.empty(len(logits_BV), dtype=logits_BV.dtype, device=self.device)
        for params, numbers in by_params.items():
            some_N = torch.tensor(numbers, device=self.device)
            seen_NV = None if seen_BV is None else seen_BV[some_N]
            tokens_B[some_N], logprobs_B[some_N] = draw(logits_BV[some_N], uniforms_B[some_N], params, seen_NV)
        return tokens_B, logprobs_B

    def _sampling_params(self, first: int) -> dict[SamplingParams, list[int]]:
        """Group rows by sampling parameters; row numbers count from ``first``."""
        if first == 0 and self._by_params is not None:
            return self._by_params
        by_params: dict[SamplingParams, list[int]] = {}
        for number, row in enumerate(self.rows[first:]):
            by_params.setdefault(row.request.params, []).append(number)
        if first == 0:
            self._by_params = by_params
        return by_params


def round_up(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def table(pages: Sequence[Sequence[int]], width: Callable[[int], int] = int) -> np.ndarray:
    """Return the pages of each row ``[B, M]``, -1 where a row has fewer; ``width`` rounds M up."""
    result = np.full((len(pages), width(max(map(len, pages), default=0))), -1, dtype=np.int64)
    for row, numbers in zip(result, pages, strict=True):
        row[: len(numbers)] = numbers
    return result
