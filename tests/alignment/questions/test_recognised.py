"""Formats as people have them, recognised by their columns; TRL and transformers are the oracles."""

from typing import Any

import pytest
from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from lilpipe.alignment.questions.columns import ParsedRow
from lilpipe.alignment.questions.formats import parse, recognise, without_none
from lilpipe.alignment.questions.turns import Malformed
from lilpipe.config.prompts import PromptColumns

COLUMNS = PromptColumns()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


SYSTEM = {"role": "system", "content": "s"}
ASKED = user("Time in Köln?")
ARGUMENTS = {"city": "Köln", "exact": None}
CALL = {"type": "function", "id": "c1", "function": {"name": "time", "arguments": ARGUMENTS}}
OUTPUT = {"role": "tool", "content": "12:30", "tool_call_id": "c1", "name": "time"}
FUNCTION = {"name": "time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLED = [ASKED, assistant("", tool_calls=[CALL]), OUTPUT, assistant("Half past twelve.")]


def format_of(values):
    return recognise("auto", without_none(values), COLUMNS).name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("messages", {"messages": [user("a"), assistant("b")], "id": 3}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}),
        ("alpaca", {"messages": None, "instruction": "a", "input": None, "output": "b"}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("prompt_completion", {"prompt": "a", "response": "b"}),
        ("gsm8k", {"question": "a", "answer": "Two.\n#### 2"}),
        ("question_answer", {"question": "a", "answer": "b"}),
        ("programs", {"prompt": "a", "tests": "assert f()"}),
        ("text", {"text": "Once.", "label": 1}),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("preferences", {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")], "messages": []}),
        ("preferences", {"instruction": "a", "output": "d", "chosen": "b", "rejected": "c"}),
        ("unpaired", {"prompt": "a", "completion": "b", "label": False}),
    ],
)
def test_a_row_is_recognised_by_its_columns(name, values):
    assert format_of(values) == name
    assert isinstance(parse("auto", values, COLUMNS), ParsedRow)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"a": 1, "b": 2}, "is in no known format: its columns are a, b; expected, for example"),
        ({"prompt": "a"}, "missing 'completion'; got prompt"),
        ({"instruction": "a"}, "missing 'output'; got instruction"),
        ({"question": "a"}, "missing 'answer'; got question"),
        ({"chosen": "a"}, "missing 'rejected'; got chosen"),
        ({"completion": "a"}, "missing 'prompt'; got completion"),
        ([1], "got list, expected an object"),
        ({"text": " "}, "'text' is empty"),
    ],
)
def test_what_an_unrecognised_row_lacks_is_said(values, reason):
    with pytest.raises(Malformed, match=reason):
        parse("auto", values, COLUMNS)


# --- messages -----------------------------------------------------------------------------------------------------


def as_json_text(call):
    return {**call, "function": {**call["function"], "arguments": '{"city": "Köln", "exact": null}'}}


@pytest.mark.parametrize(
    "values",
    [
        {"messages": CALLED, "tools": TOOLS},
        {"messages": [ASKED, assistant(None, tool_calls=[as_json_text(CALL)]), *CALLED[2:]], "tools": [FUNCTION]},
        {
            "messages": [{**ASKED, "content": [{"type": "text", "text": "Time "}, {"text": "in Köln?"}]}, *CALLED[1:]],
            "tools": '[{"name": "time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]',
        },
        {"conversations": CALLED, "tools": TOOLS},
        {"prompt": [ASKED], "completion": CALLED[1:], "tools": TOOLS},
        {"messages": [{**turn, "weight": None, "function_call": None} for turn in CALLED], "tools": TOOLS},
    ],
)
def test_a_conversation_with_tool_calls_keeps_every_key(values):
    example = parse("auto", values, COLUMNS)
    assert example.messages == CALLED
    assert example.tools == TOOLS
    assert not example.is_single_question


def test_sharegpts_roles_and_function_calls_are_those_of_openai():
    values = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Time in Köln?"},
            {"from": "function_call", "value": '{"name": "time", "arguments": {"city": "Köln"}}'},
            {"from": "observation", "value": "12:30"},
            {"from": "gpt", "value": "Half past twelve.", "weight": 1},
        ],
        "tools": [FUNCTION],
    }
    example = parse("auto", values, COLUMNS)
    call = {"type": "function", "function": {"name": "time", "arguments": {"city": "Köln"}}}
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        ASKED,
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "12:30"},
        assistant("Half past twelve.", weight=1.0),
    ]
    plain = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "user", "value": "a"},
            {"from": "assistant", "value": "b"},
        ]
    }
    assert parse("auto", plain, COLUMNS).messages == maybe_convert_to_chatml(plain)["messages"]


def test_an_openai_function_call_of_the_older_form_is_a_tool_call():
    old = assistant(None, function_call={"name": "time", "arguments": '{"city": "Köln", "exact": null}'})
    values = {"messages": [ASKED, old, {"role": "function", "name": "time", "content": "12:30"}, CALLED[-1]]}
    found = parse("auto", values, COLUMNS).messages
    assert found[1].get("tool_calls") == [{key: value for key, value in CALL.items() if key != "id"}]
    assert found[2] == {"role": "tool", "name": "time", "content": "12:30"}


