"""Preferences as tokens, and how answers lie in a batch.

All losses of the family take rows of two prompted answers: a pair's chosen and rejected one or, for ``kto``, an answer
and the answer to another prompt by which the KL divergence is estimated.

Dimensions: S answers, A tokens of the longest answer, B rows of a batch, T tokens.
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
from lilpipe.schemas.pairs import JudgedExample, Pair
from lilpipe.tokenizer.chat_template import render_answer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.packing import best_fit
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.supervised import Row, collate

ROW_TOKENS = 128
"""Short answers are packed into rows of at least so many tokens. In batches of 16 pairs of 16 to 70 tokens that took
0.76 of the CPU time of padded rows, and rows as long as the longest sequence 0.99. Answers that share one copy of their
prompt, under a mask of its own, took 0.66; with sequences of 40 to 330 tokens both took 0.7.
"""

LeftOut = dict[str, list[str]]
"""Reason to the prompts of what is not used."""


@dataclass(frozen=True)
class PromptedAnswer:
    """Token ids."""

    prompt: list[int]
    """With the assistant's header."""
    answer: list[int]
    """With the turn's end."""

    @property
    def num_tokens(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class PreferenceRow:
    """What a batch is counted in: two prompted answers."""

    prompt_id: str
    first: PromptedAnswer
    """The chosen answer, of ``kto`` the answer."""
    second: PromptedAnswer
    """The rejected answer, of ``kto`` an answer to another prompt after this one."""
    desirable: bool = True
    """Whether the first is to become likelier."""


# --- reading ------------------------------------------------------------------------------------------------------


def as_examples(pairs: Sequence[Pair]) -> list[JudgedExample]:
    """A desirable and an undesirable answer of each pair; all chosen ones first: neighbours differ in prompt."""
    chosen = [JudgedExample(pair.prompt_id, pair.split, pair.prompt, pair.chosen, True) for pair in pairs]
    return chosen + [JudgedExample(pair.prompt_id, pair.split, pair.prompt, pair.rejected, False) for pair in pairs]


def in_rounds(examples: Sequence[JudgedExample]) -> list[JudgedExample]:
    """The first answer to each prompt, then the second, and so on: neighbours differ in prompt where they can."""
    rounds: Counter[str] = Counter()
    ranked = []
    for example in examples:
        prompt = str(example.prompt)
        ranked.append((rounds[prompt], example))
        rounds[prompt] += 1
    return [example for _, example in sorted(ranked, key=lambda item: item[0])]


# --- tokens -------------------------------------------------------------------------------------------------------


def encode_answer(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> PromptedAnswer:
    """The prompt with the assistant's header, and the answer with its end."""
    return PromptedAnswer(*render_answer(tokenizer, [*prompt, Message(role="assistant", content=answer)]))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], *, max_len: int) -> tuple[list[PreferenceRow], LeftOut]:
    """Pairs as rows, and what was left out; no answer is ever cut."""
    rows: list[PreferenceRow] = []
    left_out: LeftOut = {}
    for pair in pairs:
        first, second = (encode_answer(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected))
        if reason := _reason_against((pair.chosen, pair.rejected), (first, second), max_len):
            left_out.setdefault(reason, []).append(pair.prompt_id)
        else:
            rows.append(PreferenceRow(pair.prompt_id, first, second))
    return rows, left_out


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[JudgedExample], *, max_len: int
) -> tuple[list[tuple[JudgedExample, PromptedAnswer]], LeftOut]:
    """Single answers with their tokens, and what was left out."""
    kept: list[tuple[JudgedExample, PromptedAnswer]] = []
    left_out: LeftOut = {}
    for example in examples:
        encoded = encode_answer(tokenizer, example.prompt, example.answer)
        if reason := _reason_against((example.answer,), (encoded,), max_len):
            left_out.setdefault(reason, []).append(example.prompt_id)
        else:
            kept.append((example, encoded))
    return kept, left_out


def with_mismatched(examples: Sequence[tuple[JudgedExample, PromptedAnswer]], *, max_len: int) -> list[PreferenceRow]:
    """Single answers as rows, each with the nearest answer before it that belongs to another prompt and fits.

    So almost every answer is once an answer and once a mismatched one, as Ethayarajh et al. 2024 and TRL have it.
    Raises ``DataError`` where there is no such answer.
    """
    rows = []
    for index, (example, encoded) in enumerate(examples):
        earlier = (examples[index - back][1] for back in range(1, len(examples)))
        others = (PromptedAnswer(encoded.prompt, other.answer) for other in earlier if other.prompt != encoded.prompt)
        mismatched = next((other for other in others if other.num_tokens <= max_len), None)
        if mismatched is None:
            raise DataError(
                f"dpo: no answer to another prompt fits behind prompt {example.prompt_id} in {max_len} tokens; kto "
                "estimates the KL divergence by such answers: give it several prompts, or a model of longer context"
            )
        rows.append(PreferenceRow(example.prompt_id, encoded, mismatched, example.desirable))
    return rows


def _reason_against(texts: Sequence[str], answers: Sequence[PromptedAnswer], max_len: int) -> str:
    if any(not text.strip() for text in texts):
        return "empty_answer"
    return "too_long" if any(answer.num_tokens > max_len for answer in answers) else ""


# --- batches ------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where in a batch the answers' tokens are scored."""

    rows_S1: Tensor
    columns_SA: Tensor
    present_SA: Tensor
    """Boolean: the answer has so many tokens."""
    counted_SA: Tensor
    """Boolean: the token counts in the answer's log-probability."""

    def read(self, scores: Scores) -> Tensor:
        """Log-probabilities [S, A] of the answers' tokens, 0 where there are none."""
        return scores.logprobs[self.rows_S1, self.columns_SA] * self.present_SA


class Packer:
    """Lays prompted answers in rows, several in one where the model's positions allow it."""

    def __init__(
        self, *, padding_id: int, max_len: int, packed: bool, mask_formatting: bool, device: torch.device
    ) -> None:
        self._padding_id = padding_id
        self._max_len = max_len
        self._packed = packed
        self._mask_formatting = mask_formatting
        self._device = device

    def __call__(self, answers: Sequence[PromptedAnswer]) -> tuple[TokenBatch, Places]:
        """One micro-batch, in which only answers are scored, and the places of these answers in their order.

        Positions run on over a row: rotary attention sees their differences alone.
        """
        lengths = np.array([answer.num_tokens - 1 for answer in answers])  # the last token is not put in
        row_of = self._rows(lengths)
        rows: list[list[Row]] = [[] for _ in range(int(row_of.max()) + 1)]
        used = [0] * len(rows)
        starts: list[tuple[int, int]] = []
        for row, length, answer in zip(row_of.tolist(), lengths.tolist(), answers, strict=True):
            starts.append((row, used[row] + len(answer.prompt) - 1))
            used[row] += length
            targets = [IGNORED] * (len(answer.prompt) - 1) + answer.answer
            rows[row].append((torch.tensor(answer.prompt + answer.answer[:-1]), torch.tensor(targets)))
        batch = collate(rows, padding_id=self._padding_id)
        documents = None
        if len(rows) < len(answers) and batch.documents is not None:
            documents = batch.documents.to(self._device)
        batch = TokenBatch(batch.inputs.to(self._device), batch.targets.to(self._device), documents)
        return batch, self._places(starts, [len(answer.answer) for answer in answers], max(used))

    def _rows(self, lengths: np.ndarray) -> np.ndarray:
        """The row of each answer."""
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
