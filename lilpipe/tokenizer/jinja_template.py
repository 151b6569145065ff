"""Chat templates in Jinja, as tokenizers from elsewhere carry them, in a sandbox.

Text and ids are those of ``transformers``' ``apply_chat_template``. What the assistant said is found by the template's
``{% generation %}`` blocks, or where it has none by rendering the beginnings of a conversation: what a further answer
adds to the prompt before it was said by the assistant. That takes a template that says of a beginning alone what it
says of it within the whole; another is refused.
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

# `generation` is a tag of transformers': it marks what `return_assistant_tokens_mask` reports.
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
"""Noncharacters of Unicode, which stand in no text, put around what a ``{% generation %}`` block says."""

Span = tuple[int, int]


class Encoder(Protocol):
    """What a template needs of a tokenizer."""

    special_ids: dict[str, int]

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of text in which the names of special tokens are special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens."""
        ...

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token."""
        ...


class JinjaTemplate:
    """A template and the special tokens that it names.

    Raises ``DataError`` for a template that is none, and in use for a conversation that it refuses.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        """``names``: `bos_token`, `eos_token` and others to the special tokens' names."""
        self.source = source
        self.names = dict(names)
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._plain = _compile(source, mark=False)
        self._marked = _compile(source, mark=True)

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation in writing, special tokens by their names."""
        return self._text(self._plain, messages, add_generation_prompt)

    def render(
        self, tokenizer: Encoder, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether the assistant is to be trained on it; see ``chat_template.render``.

        An answer ends with the last special token in it: the line break that many templates have after the token that
        ends a turn is never drawn, be it within a ``{% generation %}`` block, where ``transformers`` marks it, or not.
        """
        for position, message in enumerate(messages):
            if forged := [name for name in tokenizer.special_ids if name in message["content"]]:
                raise DataError(
                    f"message {position}: spells out the special token {forged[0]}, which a template in Jinja cannot "
                    "tell from a real one; remove it from the data"
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
                    "the answer after it, expected them apart; remove white space before the answer from the data"
                )
            ends = np.flatnonzero(special[first:stop])
            stop = first + ends[-1] + 1 if len(ends) else stop
            mask[first:stop] = True
        return ids, mask.tolist()

    def end_of_turn_id(self, tokenizer: Encoder) -> int:
        """The token that ends an answer. Raises ``DataError`` for a template without one: no answer could end."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, mask = self.render(tokenizer, messages)
        supervised = [token for token, counts in zip(ids, mask, strict=True) if counts]
        if not supervised or supervised[-1] not in tokenizer.special_ids.values():
            raise DataError(
                f"chat template: an answer reads {tokenizer.decode(supervised)!r}, expected it to end in a special "
                "token; the model could not learn where to stop, so take another template"
            )
        return supervised[-1]

    def _text(self, template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self.names
            )
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"chat template: refuses a conversation of {roles}: {error}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as the tokenizer has it

    def _marked_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Where the ``{% generation %}`` blocks lie in the text."""
        marked = self._text(self._marked, messages, False)
        pieces = re.split(f"[{START}{STOP}]", marked)
        if not text.startswith("".join(pieces)):
            raise DataError(
                "chat template: its text changes where its answers are marked; it does something with the text of "
                "a {% generation %} block, which must stand as it is"
            )
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return list(zip(ends[:-1:2], ends[1::2], strict=False))

    def _added_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """What each answer adds to the prompt before it."""
        spans = []
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.text(messages[:position], add_generation_prompt=True)
                answered = self.text(messages[: position + 1])
                if not (text.startswith(answered) and answered.startswith(prompt)):
                    raise DataError(
                        f"chat template: up to message {position} a conversation reads {answered[-60:]!r} by itself, "
                        f"after the prompt {prompt[-60:]!r}, and otherwise within the whole; expected each to begin "
                        "the next. Mark answers in the template with {% generation %} and {% endgeneration %}"
                    )
                spans.append((len(prompt), len(answered)))
        return spans


def _compile(source: str, *, mark: bool) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if mark else _Unmarked, loopcontrols]
    )
    # There is no clock: which day it is must not change what is trained on.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise DataError(f"chat template: cannot be read as Jinja: {error}; take another template") from error


class _Unmarked(Extension):
    """The tag ``{% generation %}``, which says what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("say"), [], [], body).set_lineno(line)

    def say(self, caller: Callable[[], str]) -> str:
        """The block's text."""
        return caller()


class _Marked(_Unmarked):
    """The same, with marks around it."""

    def say(self, caller: Callable[[], str]) -> str:
        """The block's text between marks."""
        return START + caller() + STOP


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)
