import datetime
import gzip
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lilpipe.config.sources import Source
from lilpipe.data.sources.readers import FirstBytes, RawDocument, Unreadable, digest_source, find_parts, read_part
from lilpipe.errors import DataError
from tests.data.prose import write_jsonl


def read(path, kind: Any = "jsonl", **settings):
    source = Source(kind=kind, name="mine", path=str(path), **settings)
    return [row for part in find_parts(source) for row in read_part(part)]


def good(rows):
    return [row for row in rows if isinstance(row, RawDocument)]


def bad(rows):
    return [row for row in rows if isinstance(row, Unreadable)]


def test_a_line_carries_its_id_name_version_and_licence(tmp_path):
    rows = [{"text": "one", "id": 7, "name": "n", "version": "v", "license": "MIT"}, {"text": "two"}]
    first, second = good(read(write_jsonl(tmp_path / "x.jsonl", rows), licence="CC0"))
    assert (first.id, first.text, first.name, first.version, first.licence) == ("7", "one", "n", "v", "MIT")
    assert (second.id, second.name, second.version, second.licence) == ("x.jsonl:2", "mine", "", "CC0")


NESTED = {
    "body": {"text": "one"},
    "meta": {"url": "http://x.org", "when": "2024-01-02T03:04:05"},
    "kind": "code",
    "a.b": "k",
}
NAMES = {"text": "body.text", "id": "a.b", "url": "meta.url", "date": "meta.when", "label": "kind"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_what_a_document_holds_comes_from_the_columns_that_are_named_dots_looking_into_objects(tmp_path, kind):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([NESTED]), tmp_path / "x.parquet")
    else:
        write_jsonl(tmp_path / "x.jsonl", [NESTED])
    (row,) = good(read(tmp_path, kind, columns=NAMES))
    assert (row.text, row.id, row.url, row.date) == ("one", "k", "http://x.org", "2024-01-02T03:04:05")
    assert row.label == "code"


def test_a_label_that_a_document_lacks_is_its_sources(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "two", "label": "prose"}])
    assert [row.label for row in good(read(path, label="code"))] == ["code", "prose"]
    assert [(row.url, row.date) for row in good(read(path))] == [("", "")] * 2


