"""Chat templates in Jinja from imported tokenizers, rendered in a sandbox.

Text and ids equal those of ``apply_chat_template`` in ``transformers``, with two exceptions. Names of special tokens in
messages and tools stay text. The date is fixed, since it must not change the training data.

The assistant mask comes from the template's ``{% generation %}`` blocks. If it has none, prefixes of the conversation
are rendered: the text that an answer adds to its prompt is the assistant's. Where a prefix renders to other text than
the conversation (Qwen 3 drops earlier reasoning, DeepSeek-R1's prompts open it, Mistral puts tools before the last
question), an answer goes from where its prompt ends to agree, or from its own text, to the next end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.marked import Encoded, contains, escape, names_pattern, strip_marks

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

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The template of ChatML (OpenAI 2023), which many open models use."""

START, STOP = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text contains; they mark the output of a ``{% generation %}`` block."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of an answer's reasoning in messages."""

DATE = datetime(2024, 7, 26)
"""Date that templates read. Those that state it only if they can (Llama 3.1) write their own."""

Tool = Mapping[str, Any]
"""JSON schema of a function."""


class Span(NamedTuple):
    """An answer in a rendered text, in characters."""

    start: int
    stop: int
    exact: bool = True
    """Whether it begins where its prompt ends."""


class Encoder(Protocol):
    """The part of a tokenizer that a template uses."""

    special_ids: dict[str, int]

    def encode_with_offsets(self, text: str) -> Encoded:
        """Encode text in which names of special tokens are special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        ...


class JinjaTemplate:
    """A chat template and the special tokens that it refers to.

    Raises ``DataError`` if the template is not valid Jinja, and in use if it rejects a conversation.
    """

    def __init__(self, source: str, names: Mapping[str, str], *, with_tools: str | None = None) -> None:
        """``names`` maps ``bos_token``, ``eos_token`` and others to the names of special tokens.

        ``with_tools`` is another template for conversations with tools.
        """
        self.source = source
        self.names = dict(names)
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._plain = _compile(source, mark=False)
        self._marked = _compile(source, mark=True)
        self._with_tools = None if with_tools is None else JinjaTemplate(with_tools, names)

    def text(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render the conversation as text, with special tokens by name."""
        if tools is not None and self._with_tools is not None:
            return self._with_tools.text(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._text(self._plain, messages, tools, add_generation_prompt)

    def render(
        self,
        tokenizer: Encoder,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and the mask of assistant tokens; see ``chat_template.render``.

        An answer ends at its last special token. Many templates add a line break after the end-of-turn token; the model
        never generates it, so it is not in the mask, even within a ``{% generation %}`` block, where ``transformers``
        marks it. With ``add_generation_prompt`` the mask is empty if the template does not tell where answers are.
        """
        if tools is not None and self._with_tools is not None:
            chosen = self._with_tools
            return chosen.render(tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        messages, tools = _escaped(tokenizer, messages, tools)
        text = self._text(self._plain, messages, tools, add_generation_prompt)
        encoded = tokenizer.encode_with_offsets(text)
        mask = np.zeros(len(encoded.ids), dtype=bool)
        special = np.isin(encoded.ids, list(tokenizer.special_ids.values()))
        try:
            for span in self._spans(tokenizer, messages, tools, text):
                first, stop = np.searchsorted(encoded.starts, (span.start, span.stop))
                if first and encoded.ends[first - 1] > span.start:
                    if span.exact:
                        raise DataError(
                            f"chat template: the token {tokenizer.decode(encoded.ids[first - 1 : first])!r} belongs to "
                            "a prompt and to the answer after it, expected a token boundary; remove white space before "
                            "the answer from the data"
                        )
                    first -= 1
                ends = np.flatnonzero(special[first:stop])
                stop = first + ends[-1] + 1 if len(ends) else stop
                mask[first:stop] = True
        except DataError:
            if not add_generation_prompt:
                raise
        return encoded.ids, mask.tolist()

    def end_of_turn_id(self, tokenizer: Encoder) -> int:
        """Return the token that ends an answer, or where a template has none (GLM-4), the one that starts a question.

        Raises ``DataError`` if neither is a special token.
        """
        question: Message = {"role": "user", "content": "a"}
        messages: list[Message] = [question, {"role": "assistant", "content": "b"}]
        special = tokenizer.special_ids.values()
        ids, mask = self.render(tokenizer, messages)
        supervised = [token for token, counts in zip(ids, mask, strict=True) if counts]
        if supervised and supervised[-1] in special:
            return supervised[-1]
        longer = self.render(tokenizer, [*messages, question])[0]
        if supervised and longer[: len(ids)] == ids and longer[len(ids)] in special:
            return longer[len(ids)]
        raise DataError(
            f"chat template: an answer reads {tokenizer.decode(supervised)!r}, expected it to end in a special "
            "token; the model could not learn to stop, so use another template"
        )

    def _text(
        self,
        template: Template,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
    ) -> str:
        try:
            text = template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.names,
            )
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"chat template: rejects a conversation of {roles}: {error}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as the tokenizer does

    # --- where the answers are ------------------------------------------------------------------------------------

    def _spans(
        self, tokenizer: Encoder, messages: Sequence[Message], tools: Sequence[Tool] | None, text: str
    ) -> list[Span]:
        if self.marks_answers:
            return self._marked_spans(messages, tools, text)
        answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._answer_span(tokenizer, messages, tools, text, position) for position in answers]

    def _marked_spans(self, messages: Sequence[Message], tools: Sequence[Tool] | None, text: str) -> list[Span]:
        """Return the spans of the ``{% generation %}`` blocks in the text."""
        marked = self._text(self._marked, messages, tools, False)
        pieces = re.split(f"[{START}{STOP}]", marked)
        if not text.startswith("".join(pieces)):
            raise DataError(
                "chat template: its text changes when answers are marked; it modifies the output of "
                "a {% generation %} block, expected it unmodified; use another template"
            )
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return [Span(start, stop) for start, stop in zip(ends[:-1:2], ends[1::2], strict=False)]

    def _answer_span(
        self,
        tokenizer: Encoder,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        text: str,
        position: int,
    ) -> Span:
        """Return the span that the answer at a position adds to its prompt."""
        before = messages[:position]
        prompt = self._text(self._plain, before, tools, True)
        answered = self._text(self._plain, messages[: position + 1], tools, False)
        exact = text.startswith(prompt)
        start = len(prompt) if exact else self._agreeing_start(messages, tools, text, position, prompt)
        if text.startswith(answered) and start < len(answered):
            return Span(start, len(answered), exact)
        content = messages[position].get("content")
        said = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
        place = text.find(said, start)
        if place < 0 or len(messages) < 3:  # the shortest conversation tells what ends a turn
            raise DataError(
                f"chat template: up to message {position} a conversation renders to {answered[-60:]!r} alone, "
                f"to other text after the prompt {prompt[-60:]!r} or within the conversation; expected each to "
                "start the next. Mark answers in the template with {% generation %} and {% endgeneration %}"
            )
        # gpt-oss ends the last answer in another token than those before; a call of tools contains special tokens.
        ends = tokenizer.special_ids if said else [tokenizer.decode([self.end_of_turn_id(tokenizer)])]
        found = names_pattern(ends).search(text, place + len(said))
        return Span(start, len(text) if found is None else found.end(), exact)

    def _agreeing_start(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, text: str, position: int, prompt: str
    ) -> int:
        """Return where an answer begins whose prompt ends in other text than the conversation has there.

        Their common start ends at a tag or line behind the header of the answer; if it does not reach that far, the
        answer begins where the conversation would change with another answer.
        """
        whole = re.match(r"(?s).*[\n>\]]", text[: _first_difference(prompt, text)])
        asked = self._text(self._plain, messages[:position], tools, False)
        if whole is not None and whole.end() > len(asked) and text.startswith(asked):
            return whole.end()
        other: Message = {"role": "assistant", "content": START}
        changed = self._text(self._plain, [*messages[:position], other, *messages[position + 1 :]], tools, False)
        return _first_difference(changed, text)


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _escaped(
    tokenizer: Encoder, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[Sequence[Message], Sequence[Tool] | None]:
    """Mark names of special tokens in messages and tools as text, so that nothing in them can end a turn."""
    names = names_pattern(tokenizer.special_ids)
    if not contains([*messages, tools], names):
        return messages, tools
    messages, tools = escape(strip_marks([list(messages), tools]), names)
    return messages, tools


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has the names that templates read, as in ``transformers``."""
    found = [message[key] for key in REASONING if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else dict(message)


def _compile(source: str, *, mark: bool) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if mark else _Unmarked, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    if "strftime_now is defined" not in source:
        environment.globals["strftime_now"] = DATE.strftime
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


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)
