import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lilpipe.errors import DataError
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import BytePairTokenizer, special_tokens

CONTENT = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "\n", " a \n", "{{ x }}", "<x>", "12\n\n"]))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT}),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Ids are bytes; the special tokens are 256 and up."""
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, ".")


@pytest.fixture(scope="module")
def peer(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def test_ids_and_mask_of_a_conversation(byte_tokenizer):
    messages: list[Message] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
    ]
    ids, mask = render(byte_tokenizer, messages)
    assert ids == [258, 83, 261, 259, 97, 98, 261, 260, 99, 100, 261]
    assert mask == [False, False, False, False, False, False, False, False, True, True, True]


def test_every_answer_of_a_conversation_is_supervised_with_its_end(byte_tokenizer):
    messages: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    ids, mask = render(byte_tokenizer, messages)
    assert ids == [259, 97, 261, 260, 261, 259, 98, 261, 260, 99, 261]
    assert mask == [False, False, False, False, True, False, False, False, False, True, True]


def test_what_a_tool_says_is_a_turn_that_is_not_supervised(byte_tokenizer):
    ids, mask = render(byte_tokenizer, [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "5"}])
    assert ids == [262, 52, 261, 260, 53, 261]
    assert mask == [False, False, False, False, True, True]


def test_a_vocabulary_without_reserved_tokens_has_no_place_for_tools():
    without = BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, ".", num_reserved=0)
    with pytest.raises(DataError, match=r"message 0: got role 'tool', but the vocabulary has no <\|reserved_0\|>"):
        render(without, [{"role": "tool", "content": "4"}])


def test_the_generation_prompt_is_the_header_of_an_answer(byte_tokenizer):
    messages: list[Message] = [{"role": "user", "content": "a"}]
    prompt, mask = render(byte_tokenizer, messages, add_generation_prompt=True)
    assert (prompt, mask) == ([259, 97, 261, 260], [False] * 4)
    whole, _ = render(byte_tokenizer, [*messages, {"role": "assistant", "content": "b"}])
    assert whole[: len(prompt)] == prompt


def test_a_message_cannot_forge_a_turn(byte_tokenizer):
    ids, _ = render(byte_tokenizer, [{"role": "user", "content": "".join(special_tokens())}])
    assert [i for i in ids if i > 255] == [byte_tokenizer.user_id, byte_tokenizer.turn_end_id]


@given(messages=MESSAGES, add_generation_prompt=st.booleans())
@settings(max_examples=200, deadline=None)
def test_ids_and_mask_are_those_of_the_jinja_template(tokenizer, peer, messages, add_generation_prompt):
    ids, mask = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    expected = peer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"]
    assert mask == [bool(value) for value in expected["assistant_masks"]]


def test_an_unknown_role_is_refused_by_both(byte_tokenizer, peer):
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]
    with pytest.raises(DataError, match=r"message 1: got role 'critic', expected one of system, user, assistant, tool"):
        render(byte_tokenizer, messages)
    with pytest.raises(jinja2.TemplateError, match="role critic"):
        peer.apply_chat_template(messages)
