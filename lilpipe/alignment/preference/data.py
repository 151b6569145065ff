"""Preferences as tokens, and how completions lie in a batch.

All losses of the family take rows of two prompted completions: a pair's chosen and rejected one or, for ``kto``, a
completion and the completion to another prompt by which the KL divergence is estimated.

Dimensions: S completions, A tokens of the longest completion, B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lilpipe.errors import DataError
from lilpipe.model.scores import IGNORED, Scores
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import Pair, UnpairedExample
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.packing import best_fit
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.supervised import Row, collate

ROW_TOKENS = 128
"""Short completions are packed into rows of at least so many tokens. In batches of 16 pairs of 16 to 70 tokens that
took 0.76 of the CPU time of padded rows, and rows as long as the longest sequence 0.99. Completions that share one copy
of their prompt, under a mask of its own, took 0.66; with sequences of 40 to 330 tokens both took 0.7.
"""

Skipped = dict[str, list[str]]
"""Reason to the prompts of what is not used."""


@dataclass(frozen=True)
class PromptCompletion:
    """Token ids."""

    prompt: list[int]
    """With the assistant's header."""
    completion: list[int]
    """With the turn's end."""

    @property
    def num_tokens(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class PreferenceRow:
    """What a batch is counted in: two prompted completions."""

    prompt_id: str
    first: PromptCompletion
    """The chosen completion, of ``kto`` the completion."""
    second: PromptCompletion
    """The rejected completion, of ``kto`` a completion to another prompt after this one."""
    desirable: bool = True
    """Whether the first is to become likelier."""


# --- reading ------------------------------------------------------------------------------------------------------


def as_examples(pairs: Sequence[Pair]) -> list[UnpairedExample]:
    """A desirable and an undesirable completion of each pair; all chosen ones first: neighbours differ in prompt."""
    chosen = [UnpairedExample(pair.prompt_id, pair.split, pair.prompt, pair.chosen, True) for pair in pairs]
    return chosen + [UnpairedExample(pair.prompt_id, pair.split, pair.prompt, pair.rejected, False) for pair in pairs]


def in_rounds(examples: Sequence[UnpairedExample]) -> list[UnpairedExample]:
    """The first completion to each prompt, then the second, and so on: neighbours differ in prompt where they can."""
    rounds: Counter[str] = Counter()
    ranked = []
    for example in examples:
        prompt = str(example.prompt)
        ranked.append((rounds[prompt], example))
        rounds[prompt] += 1
    return [example for _, example in sorted(ranked, key=lambda item: item[0])]


# --- tokens -------------------------------------------------------------------------------------------------------


def encode_completion(tokenizer: Tokenizer, prompt: Sequence[Message], completion: str) -> PromptCompletion:
    """The prompt with the assistant's header, and the completion with its end."""
    return PromptCompletion(*render_completion(tokenizer, [*prompt, Message(role="assistant", content=completion)]))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], *, max_len: int) -> tuple[list[PreferenceRow], Skipped]:
    """Pairs as rows, and what was left out; no completion is ever cut."""
    rows: list[PreferenceRow] = []
    skipped: Skipped = {}
    for pair in pairs:
        first, second = (encode_completion(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected))
        if reason := _reason_against((pair.chosen, pair.rejected), (first, second), max_len):
            skipped.setdefault(reason, []).append(pair.prompt_id)
        else:
            rows.append(PreferenceRow(pair.prompt_id, first, second))
    return rows, skipped


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[UnpairedExample], *, max_len: int
) -> tuple[list[tuple[UnpairedExample, PromptCompletion]], Skipped]:
    """Single completions with their tokens, and what was left out."""
    kept: list[tuple[UnpairedExample, PromptCompletion]] = []
    skipped: Skipped = {}
    for example in examples:
        encoded = encode_completion(tokenizer, example.prompt, example.completion)
        if reason := _reason_against((example.completion,), (encoded,), max_len):
            skipped.setdefault(reason, []).append(example.prompt_id)
        else:
            kept.append((example, encoded))
    return kept, skipped


