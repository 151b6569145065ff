"""Continuous batching with a paged KV cache.

A prompt is prefilled once and its pages are shared by all its completions. Tokens of a completion go to its own pages,
so nothing is copied. Up to ``max_rows`` sequences are decoded together, one token per step. When a sequence ends, its
pages are freed and the next waiting sequence takes its row before the next step (continuous batching, Yu et al. 2022,
"Orca"). If the number of pages is limited, a sequence waits until there are pages for its longest possible completion.
Each sequence has its own random numbers, so a completion does not depend on the rest of the batch, except for the
rounding of matrix products of different sizes.

Dimensions: P prompts, T tokens, D width, V vocabulary, B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lilpipe.config.backend import BackendConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation import vllm
from lilpipe.generation.by_class import complete
from lilpipe.generation.fused import FusedDecoder, is_fusable
from lilpipe.generation.graphs import DecodeGraphs, fits
from lilpipe.generation.paged_attention import PromptView
from lilpipe.generation.pages import PAGE_SIZE, pages_for
from lilpipe.generation.requests import CompletionOutput, Request, Row
from lilpipe.generation.rows import Rows, table
from lilpipe.generation.text import token_bytes
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer

__all__ = ["CompletionOutput", "Engine", "Request", "engine_for", "generate", "stream"]

TOKENS_AT_ONCE = 8192
"""Maximum number of prompt tokens, padding included, per prefill forward pass."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    seed: int,
    num_generations: int = 1,
    numbers: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    num_pages: int | None = None,
) -> list[list[CompletionOutput]]:
    """Generate ``num_generations`` completions for each prompt, in order.

    Random numbers depend only on ``seed``, the prompt's number and the index of the completion. ``numbers`` are the
    prompts' numbers across all workers (default: 0, 1, ...). Stop strings require ``tokenizer``. If ``sampling.engine``
    is "vllm", vLLM generates the completions (see ``vllm``). Raises ``DataError`` for a prompt that is empty or leaves
    no room for a completion, and if the model's logits are NaN.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    if sampling.engine == "vllm":
        return vllm.generate(
            model,
            prompts,
            numbers=numbers,
            sampling=sampling,
            stop_ids=stop_ids,
            seed=seed,
            num_generations=num_generations,
            rooms=[_room(model, index, prompt, sampling) for index, prompt in enumerate(prompts)],
            tokenizer=tokenizer,
        )
    engine = engine_for(model, max_rows=sampling.batch_size, num_pages=num_pages, cuda_graphs=sampling.cuda_graphs)
    requests = [
        engine.submit(
            prompt,
            sampling=sampling,
            stop_ids=stop_ids,
            seed=seed,
            num_generations=num_generations,
            tokenizer=tokenizer,
            index=index,
        )
        for index, prompt in zip(numbers, prompts, strict=True)
    ]
    while engine.step():
        pass
    return [request.samples for request in requests]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> Iterator[int]:
    """Yield the tokens of one completion as they are sampled; the same tokens as ``generate``."""
    engine = engine_for(model, max_rows=1, cuda_graphs=sampling.cuda_graphs)
    request = engine.submit(prompt, sampling=sampling, stop_ids=stop_ids, seed=seed, tokenizer=tokenizer)
    tokens, num_sent = request.samples[0].tokens, 0
    while not request.done:
        engine.step()
        yield from tokens[num_sent:]
        num_sent = len(tokens)


class Engine:
    """Decodes requests together; call ``step`` until it returns False.

    ``num_pages`` limits the number of pages in use, each of ``PAGE_SIZE`` tokens. ``cuda_graphs`` (experimental)
    replays the decode step of a dense model on a GPU. ``fuse`` decodes faster on a CPU with a copy of the weights.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_rows: int,
        num_pages: int | None = None,
        cuda_graphs: bool = False,
        fuse: bool = True,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.num_pages = num_pages
        self.waiting: deque[Request] = deque()
        """Requests with completions that have not started, oldest first."""
        self.graphs = DecodeGraphs(model) if cuda_graphs and fits(model) else None
        self.fused = FusedDecoder(model) if fuse and is_fusable(model) else None
        self.rows = Rows(model, padded=self.graphs is not None)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingConfig,
        stop_ids: Collection[int],
        seed: int,
        num_generations: int = 1,
        tokenizer: Tokenizer | None = None,
        index: int = 0,
        num_top_logprobs: int = 0,
    ) -> Request:
        """Add a request for completions of a prompt.

        ``seed`` and ``index`` determine its random numbers. ``num_top_logprobs`` is the number of most likely tokens to
        return at each position. Raises ``DataError`` if the prompt and completion cannot fit, and for stop strings
        without a tokenizer.
        """
        if sampling.stop and tokenizer is None:
            raise DataError(f"sampling.stop: got {sampling.stop} without a tokenizer; pass tokenizer")
        request = Request(
            prompt=list(prompt_ids),
            sampling=sampling,
            stop_ids=frozenset(stop_ids),
            seed=seed,
            index=index,
            room=_room(self.model, index, prompt_ids, sampling),
            samples=[CompletionOutput([], [], finished=False) for _ in range(num_generations)],
            num_top_logprobs=num_top_logprobs,
            vocabulary=token_bytes(tokenizer) if sampling.stop and tokenizer else [],
        )
        self._check_pages(request)
        if request.samples:
            self.waiting.append(request)
        return request

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Stop generating for a request; its completions stay as they are."""
        if request in self.waiting:
            self.waiting.remove(request)
        request.num_ended += len(request.samples) - request.num_started
        request.num_started = len(request.samples)
        for sample in request.samples:
            sample.stop_reason = sample.stop_reason or "cancelled"
        self.rows.remove([number for number, row in enumerate(self.rows.rows) if row.request is request])

    @torch.inference_mode()
    def step(self) -> bool:
        """Fill free rows with waiting completions and sample a token in every row. Returns False when all is done."""
        while self._enter():
            pass
        if self.rows:
            tokens_B1, positions_B1, view = self.rows.inputs()
            if self.graphs is not None:
                logits_BV = self.graphs(tokens_B1, positions_B1, view)
            elif self.fused is not None:
                logits_BV = self.fused(tokens_B1, positions_B1, view)
            else:
                logits_BV = self.model(tokens_B1, positions_BT=positions_B1, cache=view)[:, 0]
            self.rows.draw(logits_BV[: len(self.rows)])
        return bool(self.rows or self.waiting)

    # --- admission ------------------------------------------------------------------------------------------------

    def _enter(self) -> bool:
        """Prefill waiting prompts and sample their first tokens. Returns False if no completion was admitted."""
        entering: list[Row] = []
        while self.waiting and len(self.rows) + len(entering) < self.max_rows:
            request = self.waiting[0]
            if not self._has_pages(request, entering):
                break
            if not request.pages:
                request.pages = self.rows.prompts.take(pages_for(len(request.prompt)))
            entering.append(Row(request, request.num_started))
            request.num_started += 1
            if request.num_started == len(request.samples):
                self.waiting.popleft()
        if not entering:
            return False
        requests = list(dict.fromkeys(row.request for row in entering))
        self._read([request for request in requests if request.logits_V is None])
        logits = [row.request.logits_V for row in entering]
        for request in requests:
            if request.num_started == len(request.samples):
                request.logits_V = None
        self.rows.add(entering, torch.stack([logits_V for logits_V in logits if logits_V is not None]))
        return True

    def _has_pages(self, request: Request, entering: Sequence[Row]) -> bool:
        """Whether the page limit allows one more completion of maximum length, given those admitted."""
        if self.num_pages is None:
            return True
        promised = sum(row.request.pages_per_completion for row in [*self.rows.rows, *entering])
        prompt = 0 if request.pages else pages_for(len(request.prompt))
        return self.rows.prompts.num_used + promised + prompt + request.pages_per_completion <= self.num_pages

    def _read(self, requests: Sequence[Request]) -> None:
        """Prefill prompts, batched by similar length."""
        ordered = sorted(requests, key=lambda request: len(request.prompt))
        while ordered:
            count = 1
            while count < len(ordered) and (count + 1) * len(ordered[count].prompt) <= TOKENS_AT_ONCE:
                count += 1
            self._read_together(ordered[:count])
            ordered = ordered[count:]

    def _read_together(self, requests: Sequence[Request]) -> None:
        lengths_P = np.array([len(request.prompt) for request in requests])
        max_len, device = int(lengths_P.max()), self.model.device
        # Right padding: with causal attention, no prompt token attends to it.
        tokens_PT = torch.tensor([request.prompt + [0] * (max_len - len(request.prompt)) for request in requests])
        view = PromptView(self.rows.prompts, table([request.pages for request in requests]), lengths_P)
        hidden_PTD = self.model.model(tokens_PT.to(device), cache=view)
        last_P = torch.from_numpy(lengths_P - 1).to(device)
        logits_PV = self.model.logits(hidden_PTD[torch.arange(len(requests), device=device), last_P])
        for request, logits_V in zip(requests, logits_PV, strict=True):
            request.logits_V = logits_V

    def _check_pages(self, request: Request) -> None:
        needed = pages_for(len(request.prompt)) + request.pages_per_completion
        if self.num_pages is not None and needed > self.num_pages:
            raise DataError(
                f"prompt {request.index}: {len(request.prompt)} tokens and a completion of up to {request.room} need "
                f"{needed} pages of {PAGE_SIZE} tokens, but num_pages is {self.num_pages}; shorten them or increase it"
            )


class BackendEngine(Engine):
    """The engine of a model that transformers computes, with ``generate`` of its class.

    A step generates completions of prompts of equal length to their ends, so nothing is assumed about padding or the
    cache. Tokens and random numbers are those of ``Engine``; ended rows are computed until the last has ended.
    """

    def __init__(self, model: Transformer, *, max_rows: int) -> None:
        self.model, self.max_rows, self.num_pages = model, max_rows, None
        self.waiting: deque[Request] = deque()

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Do not start further completions of a request."""
        if request in self.waiting:
            self.waiting.remove(request)
        request.num_ended += len(request.samples) - request.num_started
        request.num_started = len(request.samples)
        for sample in request.samples:
            sample.stop_reason = sample.stop_reason or "cancelled"

    @torch.inference_mode()
    def step(self) -> bool:
        """Complete waiting prompts as long as the oldest, with the same parameters. Returns False when all is done."""
        if not self.waiting:
            return False
        first = self.waiting[0]
        rows: list[Row] = []
        for request in list(self.waiting):
            if (len(request.prompt), request.params) != (len(first.prompt), first.params):
                continue
            while request.num_started < len(request.samples) and len(rows) < self.max_rows:
                rows.append(Row(request, request.num_started))
                request.num_started += 1
            if request.num_started == len(request.samples):
                self.waiting.remove(request)
        complete(self.model, rows)
        for row in rows:
            row.request.num_ended += 1
        return bool(self.waiting)


def engine_for(model: Transformer, *, max_rows: int, **options: Any) -> Engine:
    """Return the engine of a model; ``options`` are those of ``Engine``, which others ignore."""
    if isinstance(model.config, BackendConfig):
        return BackendEngine(model, max_rows=max_rows)
    return Engine(model, max_rows=max_rows, **options)


def _room(model: Transformer, index: int, prompt: Sequence[int], sampling: SamplingConfig) -> int:
    """Return the maximum number of tokens of a completion of the prompt."""
    max_seq_len = model.config.max_seq_len
    if not 0 < len(prompt) < max_seq_len:
        raise DataError(
            f"prompt {index}: got {len(prompt)} tokens, expected 1 to {max_seq_len - 1}: prompt and completion must "
            f"fit in max_seq_len = {max_seq_len}; shorten the prompt or train a model with a larger model.max_seq_len"
        )
    return min(sampling.max_new_tokens, max_seq_len - len(prompt))
