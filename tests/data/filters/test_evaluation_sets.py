import pytest

from lilpipe.config.sources import Columns, Source
from lilpipe.data.filters.evaluation_sets import prompt_sets, source_sets
from lilpipe.errors import DataError
from lilpipe.schemas.examples import PROMPT_SCHEMA
from lilpipe.schemas.tables import write_rows
from tests.data.prose import write_jsonl

LONG = "Emma has 7 shells and finds 4 more. How many does she have?"


def test_the_held_out_splits_of_the_pipelines_prompts_are_sets_and_short_questions_come_with_their_answer(tmp_path):
    rows = [
        ("train/1", "train", "Seen in training."),
        ("validation/1", "validation", LONG),
        ("test/1", "test", "Sort the list 2 1."),
    ]
    columns = [{"id": key, "split": split, "family": "f", "question": q, "answer": "1 2"} for key, split, q in rows]
    write_rows(tmp_path / "prompts.arrow", columns, PROMPT_SCHEMA)
    dev, test = prompt_sets(tmp_path, min_item_words=8)
    assert (dev.name, dev.items) == ("prompts-validation", [("validation/1", LONG)])
    assert (test.name, test.items) == ("prompts-test", [("test/1", "Sort the list 2 1. 1 2")])


def jsonl(path):
    return Source(kind="jsonl", name="quiz", path=str(path), columns=Columns(text="question"))


def test_sources_that_the_user_names_are_sets_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "quiz.jsonl", [{"id": "a", "question": LONG}, {"id": "b", "question": "Why?"}])
    (quiz,) = source_sets([jsonl(path)])
    assert (quiz.name, quiz.items) == ("quiz", [("a", LONG), ("b", "Why?")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Why?"}\n{"question": 3}\n', r"'quiz': .*quiz.jsonl:2 .*a number.*repair the file"),
        ('{"question": "Why?"}\n{"question": "br', r"'quiz': .*quiz.jsonl:2 .*repair the file"),
        ("\n", r"'quiz': got no items in .*; correct `path`"),
    ],
)
def test_a_set_of_which_an_item_would_be_missed_is_refused(tmp_path, content, message):
    path = tmp_path / "quiz.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        source_sets([jsonl(path)])
