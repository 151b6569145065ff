import pytest

from lilpipe.alignment.questions.columns import ParsedRow
from lilpipe.alignment.questions.formats import parse
from lilpipe.alignment.questions.turns import Malformed
from lilpipe.config.prompts import PromptColumns
from lilpipe.schemas.messages import Message

COLUMNS = PromptColumns()


def user(text):
    return Message(role="user", content=text)


def assistant(text):
    return Message(role="assistant", content=text)


BRIEF = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "12"}


@pytest.mark.parametrize(
    ("answer", "number", "reference", "steps"),
    [
        ("He has 3+4=<<3+4=7>>7.\nTwice that is <<7*2=14>>14.\n#### 14", "14", "He has 3+4=7.\nTwice that is 14.", 2),
        ("It costs $1,250.\n#### 1,250", "1250", "It costs $1,250.", 1),
        ("Nothing.\n####-5", "-5", "Nothing.", 1),
        ("Half.\n#### 1/2", "1/2", "Half.", 1),
        ("Much.\n#### 5 000", "5000", "Much.", 1),
        ("Less.\n#### - 5", "-5", "Less.", 1),
        ("More.\n#### 1e5", "100000", "More.", 1),
        ("More.\n#### 9{,}500", "9500", "More.", 1),
    ],
)
def test_gsm8k_is_read_without_the_calculators_notes(answer, number, reference, steps):
    example = parse("gsm8k", {"question": "How many?", "answer": answer}, COLUMNS)
    expected = ParsedRow([user("How many?")], f"{reference}\nAnswer: {number}", number, "numeric", difficulty=steps)
    assert example == expected


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "Name a tree.", "input": "", "output": "Oak"}, [user("Name a tree.")]),
        ({"instruction": "Translate.", "input": "Baum", "output": "Oak"}, [user("Translate.\n\nBaum")]),
        ({"prompt": "Name a tree.", "response": "Oak"}, [user("Name a tree.")]),
        ({"messages": [user("Name a tree."), assistant("Oak")]}, [user("Name a tree.")]),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    user("A?"),
                    assistant("B"),
                    user("C"),
                    assistant("Oak"),
                ]
            },
            [BRIEF, user("A?"), assistant("B"), user("C")],
        ),
        (
            {"messages": [user("Time?"), assistant("call"), TOOL, assistant("Oak")]},
            [user("Time?"), assistant("call"), TOOL],
        ),
    ],
)
def test_instructions_are_read_in_each_form(values, prompt):
    example = parse("instructions", values, COLUMNS)
    assert example == ParsedRow(prompt, "Oak")
    assert example.is_single_question == (len(prompt) == 1)


def test_a_program_has_tests_and_maybe_an_answer():
    values = {"prompt": "Double it.", "tests": "assert double(2) == 4"}
    assert parse("programs", values, COLUMNS) == ParsedRow([user("Double it.")], "", "assert double(2) == 4", "program")
    assert parse("programs", values | {"response": "```\n```"}, COLUMNS).reference == "```\n```"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Tree?", "chosen": "Oak.", "rejected": "Oak, idiot."},
        {"prompt": [user("Tree?")], "chosen": [assistant("Oak.")], "rejected": [assistant("Oak, idiot.")]},
        {"chosen": [user("Tree?"), assistant("Oak.")], "rejected": [user("Tree?"), assistant("Oak, idiot.")]},
        {
            "prompt": "Tree?",
            "chosen": [user("Tree?"), assistant("Oak.")],
            "rejected": [user("Tree?"), assistant("Oak, idiot.")],
        },
        {
            "instruction": "Tree?",
            "input": "",
            "output": "Oak!",
            "chosen": "Oak.",
            "rejected": "Oak, idiot.",
            "edited": "",
        },
    ],
)
def test_preferences_are_read_in_each_form(values):
    assert parse("preferences", values, COLUMNS) == ParsedRow([user("Tree?")], "Oak.", rejected="Oak, idiot.")


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Tree?", "completion": "Oak."},
        {"prompt": [user("Tree?")], "completion": [assistant("Oak.")]},
        {"completion": [user("Tree?"), assistant("Oak.")]},
    ],
)
def test_trls_unpaired_preferences_are_single_answers_with_a_verdict(values, label):
    example = parse("preferences", values | {"label": label}, COLUMNS)
    assert example == ParsedRow([user("Tree?")], "Oak.", desirable=label)
    assert example.best_answer == ("Oak." if label else "")


