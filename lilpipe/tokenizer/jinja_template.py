"""Chat templates in Jinja from imported tokenizers, rendered in a sandbox.

Text and ids equal those of ``apply_chat_template`` in ``transformers``. The assistant mask comes from the template's
``{% generation %}`` blocks. If it has none, prefixes of the conversation are rendered: the text that an answer adds to
its prompt is the assistant's. This requires that a prefix renders to the same text alone and within the conversation;
other templates are rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message

# `generation` is a tag of transformers: it marks the tokens of `return_assistant_tokens_mask`.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] + '<|end_of_turn|>' }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end_of_turn|>' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|reserved_0|>' + message['content'] + '<|end_of_turn|>' }}
    {%- else %}
        {{- raise_exception('role ' + message['role'] + ': expected system, user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

START, STOP = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text contains; they mark the output of a ``{% generation %}`` block."""

Span = tuple[int, int]


class Encoder(Protocol):
    """The part of a tokenizer that a template uses."""

    special_ids: dict[str, int]

    def encode_marked(self, text: str) -> list[int]:
        """Encode text in which names of special tokens are special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        ...

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token."""
        ...


class JinjaTemplate:
    """A chat template and the special tokens that it refers to.

    Raises ``DataError`` if the template is not valid Jinja, and in use if it rejects a conversation.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        """``names`` maps ``bos_token``, ``eos_token`` and others to the names of special tokens."""
        self.source = source
        self.names = dict(names)
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._plain = _compile(source, mark=False)
        self._marked = _compile(source, mark=True)

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render the conversation as text, with special tokens by name."""
        return self._text(self._plain, messages, add_generation_prompt)

    def render(
        self, tokenizer: Encoder, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and the mask of assistant tokens; see ``chat_template.render``.

        An answer ends at its last special token. Many templates add a line break after the end-of-turn token; the model
        never generates it, so it is not in the mask, even within a ``{% generation %}`` block, where ``transformers``
        marks it.
        """
        for position, message in enumerate(messages):
            if forged := [name for name in tokenizer.special_ids if name in message["content"]]:
                raise DataError(
                    f"message {position}: spells out the special token {forged[0]}, which a Jinja template cannot "
                    "distinguish from a real one; remove it from the data"
                )
        text = self.text(messages, add_generation_prompt=add_generation_prompt)
        ids = tokenizer.encode_marked(text)
        mask = np.zeros(len(ids), dtype=bool)
        spans = self._marked_spans(messages, text) if self.marks_answers else self._added_spans(messages, text)
        starts = np.cumsum([0, *map(len, tokenizer.token_bytes(ids))])
        special = np.isin(ids, list(tokenizer.special_ids.values()))
        for span in spans:
            first, stop = (np.searchsorted(starts, len(text[:place].encode())) for place in span)
            if starts[first] != len(text[: span[0]].encode()):
                raise DataError(
                    f"chat template: the token {tokenizer.decode(ids[first - 1 : first])!r} belongs to a prompt and to "
                    "the answer after it, expected a token boundary; remove white space before the answer from the data"
                )
            ends = np.flatnonzero(special[first:stop])
            stop = first + ends[-1] + 1 if len(ends) else stop
            mask[first:stop] = True
        return ids, mask.tolist()

    def end_of_turn_id(self, tokenizer: Encoder) -> int:
        """Return the token that ends an answer. Raises ``DataError`` if the template has none."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, mask = self.render(tokenizer, messages)
        supervised = [token for token, counts in zip(ids, mask, strict=True) if counts]
        if not supervised or supervised[-1] not in tokenizer.special_ids.values():
            raise DataError(
                f"chat template: an answer reads {tokenizer.decode(supervised)!r}, expected it to end in a special "
                "token; the model could not learn to stop, so use another template"
            )
        return supervised[-1]

    def _text(self, template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self.names
            )
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"chat template: rejects a conversation of {roles}: {error}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as the tokenizer does

    def _marked_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Return the spans of the ``{% generation %}`` blocks in the text."""
        marked = self._text(self._marked, messages, False)
        pieces = re.split(f"[{START}{STOP}]", marked)
        if not text.startswith("".join(pieces)):
            raise DataError(
                "chat template: its text changes when answers are marked; it modifies the output of "
                "a {% generation %} block, expected it unmodified; use another template"
            )
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return list(zip(ends[:-1:2], ends[1::2], strict=False))

    def _added_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Return the span that each answer adds to its prompt."""
        spans = []
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.text(messages[:position], add_generation_prompt=True)
                answered = self.text(messages[: position + 1])
                if not (text.startswith(answered) and answered.startswith(prompt)):
                    raise DataError(
                        f"chat template: up to message {position} a conversation renders to {answered[-60:]!r} alone, "
                        f"to other text after the prompt {prompt[-60:]!r} or within the conversation; expected each to "
                        "start the next. Mark answers in the template with {% generation %} and {% endgeneration %}"
                    )
                spans.append((len(prompt), len(answered)))
        return spans


def _compile(source: str, *, mark: bool) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if mark else _Unmarked, loopcontrols]
    )
    # No `strftime_now`: the current date must not change the training data.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise DataError(f"chat template: cannot be read as Jinja: {error}; use another template") from error


class _Unmarked(Extension):
    """The tag ``{% generation %}``; outputs its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("say"), [], [], body).set_lineno(line)

    def say(self, caller: Callable[[], str]) -> str:
        """Return the block's text."""
        return caller()


class _Marked(_Unmarked):
    """The tag ``{% generation %}``; outputs its content between marks."""

    def say(self, caller: Callable[[], str]) -> str:
        """Return the block's text between marks."""
        return START + caller() + STOP


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)
