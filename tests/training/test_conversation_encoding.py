"""Weights of tokens, long conversations, tools and plain texts; the peer is transformers' template and loss."""

import json

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from lilpipe.config.model import ModelConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import DataError
from lilpipe.model.scores import Scores
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.training.conversation_encoding import encode, encode_conversation, without_history
from lilpipe.training.conversations import check_answers, check_rejected, keep_checked, supervised_ratio
from lilpipe.training.supervised import SupervisedTokens
from tests.tokenizer.foreign import with_special_tokens
from tests.tokenizer.test_published_templates import CONVERSATIONS, pair

CALL = {"type": "function", "function": {"name": "time", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]
CALLED: list[Message] = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:30", "name": "time"},
    {"role": "assistant", "content": "Half past."},
]
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>tools ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant ' }}
        {%- generation %}
            {{- m.content }}
            {%- for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""


def talk(*turns, weights=None, system=None, name="talk"):
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for place, turn in enumerate(turns):
        message = Message(role=("user", "assistant")[place % 2], content=turn)
        if weights and place % 2 and weights[place // 2] is not None:
            message["weight"] = weights[place // 2]
        messages.append(message)
    return Conversation(name, "prompt", "mine", messages)


@pytest.fixture(scope="module")
def tokenizer():
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)


def chatml(template=TEMPLATE):
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ranks = {bytes([byte]): byte for byte in range(256)}
    return with_special_tokens(ranks, ".", names, document_end=names[2], template=template)


def learnt(tokenizer, example):
    """The text with a loss, by weight."""
    weights = example.weights or [float(flag) for flag in example.mask]
    return {
        weight: tokenizer.decode([token for token, other in zip(example.ids, weights, strict=True) if other == weight])
        for weight in set(weights) - {0.0}
    }


# --- weights ------------------------------------------------------------------------------------------------------


def test_each_answer_has_the_weight_of_its_message(tokenizer):
    example = encode_conversation(tokenizer, talk("a", "one", "b", "two", "c", "three", weights=[0, 0.5, None]))
    assert learnt(tokenizer, example) == {0.5: "two<|end_of_turn|>", 1.0: "three<|end_of_turn|>"}
    assert encode_conversation(tokenizer, talk("a", "one", weights=[1.0])).weights is None
    check_answers(tokenizer, [example])  # an answer without loss is still whole
    num_learnt = len("two<") + len("three<")
    assert sum(example.learnt) == num_learnt
    assert supervised_ratio([example], min_ratio=0) == num_learnt / len(example.ids)


def test_only_the_last_answer_is_learnt_if_history_is_masked(tokenizer):
    talks = [talk("a", "one", "b", "two"), talk("a", "one", "b", "two", weights=[None, 0.5])]
    found = encode(tokenizer, talks, max_len=99, mask_history=True).fitting
    assert [learnt(tokenizer, example) for example in found] == [
        {1.0: "two<|end_of_turn|>"},
        {0.5: "two<|end_of_turn|>"},
    ]
    silent = encode(tokenizer, [talk("a", "one", "b", "two", weights=[None, 0])], max_len=99, mask_history=True)
    assert "nothing to learn" in silent.rejected[0][1]
    assert without_history([]) == []


def test_the_weighted_loss_is_that_of_torch_packed_or_not(tokenizer):
    """Cross-entropy of each token times its weight, over the sum of weights."""
    shape = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=99)
    model = Transformer(shape, tokenizer.vocab_size)
    model.init_weights(0)
    model = model.double()
    talks = [talk("a", "one", "b", "two", weights=[0.25, None]), talk("c", "three"), talk("d", "four", weights=[0.5])]
    examples = encode(tokenizer, talks, max_len=99).fitting
    total, weight = 0.0, 0.0
    for example in examples:
        ids = torch.tensor(example.ids)
        weights = torch.tensor(example.weights or example.mask, dtype=torch.float64)[1:]
        logits = model(ids[None, :-1])[0]
        total += (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum().item()
        weight += weights.sum().item()
    for packing, steps in ((False, 1), (True, 1), (True, 3)):
        objective = SupervisedTokens(
            examples, batch_size=3, seed=0, padding_id=0, packing=packing, accumulation_steps=steps
        )
        losses = []
        for batch in objective.batches(0):
            scores = model(batch.inputs, targets_BT=batch.targets, documents_BT=batch.documents)
            padded = Scores(*(F.pad(column, (0, 3, 0, 1)) for column in scores))  # as a sharded model's
            losses.append(objective.loss(scores, batch))
            assert objective.loss(padded, batch).total.item() == pytest.approx(losses[-1].total.item())
        assert sum(loss.total.item() for loss in losses) == pytest.approx(total, rel=1e-7)
        assert sum(loss.count for loss in losses) == pytest.approx(weight)


# --- tools --------------------------------------------------------------------------------------------------------


def called(messages=CALLED):
    return Conversation("called", "prompt", "mine", list(messages), tools=TOOLS)


def test_a_tool_call_is_learnt_and_its_result_is_not():
    """The mask is that of transformers' assistant tokens."""
    tokenizer = chatml()
    example = encode_conversation(tokenizer, called())
    text = learnt(tokenizer, example)[1.0]
    assert text == '<call>{"name": "time", "arguments": {"city": "Rome"}}</call><|im_end|>Half past.<|im_end|>'
    assert keep_checked(tokenizer, [example])[1] == []
    last = encode(tokenizer, [called()], max_len=999, mask_history=True).fitting[0]
    assert learnt(tokenizer, last) == {1.0: "Half past.<|im_end|>"}


def test_transformers_renders_tools_to_the_same_ids_and_mask(tmp_path):
    tokenizer = chatml()
    tokenizer.save(tmp_path)
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs = peer.apply_chat_template(
        CALLED, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    example = encode_conversation(tokenizer, called())
    assert example.ids == theirs["input_ids"]
    assert example.mask == [bool(flag) for flag in theirs["assistant_masks"]]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", "", "the tool 'time' is not among the tokens"),
        ("call.function | tojson", "''", "and calls of time"),
        ("m.role + ' ' + m.content", "m.role + ' '", "message 0 is not among the tokens"),
    ],
)
def test_a_template_that_leaves_out_a_part_of_a_tool_call_is_found(old, new, reason):
    assert old in TEMPLATE
    tokenizer = chatml(TEMPLATE.replace(old, new))
    kept, rejected = keep_checked(tokenizer, [encode_conversation(tokenizer, called())])
    assert not kept
    assert reason in rejected[0][1]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, "two turns, system, tools") for name in ("llama3_1", "qwen2_5", "qwen3", "qwen3_training", "gptoss")),
        *((name, "two turns, system, tools") for name in ("qwen3_instruct_2507", "mistral", "granite")),
        *((name, "two turns, system") for name in ("llama3", "phi3", "deepseekv3", "zephyr", "smollm2", "olmo2")),
        *((name, "two turns, system") for name in ("gemma3", "cohere2", "deepseek_r1_distill")),
        ("gemma", "two turns"),
    ],
)
def test_conversations_of_published_templates_are_trained_on_or_rejected_with_a_reason(name, kinds):
    tokenizer, _ = pair(name)
    talks = [
        Conversation(kind, kind, "mine", messages, tools=tools) for kind, (messages, tools) in CONVERSATIONS.items()
    ]
    found = encode(tokenizer, talks, max_len=9_999)
    kept, unfit = keep_checked(tokenizer, found.fitting)
    assert ", ".join(example.id for example in kept) == kinds
    assert len(kept) + len(found.rejected) + len(unfit) == 3


