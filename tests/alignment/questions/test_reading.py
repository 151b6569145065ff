"""Rows of every kind of file, and data sets given by their path alone."""

import csv
import gzip
import json
import time
import tracemalloc
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from lilpipe.alignment.questions import prompts as module
from lilpipe.alignment.questions import reading
from lilpipe.alignment.questions.prompts import external
from lilpipe.alignment.questions.reading import read_rows
from lilpipe.alignment.questions.turns import Malformed
from lilpipe.config.prompts import PromptsConfig, PromptSource
from lilpipe.data.sources import parquet
from lilpipe.errors import DataError
from lilpipe.schemas.examples import read_conversations, read_exercises, read_prompts
from lilpipe.schemas.pairs import read_examples, read_pairs
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
TALKS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(30)
]
CALLED = {
    "messages": [
        {"role": "user", "content": "Call f."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two.", "weight": 0.5},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def values_of(path):
    rows = list(read_rows(PromptSource(path=str(path))))
    assert not any(isinstance(values, Malformed) for _, _, values in rows), rows
    return [{key: value for key, value in values.items() if value is not None} for _, _, values in rows]


def malformed_of(path):
    return [
        (row, str(values))
        for _, row, values in read_rows(PromptSource(path=str(path)))
        if isinstance(values, Malformed)
    ]


def gather(folder, *sources, **settings):
    workspace = Workspace(folder / f"run-{len(list(folder.glob('run-*')))}")
    metrics = module.run(PromptsConfig(families=(), sources=sources, **settings), {}, workspace)
    return workspace, metrics


# --- kinds of files -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    """Arrow fills absent keys of structs with None, and writes mixed columns as JSON."""
    rows = [*TALKS[:3], {"messages": [{"role": "system", "content": "s"}, *TALKS[3]["messages"]], "tools": None}]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows, indent=2))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    expected = [{key: value for key, value in row.items() if value is not None} for row in rows]
    for path in sorted(tmp_path.iterdir()):
        assert values_of(path) == expected, path


def test_tool_calls_with_other_arguments_come_back_from_datasets_and_parquet(tmp_path, monkeypatch):
    other = json.loads(json.dumps(CALLED).replace('"a": 1', '"c": "x"'))
    rows = [CALLED, other]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", rows)
    found = [values_of(tmp_path / "a.parquet"), values_of(tmp_path / "saved")]
    found.append([values for _, _, values in read_rows(PromptSource(hub=str(tmp_path / "folder")))])
    for each in found:
        calls = [values["messages"][1]["tool_calls"][0]["function"]["arguments"] for values in each]
        assert [{key: value for key, value in call.items() if value is not None} for call in calls] == [
            {"a": 1},
            {"c": "x"},
        ]


def test_csv_is_read_as_the_csv_module_writes_it(tmp_path):
    rows = [
        {"instruction": 'Say "a, b"\nand c.', "input": "", "output": "Ümlaut; done"},
        {"instruction": "Next", "input": "x\ty", "output": "z"},
    ]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t"), ("c.csv", ";")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert values_of(tmp_path / name) == [{key: value for key, value in row.items() if value} for row in rows]


def test_a_bad_row_of_a_csv_file_is_named_by_its_line(tmp_path):
    lines = [b"prompt,completion", b'"two\nlines",a', b"b", b"c,\xff", b"", b'"d"x,e', b"f,g", b'"open,h']
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines) + b"\n")
    found = dict(malformed_of(tmp_path / "a.csv"))
    assert found.keys() == {4, 7, 9}
    assert found[4].startswith("invalid CSV: got 1 cells, expected 2: prompt, completion")
    workspace, metrics = gather(tmp_path, PromptSource(path=str(tmp_path / "a.csv"), max_malformed_ratio=1))
    entries = [json.loads(line) for line in (workspace.output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [4, 5, 7, 9]
    assert "'completion' contains a NUL or an unpaired surrogate" in entries[1]["error"]
    assert metrics["quarantined"] == 4


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"a": 1}, {"a": 2}', 3, "Expecting value"),
        ('[{"a": 1}, {"a": 2}, {"a": ', 3, "Expecting value"),
        ('[{"a": 1}, {"a": 2}, oops]', 3, "Expecting value"),
        ('[{"a": 1}, {"a": 2}, ' + "[" * 100_000, 3, "recursion"),
    ],
)
def test_a_damaged_list_gives_the_rows_before_the_damage(tmp_path, text, place, reason):
    (tmp_path / "a.json").write_text(text)
    rows = list(read_rows(PromptSource(path=str(tmp_path / "a.json"))))
    assert [values for _, _, values in rows[:2]] == [{"a": 1}, {"a": 2}]
    (found,) = malformed_of(tmp_path / "a.json")
    assert found[0] == place
    assert reason in found[1]
    assert "the rest of the list cannot be read" in found[1]