def test_an_edited_answer_is_the_best():
    values = {"prompt": "Tree?", "chosen": "Oak.", "rejected": "No.", "edited": "An oak."}
    example = parse("preferences", values, COLUMNS)
    assert (example.reference, example.rejected, example.edited) == ("Oak.", "No.", "An oak.")
    assert example.best_answer == "An oak."


def test_columns_may_have_other_names():
    columns = PromptColumns(prompt="query", chosen="good", rejected="bad")
    example = parse("preferences", {"query": "Tree?", "good": "Oak.", "bad": "No."}, columns)
    assert example == ParsedRow([user("Tree?")], "Oak.", rejected="No.")


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("gsm8k", ["a"], "got list, expected an object"),
        ("gsm8k", {"question": "How many?"}, "missing 'answer'; got question"),
        ("gsm8k", {"question": "How many?", "answer": "5"}, "does not end in `#### N`"),
        ("gsm8k", {"question": "How many?", "answer": "#### five"}, "does not end in `#### N`"),
        ("gsm8k", {"question": "How many?", "answer": "#### 3 or 4"}, "does not end in `#### N`; got '3 or 4'"),
        ("gsm8k", {"question": 5, "answer": "#### 5"}, "'question': got int, expected a string"),
        ("gsm8k", {"question": " ", "answer": "#### 5"}, "'question' is empty"),
        ("instructions", {"instruction": "Name.", "input": "", "output": ""}, "'output' is empty"),
        ("instructions", {"prompt": "a\0b", "response": "c"}, "'prompt' contains a NUL"),
        ("instructions", {"prompt": "a", "response": "\ud800"}, "'response' contains a NUL or an unpaired surrogate"),
        ("instructions", {"messages": []}, "'messages' is not a list of messages"),
        ("instructions", {"messages": [user("a")]}, "'messages' ends with a turn of 'user', expected the assistant's"),
        ("instructions", {"messages": [{"role": "bot", "content": "a"}]}, "message 0 has no valid role"),
        ("instructions", {"messages": [assistant("a")]}, "'messages' has no user turn"),
        ("programs", {"prompt": "Double it."}, "missing 'tests'"),
        ("preferences", {"prompt": "a", "chosen": "b"}, "missing 'rejected'"),
        ("preferences", {"prompt": "a", "label": True}, "missing 'completion'"),
        ("preferences", {"prompt": "a", "completion": "b", "label": "yes"}, "'label': got 'yes', expected true"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b "}, "two of chosen, rejected are equal"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "edited": "b"}, "chosen, rejected, edited are"),
        (
            "preferences",
            {"prompt": [assistant("a")], "chosen": "b", "rejected": "c"},
            "'prompt' has no user turn",
        ),
        (
            "preferences",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
            "chosen, rejected answer different conversations",
        ),
        (
            "preferences",
            {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "'prompt' differs from the conversation in 'chosen'",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(kind, values, reason):
    with pytest.raises(Malformed, match=reason):
        parse(kind, values, COLUMNS)


@pytest.mark.parametrize("kind", ["gsm8k", "instructions", "programs", "preferences"])
@pytest.mark.parametrize(
    "values", [{}, {"prompt": "a", "completion": "b"}, {"label": 1}, {"chosen": "b c"}, {"input": "a"}]
)
def test_a_kind_takes_no_other_row_and_names_what_it_lacks(kind, values):
    if kind == "instructions" and "completion" in values:
        assert parse(kind, values, COLUMNS).reference == "b"
        return
    with pytest.raises(Malformed, match="missing '"):
        parse(kind, values, COLUMNS)
