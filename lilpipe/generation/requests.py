"""Requests to the engine and their completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.pages import pages_for
from lilpipe.generation.text import TextStream

StopReason = Literal["stop_token", "stop_string", "length", "cancelled"]

TopLogprobs = list[tuple[int, float]]
"""The most likely tokens at one position and their log-probabilities at temperature 1, most likely first."""


@dataclass
class CompletionOutput:
    """One completion, in progress or ended.

    ``tokens`` excludes a stop token but includes the tokens of a stop string. ``logprobs`` are the model's, at
    temperature 1, before the repetition penalty and filters, for ``tokens`` and for the stop token if one was sampled.
    A completion that ended without being ``finished`` reached ``max_new_tokens`` or ``max_seq_len``, or was cancelled.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    """Whether a stop token or stop string ended it."""
    stop_reason: StopReason | None = None
    """None while in progress."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """For each of ``logprobs``, if requested."""


class SamplingParams(NamedTuple):
    """Sampling parameters. Rows with equal parameters are sampled together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


@dataclass(eq=False)
class Request:
    """A prompt and its completions."""

    prompt: list[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    seed: int
    index: int
    """Prompt number; random numbers depend on it and on ``seed``."""
    room: int
    """Maximum number of tokens of a completion."""
    samples: list[CompletionOutput]
    num_top_logprobs: int = 0
    """Number of most likely tokens to return at each position."""
    vocabulary: list[bytes] = field(default_factory=list)
    """Bytes of each token; empty without stop strings."""
    num_started: int = 0
    num_ended: int = 0
    pages: list[int] = field(default_factory=list)
    """Pages of the prompt, from the start of the first completion to the end of the last."""
    logits_V: Tensor | None = None
    """Logits after the prompt, until all completions have started."""

    def __post_init__(self) -> None:
        self.params = SamplingParams(*(getattr(self.sampling, name) for name in SamplingParams._fields))

    @property
    def done(self) -> bool:
        """Whether all completions have ended."""
        return self.num_ended == len(self.samples)

    @property
    def pages_per_completion(self) -> int:
        """Maximum number of pages of one completion. Its last token is never cached."""
        return pages_for(self.room - 1)

    def text(self) -> TextStream | None:
        """Return a decoder that detects stop strings, or None if there are none."""
        return TextStream(self.vocabulary, self.sampling.stop) if self.sampling.stop else None


@dataclass(eq=False)
class Row:
    """A completion in progress."""

    request: Request
    number: int
    """Index of the completion in its request."""
    pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sample = self.request.samples[self.number]
        self.stop_ids, self.room = self.request.stop_ids, self.request.room
        self.text = self.request.text()

    def record(self, token: int, logprob: float) -> bool:
        """Append a token; returns whether it ends the completion."""
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
