import bz2
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lilpipe.alignment.questions import prompts as module
from lilpipe.alignment.questions.prompts import external
from lilpipe.alignment.questions.sources import position
from lilpipe.alignment.rewards.reward_functions import CompletionText, Rewards
from lilpipe.config.prompts import ANSWER_REWARD, PromptsConfig, PromptSource
from lilpipe.errors import DataError
from lilpipe.schemas.examples import (
    check_not_held_out,
    normalise_question,
    read_conversations,
    read_exercises,
    read_prompts,
)
from lilpipe.schemas.pairs import read_examples, read_pairs
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(count, start=0):
    def problem(n):
        answer = f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"
        return {"question": f"Ann has {n} pens and buys {n}. How many?", "answer": answer}

    return [problem(n) for n in range(start, start + count)]


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def preferences(count):
    return [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No, {n}!"} for n in range(count)]


def gather(folder, *sources, **settings):
    """Run the stage on sources alone; what it wrote."""
    workspace = Workspace(folder / f"run-{len(list(folder.glob('run-*')))}")
    metrics = module.run(PromptsConfig(families=(), sources=sources, **settings), {}, workspace)
    return workspace, metrics


def questions_by_split(output):
    found = {
        split: {prompt.question for prompt in read_prompts(output, split)} for split in ("train", "validation", "test")
    }
    found["demonstrations"] = {item.messages[0]["content"] for item in read_conversations(output)}
    found["documents"] = {text.removeprefix("Exercise: ").split("\n")[0] for _, text in read_exercises(output)}
    return found


def test_each_row_falls_to_one_split_and_by_about_its_ratio(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", problems(500))
    source = PromptSource(kind="gsm8k", name="gsm8k", path=path, documents_ratio=0.2, demonstrations_ratio=0.3)
    workspace, metrics = gather(tmp_path, source)
    found = questions_by_split(workspace.output)
    assert sum(map(len, found.values())) == 500 == len(set().union(*found.values()))
    expected = {"test": 50, "validation": 50, "documents": 100, "demonstrations": 150, "train": 150}
    for split, count in expected.items():
        assert abs(metrics[split] - count) < 4 * count**0.5
    assert metrics["quarantined"] == metrics["pairs"] == 0


def test_a_questions_split_does_not_depend_on_what_stands_beside_it(tmp_path):
    rows = problems(300)
    all_rows = PromptSource(kind="gsm8k", name="a", path=write_lines(tmp_path / "all.jsonl", rows))
    reversed_half = PromptSource(kind="gsm8k", name="b", path=write_lines(tmp_path / "half.jsonl", rows[::-2]))
    found = [questions_by_split(gather(tmp_path, source)[0].output) for source in (all_rows, reversed_half)]
    for split, questions in found[1].items():
        assert questions <= found[0][split]


def test_an_official_test_split_stays_whole_and_alone(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", problems(200))
    test_path = write_lines(tmp_path / "test.jsonl", problems(50, start=1_000))
    workspace, metrics = gather(tmp_path, PromptSource(kind="gsm8k", name="gsm8k", path=path, test_path=test_path))
    assert metrics["test"] == 50
    assert {prompt.question for prompt in read_prompts(workspace.output, "test")} == {
        row["question"] for row in problems(50, start=1_000)
    }


def test_a_test_question_that_occurs_in_training_is_refused_however_it_is_dressed(tmp_path):
    train = problems(40)
    learnt = next(row for row in train if position(row["question"]) > 0.5)
    dressed = {**learnt, "question": "  " + learnt["question"].upper().replace(".", " !").replace(" PENS", ',  "PENS"')}
    path, test_path = write_lines(tmp_path / "a.jsonl", train), write_lines(tmp_path / "b.jsonl", [dressed])
    for share in (0.0, 0.9):  # as a prompt and as a demonstration
        source = PromptSource(kind="gsm8k", name="leaky", path=path, test_path=test_path, demonstrations_ratio=share)
        with pytest.raises(
            DataError, match=r"sources: 'leaky': 1 training questions occur in the validation or test split"
        ):
            gather(tmp_path, source)
    as_text = PromptSource(
        kind="gsm8k", name="leaky", path=path, test_path=test_path, demonstrations_ratio=0, documents_ratio=0.9
    )
    with pytest.raises(DataError, match="1 training questions"):
        gather(tmp_path, as_text)


def test_a_test_question_of_one_source_is_not_learnt_from_another(tmp_path):
    row = next(row for row in problems(40) if position(row["question"]) > 0.5)
    shown = conversation(("user", row["question"]), ("assistant", "Many."))
    first = PromptSource(
        kind="gsm8k",
        name="a",
        path=write_lines(tmp_path / "a.jsonl", problems(9, start=500)),
        test_path=write_lines(tmp_path / "b.jsonl", [row]),
    )
    second = PromptSource(kind="instructions", name="b", path=write_lines(tmp_path / "c.jsonl", [shown]))
    with pytest.raises(DataError, match="sources: 'b'"):
        gather(tmp_path, first, second)


def test_a_later_turn_that_asks_a_test_question_is_refused(tmp_path):
    rows: list[dict[str, Any]] = [{"prompt": f"Name {n} trees.", "response": "Oak."} for n in range(60)]
    held_out = next(row["prompt"] for row in rows if position(row["prompt"]) < 0.1)
    rows.append(
        conversation(("user", "Hello there!"), ("assistant", "Hello."), ("user", held_out), ("assistant", "Oak."))
    )
    source = PromptSource(kind="instructions", name="trees", path=write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match="sources: 'trees': 1 training questions"):
        gather(tmp_path, source)


@pytest.mark.parametrize(
    "dressed", ["sort THE list 3 1", "Sort the list  3, 1!", "“Sort” the list: 3 1.", "\uff33ort the list 3 1."]
)
def test_dress_does_not_make_another_question(dressed):
    assert normalise_question(dressed) == normalise_question("Sort the list 3 1.")


@pytest.mark.parametrize(
    "other",
    ["Sort the list 1 3.", "Sort the list 3 -1.", "Sort the list 31.", "Sort the list (3 1).", "Sort the list 3.1."],
)
def test_what_changes_the_task_makes_another_question(other):
    assert normalise_question(other) != normalise_question("Sort the list 3 1.")


def test_a_planted_near_duplicate_is_seen_by_the_gate_of_every_stage(tmp_path):
    workspace, _ = gather(
        tmp_path, PromptSource(kind="gsm8k", name="g", path=write_lines(tmp_path / "a", problems(90)))
    )
    planted = read_prompts(workspace.output, "test")[0].question.upper().replace(".", ";")
    check_not_held_out(["What is new?"], workspace.output)
    with pytest.raises(DataError, match="1 training questions"):
        check_not_held_out(["What is new?", planted], workspace.output)


# --- pairs, demonstrations ----------------------------------------------------------------------------------------


def test_preferences_become_pairs_of_which_those_of_dev_are_held_out(tmp_path):
    rows = [*preferences(200), {"prompt": "Best?", "chosen": "b", "rejected": "c", "edited": "a"}]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    source = PromptSource(kind="preferences", name="tone", path=path, demonstrations_ratio=0)
    workspace, metrics = gather(tmp_path, source)
    train, validation = (read_pairs(workspace.output, split) for split in ("train", "validation"))
    prompts = {
        split: {p.id: p for p in read_prompts(workspace.output, split)} for split in ("train", "validation", "test")
    }
    assert len(train) + len(validation) == metrics["pairs"]
    assert {pair.prompt_id for pair in train} == set(prompts["train"])
    assert {pair.prompt_id for pair in validation} == set(prompts["validation"])
    assert len(prompts["test"]) + metrics["pairs"] == 201
    for pair in train:
        prompt = prompts["train"][pair.prompt_id]
        assert pair.prompt == [{"role": "user", "content": prompt.question}]
        assert prompt.reference == pair.ranking[0]
        assert prompt.verifier == "none"
    assert [pair.ranking for pair in (*train, *validation) if pair.edited] in ([["a", "b", "c"]], [])


def test_single_answers_keep_their_verdicts_and_a_bad_one_is_never_shown_or_a_reference(tmp_path):
    rows = [{"prompt": f"Say {n // 2}.", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(400)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    workspace, metrics = gather(tmp_path, PromptSource(kind="preferences", name="tone", path=path))
    train, validation = (read_examples(workspace.output, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == metrics["unpaired_examples"]
    assert metrics["pairs"] == 0
    prompts = {
        split: {p.id: p for p in read_prompts(workspace.output, split)} for split in ("train", "validation", "test")
    }
    assert {item.prompt_id for item in train} == set(prompts["train"])
    assert {item.prompt_id for item in validation} == set(prompts["validation"])
    for item in (*train, *validation):
        assert item.label == (int(item.completion.removeprefix("It is ").removesuffix(".")) % 2 == 0)
    good = {row["completion"] for row in rows if row["label"]}
    shown = {item.messages[-1]["content"] for item in read_conversations(workspace.output)}
    assert shown
    assert shown <= good
    references = {prompt.reference for part in prompts.values() for prompt in part.values()}
    assert "" in references
    assert references <= good | {""}


def test_two_sources_that_ask_the_same_agree_on_its_split_and_ask_once(tmp_path):
    shown = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(200)]
    one = PromptSource(
        kind="instructions", name="shown", path=write_lines(tmp_path / "a.jsonl", shown), demonstrations_ratio=0.8
    )
    other = PromptSource(
        kind="preferences",
        name="tone",
        path=write_lines(tmp_path / "b.jsonl", preferences(200)),
        demonstrations_ratio=0,
    )
    workspace, metrics = gather(tmp_path, one, other)
    questions = [p.question for split in ("train", "validation", "test") for p in read_prompts(workspace.output, split)]
    assert len(questions) == len(set(questions)) == 200
    assert metrics["repeated"] == metrics["validation"] + metrics["test"]
    ids = {prompt.id for split in ("train", "validation") for prompt in read_prompts(workspace.output, split)}
    assert {pair.prompt_id for split in ("train", "validation") for pair in read_pairs(workspace.output, split)} <= ids


def test_a_conversation_is_shown_but_not_asked(tmp_path):
    def talk(n):
        start = (("system", "Be kind."), ("user", f"Hello {n}"), ("assistant", "Hi"))
        return conversation(*start, ("user", "Bye"), ("assistant", "Bye"))

    source = PromptSource(
        kind="instructions",
        name="talks",
        path=write_lines(tmp_path / "a.jsonl", [talk(n) for n in range(50)]),
        max_malformed_ratio=0,
    )
    workspace, metrics = gather(tmp_path, source)
    assert metrics["demonstrations"] + metrics["quarantined"] == 50
    assert metrics["demonstrations"] > 25
    assert read_conversations(workspace.output)[0].messages[0] == {"role": "system", "content": "Be kind."}
    skipped = [json.loads(line) for line in (workspace.output / "quarantine.jsonl").read_text().splitlines()]
    assert all("first question is in the" in entry["error"] for entry in skipped)


def test_programs_are_asked_with_their_tests(tmp_path):
    rows = [{"prompt": f"Write f that adds {n}.", "tests": f"assert f(1) == {n + 1}"} for n in range(30)]
    source = PromptSource(kind="programs", name="adders", path=write_lines(tmp_path / "a.jsonl", rows))
    workspace, metrics = gather(tmp_path, source)
    assert metrics["train"] + metrics["validation"] + metrics["test"] == 30
    prompt = read_prompts(workspace.output, "train")[0]
    number = prompt.question.removeprefix("Write f that adds ").removesuffix(".")
    program = CompletionText(f"```python\ndef f(x): return x + {number}\n```", True, 9)
    assert Rewards(ANSWER_REWARD)([prompt], [program])[0].total == 1


# --- files --------------------------------------------------------------------------------------------------------


def test_bad_lines_are_set_aside_with_file_line_and_reason(tmp_path):
    lines = [json.dumps(row) for row in problems(200)]
    lines[3] = '{"question": "cut of'
    lines[6:6] = ["", "   "]
    lines[9] = '{"question": "No answer?"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    workspace, metrics = gather(tmp_path, PromptSource(kind="gsm8k", name="g", path=str(tmp_path / "a.jsonl")))
    entries = [json.loads(line) for line in (workspace.output / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in entries] == [("a.jsonl", 4), ("a.jsonl", 10)]
    assert "invalid JSON: Unterminated string" in entries[0]["error"]
    assert entries[0]["excerpt"] == lines[3]
    assert "missing 'answer'" in entries[1]["error"]
    assert metrics["quarantined"] == 2
    assert "quarantined g a.jsonl:4: invalid JSON" in workspace.events.read_text()


def test_a_source_of_another_form_is_refused_with_numbers(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", preferences(20))
    with pytest.raises(DataError, match=r"20 of 20 rows are not valid gsm8k.*a\.jsonl:20: missing 'question'"):
        gather(tmp_path, PromptSource(kind="gsm8k", name="g", path=path))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"source 'g': .*empty\.jsonl has no rows"):
        gather(tmp_path, PromptSource(kind="gsm8k", name="g", path=str(tmp_path / "empty.jsonl")))


def test_a_list_in_one_file_and_compressed_lines_hold_the_same(tmp_path):
    rows = problems(60)
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(plain))
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    digests = {
        digest_of(gather(tmp_path, PromptSource(kind="gsm8k", name="g", path=str(path)))[0])
        for path in sorted(tmp_path.glob("a.*"))
    }
    assert len(digests) == 1


def test_a_file_that_breaks_off_is_told_and_what_came_before_is_kept(tmp_path):
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in problems(3_000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-200])
    workspace, metrics = gather(tmp_path, PromptSource(kind="gsm8k", name="g", path=str(tmp_path / "a.jsonl.gz")))
    entries = [json.loads(line) for line in (workspace.output / "quarantine.jsonl").read_text().splitlines()]
    assert any("file is truncated" in entry["error"] for entry in entries)
    assert metrics["train"] > 500


def test_the_content_of_the_files_is_part_of_the_identity(tmp_path):
    path, test_path = write_lines(tmp_path / "a.jsonl", problems(5)), write_lines(tmp_path / "b.jsonl", problems(5, 9))
    config = PromptsConfig(sources=(PromptSource(kind="gsm8k", name="g", path=path, test_path=test_path),))
    before = external(config)
    assert list(before) == ["source g"]
    write_lines(tmp_path / "b.jsonl", problems(6, 9))
    assert external(config) != before
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"source 'g': path .*b\.jsonl does not exist"):
        external(config)


def test_a_data_set_by_its_name_is_read_like_the_same_files(tmp_path, monkeypatch):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    path = write_lines(folder / "train.jsonl", problems(60))
    test_path = write_lines(folder / "test.jsonl", problems(20, start=500))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    of_hub = PromptSource(kind="gsm8k", name="g", hub=str(folder), test_split="test")
    of_files = PromptSource(kind="gsm8k", name="g", path=path, test_path=test_path)
    by_name, by_path = gather(tmp_path, of_hub)[0], gather(tmp_path, of_files)[0]
    assert digest_of(by_name) == digest_of(by_path)
    config = PromptsConfig(sources=(of_hub,))
    before = external(config)
    write_lines(folder / "train.jsonl", problems(61))
    assert external(config) != before
    with pytest.raises(DataError, match="split 'validation', cannot be read"):
        gather(tmp_path, PromptSource(kind="gsm8k", name="g", hub=str(folder), split="validation"))


def test_a_commit_of_the_hub_is_its_own_digest():
    source = PromptSource(kind="gsm8k", name="g", hub="nobody/nothing", revision="0123abc")
    assert external(PromptsConfig(sources=(source,))) == {"source g": "revision 0123abc"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set exactly one of path and hub"),
        ({"path": "a", "hub": "b"}, "set exactly one of path and hub"),
        ({"path": "a", "revision": "b"}, "revision is not used with `path`"),
        ({"hub": "a", "revision": "main"}, "revision 'main' is not a commit"),
        ({"path": "a", "split": "b"}, "split is not used with `path`"),
        ({"hub": "a", "test_path": "b"}, "test_path is not used with `hub`"),
        ({"path": "a", "test_path": "b", "test_ratio": 0.2}, "test_ratio is not used with an official test split"),
        (
            {"path": "a", "validation_ratio": 0.5, "demonstrations_ratio": 0.5},
            r"ratios sum to 1\.1, expected",
        ),
    ],
)
def test_sources_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptSource(kind="gsm8k", name="g", **settings)


def test_equal_sources_give_equal_bytes_beside_generated_tasks(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", problems(50))
    config = PromptsConfig(
        families=("copy",),
        num_documents=30,
        num_demonstrations=10,
        num_train=20,
        num_validation=5,
        num_test=5,
        sources=(PromptSource(kind="gsm8k", name="g", path=path),),
    )
    digests = set()
    for name in ("1", "2"):
        workspace = Workspace(tmp_path / name)
        module.run(config, {}, workspace)
        digests.add(digest_of(workspace))
        assert Counter(p.family for p in read_prompts(workspace.output, "train")).keys() == {"copy", "g"}
    assert len(digests) == 1


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_shared_data
def test_gsm8ks_own_answers_are_right_and_its_test_split_is_new(tmp_path):
    train, test = (str(SHARED / f"gsm8k-{split}.jsonl.gz") for split in ("train", "test"))
    workspace, metrics = gather(tmp_path, PromptSource(kind="gsm8k", name="gsm8k", path=train, test_path=test))
    assert metrics["test"] == 660
    assert metrics["train"] + metrics["validation"] + metrics["demonstrations"] + metrics["quarantined"] > 7_400
    prompts = [prompt for split in ("train", "validation", "test") for prompt in read_prompts(workspace.output, split)]
    scored = Rewards(ANSWER_REWARD)(prompts, [CompletionText(prompt.reference, True, 1) for prompt in prompts])
    assert all(one.total == 1 for one in scored)


@needs_shared_data
def test_shared_instructions_and_preferences_agree_on_every_split(tmp_path):
    shown = PromptSource(kind="instructions", name="shown", path=str(SHARED / "instruction-data.json"))
    tone = PromptSource(
        kind="preferences",
        name="tone",
        path=str(SHARED / "instruction-data-with-preference.json"),
        demonstrations_ratio=0,
    )
    workspace, metrics = gather(tmp_path, shown, tone)
    assert metrics["quarantined"] == 6  # answers that are the same
    assert metrics["pairs"] > 900
    assert all(len(set(pair.ranking)) == 2 for pair in read_pairs(workspace.output, "train"))
