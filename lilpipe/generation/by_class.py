"""Sampling with ``generate`` of a class of transformers, with the random numbers of the engine.

The class computes hidden states and keeps its cache. Each token is drawn here (``sampling.draw``), and handed back as
the only possible one.

Dimensions: B rows of equal prompt length, T tokens so far, D inputs of the output layer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lilpipe.errors import DataError
from lilpipe.generation.requests import Row
from lilpipe.generation.sampling import draw, uniforms
from lilpipe.model.backend import Backend
from lilpipe.model.transformer import Transformer


def complete(model: Transformer, rows: Sequence[Row]) -> None:
    """Generate all completions to their ends. The rows have prompts of one length, and the same parameters."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    backend = model.model
    assert isinstance(backend, Backend)
    prompts_BT = torch.tensor([row.request.prompt for row in rows], device=model.device)
    drawing = _Drawing(model, backend, rows)
    config = GenerationConfig(
        max_new_tokens=max(row.room for row in rows), do_sample=False, eos_token_id=None, pad_token_id=0
    )
    backend.network.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        generation_config=config,
        logits_processor=LogitsProcessorList([drawing.scores]),
        stopping_criteria=StoppingCriteriaList([drawing.ended]),
    )


class _Drawing:
    """Draws a token of each row, and knows which rows have ended."""

    def __init__(self, model: Transformer, backend: Backend, rows: Sequence[Row]) -> None:
        self._model, self._backend, self._rows = model, backend, rows
        self._num_drawn = 0
        self._is_open = [True] * len(rows)
        streams = [uniforms(row.request.seed, row.request.index, row.number, row.room) for row in rows]
        self._uniforms_TB = torch.nn.utils.rnn.pad_sequence(streams).to(model.device)

    def scores(self, tokens_BT: Tensor, hidden_BD: Tensor) -> Tensor:
        """Draw the next tokens; return scores ``[B, V]`` of 0 for them and -inf for all others."""
        hidden_BD = self._backend.with_bias(hidden_BD.to(self._model.output_weight.dtype))
        logits_BV = self._model.logits(hidden_BD)
        params = self._rows[0].request.params
        seen_BV = None
        if params.repetition_penalty != 1:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(1, tokens_BT, True)
        tokens_B, logprobs_B = draw(logits_BV, self._uniforms_TB[self._num_drawn], params, seen_BV)
        self._num_drawn += 1
        self._record(logits_BV, tokens_B.tolist(), logprobs_B.tolist())
        return torch.full_like(logits_BV, -math.inf).scatter_(1, tokens_B[:, None], 0.0)

    def ended(self, tokens_BT: Tensor, _scores: Tensor) -> Tensor:
        """Return for each row whether all rows have ended, so that generation stops only then."""
        return torch.full((len(tokens_BT),), not any(self._is_open), device=tokens_BT.device)

    def _record(self, logits_BV: Tensor, tokens: list[int], logprobs: list[float]) -> None:
        """Append the tokens to the rows that have not ended."""
        for number, row in enumerate(self._rows):
            if not self._is_open[number]:
                continue
            if not math.isfinite(logprobs[number]):
                raise DataError("the model's logits are not finite: its training diverged; train it again")
            if most := min(row.request.num_top_logprobs, logits_BV.shape[1]):
                values, ids = logits_BV[number].log_softmax(dim=-1).topk(most)
                row.sample.top_logprobs.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
            self._is_open[number] = not row.record(tokens[number], logprobs[number])
