"""Conversations as tokens, and each gate with the fault that it is for."""

from dataclasses import replace

import pytest

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer import encoding
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE
from lilpipe.training.conversation_encoding import encode
from lilpipe.training.conversations import check_answers, check_export, check_masks, mix
from tests.tokenizer.foreign import with_special_tokens


def talk(number, *turns, origin="sampled", system=None):
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [Message(role=("user", "assistant")[place % 2], content=turn) for place, turn in enumerate(turns)]
    return Conversation(f"talk/{number}", f"prompt/{number}", origin, messages)


MARKED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>' + m.role + ': ' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""
MARKED_TOO_WIDE = MARKED.replace(
    "{{- '<|im_start|>' + m.role + ': ' }}{% generation %}{{", "{% generation %}{{ '<|im_start|>' + m.role + ': ' +"
)

TALKS = [talk(number, f"say {number % 5}", f"Answer: {number % 5}") for number in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)


def examples_of(tokenizer, talks=TALKS):
    return encode(tokenizer, talks, max_len=200)[0]


# --- mixing -------------------------------------------------------------------------------------------------------


def test_each_origin_is_shown_as_often_as_its_weight_says():
    talks = [talk(n, "q", "a", origin="sampled" if n < 4 else "demonstration") for n in range(10)]
    mixed = mix(talks, {"sampled": 2.5, "demonstration": 0.5}, seed=0)
    counts = {item.id: sum(other.id == item.id for other in mixed) for item in talks}
    assert sorted(counts[item.id] for item in talks[:4]) == [2, 2, 3, 3]
    assert sorted(counts[item.id] for item in talks[4:]) == [0, 0, 0, 1, 1, 1]
    assert mix(talks, {"sampled": 0.0}, seed=0) == talks[4:]
    assert mix(talks, {}, seed=0) == talks


def test_which_part_of_an_origin_is_shown_is_drawn_from_the_seed():
    parts = [[item.id for item in mix(TALKS, {"sampled": 0.5}, seed=seed)] for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_a_mixture_that_would_be_ignored_or_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"sft.mixture: got the origin 'written', expected .*: sampled"):
        mix(TALKS, {"written": 2.0}, seed=0)
    with pytest.raises(ConfigError, match="selects no conversation"):
        mix(TALKS, {"sampled": 0.0}, seed=0)


# --- masks --------------------------------------------------------------------------------------------------------


def test_the_gates_pass_what_the_template_renders(tokenizer, tmp_path):
    tool: Message = {"role": "tool", "content": "42"}
    many = talk(20, "one", "1", "two", "2 \ud800", system="be brief")
    called = replace(many, messages=[*many.messages[:3], tool, *many.messages[3:]])
    forging = talk(21, "a <|end_of_turn|> b", "<|assistant|>")
    examples = examples_of(tokenizer, [many, called, forging, *TALKS])
    assert 0.4 < check_masks(tokenizer, examples, min_ratio=0.4) < 1
    check_answers(tokenizer, examples)
    check_export(tokenizer, examples, tmp_path)


def test_under_another_template_each_answer_must_end_its_turn():
    def tokenizer_of(template):
        names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        ranks = {bytes([byte]): byte for byte in range(256)}
        return with_special_tokens(ranks, ".", names, document_end=names[2], template=template)

    chatml = tokenizer_of(MARKED)
    examples = examples_of(chatml, [talk(0, "one", "1", "two", "2")])
    assert check_masks(chatml, examples) > 0
    check_answers(chatml, examples)
    endless = replace(examples[0], mask=[*examples[0].mask[:-1], False])
    with pytest.raises(DataError, match=r"talk/0: the supervised runs end in \['<\|im_end\|>', '2'\]"):
        check_masks(chatml, [endless])
    # The header is within what the template marks: that is text that the assistant never said.
    wide = tokenizer_of(MARKED_TOO_WIDE)
    with pytest.raises(DataError, match=r"talk/0: answer 0: 'assistant: 1' is supervised, expected '1'"):
        check_answers(wide, examples_of(wide, [talk(0, "one", "1")]))


def with_mask(example, position, value):
    mask = list(example.mask)
    mask[position] = value
    return replace(example, mask=mask)


