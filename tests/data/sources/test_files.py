import gzip
import os
from typing import Any

import fsspec
import pytest
import zstandard

from lilpipe.config.sources import Source
from lilpipe.data.sources.files import BrokenStream, digest_files, find_files, open_file
from lilpipe.data.sources.readers import RawDocument, digest_source, find_parts, read_part
from lilpipe.errors import DataError

LINES = b"".join(b"line %d\n" % i for i in range(20_000))


def source(path, kind: Any = "jsonl"):
    return Source(kind=kind, name="mine", path=str(path))


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl.zst", "notes.txt", ".hidden.jsonl", "_cache/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["a.jsonl.gz", "b.jsonl", "deep/c.jsonl.zst"]),
        ("b.jsonl", ["b.jsonl"]),
        ("notes.txt", ["notes.txt"]),
        ("*.jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("d*/*.zst", ["deep/c.jsonl.zst"]),
    ],
)
def test_a_path_is_a_file_a_folder_or_a_glob(tree, path, names):
    assert [file.name for file in find_files(source(tree / path))] == names


def test_a_url_of_any_fsspec_file_system_is_read():
    with fsspec.open("memory://bucket/data/x.jsonl", "wb") as file:
        file.write(b"{}\n")  # type: ignore[union-attr]
    (found,) = find_files(source("memory://bucket/data"))
    assert found.name == "x.jsonl"
    with open_file(found) as stream:
        assert stream.read() == b"{}\n"
    before = digest_files([found])
    fsspec.filesystem("memory").pipe("/bucket/data/x.jsonl", b"{ }\n")
    assert digest_files(find_files(source("memory://bucket/data"))) != before


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("absent", "absent does not exist"),
        ("*.csv", "no file matches"),
        ("deep", "no file in the folder ends in .parquet"),
        ("nowhere://x", "cannot be opened"),
    ],
)
def test_a_path_that_gives_nothing_is_named_with_its_source(tree, path, complaint):
    location = path if "://" in path else tree / path
    with pytest.raises(DataError, match="source 'mine'") as error:
        find_files(source(location, "parquet" if path == "deep" else "jsonl"))
    assert complaint in str(error.value)
    assert path in str(error.value)


def test_files_without_a_byte_are_no_documents(tmp_path):
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(DataError, match="all files are empty"):
        find_files(source(tmp_path))


def test_a_digest_tells_of_content_and_names_and_of_nothing_else(tree):
    before = digest_files(find_files(source(tree)))
    os.utime(tree / "b.jsonl", (1, 1))
    assert digest_files(find_files(source(tree))) == before
    (tree / "b.jsonl").write_bytes(b"[]")
    changed = digest_files(find_files(source(tree)))
    assert changed != before
    (tree / "b.jsonl").rename(tree / "e.jsonl")
    assert digest_files(find_files(source(tree))) not in (before, changed)


def write(path, content):
    path.write_bytes(content)
    return find_files(source(path))[0]


def test_every_member_and_frame_of_a_compressed_file_is_read(tmp_path):
    half = len(LINES) // 2
    zst = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    gz = gzip.compress(LINES[:half]) + gzip.compress(LINES[half:])
    for name, content in (("x.jsonl.zst", zst), ("x.jsonl.gz", gz), ("x.jsonl", LINES)):
        with open_file(write(tmp_path / name, content)) as stream:
            assert b"".join(stream) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_is_never_taken_for_a_short_one(tmp_path, suffix):
    content = gzip.compress(LINES) if suffix == ".gz" else zstandard.compress(LINES)
    with (
        open_file(write(tmp_path / f"x.jsonl{suffix}", content[: len(content) // 2])) as stream,
        pytest.raises(BrokenStream),
    ):
        stream.read()


def names_and_texts(path):
    rows = [row for part in find_parts(source(path)) for row in read_part(part)]
    return {row.file: row.text if isinstance(row, RawDocument) else f"defect: {row.error}" for row in rows}


@pytest.fixture
def linked(tmp_path):
    """A folder, beside one that links may lead to."""
    for name in ("here/a.jsonl", "there/b.jsonl", "there/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_links_to_files_are_read_as_in_the_cache_of_the_hugging_face_hub(linked, pattern):
    (linked / "here" / "b.jsonl").symlink_to("../there/b.jsonl")
    found = names_and_texts(linked / "here" / pattern)
    assert found == {"a.jsonl": "here/a.jsonl", "b.jsonl": "there/b.jsonl"}


@pytest.mark.parametrize("pattern", ["", "*"])
@pytest.mark.parametrize(("target", "reason"), [("absent", "No such file"), ("b.jsonl", "Too many levels")])
def test_a_link_that_leads_nowhere_is_quarantined_and_the_other_files_are_read(linked, pattern, target, reason):
    before = digest_files(find_files(source(linked / "here")))
    (linked / "here" / "b.jsonl").symlink_to(target)
    found = names_and_texts(linked / "here" / pattern)
    assert found.pop("a.jsonl") == "here/a.jsonl"
    assert found.pop("b.jsonl").startswith(f"defect: is a link that cannot be followed: {reason}")
    assert not found
    assert digest_files(find_files(source(linked / "here" / pattern))) != before


def test_a_pipe_is_quarantined_and_not_waited_for(linked):
    os.mkfifo(linked / "here" / "b.jsonl")
    assert names_and_texts(linked / "here") == {"a.jsonl": "here/a.jsonl", "b.jsonl": "defect: is not a regular file"}


@pytest.mark.parametrize("target", ["absent", "b.jsonl"])
def test_a_source_of_nothing_but_a_broken_link_is_an_error_at_once(linked, target, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    (linked / "b.jsonl").symlink_to(target)
    for path in (linked / "b.jsonl", linked / "*.jsonl"):
        with pytest.raises(DataError, match="source 'mine'"):
            find_files(source(path))


def test_links_to_folders_are_followed_and_not_in_circles(linked):
    (linked / "here" / "there").symlink_to("../there")
    (linked / "here" / "self").symlink_to(".")
    (linked / "there" / "back").symlink_to("../here")
    (linked / "there" / "up").symlink_to("..")
    assert names_and_texts(linked / "here") == {
        "a.jsonl": "here/a.jsonl",
        "there/b.jsonl": "there/b.jsonl",
        "there/deep/c.jsonl": "there/deep/c.jsonl",
    }


@pytest.mark.parametrize("pattern", ["", "*"])
def test_a_file_whose_name_is_no_utf8_is_read_under_a_name_that_is(linked, pattern):
    path = os.fsencode(linked / "here") + b"/caf\xe9.jsonl"
    with open(path, "w") as file:  # noqa: PTH123
        file.write('{"text": "coffee"}')
    assert names_and_texts(linked / "here" / pattern) == {"a.jsonl": "here/a.jsonl", "caf\\xe9.jsonl": "coffee"}
    assert digest_files(find_files(source(linked / "here" / pattern)))
    folder = Source(kind="huggingface", name="mine", path=str(linked / "here"))
    assert digest_source(folder)