def test_our_own_template_rejects_tools(tokenizer):
    plain = called([CALLED[0], CALLED[3]])
    for item in (called(), plain, Conversation("called", "prompt", "mine", CALLED)):
        found = encode(tokenizer, [item, talk("a", "b")], max_len=999)
        assert len(found.fitting) == 1
        assert found.rejected[0][0] == "called"
        assert "own chat template cannot show" in found.rejected[0][1]


def test_few_rejected_conversations_are_left_out_and_many_are_an_error():
    rejected = [("a", "conversation a: no"), ("b", "no")]
    check_rejected(rejected, 200, max_ratio=0.01)
    with pytest.raises(
        DataError, match=r"2 of 199 conversations cannot be used.*= 1.00%; the first: conversation a: no"
    ):
        check_rejected(rejected, 199, max_ratio=0.01)
    with pytest.raises(DataError, match="2 of 2"):
        check_rejected(rejected, 2, max_ratio=1)


# --- too long -----------------------------------------------------------------------------------------------------


def test_a_long_conversation_is_split_before_its_questions(tokenizer):
    turns = [f"{kind}{n}" * 3 for n in range(6) for kind in "qa"]
    long = talk(*turns, system="brief", name="long")
    exchange = len(encode_conversation(tokenizer, talk("q0q0q0", "a0a0a0", system="brief")).ids)
    max_len = exchange + 16  # one more exchange
    found = encode(tokenizer, [long, talk("a", "b")], max_len=max_len, strategy="split")
    parts = [example for example in found.fitting if example.id.startswith("long")]
    assert [example.id for example in parts] == ["long/0", "long/1", "long/2"]
    assert all(example.messages[0] == {"role": "system", "content": "brief"} for example in parts)
    assert [turn["content"] for example in parts for turn in example.messages[1:]] == turns
    assert all(len(example.ids) <= max_len for example in found.fitting)
    assert [(example.id, count) for example, count in found.split] == [("long", 3)]
    assert keep_checked(tokenizer, parts)[1] == []
    dropped = encode(tokenizer, [long, talk("a", "b")], max_len=max_len)
    assert ([example.id for example in dropped.too_long], len(dropped.fitting)) == (["long"], 1)