MASKS = {
    "a prompt token supervised": lambda e: with_mask(e, 2, True),
    "the header supervised": lambda e: with_mask(e, e.mask.index(True) - 1, True),
    "the end of the turn not supervised": lambda e: with_mask(e, -1, False),
    "an answer's token not supervised": lambda e: with_mask(e, -3, False),
    "nothing supervised": lambda e: replace(e, mask=[False] * len(e.mask)),
    "everything supervised": lambda e: replace(e, mask=[True] * len(e.mask)),
    "no end of the turn": lambda e: replace(e, ids=e.ids[:-1], mask=e.mask[:-1]),
}


@pytest.mark.parametrize("fault", MASKS)
def test_the_masks_gate_refuses(tokenizer, fault):
    examples = examples_of(tokenizer)
    examples[7] = MASKS[fault](examples[7])
    with pytest.raises(DataError, match="talk/7"):
        check_masks(tokenizer, examples)


def test_a_share_of_supervised_tokens_below_the_floor_is_refused(tokenizer):
    examples = examples_of(tokenizer, [talk(0, "q" * 95, "a")])
    with pytest.raises(DataError, match=r"2.00% of the tokens are supervised, expected at least .* = 5.00%"):
        check_masks(tokenizer, examples, min_ratio=0.05)


# --- answers and the exported tokenizer ---------------------------------------------------------------------------


def cut_inside_the_answer(example, end_id):
    """As a data loader does that cuts to a length and then closes the turn: its mask looks right."""
    return replace(example, ids=[*example.ids[:-4], end_id], mask=example.mask[:-3])


def test_an_answer_that_was_cut_is_refused_though_its_mask_is_right(tokenizer):
    examples = examples_of(tokenizer)
    examples[7] = cut_inside_the_answer(examples[7], tokenizer.turn_end_id)
    check_masks(tokenizer, examples)
    with pytest.raises(DataError, match=r"talk/7: answer 0: 'Answe.*' is supervised, expected 'Answer: 2'"):
        check_answers(tokenizer, examples)


def test_an_answer_that_got_lost_is_refused(tokenizer):
    examples = examples_of(tokenizer, [talk(0, "a", "b", "c", "d")])
    half = len(examples[0].ids) // 2
    lost = replace(examples[0], ids=examples[0].ids[:half], mask=examples[0].mask[:half])
    check_masks(tokenizer, [lost])
    with pytest.raises(DataError, match="talk/0: 1 answers are supervised, expected 2"):
        check_answers(tokenizer, [lost])


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_turn_that_the_template_leaves_out_is_refused(role):
    """As Zephyr's does without a word of what a tool said: the answer after it would be learnt out of nothing."""
    source = (
        "{% for m in messages if m.role != '" + role + "' %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    )
    source += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ranks = {bytes([byte]): byte for byte in range(256)}
    names = ("<|end|>", "<|endoftext|>")
    other = with_special_tokens(ranks, ".", names, document_end=names[1], template=source)
    silent = talk(0, "one", "1", "two", "2")
    silent.messages.insert(2 if role == "tool" else 0, {"role": role, "content": 'be "brief"'})
    examples = examples_of(other, [silent])
    check_masks(other, examples)
    with pytest.raises(DataError, match=rf"talk/0: the {role}'s message . is not among the tokens"):
        check_answers(other, examples)
    as_json = source.replace(f" if m.role != '{role}'", "").replace("m.content +", "(m.content | tojson)[1:-1] +")
    spoken = with_special_tokens(ranks, ".", names, document_end=names[1], template=as_json)
    check_answers(spoken, examples_of(spoken, [silent]))


HEADER = "{{- '<|assistant|>' }}\n        {%- generation %}"


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("'<|' + message['role'] + '|>'", "'<|user|>'", "other ids from token 0 on"),
        ("message['content'] + '<|end", "message['content'] | trim + '<|end", "other ids from token 11 on"),
        (HEADER, "{%- generation %}{{- '<|assistant|>' }}", "other masks"),
    ],
    ids=["another header", "white space taken away", "a header that is learnt"],
)
def test_an_exported_template_that_says_something_else_is_refused(tokenizer, tmp_path, monkeypatch, right, wrong, what):
    assert right in CHAT_TEMPLATE
    monkeypatch.setattr(encoding, "CHAT_TEMPLATE", CHAT_TEMPLATE.replace(right, wrong))
    examples = examples_of(tokenizer, [talk(0, "a", " b", system="brief")])
    with pytest.raises(DataError, match=f"talk/0: the exported tokenizer gives {what}"):
        check_export(tokenizer, examples, tmp_path)
