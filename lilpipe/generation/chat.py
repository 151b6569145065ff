"""Chat with a checkpoint in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import stream
from lilpipe.generation.frozen import load_frozen
from lilpipe.generation.text import TextStream, token_bytes
from lilpipe.schemas.messages import Message
from lilpipe.terminal import visible
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer

HELP = "/reset starts a new conversation, /quit or Ctrl-D exits, Ctrl-C stops a completion."


GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=256, batch_size=1)


def chat(directory: Path, *, sampling: SamplingConfig = GREEDY, system: str | None = None, seed: int = 0) -> None:
    """Read messages from standard input and print each completion as it is generated.

    The prompt is the whole conversation. When it no longer fits the context, the oldest turns are dropped, but not the
    ``system`` message. Raises ``ArtifactError`` if the directory contains no checkpoint.
    """
    model, tokenizer = load_frozen(directory)
    stop_ids = (tokenizer.turn_end_id, tokenizer.document_end_id)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    print(HELP)
    for turn, question in enumerate(_questions()):
        if question == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        prompt = fit(tokenizer, messages, max_tokens=model.config.max_seq_len - 1)
        if prompt is None:
            messages.pop()
            print(f"(too long: the context length is {model.config.max_seq_len} tokens for prompt and completion)")
            continue
        tokens = stream(model, prompt, sampling=sampling, stop_ids=stop_ids, seed=seed + turn)
        messages.append({"role": "assistant", "content": _say(text_pieces(tokenizer, tokens))})


def fit(tokenizer: Tokenizer, messages: list[Message], *, max_tokens: int) -> list[int] | None:
    """Return the conversation's token ids, after removing the oldest exchanges in place until it fits; None if it
    cannot.

    A leading system message is kept.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    while len(prompt := render(tokenizer, messages, add_generation_prompt=True)[0]) > max_tokens:
        if len(messages) - first < 3:
            return None
        del messages[first : first + 2]
    return prompt


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens. Incomplete UTF-8 characters are held back until their last byte."""
    text = TextStream(token_bytes(tokenizer))
    for token in tokens:
        yield text.push([token])
    yield text.finish()


def _questions() -> Iterator[str]:
    """Yield non-empty lines until /quit or the end of input."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line:
            yield line


def _say(pieces: Iterator[str]) -> str:
    """Print the pieces as they arrive and return the whole text; Ctrl-C stops it."""
    said = []
    try:
        for piece in pieces:
            said.append(piece)
            print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return "".join(said)
