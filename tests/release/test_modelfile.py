"""Modelfiles: the Go template is derived from the Jinja template, or left out."""

import pytest

from lilpipe.release.modelfile import find_turns, modelfile
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE, JinjaTemplate

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
COUNTS_TURNS = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
TRIMS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'][:2] }}{% endfor %}<assistant>"


def render_with(source):
    return JinjaTemplate(source, {}).text


def test_parts_of_chatml_with_a_default_system_message():
    found = find_turns(render_with(CHATML))
    assert found is not None
    assert found.default_system == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert found.answer_end == "<|im_end|>\n"


@pytest.mark.parametrize("source", [CHATML, CHAT_TEMPLATE])
def test_parts_give_the_template_s_text(source):
    render = render_with(source)
    found = find_turns(render)
    assert found is not None
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for messages in (turns, turns[:1], [{"role": "system", "content": "s"}, *turns]):
        assert found.render(messages) == render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", [NO_SYSTEM, COUNTS_TURNS, TRIMS])
def test_other_templates_have_no_parts(source):
    assert find_turns(render_with(source)) is None


def test_modelfile():
    text = modelfile("m-F16.gguf", find_turns(render_with(CHATML)), ["<|im_end|>"])
    assert text.startswith('FROM ./m-F16.gguf\nTEMPLATE """{{ range $i, $message := .Messages }}')
    assert '{{ else if eq $message.Role "user" }}<|im_start|>user\n{{ $message.Content }}<|im_end|>\n' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert "TEMPLATE" not in modelfile("m.gguf", None, [])