def test_alpaca_with_a_system_text_and_a_history_is_a_conversation():
    values = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert parse("auto", values, COLUMNS).messages == [
        {"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")
    ]  # fmt: skip


def test_answers_in_the_prompt_of_a_completion_have_no_loss():
    values = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert [turn.get("weight") for turn in parse("auto", values, COLUMNS).messages] == [None, 0.0, None, None]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("a"), assistant("b", weight=2)], "'messages.1.weight': got 2, expected a number from 0 to 1"),
        ([user("a"), assistant("b", weight=True)], "'messages.1.weight': got True"),
        ([user("a"), assistant("b", weight=0)], "every assistant message has the weight 0"),
        ([{**user("a"), "tool_calls": [CALL]}, assistant("b")], "'messages.0' has tool calls and role 'user'"),
        ([user("a"), assistant("", tool_calls=[{"id": "x"}])], "a tool call without a function's name"),
        ([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "[1]"}])], "'f' are not a JSON object"),
        ([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])], "'messages.1' is not JSON"),
        ([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}])], "cannot be stored"),
        ([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": float("nan")}}])], "cannot be stored"),
        (
            [user([{"type": "image_url", "image_url": "x"}]), assistant("b")],
            "a part of type 'image_url', expected text",
        ),
        ([user("a"), assistant("")], "'messages.1.content' is empty"),
        ([user("a"), OUTPUT], "ends with a turn of 'tool'"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(turns, reason):
    with pytest.raises(Malformed, match=reason):
        parse("auto", {"messages": turns}, COLUMNS)


@pytest.mark.parametrize("tools", [[1], [{"type": "function"}], "[", {"a": 1}])
def test_tools_that_are_not_functions_are_refused(tools):
    with pytest.raises(Malformed, match="'tools' is not"):
        parse("auto", {"messages": CALLED, "tools": tools}, COLUMNS)


# --- preferences --------------------------------------------------------------------------------------------------

IMPLICIT = [
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
    },
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "What is it? A blue bird.", "rejected": "What is it? A green frog."},
]


@pytest.mark.parametrize("values", IMPLICIT)
def test_an_implicit_prompt_is_the_one_that_trl_extracts(values):
    example = parse("auto", values, COLUMNS)
    theirs: Any = extract_prompt(values)
    if isinstance(theirs["prompt"], str):
        theirs = {"prompt": [user(theirs["prompt"].strip())]} | {
            side: [assistant(theirs[side].strip())] for side in ("chosen", "rejected")
        }
    assert example.prompt == theirs["prompt"]
    assert [assistant(example.reference)] == theirs["chosen"]
    assert [assistant(example.rejected)] == theirs["rejected"]


def test_transcripts_of_hh_rlhf_are_conversations():
    start = "\n\nHuman: Name a tree.\n\nAssistant: Oak.\n\nHuman: One more?\n\nAssistant:"
    example = parse("auto", {"chosen": f"{start} Birch.", "rejected": f"{start} Brick."}, COLUMNS)
    assert example.prompt == [user("Name a tree."), assistant("Oak."), user("One more?")]
    assert (example.reference, example.rejected) == ("Birch.", "Brick.")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "a", "chosen": [SYSTEM, user("a"), assistant("b")], "rejected": [SYSTEM, user("a"), assistant("c")]},
        {"prompt": [SYSTEM, user("a")], "chosen": "b", "rejected": "c"},
        {"prompt": "a", "system": "s", "chosen": "b", "rejected": [assistant("c")]},
    ],
)
def test_a_prompt_beside_conversations_may_repeat_their_last_question(values):
    example = parse("auto", values, COLUMNS)
    assert example.prompt == [SYSTEM, user("a")]
    assert (example.reference, example.rejected) == ("b", "c")


def test_tool_calls_before_the_compared_answers_belong_to_the_prompt():
    values = {"prompt": [ASKED], "chosen": [*CALLED[1:3], assistant("b")], "rejected": [*CALLED[1:3], assistant("c")]}
    example = parse("auto", values | {"tools": TOOLS}, COLUMNS)
    assert example.prompt == CALLED[:3]
    assert example.tools == TOOLS


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("x"), user("c"), assistant("e")],
            },
            "answer different conversations: only their last messages may differ",
        ),
        ({"prompt": "a", "chosen": CALLED[:2], "rejected": [ASKED, assistant("c")]}, "'chosen' ends with tool calls"),
        ({"chosen": "Yes.", "rejected": "No."}, "chosen, rejected share no prompt"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "no question: 'chosen' has no user turn"),
    ],
)
def test_what_is_wrong_with_a_preference_is_said(values, reason):
    with pytest.raises(Malformed, match=reason):
        parse("auto", values, COLUMNS)


@pytest.mark.parametrize("label", ["true", "False", "1", 0, 1.0])
def test_labels_may_be_written_as_text(label):
    example = parse("auto", {"prompt": "a", "completion": "b", "label": label}, COLUMNS)
    assert example.desirable is (str(label).lower() in ("true", "1", "1.0"))
