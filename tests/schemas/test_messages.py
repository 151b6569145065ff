"""Conversations and preferences through their Arrow files."""

import pyarrow as pa
import pytest

from lilpipe.schemas.examples import Conversation, read_conversations, write_conversations
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import (
    PAIR_SCHEMA,
    Pair,
    UnpairedExample,
    read_examples,
    read_pairs,
    write_examples,
    write_pairs,
)
from lilpipe.schemas.tables import read_table, write_rows

TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]
CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "time", "arguments": {"z": None, "city": "Köln", "a": [1]}},
}
CALLED: list[Message] = [
    {"role": "user", "content": "What time is it?", "name": "Ann"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0.0},
    {"role": "tool", "content": "12:30", "tool_call_id": "c1", "name": "time"},
    {"role": "assistant", "content": "Half past twelve.", "weight": 0.5, "reasoning_content": "Think."},
]
PLAIN: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_every_key_of_a_message_comes_back_and_no_other(tmp_path):
    talks = [
        Conversation("1", "1", "mine", CALLED, tools=TOOLS),
        Conversation("2", "2", "mine", PLAIN),
        Conversation("3", "3", "mine", [], text="Once upon a time."),
    ]
    write_conversations(tmp_path / "conversations.arrow", talks)
    found = read_conversations(tmp_path)
    assert found == talks
    (call,) = found[0].messages[1].get("tool_calls", [])
    assert list(call["function"]["arguments"]) == ["z", "city", "a"]


def test_columns_that_no_conversation_needs_are_absent(tmp_path):
    """The bytes of conversations without tools stay as they were before there were any."""
    talks = [Conversation("2", "2", "mine", PLAIN)]
    write_conversations(tmp_path / "a" / "conversations.arrow", talks)
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [*((name, pa.string()) for name in ("id", "prompt_id", "origin")), ("messages", pa.list_(message))]
    )
    write_rows(tmp_path / "b.arrow", [vars(item) for item in talks], schema)
    assert (tmp_path / "a" / "conversations.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    pairs = [Pair("1", "train", PLAIN[:1], "b", "c")]
    write_pairs(tmp_path / "pairs.arrow", pairs)
    write_rows(tmp_path / "d.arrow", [vars(item) for item in pairs], PAIR_SCHEMA)
    assert (tmp_path / "pairs.arrow").read_bytes() == (tmp_path / "d.arrow").read_bytes()
    assert read_table(tmp_path / "pairs.arrow").column_names == [
        "prompt_id", "split", "prompt", "chosen", "rejected", "edited"
    ]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_preferences_keep_the_calls_in_their_prompts(tmp_path, tools):
    pairs = [Pair("1", "train", CALLED[:3], "b", "c", tools=tools), Pair("2", "train", PLAIN[:1], "b", "c", "d")]
    write_pairs(tmp_path / "pairs.arrow", pairs)
    assert read_pairs(tmp_path, "train") == pairs
    examples = [UnpairedExample("1", "train", CALLED[:3], "b", True, tools=tools)]
    write_examples(tmp_path / "examples.arrow", examples)
    assert read_examples(tmp_path, "train") == examples
