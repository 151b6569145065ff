"""Completions sampled from a model for verifiable prompts, and their padded batches.

With form ``text``, for a base model, the question is plain text as in pretraining, and the completion ends at the first
blank line or end-of-text token. With form ``chat`` the question is a user turn and the completion ends at the
end-of-turn token.

Dimensions: N completions, T tokens of the longest prompt with its completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lilpipe.alignment.rewards.reward_functions import CompletionText, Verdict, judge
from lilpipe.alignment.verify.verifiers import as_text, first_paragraph
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.engine import CompletionOutput, generate
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer

PromptForm = Literal["text", "chat"]


@dataclass(frozen=True)
class Completion:
    """A completion to a prompt, with the verifier's verdict."""

    prompt: Prompt
    prompt_ids: list[int]
    sample: CompletionOutput
    completion_ids: list[int]
    """Sampled tokens, including the stop token; ``sample.logprobs`` starts with their log-probabilities."""
    text: str
    verdict: Verdict

    @property
    def as_completion_text(self) -> CompletionText:
        """Input of reward functions."""
        has_stop = len(self.completion_ids) > len(self.sample.tokens)
        return CompletionText(self.text, ended=self.verdict.ended, num_tokens=len(self.completion_ids) - has_stop)


def encode_question(tokenizer: Tokenizer, question: str, form: PromptForm) -> list[int]:
    """Return the tokens of the prompt."""
    if form == "text":
        return [*tokenizer.document_start_ids, *tokenizer.encode(as_text(question))]
    return render(tokenizer, [Message(role="user", content=question)], add_generation_prompt=True)[0]


def stop_id(tokenizer: Tokenizer, form: PromptForm) -> int:
    """Return the stop token of a completion."""
    return tokenizer.document_end_id if form == "text" else tokenizer.turn_end_id


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    form: PromptForm,
    sampling: SamplingConfig,
    seed: int,
    num_generations: int = 1,
    numbers: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """Sample ``num_generations`` completions per prompt, deterministically. ``numbers``: see ``generate``.

    Raises ``DataError`` naming a prompt that leaves no room for a completion.
    """
    encoded = [encode_question(tokenizer, prompt.question, form) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= model.config.max_seq_len:
            raise DataError(
                f"prompt {prompt.id!r}: got {len(ids)} tokens, expected at most {model.config.max_seq_len - 1} to "
                f"leave room for a completion; remove prompts as long as {prompt.question[:60]!r}..., or train a "
                "model with a larger model.max_seq_len"
            )
    shown = partial(_completion, tokenizer, sampling=sampling, form=form)
    if form == "text":  # text after a blank line is not part of the completion
        sampling = sampling.model_copy(update={"stop": (*sampling.stop, "\n\n")})
    groups = generate(
        model,
        encoded,
        sampling=sampling,
        stop_ids=[stop_id(tokenizer, form)],
        seed=seed,
        num_generations=num_generations,
        numbers=numbers,
        tokenizer=tokenizer,
    )
    return [
        [shown(prompt, ids, sample) for sample in group]
        for prompt, ids, group in zip(prompts, encoded, groups, strict=True)
    ]


def _completion(
    tokenizer: Tokenizer,
    prompt: Prompt,
    prompt_ids: list[int],
    sample: CompletionOutput,
    *,
    sampling: SamplingConfig,
    form: PromptForm,
) -> Completion:
    text = up_to_stop(tokenizer.decode(sample.tokens), sampling.stop, keep=sampling.keep_stop)
    ended = sample.finished or (form == "text" and "\n\n" in text.lstrip())
    completion = first_paragraph(text) if form == "text" else text.strip()
    has_stop = sample.finished and sample.stop_reason != "stop_string"
    completion_ids = sample.tokens + [stop_id(tokenizer, form)] * has_stop
    if form == "text":
        completion_ids = _through_first_paragraph(tokenizer, completion_ids)
    return Completion(prompt, prompt_ids, sample, completion_ids, completion, judge(prompt, completion, ended=ended))


def up_to_stop(text: str, stop: Sequence[str], *, keep: bool) -> str:
    """Return the text before the first stop string, or including it if ``keep``."""
    found = [(place, len(string)) for string in stop if (place := text.find(string)) >= 0]
    if not found:
        return text
    place, length = min(found)
    return text[: place + length * keep]


def _through_first_paragraph(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return the shortest prefix that contains a whole paragraph, or all tokens without a blank line."""
    if "\n\n" not in tokenizer.decode(tokens).lstrip():
        return tokens
    return next(
        tokens[:count] for count in range(1, len(tokens) + 1) if "\n\n" in tokenizer.decode(tokens[:count]).lstrip()
    )


def pad_completions(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, padding_id: int
) -> tuple[Tensor, Tensor]:
    """Return tokens [N, T], right-padded, and a mask [N, T-1], True where the next token is in the completion."""
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    tokens_NT = torch.full((len(lengths), max(lengths)), padding_id, dtype=torch.int64)
    mask_NT = torch.zeros_like(tokens_NT, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens_NT[row, : lengths[row]] = torch.tensor([*prompt, *completion])
        mask_NT[row, len(prompt) : lengths[row]] = True
    return tokens_NT, mask_NT[:, 1:]