def with_mismatched(
    examples: Sequence[tuple[UnpairedExample, PromptCompletion]], *, max_len: int
) -> list[PreferenceRow]:
    """Single completions as rows, each with the nearest completion before it that belongs to another prompt and fits.

    So almost every completion is once a completion and once a mismatched one, as Ethayarajh et al. 2024 and TRL have
    it. Raises ``DataError`` where there is no such completion.
    """
    rows = []
    for index, (example, encoded) in enumerate(examples):
        earlier = (examples[index - back][1] for back in range(1, len(examples)))
        others = (
            PromptCompletion(encoded.prompt, other.completion) for other in earlier if other.prompt != encoded.prompt
        )
        mismatched = next((other for other in others if other.num_tokens <= max_len), None)
        if mismatched is None:
            raise DataError(
                f"dpo: no completion to another prompt fits behind prompt {example.prompt_id} in {max_len} tokens; kto "
                "estimates the KL divergence by such completions: give it several prompts, or a model of longer context"
            )
        rows.append(PreferenceRow(example.prompt_id, encoded, mismatched, example.label))
    return rows


def _reason_against(texts: Sequence[str], completions: Sequence[PromptCompletion], max_len: int) -> str:
    if any(not text.strip() for text in texts):
        return "empty_completion"
    return "too_long" if any(completion.num_tokens > max_len for completion in completions) else ""


# --- batches ------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where in a batch the completions' tokens are scored."""

    rows_S1: Tensor
    columns_SA: Tensor
    present_SA: Tensor
    """Boolean: the completion has so many tokens."""
    counted_SA: Tensor
    """Boolean: the token counts in the completion's log-probability."""

    def read(self, scores: Scores) -> Tensor:
        """Log-probabilities [S, A] of the completions' tokens, 0 where there are none."""
        return scores.logprobs[self.rows_S1, self.columns_SA] * self.present_SA


class Packer:
    """Lays prompted completions in rows, several in one where the model's positions allow it."""

    def __init__(
        self, *, padding_id: int, max_len: int, packed: bool, mask_formatting: bool, device: torch.device
    ) -> None:
        self._padding_id = padding_id
        self._max_len = max_len
        self._packed = packed
        self._mask_formatting = mask_formatting
        self._device = device

    def __call__(self, completions: Sequence[PromptCompletion]) -> tuple[TokenBatch, Places]:
        """One micro-batch, in which only completions are scored, and the places of these completions in their order.

        Positions run on over a row: rotary attention sees their differences alone.
        """
        lengths = np.array([completion.num_tokens - 1 for completion in completions])  # the last token is not put in
        row_of = self._rows(lengths)
        rows: list[list[Row]] = [[] for _ in range(int(row_of.max()) + 1)]
        used = [0] * len(rows)
        starts: list[tuple[int, int]] = []
        for row, length, completion in zip(row_of.tolist(), lengths.tolist(), completions, strict=True):
            starts.append((row, used[row] + len(completion.prompt) - 1))
            used[row] += length
            targets = [IGNORED] * (len(completion.prompt) - 1) + completion.completion
            rows[row].append((torch.tensor(completion.prompt + completion.completion[:-1]), torch.tensor(targets)))
        batch = collate(rows, padding_id=self._padding_id)
        documents = None
        if len(rows) < len(completions) and batch.documents is not None:
            documents = batch.documents.to(self._device)
        batch = TokenBatch(batch.inputs.to(self._device), batch.targets.to(self._device), documents)
        return batch, self._places(starts, [len(completion.completion) for completion in completions], max(used))

    def _rows(self, lengths: np.ndarray) -> np.ndarray:
        """The row of each completion."""
        if not self._packed:
            return np.arange(len(lengths))
        return best_fit(lengths, capacity=max(int(lengths.max()), min(ROW_TOKENS, self._max_len)))

    def _places(self, starts: Sequence[tuple[int, int]], num_tokens: Sequence[int], width: int) -> Places:
        rows_S, columns_S = torch.tensor(starts, device=self._device).unbind(1)
        lengths_S1 = torch.tensor(num_tokens, device=self._device)[:, None]
        offsets_A = torch.arange(max(num_tokens), device=self._device)
        columns_SA = (columns_S[:, None] + offsets_A).clamp(max=width - 1)
        counted_SA = offsets_A < lengths_S1 - int(self._mask_formatting)
        return Places(rows_S[:, None], columns_SA, offsets_A < lengths_S1, counted_SA)
