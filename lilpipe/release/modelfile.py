"""Ollama's Modelfile: the GGUF file, how a conversation is rendered, and where an answer stops.

Ollama renders conversations with templates of Go, not of Jinja. The Go template is derived from renderings by the
tokenizer's chat template, and left out if it does not give the same text. Ollama itself was never run in our tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message


class Render(Protocol):
    """Renders a conversation; with ``add_generation_prompt``, up to where the model answers."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the text."""
        ...


_SYSTEM, _FIRST, _ANSWER, _SECOND = "\x01system\x01", "\x01first\x01", "\x01answer\x01", "\x01second\x01"


@dataclass(frozen=True)
class Turns:
    """The text around the messages of a conversation."""

    default_system: str
    """Before the first message of a conversation without system message."""
    system: tuple[str, str]
    user: tuple[str, str]
    """The second part includes the start of the answer."""
    answer_end: str

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation that ends with a message of the user."""
        around = {"system": self.system, "user": self.user, "assistant": ("", self.answer_end)}
        parts = [message["content"].join(around[message["role"]]) for message in messages]
        return ("" if messages[0]["role"] == "system" else self.default_system) + "".join(parts)

    def go_template(self) -> str:
        """Return the same as a Go template with Ollama's variables."""
        content = "{{ $message.Content }}"
        return (
            "{{ range $i, $message := .Messages }}"
            '{{ if and (eq $i 0) (ne $message.Role "system") }}' + self.default_system + "{{ end }}"
            '{{ if eq $message.Role "system" }}' + content.join(self.system) + '{{ else if eq $message.Role "user" }}'
            "" + content.join(self.user) + "{{ else }}" + content + self.answer_end + "{{ end }}{{ end }}"
        )


def find_turns(render: Render) -> Turns | None:
    """Return the text around messages, or ``None`` if the template does more than surround each message."""
    user: Message = {"role": "user", "content": _FIRST}
    turn: list[Message] = [user, {"role": "assistant", "content": _ANSWER}]

    def prompt(messages: Sequence[Message]) -> str:
        return render(messages, add_generation_prompt=True)

    try:
        without_system, after_user = prompt([user]).split(_FIRST)
        _, answer_end = render(turn, add_generation_prompt=False).split(_ANSWER)
        _, rest = prompt([*turn, {"role": "user", "content": _SECOND}]).split(_ANSWER)
        before_user = rest.removeprefix(answer_end).split(_SECOND)[0]
        before_system, rest = prompt([{"role": "system", "content": _SYSTEM}, user]).split(_SYSTEM)
        after_system, _ = rest.split(_FIRST)
    except (ValueError, DataError):
        return None
    found = Turns(
        default_system=without_system.removesuffix(before_user),
        system=(before_system, after_system.removesuffix(before_user)),
        user=(before_user, after_user),
        answer_end=answer_end,
    )
    probe: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}] * 2
    probe.append({"role": "user", "content": "Bye"})
    system: Message = {"role": "system", "content": "Be brief."}
    same = all(found.render(messages) == prompt(messages) for messages in (probe, [system, *probe], [system, user]))
    return found if same and "{{" not in found.go_template().replace("{{ ", "") else None


def modelfile(gguf_name: str, turns: Turns | None, stops: Sequence[str]) -> str:
    """Return the content of a Modelfile; without ``turns``, Ollama uses the GGUF file's template if it knows it."""
    lines = [f"FROM ./{gguf_name}"]
    if turns is not None and '"""' not in turns.go_template():
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"
