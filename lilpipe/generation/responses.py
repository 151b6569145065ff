"""Responses of OpenAI's chat completions and text completions, whole or in streamed chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lilpipe.generation.protocol import Ask, ChatRequest, CompletionRequest, Request
from lilpipe.generation.requests import TopLogprobs


@dataclass
class Piece:
    """A streamed part of one choice, or all of it. ``finish_reason`` is None except in the last part."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """For each token, if requested."""
    finish_reason: str | None = None

    def extend(self, other: Piece) -> None:
        """Append the next part."""
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.top_logprobs += other.top_logprobs
        self.finish_reason = other.finish_reason


class Envelope:
    """Builds the response to one request; all its chunks share an id, a time and a model name."""

    def __init__(self, request: Request, *, model: str, vocabulary: Sequence[bytes]) -> None:
        self.request = request
        self.vocabulary = vocabulary
        self.common = {"id": f"{request.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], ask: Ask) -> dict[str, Any]:
        """Return a non-streamed response."""
        choices = [self._choice(piece) for piece in pieces]
        usage = self.usage(ask, sum(len(piece.tokens) for piece in pieces))
        return {**self.common, "object": self.request.whole, "choices": choices, "usage": usage}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return a streamed chunk."""
        return {**self.common, "object": self.request.chunk, "choices": list(choices), **more}

    def opening(self) -> list[dict[str, Any]]:
        """Return the first chunk of each choice of a chat, sent before any text."""
        if isinstance(self.request, CompletionRequest):
            return []
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk({"index": index, **first}) for index in range(self.request.n)]

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return a streamed chunk that continues one choice."""
        return self.chunk(self._choice(piece, streamed=True))

    @staticmethod
    def usage(ask: Ask, num_completion: int) -> dict[str, int]:
        """Count the tokens of the prompts (each once) and of all completions."""
        num_prompt = sum(map(len, ask.prompts))
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_completion}
        return {**counts, "total_tokens": num_prompt + num_completion}

    def _choice(self, piece: Piece, *, streamed: bool = False) -> dict[str, Any]:
        if isinstance(self.request, CompletionRequest):
            return _text_choice(piece, self.request, self.vocabulary)
        return _chat_choice(piece, self.request, self.vocabulary, streamed=streamed)


def _chat_choice(piece: Piece, request: ChatRequest, vocabulary: Sequence[bytes], *, streamed: bool) -> dict[str, Any]:
    said = {"delta": {"content": piece.text}} if streamed else {"message": _said(piece.text)}
    logprobs = None
    if request.logprobs:
        entries = zip(piece.tokens, piece.logprobs, _beside_each(piece), strict=True)
        logprobs = {"content": [_logprob(token, value, others, vocabulary) for token, value, others in entries]}
    return {"index": piece.index, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _text_choice(piece: Piece, request: CompletionRequest, vocabulary: Sequence[bytes]) -> dict[str, Any]:
    logprobs = None
    if request.logprobs is not None:
        logprobs = {
            "tokens": [_text(token, vocabulary) for token in piece.tokens],
            "token_logprobs": piece.logprobs,
            "top_logprobs": _by_text(piece, vocabulary) if request.logprobs else None,
            "text_offset": None,
        }
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _logprob(token: int, logprob: float, others: TopLogprobs, vocabulary: Sequence[bytes]) -> dict[str, Any]:
    return {
        **_entry(token, logprob, vocabulary),
        "top_logprobs": [_entry(other, value, vocabulary) for other, value in others],
    }


def _entry(token: int, logprob: float, vocabulary: Sequence[bytes]) -> dict[str, Any]:
    return {"token": _text(token, vocabulary), "logprob": logprob, "bytes": list(_bytes(token, vocabulary))}


def _by_text(piece: Piece, vocabulary: Sequence[bytes]) -> list[dict[str, float]]:
    """Return the log-probabilities at each position by token text: the most likely tokens and the sampled one.

    If several tokens have the same text (incomplete UTF-8), the first is kept.
    """
    found: list[dict[str, float]] = []
    for token, logprob, others in zip(piece.tokens, piece.logprobs, _beside_each(piece), strict=True):
        found.append({})
        for other, value in (*others, (token, logprob)):
            found[-1].setdefault(_text(other, vocabulary), value)
    return found


def _beside_each(piece: Piece) -> list[TopLogprobs]:
    """Return the most likely tokens at each position; empty lists if not requested."""
    return piece.top_logprobs or [[] for _ in piece.tokens]


def _text(token: int, vocabulary: Sequence[bytes]) -> str:
    return _bytes(token, vocabulary).decode(errors="replace")


def _bytes(token: int, vocabulary: Sequence[bytes]) -> bytes:
    return vocabulary[token] if token < len(vocabulary) else b""