def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    rows = [{"text": "é" * (n % 7 * 40), "n": n} for n in range(500)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    for size in (1, 7, 64, 4096):
        monkeypatch.setattr(reading, "READ_BYTES", size)
        assert values_of(tmp_path / "a.json") == rows


def test_blank_lines_are_counted_and_take_no_time(tmp_path):
    """A few kilobytes can expand to any number of them."""
    (tmp_path / "a.jsonl").write_bytes(b'\n \r\n{"text": "a"}\n\n\n  {"text": "b"}\n\n  ')
    assert [row for _, row, _ in read_rows(PromptSource(path=str(tmp_path / "a.jsonl")))] == [3, 6]
    data = b"\n" * (1 << 27) + b'{"text": "a"}\n'
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    start = time.monotonic()
    assert "more than 1,000 times its size" in malformed_of(tmp_path / "b.jsonl.zst")[0][1]
    assert time.monotonic() - start < 30  # one by one, they took minutes


def test_memory_does_not_grow_with_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr("lilpipe.data.sources.jsonl.MAX_DOCUMENT_BYTES", 1 << 20)
    long = '{"text": "' + "a" * (1 << 24) + '"}'
    (tmp_path / "a.jsonl").write_text(f'{{"text": "b"}}\n{long}\n{{"text": "c"}}\n')
    (tmp_path / "b.json").write_text(f'[{{"text": "b"}},\n{long},\n{{"text": "c"}}]\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "d" * 1_000}] * 30_000))
    found = {}
    for name in "a.jsonl", "b.json", "c.json":
        tracemalloc.start()
        count = Counter(type(values).__name__ for _, _, values in read_rows(PromptSource(path=str(tmp_path / name))))
        found[name] = count
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20, name
        tracemalloc.stop()
    assert found["a.jsonl"] == {"dict": 2, "Malformed": 1}
    assert found["b.json"] == {"dict": 1, "Malformed": 1}  # where the element ends is not known
    assert found["c.json"] == {"dict": 30_000}


def test_parquet_batches_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * 100_000] * 500})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(PromptSource(path=str(tmp_path / "a.parquet")))) == 500
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lilpipe.data.sources.files.EXPANSION_FROM_BYTES", 1 << 20)
        patch.setattr("lilpipe.data.sources.files.MAX_EXPANSION", 10)
        assert "more than 10 times its size" in malformed_of(tmp_path / "a.parquet")[0][1]


def test_a_value_that_python_cannot_hold_is_one_bad_row(tmp_path):
    stamps = pa.array([0, 2**50, 0], pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "date": stamps}), tmp_path / "a.parquet")
    ((row, reason),) = malformed_of(tmp_path / "a.parquet")
    assert row == 2
    assert "'date' cannot be read as timestamp[ms]" in reason


def test_a_damaged_parquet_file_gives_what_can_be_read(tmp_path):
    pq.write_table(pa.table({"text": [f"{n}" * 50 for n in range(40)]}), tmp_path / "a.parquet", row_group_size=10)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = b"\0" * 200
    (tmp_path / "a.parquet").write_bytes(data)
    assert malformed_of(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read after row 0" in malformed_of(tmp_path / "a.parquet")[0][1]


def test_a_broken_link_is_quarantined(tmp_path):
    write_lines(tmp_path / "a.jsonl", TALKS[:3])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    assert malformed_of(tmp_path) == [(1, "is a link that cannot be followed: No such file or directory")]


# --- one line of settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/mine.jsonl.gz", "mine"),
        ("s3://bucket/talks/*.parquet", "talks"),
        ("talks/", "talks"),
        ("./.jsonl", "jsonl"),
    ],
)
def test_a_path_alone_is_a_source(path, name):
    (source,) = PromptsConfig.model_validate({"sources": [path]}).sources
    assert (source.path, source.name, source.kind) == (path, name, "auto")
    assert PromptSource(hub="org/set").name == "set"
    with pytest.raises(ValidationError, match="names of families and sources must be unique"):
        PromptsConfig.model_validate({"sources": [path, path]})


def test_the_log_and_the_metrics_show_the_formats_of_a_mixed_file(tmp_path):
    rows = [*TALKS, CALLED, {"instruction": "a", "output": "b", "id": 7}, {"text": "Once."}, {"nothing": 1}, [1]]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    source = PromptSource(path=path, max_malformed_ratio=0.1, test_ratio=0, validation_ratio=0)
    workspace, metrics = gather(tmp_path, source)
    log = workspace.events.read_text()
    assert "source 'mine': recognised rows: 31 messages, 1 alpaca, 1 text; quarantined rows: 2" in log
    assert "columns without a use: id (1 rows)" in log
    assert {key: value for key, value in metrics.items() if key.startswith("format/")} == {
        "format/messages": 31,
        "format/alpaca": 1,
        "format/text": 1,
    }
    shown = {item.id: item for item in read_conversations(workspace.output)}
    assert len(shown) == 33 == metrics["demonstrations"]
    (called,) = [item for item in shown.values() if item.tools]
    assert called.messages == CALLED["messages"]
    assert [item.text for item in shown.values() if item.text] == ["Once."]
    with pytest.raises(DataError, match=r"2 of 35 rows are not valid auto.*mine.jsonl:35: got list"):
        gather(tmp_path, PromptSource(path=path))