def test_an_exchange_that_is_too_long_itself_is_left_out_and_listed(tokenizer):
    long = talk("a", "b", "c", "d" * 99, "e", "f", name="long")
    found = encode(tokenizer, [long], max_len=20, strategy="split")
    assert [example.id for example in found.fitting] == ["long/0", "long/2"]
    assert [example.id for example in found.too_long] == ["long/1"]
    whole = encode(tokenizer, [talk("a", "b" * 99, name="whole"), talk("a", "b")], max_len=20, strategy="split")
    assert [example.id for example in whole.too_long] == ["whole"]
    assert whole.split == []


def test_parts_without_a_loss_are_not_trained_on(tokenizer):
    long = talk("a", "b" * 9, "c", "d" * 9, weights=[0, None], name="long")
    found = encode(tokenizer, [long], max_len=20, strategy="split")
    assert [learnt(tokenizer, example) for example in found.fitting] == [{1.0: "d" * 9 + "<|end_of_turn|>"}]
    masked = encode(tokenizer, [talk(*"abcdefgh", name="long")], max_len=12, mask_history=True, strategy="split")
    assert [[turn["content"] for turn in example.messages] for example in masked.fitting] == [list("efgh")]


def test_each_token_of_a_text_but_the_first_is_predicted_once(tokenizer):
    text = Conversation("text", "text", "mine", [], text="abcdefghij <|user|>")
    whole = encode_conversation(tokenizer, text)
    assert whole.ids == [*b"abcdefghij <|user|>", tokenizer.document_end_id]
    assert all(whole.mask)
    tokenizer.document_start_ids = (7,)  # as of an imported model
    assert encode_conversation(tokenizer, text).ids == [7, *whole.ids]
    tokenizer.document_start_ids = ()
    for max_len in (2, 3, 7, 19, 20):
        found = encode(tokenizer, [text], max_len=max_len, strategy="split")
        assert [token for example in found.fitting for token in example.ids[1:]] == whole.ids[1:]
        assert max(len(example.ids) for example in found.fitting) <= max_len


def test_a_long_conversation_may_be_an_error(tokenizer):
    with pytest.raises(
        DataError, match=r"1 of the 2 conversations is longer than the model's 20 tokens \(the shortest"
    ):
        encode(tokenizer, [talk("a", "b" * 99), talk("a", "b")], max_len=20, strategy="raise")
    assert SFTConfig(excess_length_strategy="raise")
    with pytest.raises(ValidationError):
        SFTConfig.model_validate({"excess_length_strategy": "truncate"})


def test_the_settings_have_the_names_of_other_libraries():
    """`mask_history` of LLaMA-Factory, `excess_length_strategy` of axolotl; the defaults change nothing."""
    defaults = json.loads(SFTConfig().model_dump_json())
    assert (defaults["mask_history"], defaults["excess_length_strategy"]) == (False, "drop")
