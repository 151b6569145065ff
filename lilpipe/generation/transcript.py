"""The engine's output for one request, as parts of a response."""

from __future__ import annotations

from collections.abc import Sequence

from lilpipe.generation.engine import Engine
from lilpipe.generation.protocol import Ask
from lilpipe.generation.responses import Piece
from lilpipe.generation.text import TextStream
from lilpipe.tokenizer.encoding import Tokenizer


class Transcript:
    """A request in the engine. Choices are numbered prompt by prompt."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, vocabulary: Sequence[bytes], ask: Ask) -> None:
        """Submit the request to the engine. Raises ``DataError`` if the engine rejects it."""
        self.requests = []
        try:
            for index, prompt in enumerate(ask.prompts):
                self.requests.append(
                    engine.submit(
                        prompt,
                        sampling=ask.sampling,
                        stop_ids=ask.stop_ids,
                        seed=ask.seed,
                        num_generations=ask.num_generations,
                        tokenizer=tokenizer,
                        index=index,
                        num_top_logprobs=ask.num_top_logprobs,
                    )
                )
        except BaseException:
            self.cancel(engine)
            raise
        self._samples = [sample for request in self.requests for sample in request.samples]
        self._texts = [TextStream(vocabulary, ask.stop) for _ in self._samples]
        self._num_seen = [0] * len(self._samples)
        self._open = dict.fromkeys(range(len(self._samples)))

    @property
    def done(self) -> bool:
        """Whether the last part of every choice has been returned."""
        return not self._open

    def news(self) -> list[Piece]:
        """Return the new parts since the last call; none for a choice without new tokens."""
        pieces = [piece for index in list(self._open) if (piece := self._news(index)) is not None]
        for piece in pieces:
            if piece.finish_reason is not None:
                del self._open[piece.index]
        return pieces

    def _news(self, index: int) -> Piece | None:
        sample, text, seen = self._samples[index], self._texts[index], self._num_seen[index]
        tokens, logprobs = sample.tokens[seen:], sample.logprobs[seen : len(sample.tokens)]
        top_logprobs = sample.top_logprobs[seen : len(sample.tokens)]
        self._num_seen[index] += len(tokens)
        over = sample.stop_reason is not None
        if not (tokens or over):
            return None
        said = text.push(tokens)
        if not over:
            return Piece(index, said, tokens, logprobs, top_logprobs)
        said += text.finish()
        reason = "stop" if sample.finished or text.stopped else "length"
        return Piece(index, said, tokens, logprobs, top_logprobs, finish_reason=reason)

    def cancel(self, engine: Engine) -> None:
        """Cancel the unfinished completions and free their rows."""
        for request in self.requests:
            if not request.done:
                engine.cancel(request)


def gather(choices: dict[int, Piece], pieces: Sequence[Piece]) -> None:
    """Append parts to their choices."""
    for piece in pieces:
        if piece.index in choices:
            choices[piece.index].extend(piece)
        else:
            choices[piece.index] = piece
