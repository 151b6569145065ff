"""Tokenization and packing of preferences.

Each row has two completions with their prompts: the chosen and the rejected one or, for ``kto``, a completion and a
mismatched completion that estimates the KL divergence.

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
from lilpipe.schemas.messages import Message, Tools
from lilpipe.schemas.pairs import Pair, UnpairedExample
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.packing import best_fit
from lilpipe.training.conversation_encoding import check_tools
from lilpipe.training.finetune import TokenBatch
from lilpipe.training.supervised import Row, collate, sequence_ids

ROW_TOKENS = 128
"""Minimum capacity, in tokens, of a packed row.

Relative to padded rows, batches of 16 pairs of 16 to 70 tokens took 0.76 of the CPU time, and 0.99 when the capacity
was the longest sequence. Sharing one copy of the prompt between two completions, with a custom mask, took 0.66; with
sequences of 40 to 330 tokens both took 0.7.
"""

Skipped = dict[str, list[str]]
"""Prompt ids by the reason for skipping."""


@dataclass(frozen=True)
class PromptCompletion:
    """Token ids of a prompt and its completion."""

    prompt: list[int]
    """Ends with the assistant's header."""
    completion: list[int]
    """Ends with the end-of-turn token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class PreferenceRow:
    """Row of a preference dataset: two completions with their prompts."""

    prompt_id: str
    first: PromptCompletion
    """Chosen completion; for ``kto`` the completion."""
    second: PromptCompletion
    """Rejected completion; for ``kto`` a mismatched completion, sampled for another prompt."""
    desirable: bool = True
    """Whether the first completion is desirable (``kto``)."""


# --- reading ------------------------------------------------------------------------------------------------------


def as_examples(pairs: Sequence[Pair]) -> list[UnpairedExample]:
    """Split each pair into a desirable and an undesirable example.

    All chosen completions come first, so that neighbours have different prompts.
    """
    chosen = [UnpairedExample(pair.prompt_id, pair.split, pair.prompt, pair.chosen, True) for pair in pairs]
    return chosen + [UnpairedExample(pair.prompt_id, pair.split, pair.prompt, pair.rejected, False) for pair in pairs]


def in_rounds(examples: Sequence[UnpairedExample]) -> list[UnpairedExample]:
    """Order examples by their index within their prompt, so that neighbours have different prompts where possible."""
    rounds: Counter[str] = Counter()
    ranked = []
    for example in examples:
        prompt = str(example.prompt)
        ranked.append((rounds[prompt], example))
        rounds[prompt] += 1
    return [example for _, example in sorted(ranked, key=lambda item: item[0])]


# --- tokens -------------------------------------------------------------------------------------------------------


def encode_completion(
    tokenizer: Tokenizer, prompt: Sequence[Message], completion: str, *, tools: Tools | None = None
) -> PromptCompletion:
    """Tokenize a prompt with the assistant's header, and a completion with its end-of-turn token.

    Raises ``DataError`` if the chat template rejects them.
    """
    check_tools(tokenizer, prompt, tools)
    messages = [*prompt, Message(role="assistant", content=completion)]
    return PromptCompletion(*render_completion(tokenizer, messages, tools=tools))


def _encode_all(
    tokenizer: Tokenizer, item: Pair | UnpairedExample, texts: Sequence[str], *, max_len: int
) -> tuple[list[PromptCompletion], str]:
    """Tokenize the completions of a preference; with the reason for skipping it, if any."""
    try:
        found = [encode_completion(tokenizer, item.prompt, text, tools=item.tools) for text in texts]
    except DataError:
        return [], "rejected_by_template"
    return found, _reason_against(texts, found, max_len)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], *, max_len: int) -> tuple[list[PreferenceRow], Skipped]:
    """Tokenize pairs; return the rows and the skipped prompt ids. Completions are never truncated."""
    rows: list[PreferenceRow] = []
    skipped: Skipped = {}
    for pair in pairs:
        encoded, reason = _encode_all(tokenizer, pair, (pair.chosen, pair.rejected), max_len=max_len)
        if reason:
            skipped.setdefault(reason, []).append(pair.prompt_id)
        else:
            rows.append(PreferenceRow(pair.prompt_id, encoded[0], encoded[1]))
    return rows, skipped


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[UnpairedExample], *, max_len: int
) -> tuple[list[tuple[UnpairedExample, PromptCompletion]], Skipped]:
    """Tokenize unpaired completions; return those kept and the skipped prompt ids."""
    kept: list[tuple[UnpairedExample, PromptCompletion]] = []
    skipped: Skipped = {}
    for example in examples:
        encoded, reason = _encode_all(tokenizer, example, (example.completion,), max_len=max_len)
        if reason:
            skipped.setdefault(reason, []).append(example.prompt_id)
        else:
            kept.append((example, encoded[0]))
    return kept, skipped


def with_mismatched(
    examples: Sequence[tuple[UnpairedExample, PromptCompletion]], *, max_len: int
) -> list[PreferenceRow]:
    """Return a row for each completion, with the closest previous completion to another prompt that fits.

    "Previous" wraps around at the start. Almost every completion then serves once as a mismatched completion, as in
    Ethayarajh et al. 2024 and TRL. Raises ``DataError`` if no such completion exists.
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
                f"dpo: no completion to another prompt fits after prompt {example.prompt_id} in {max_len} tokens; kto "
                "estimates the KL divergence from such completions: add prompts, or use a model with a longer context"
            )
        rows.append(PreferenceRow(example.prompt_id, encoded, mismatched, example.label))
    return rows


