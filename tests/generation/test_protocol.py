"""What the server's tests do not reach: vocabularies from elsewhere."""

import pytest

from lilpipe.generation.protocol import ChatRequest, CompletionRequest, RequestError
from lilpipe.generation.text import TextStream, token_bytes
from tests.model.checkpoints import PATTERN, small_tokenizer
from tests.tokenizer.foreign import with_special_tokens

TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def foreign(template=None):
    """A vocabulary with other special tokens than ours."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return with_special_tokens(ranks, PATTERN, special, document_end="<|endoftext|>", template=template)


def test_a_template_from_elsewhere_puts_the_conversation_and_ends_the_answer():
    tokenizer = foreign(TEMPLATE)
    ask = ChatRequest.parse(HELLO).ask(tokenizer, max_seq_len=64)
    assert [tokenizer.decode(prompt) for prompt in ask.prompts] == [
        "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    ]
    assert set(ask.stop_ids) == {tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["<|endoftext|>"]}


def test_a_model_without_conversations_continues_texts_alone():
    with pytest.raises(RequestError, match="no chat template"):
        ChatRequest.parse(HELLO).ask(foreign(), max_seq_len=64)
    ask = CompletionRequest.parse({"prompt": "a"}).ask(foreign(), max_seq_len=64)
    assert (ask.prompts, ask.stop_ids) == ([[256, ord("a")]], (256,))


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m['content'] }} {% endfor %}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_cannot_be_followed_is_the_requests_error(template):
    with pytest.raises(RequestError, match="chat template"):
        ChatRequest.parse(HELLO).ask(foreign(template), max_seq_len=64)


def test_the_longest_answer_is_bounded_by_the_context():
    ask = CompletionRequest.parse({"prompt": "abc", "max_tokens": 10**9}).ask(foreign(), max_seq_len=64)
    assert ask.sampling.max_new_tokens == 60


def test_ids_beyond_the_tokenizers_say_nothing():
    vocabulary = token_bytes(foreign())
    assert TextStream(vocabulary).push([ord("a"), len(vocabulary), ord("b")]) == "ab"


def test_a_million_spaces_are_too_long_a_prompt_and_no_failure():
    for tokenizer in (foreign(TEMPLATE), small_tokenizer()):
        with pytest.raises(RequestError, match=r"prompt: got .* tokens, expected at most 63") as error:
            CompletionRequest.parse({"prompt": " " * 1_100_000}).ask(tokenizer, max_seq_len=64)
        assert error.value.status == 400
