"""Scores of a trained reward model: the head's output at the assistant's end-of-turn token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lilpipe.errors import ArtifactError, DataError
from lilpipe.model.heads import HeadModel, load_head_model, outputs_of_rows
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer


class RewardModel:
    """Scores completions; it computes no gradients."""

    def __init__(self, model: HeadModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def score(self, conversations: Sequence[list[Message]]) -> list[float]:
        """Return the score of each conversation's last completion.

        A conversation longer than the model's context is truncated on the left. Raises ``DataError`` if a completion
        alone does not fit: one truncated at the context length has no room for its end-of-turn token.
        """
        return score_rows(self.model, [self._encode(conversation) for conversation in conversations], self.tokenizer)

    def _encode(self, conversation: Sequence[Message]) -> list[int]:
        max_len = self.model.config.max_seq_len
        before, answer = render_completion(self.tokenizer, conversation)
        if len(answer) > max_len:
            raise DataError(
                f"reward model: got a completion of {len(answer)} tokens, expected at most its {max_len}; lower "
                "sampling.max_new_tokens, or train a reward model with a longer context"
            )
        return [*before, *answer][-max_len:]


def load_reward_model(directory: Path, device: torch.device) -> RewardModel:
    """Load the reward model of a Checkpoint. Raises ``ArtifactError`` if it has no scalar head."""
    model, tokenizer = load_head_model(directory)
    if model.num_outputs != 1:
        raise ArtifactError(
            f"{directory}: its head has {model.num_outputs} outputs, expected 1; train a reward model with the stage "
            "reward_model"
        )
    return RewardModel(model.to(device), tokenizer)


def score_rows(model: HeadModel, rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[float]:
    """Return the scalar output at the last token of each row of ids."""
    return outputs_of_rows(model, rows, padding_id=tokenizer.padding_id)[:, 0].tolist()