def _reason_against(texts: Sequence[str], completions: Sequence[PromptCompletion], max_len: int) -> str:
    if any(not text.strip() for text in texts):
        return "empty_completion"
    return "too_long" if any(completion.num_tokens > max_len for completion in completions) else ""


# --- batches ------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Positions at which a batch scores the tokens of its completions."""

    rows_S1: Tensor
    columns_SA: Tensor
    present_SA: Tensor
    """Boolean mask of the completion's tokens; false for padding."""
    counted_SA: Tensor
    """Boolean mask of the tokens that count in the completion's log-probability."""

    def read(self, scores: Scores) -> Tensor:
        """Return the log-probabilities [S, A] of the completions' tokens, 0 for padding."""
        return scores.logprobs[self.rows_S1, self.columns_SA] * self.present_SA


class Packer:
    """Builds batches of completions; packs several into a row where the model's positions allow it."""

    def __init__(
        self, *, padding_id: int, max_len: int, packed: bool, mask_formatting: bool, device: torch.device
    ) -> None:
        self._padding_id = padding_id
        self._max_len = max_len
        self._packed = packed
        self._mask_formatting = mask_formatting
        self._device = device

    def __call__(self, completions: Sequence[PromptCompletion]) -> tuple[TokenBatch, Places]:
        """Return a micro-batch that scores only completions, and the positions of the completions in order.

        ``TokenBatch.sequences`` are indices of ``completions``.
        Position ids are not reset within a packed row: RoPE depends only on position differences.
        """
        lengths = np.array([completion.num_tokens - 1 for completion in completions])  # the last token is only a target
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
        assert batch.documents is not None
        members = [np.flatnonzero(row_of == row).tolist() for row in range(len(rows))]
        sequences = sequence_ids(batch.documents, members).to(self._device)
        documents = batch.documents.to(self._device) if len(rows) < len(completions) else None
        batch = TokenBatch(
            batch.inputs.to(self._device), batch.targets.to(self._device), documents, sequences=sequences
        )
        return batch, self._places(starts, [len(completion.completion) for completion in completions], max(used))

    def _rows(self, lengths: np.ndarray) -> np.ndarray:
        """Return the row index of each completion."""
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
