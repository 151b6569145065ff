"""What is asked of the engine, and the completions while they grow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.pages import pages_for
from lilpipe.generation.text import TextStream

StopReason = Literal["stop_token", "stop_string", "length", "cancelled"]

TopLogprobs = list[tuple[int, float]]
"""The tokens that were likeliest at one place and their log-probabilities at temperature 1, the likeliest first."""


@dataclass
class CompletionOutput:
    """One completion, while it grows and afterwards.

    ``tokens`` leaves a stop token out but holds those of a stop string. ``logprobs`` are the model's own, at
    temperature 1, before the penalty and before any filter, of ``tokens`` and of the stop token if one was drawn. A
    completion that is not ``finished`` met ``max_new_tokens`` or ``max_seq_len``, or was cancelled.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    """Whether a stop token or a stop string ended it."""
    stop_reason: StopReason | None = None
    """None while it grows."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """Beside each of ``logprobs``, where they were asked for."""


class SamplingParams(NamedTuple):
    """What a token's choice depends on beside logits and chance; rows of one set of parameters are drawn together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


@dataclass(eq=False)
class Request:
    """Completions that were asked for together."""

    prompt: list[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    seed: int
    index: int
    """The prompt's part in its random numbers, beside ``seed``."""
    room: int
    """Most tokens that a completion can have."""
    samples: list[CompletionOutput]
    num_top_logprobs: int = 0
    """How many of the likeliest tokens are noted at each place."""
    vocabulary: list[bytes] = field(default_factory=list)
    """Bytes of each token, where stop strings are looked for."""
    num_started: int = 0
    num_ended: int = 0
    pages: list[int] = field(default_factory=list)
    """Of the prompt, from when its first completion begins until the last ends."""
    logits_V: Tensor | None = None
    """After the prompt, until all completions have begun."""

    def __post_init__(self) -> None:
        self.params = SamplingParams(*(getattr(self.sampling, name) for name in SamplingParams._fields))

    @property
    def done(self) -> bool:
        """Whether all completions have ended."""
        return self.num_ended == len(self.samples)

    @property
    def pages_per_completion(self) -> int:
        """Most pages that one completion needs; its last token is never written."""
        return pages_for(self.room - 1)

    def text(self) -> TextStream | None:
        """What reads a completion for stop strings, if there are any."""
        return TextStream(self.vocabulary, self.sampling.stop) if self.sampling.stop else None


@dataclass(eq=False)
class Row:
    """A completion in the making."""

    request: Request
    number: int
    """Of the completion among the request's."""
    pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sample = self.request.samples[self.number]
        self.stop_ids, self.room = self.request.stop_ids, self.request.room
        self.text = self.request.text()

    def record(self, token: int, logprob: float) -> bool:
        """Take a token; whether it ended the completion."""
        sample = self.sample
        sample.logprobs.append(logprob)
        if token in self.stop_ids:
            return self._end("stop_token")
        sample.tokens.append(token)
        if self.text is not None:
            self.text.push([token])
            if self.text.stopped:
                return self._end("stop_string")
        return len(sample.tokens) == self.room and self._end("length")

    def _end(self, reason: StopReason) -> bool:
        self.sample.stop_reason = reason
        self.sample.finished = reason in ("stop_token", "stop_string")
        return True
