"""Requests of OpenAI's chat completions and text completions: validation and tokenization.

Independent of HTTP: `lilpipe serve` and the MLflow model share it. Parameters beyond OpenAI's (``top_k``, ``min_p``,
``repetition_penalty``) have vLLM's names. A parameter that would be ignored is an error, unless it cannot change the
completion.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer

MAX_CHOICES = 128
"""Maximum number of completions per request: OpenAI's limit for ``n``."""

WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
)
"""Parameters that do not affect the completion: accepted and ignored."""

NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "best_of": 1,
    "echo": False,
    "suffix": "",
}
"""Unsupported parameters, accepted only with the value that has no effect."""


class RequestError(DataError):
    """An invalid request, with OpenAI's error body."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind="invalid_request_error", param=param, code=code)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error body in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has turn tokens or an imported chat template."""
    return tokenizer.has_turns or tokenizer.template is not None


@dataclass(frozen=True)
class Ask:
    """A tokenized request: ``num_generations`` completions for each prompt."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    seed: int
    num_generations: int
    num_top_logprobs: int = 0
    """Number of most likely tokens to return at each position."""


# --- requests -----------------------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False
    """Send a last chunk with token counts."""


class BaseRequest(BaseModel):
    """Parameters of both request types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    whole: ClassVar[str]
    """Object type of a non-streamed response."""
    chunk: ClassVar[str]
    """Object type of a streamed chunk."""
    prefix: ClassVar[str]
    """Prefix of the response id."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: PositiveInt | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Validate a JSON body. Raises ``RequestError`` naming the first invalid parameter."""
        if not isinstance(values, dict):
            raise RequestError(f"the body: got a JSON {type(values).__name__}, expected an object")
        given = {key: value for key, value in values.items() if value is not None and key not in WITHOUT_EFFECT}
        for name in NEUTRAL.keys() & given.keys():
            if (value := given.pop(name)) != NEUTRAL[name]:
                message = f"{name}: got {_show(value)}; only {json.dumps(NEUTRAL[name])} is supported; leave it out"
                raise RequestError(message, param=name, code="unsupported_parameter")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise _refusal(error) from error

    def _ask(
        self,
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        *,
        param: str,
        max_seq_len: int,
        limit: int,
        num_top_logprobs: int,
    ) -> Ask:
        longest = max(map(len, prompts))
        if longest >= max_seq_len:
            message = (
                f"{param}: got {longest} tokens, expected at most {max_seq_len - 1}: this model's context length is "
                f"{max_seq_len} tokens for prompt and completion; shorten the prompt"
            )
            raise RequestError(message, param=param, code="context_length_exceeded")
        stop = tuple([self.stop] if isinstance(self.stop, str) else self.stop)
        if "" in stop:
            raise RequestError("stop: got an empty string, expected a non-empty stop string", param="stop")
        # A limit beyond the context length would only reserve random numbers.
        room = max_seq_len - min(map(len, prompts))
        settings = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": min(limit, room)}
        extra = {"top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
        settings |= {name: value for name, value in extra.items() if value is not None}
        settings |= {"stop": stop} if stop else {}
        try:
            sampling = SamplingConfig(**settings)
        except ValidationError as error:
            raise _refusal(error) from error
        try:
            ends = (tokenizer.document_end_id, *([tokenizer.turn_end_id] if can_chat(tokenizer) else []))
        except DataError as error:  # an imported template without an end-of-turn token
            raise RequestError(str(error), param=param) from error
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return Ask(
            prompts,
            sampling,
            stop_ids=ends,
            stop=stop,
            seed=seed,
            num_generations=self.n,
            num_top_logprobs=num_top_logprobs,
        )


class TextPart(BaseModel):
    """A text part of a message's content. Image and audio parts are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of the conversation. Other fields of an earlier response are ignored."""

    role: str
    content: str | list[TextPart]

    def message(self) -> Message:
        """Return the message for the chat template. OpenAI's role "developer" becomes "system"."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class ChatRequest(BaseRequest):
    """``POST /v1/chat/completions``."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    def ask(self, tokenizer: Tokenizer, *, max_seq_len: int) -> Ask:
        """Tokenize and validate the request. Raises ``RequestError``."""
        if not can_chat(tokenizer):
            message = "messages: this model has no chat template; send a prompt to /v1/completions"
            raise RequestError(message, param="messages")
        try:
            prompt, _ = render(tokenizer, [turn.message() for turn in self.messages], add_generation_prompt=True)
        except DataError as error:
            raise RequestError(str(error), param="messages") from error
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs: got {self.top_logprobs} without logprobs; set logprobs to true"
            raise RequestError(message, param="top_logprobs")
        limit = self.max_completion_tokens or self.max_tokens or max_seq_len
        settings = {"max_seq_len": max_seq_len, "limit": limit, "num_top_logprobs": self.top_logprobs}
        return self._ask([prompt], tokenizer, param="messages", **settings)


class CompletionRequest(BaseRequest):
    """``POST /v1/completions``."""

    whole = chunk = "text_completion"
    prefix = "cmpl"

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: PositiveInt | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Return the log-probabilities of the sampled tokens and of this many most likely tokens at each position."""

    def ask(self, tokenizer: Tokenizer, *, max_seq_len: int) -> Ask:
        """Tokenize and validate the request. Raises ``RequestError``."""
        try:
            prompts = [_ids(prompt, tokenizer) for prompt in self._prompts()]
        except DataError as error:
            raise RequestError(str(error), param="prompt") from error
        if not prompts or not all(prompts):
            raise RequestError("prompt: got no tokens, expected a non-empty text or list of token ids", param="prompt")
        if len(prompts) * self.n > MAX_CHOICES:
            message = f"prompt: got {len(prompts)} prompts x n = {self.n}, expected at most {MAX_CHOICES} completions"
            raise RequestError(message, param="prompt")
        settings = {"max_seq_len": max_seq_len, "limit": self.max_tokens or 16, "num_top_logprobs": self.logprobs or 0}
        return self._ask(prompts, tokenizer, param="prompt", **settings)

    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(token, int) for token in self.prompt):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


Request = ChatRequest | CompletionRequest


def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a prompt. A text gets the tokens in front that precede a document in training."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    if prompt and not 0 <= min(prompt) <= max(prompt) < tokenizer.vocab_size:
        message = f"prompt: got token ids {min(prompt)} to {max(prompt)}, expected 0 to {tokenizer.vocab_size - 1}"
        raise RequestError(message, param="prompt")
    return prompt


def _refusal(error: ValidationError) -> RequestError:
    """Convert the first validation error to a ``RequestError`` with the parameter's name in the request."""
    first = error.errors()[0]
    name, *place = map(str, first["loc"][:3] if first["loc"][:1] == ("messages",) else first["loc"][:1])
    param = name + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place)
    if first["type"] == "extra_forbidden":
        message = f"{param}: unknown parameter; leave it out"
        return RequestError(message, param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"{param}: missing, expected a value", param=param, code="missing_required_parameter")
    wanted = first["msg"][0].lower() + first["msg"][1:]
    return RequestError(f"{param}: got {_show(first['input'])}: {wanted}", param=param, code="invalid_value")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