def test_a_date_of_a_parquet_column_is_written_as_iso_8601(tmp_path):
    when = datetime.datetime(2024, 1, 2, 3, 4, tzinfo=datetime.UTC)
    pq.write_table(pa.table({"text": ["one"], "date": [when]}), tmp_path / "x.parquet")
    assert good(read(tmp_path, "parquet"))[0].date == "2024-01-02T03:04:00+00:00"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"text": "cut of', "is not JSON"),
        (b'["text"]', "is a list, expected an object"),
        (b'{"txt": "x"}', "has no 'text'; it has txt"),
        (b'{"text": 3}', "'text' is a number, expected a string"),
        (b'{"text": null}', "'text' is null, expected a string"),
        (b'{"text": " \\n"}', "'text' is empty"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8"),
        (b'{"text": "half \\ud800 pair"}', "a lone surrogate"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_reported_by_number_and_reason(tmp_path, line, error):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine too"}\n')
    rows = read(path)
    assert [row.text for row in good(rows)] == ["fine", "fine too"]
    (unreadable,) = bad(rows)
    assert (unreadable.file, unreadable.row) == ("x.jsonl", 3)
    assert error in unreadable.error
    assert not unreadable.breaks_off
    unreadable.excerpt.encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_gives_what_can_be_read_and_says_where_it_breaks_off(tmp_path, suffix):
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("abcdefgh", k=200))} for _ in range(3_000)]
    plain = write_jsonl(tmp_path / "x.jsonl", rows).read_bytes()
    content = gzip.compress(plain) if suffix == ".gz" else zstandard.compress(plain)
    cut = tmp_path / f"cut.jsonl{suffix}"
    cut.write_bytes(content[: len(content) * 2 // 3])
    found = read(cut)
    texts = [row.text for row in good(found)]
    assert 0 < len(texts) < len(rows)
    assert texts == [row["text"] for row in rows[: len(texts)]]
    (broken,) = bad(found)
    assert broken.breaks_off
    assert broken.row == len(texts) + 1


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    rows = read(tmp_path, "text")
    assert [(row.id, row.text) for row in good(rows)] == [("a.txt", "one\ntwo\n"), ("b.md.gz", "three")]
    assert [row.file for row in bad(rows)] == ["c.txt"]


def test_parquet_rows_are_read_and_bad_ones_reported(tmp_path):
    table = pa.table({"text": ["one", None, "three"], "id": [10, 11, 12], "other": [[1], [2], [3]]})
    pq.write_table(table, tmp_path / "a.parquet")
    invalid = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")]
    )
    pq.write_table(pa.table({"text": invalid}), tmp_path / "b.parquet")
    rows = read(tmp_path, "parquet")
    assert [(row.id, row.text) for row in good(rows)] == [("10", "one"), ("12", "three"), ("b.parquet:2", "ok")]
    assert [(row.file, row.row) for row in bad(rows)] == [("a.parquet", 2), ("b.parquet", 1)]


def test_a_corrupt_parquet_file_breaks_off(tmp_path):
    pq.write_table(pa.table({"text": ["word " * 1_000] * 50}), tmp_path / "a.parquet", compression="none")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    rows = read(tmp_path, "parquet")
    assert len(good(rows)) == 50
    assert [(row.file, row.breaks_off) for row in bad(rows)] == [("b.parquet", True)]


def test_max_bytes_takes_the_first_documents_in_the_order_of_a_hash_of_their_ids(tmp_path):
    rows = [{"text": f"{i:03d}" * 10, "id": f"doc {i}"} for i in range(200)]
    in_order = sorted(good(read(write_jsonl(tmp_path / "a.jsonl", rows))), key=lambda row: row.order)
    random.Random(1).shuffle(rows)
    first = FirstBytes(30 * 20)
    capped = [row for row in good(read(write_jsonl(tmp_path / "b.jsonl", rows))) if first.admits(row)]
    assert {row.id for row in in_order[:20]} <= {row.id for row in capped}
    assert len(capped) < 100  # what cannot be among them is not even kept for later


def test_small_files_are_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr("lilpipe.data.sources.readers.PART_BYTES", 100)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 30)
    parts = find_parts(Source(kind="text", name="mine", path=str(tmp_path)))
    assert [len(part.files) for part in parts] == [3, 3, 3, 1]


def test_local_hugging_face_data_sets_are_read_in_both_forms(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)], "id": [str(i) for i in range(10)]})
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    data.to_json(str(tmp_path / "folder" / "train.jsonl"))
    for folder in ("saved", "folder"):
        rows = read(tmp_path / folder, "huggingface")
        assert [row.text for row in good(rows)] == [f"row {i}" for i in range(10)]
    assert len(read(tmp_path / "saved", "huggingface", split="test")) == 1
    with pytest.raises(DataError, match="split 'absent'"):
        read(tmp_path / "saved", "huggingface", split="absent")
    source = Source(kind="huggingface", name="mine", path=str(tmp_path / "folder"))
    before = digest_source(source)
    data.select([1]).to_json(str(tmp_path / "folder" / "train.jsonl"))
    assert digest_source(source) != before


def test_a_hub_name_that_cannot_be_reached_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    with pytest.raises(DataError, match="download the dataset and name its folder"):
        digest_source(Source(kind="huggingface", name="mine", path="someone/something"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [([0, 1, 2], ["0", "1", "2"]), ([True, False], ["true", "false"]), ([0.5], ["0.5"]), ([None, 3], ["", "3"])],
)
def test_a_label_may_be_a_number_or_a_boolean(tmp_path, kind, values, labels):
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": "a", "label": value}) + "\n" for value in values))
    else:
        pq.write_table(pa.table({"text": ["a"] * len(values), "label": values}), path)
    assert [row.label for row in good(read(path, kind))] == labels


def test_a_date_may_be_a_number_of_seconds(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "date": 1700000000}')
    assert [row.date for row in good(read(tmp_path / "x.jsonl"))] == ["1700000000"]


def test_a_label_of_a_thousand_digits_or_without_a_value_raises_nothing(tmp_path):
    digits = "9" * 1_000
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "label": {digits}}}\n{{"text": "a", "label": NaN}}')
    assert [row.label for row in good(read(tmp_path / "x.jsonl"))] == [digits, ""]