def test_rows_go_where_they_are_of_use(tmp_path):
    """Without a ratio: preferences to pairs, answers that nothing verifies to demonstrations."""
    pairs = [{"prompt": f"P {n}", "chosen": f"b {n}", "rejected": f"c {n}"} for n in range(100)]
    labels = [{"prompt": f"L {n}", "completion": f"b {n}", "label": n % 2 == 0} for n in range(100)]
    sums = [{"question": f"Q {n}", "answer": f"#### {n}"} for n in range(100)]
    path = write_lines(tmp_path / "mine.jsonl", [*TALKS, *pairs, *labels, *sums])
    workspace, metrics = gather(tmp_path, PromptSource(path=path, test_ratio=0, validation_ratio=0))
    assert len(read_pairs(workspace.output, "train")) == 100 == metrics["pairs"]
    assert len(read_examples(workspace.output, "train")) == 100
    shown = [item.messages[0]["content"][0] for item in read_conversations(workspace.output)]
    assert shown.count("S") == 30
    assert 20 < shown.count("Q") < 60
    assert len(shown) == 30 + shown.count("Q")
    assert len(read_prompts(workspace.output, "train")) == 300 - shown.count("Q")


def test_conversations_are_trained_on_unless_they_ask_a_held_out_question(tmp_path):
    def talk(n, later):
        return {"messages": [*TALKS[n]["messages"], {"role": "user", "content": later}, TALKS[n]["messages"][1]]}

    single = [{"prompt": f"Q {n}?", "completion": "b"} for n in range(40)]
    path = write_lines(tmp_path / "a.jsonl", single)
    workspace, _ = gather(tmp_path, PromptSource(path=path))
    held_out = read_prompts(workspace.output, "test")[0].question
    learnt = read_conversations(workspace.output)[0].messages[0]["content"]
    rows = [*(talk(n, "More?") for n in range(28)), talk(28, held_out.upper()), talk(29, learnt)]
    turns = [{**row, "prompt": row["messages"][:3], "chosen": "x", "rejected": f"y{n}"} for n, row in enumerate(rows)]
    path = write_lines(tmp_path / "b.jsonl", [*rows, *turns, *single])
    workspace, metrics = gather(tmp_path, PromptSource(path=path))
    shown = [item.messages[0]["content"] for item in read_conversations(workspace.output) if len(item.messages) > 2]
    assert sorted(shown) == sorted(f"Say {n}." for n in range(30) if n != 28)
    entries = [json.loads(line) for line in (workspace.output / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["row"] for entry in entries} <= {29, 59}
    assert "asks a question of the validation or test split" in entries[0]["error"]
    assert metrics["pairs"] + metrics["quarantined"] == 31


def test_plain_texts_are_held_out_of_nothing(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"text": f"  Text {n}\n"} for n in range(100)])
    workspace, metrics = gather(tmp_path, PromptSource(path=path, documents_ratio=0.3, test_ratio=0.5))
    texts = [item.text or "" for item in read_conversations(workspace.output)]
    documents = [text for _, text in read_exercises(workspace.output)]
    assert 15 < len(documents) < 45
    assert sorted([*texts, *documents]) == sorted(f"  Text {n}\n" for n in range(100))
    assert metrics["quarantined"] == 0


def test_a_saved_dataset_is_its_files_content(tmp_path):
    many, few = datasets.Dataset.from_list(TALKS), datasets.Dataset.from_list(TALKS[:2])
    datasets.DatasetDict([("train", many), ("test", few)]).save_to_disk(tmp_path / "saved")
    path = write_lines(tmp_path / "saved.jsonl", TALKS)
    saved, lines = (PromptSource(path=each, name="mine") for each in (str(tmp_path / "saved"), path))
    assert digest_of(gather(tmp_path, saved)[0]) == digest_of(gather(tmp_path, lines)[0])
    config = PromptsConfig(sources=(saved,))
    before = external(config)
    datasets.DatasetDict([("train", few), ("test", few)]).save_to_disk(tmp_path / "saved")
    assert external(config) != before
    with pytest.raises(DataError, match="split 'other', cannot be read"):
        list(read_rows(PromptSource(hub=str(tmp_path / "saved"), split="other")))
