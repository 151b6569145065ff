import hashlib
import json

import pyarrow as pa
import pytest

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokenizer.byte_pair import BytePairEncoder
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens import build as module
from lilpipe.tokens.build import is_validation, stream_name
from lilpipe.tokens.shards import SPLITS
from tests import artifacts
from tests.tokenizer.foreign import write
from tests.tokens.conftest import CORPUS, EXERCISES, SEVERAL, build, source_of

SOURCES = {"corpus": CORPUS, "exercises": EXERCISES}


def members(source, split):
    return [text for text in SOURCES[source] if is_validation(text, 0.2) == (split == "validation")]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_stream_is_the_naive_tokenization_of_its_documents(built, tokenizer, source, split):
    expected = [token for text in members(source, split) for token in [*tokenizer.encode(text), 292]]
    stream = built.shards.stream(source, split)
    assert tokenizer.document_end_id == 292
    assert stream.read(0, stream.num_tokens).tolist() == expected
    assert stream.num_bytes == sum(len(text.encode()) for text in members(source, split))
    assert stream.num_documents == len(members(source, split))
    assert built.metrics[f"{source}_{split}_tokens"] == len(expected)
    assert built.metrics[f"{source}_{split}_documents"] == len(members(source, split))


def test_a_shard_has_one_row_per_document(built, tokenizer):
    folder = built.workspace.output / "shards" / "corpus" / "train"
    rows = []
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as file:
            rows += pa.ipc.open_file(file).read_all().to_pylist()
    assert [row["id"] for row in rows] == [
        f"books/{index}" for index, text in enumerate(CORPUS) if not is_validation(text, 0.2)
    ]
    assert {row["source"] for row in rows} == {"books"}
    for row, text in zip(rows, members("corpus", "train"), strict=True):
        assert tokenizer.decode(row["tokens"][:-1]) == text
        assert row["num_bytes"] == len(text.encode())


def test_shards_close_once_they_hold_enough_tokens(built):
    stream = built.shards.stream("corpus", "train")
    shards = [stream.shard(index) for index in range(stream.num_shards)]
    assert len(shards) > 2
    for shard in shards[:-1]:
        assert shard.offsets[-2] < 300 <= shard.offsets[-1]


def test_the_split_is_a_hash_of_the_text_alone():
    texts = [f"text {index}" for index in range(4000)]
    held_out = [is_validation(text, 0.1) for text in texts]
    assert 330 < sum(held_out) < 470
    first = hashlib.blake2b(texts[0].encode(), digest_size=8).digest()
    assert held_out[0] == (int.from_bytes(first, "big") / 2**64 < 0.1)
    assert all(is_validation(text, 0.2) for text, held in zip(texts, held_out, strict=True) if held)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_does_not_show(built, inputs, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(module, "CHARS_PER_TASK", 200)
    assert build(tmp_path, inputs, num_workers=num_workers).files() == built.files()


@pytest.mark.parametrize("writes", [0, 1, 2, 5, 9])
def test_a_killed_run_goes_on_behind_its_last_shard_and_ends_in_the_same_bytes(
    built, inputs, tmp_path, monkeypatch, writes
):
    written, real = [], module.write_shard

    def dying(path, *args, **kwargs):
        if len(written) == writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.999.tmp").write_bytes(b"half a sha")
            raise KeyboardInterrupt
        real(path, *args, **kwargs)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, inputs)
    again = []
    monkeypatch.setattr(module, "write_shard", lambda path, *args, **kw: (again.append(path), real(path, *args, **kw)))
    assert build(tmp_path, inputs).files() == built.files()
    assert not set(again) & set(written)
    assert len(written) + len(again) == sum(name.endswith(".arrow") for name in built.files())


def test_running_again_writes_no_shard(inputs, tmp_path, monkeypatch):
    first = build(tmp_path, inputs).files()
    monkeypatch.setattr(module, "write_shard", lambda *args, **kwargs: pytest.fail("wrote a shard again"))
    assert build(tmp_path, inputs).files() == first


def test_without_prompts_there_is_the_corpus_alone(inputs, tmp_path):
    alone = build(tmp_path / "a", {key: inputs[key] for key in ("corpus", "tokenizer")})
    none = build(tmp_path / "b", inputs | {"prompts": artifacts.prompts(tmp_path / "prompts", [])})
    assert alone.shards.streams == none.shards.streams == ("corpus",)
    assert alone.files() == none.files()


@pytest.mark.parametrize("split", ["validation", "training"])
def test_a_source_that_leaves_a_split_empty_is_an_error_with_numbers(inputs, tmp_path, split):
    texts = [text for text in CORPUS if is_validation(text, 0.2) == (split == "training")][:5]
    few = inputs | {"corpus": artifacts.corpus(tmp_path / "few", texts)}
    remedy = "raise" if split == "validation" else "lower"
    with pytest.raises(
        DataError,
        match=rf"validation_ratio: got 0\.2, which leaves 0 of the 5 documents of 'corpus' for {split}.*{remedy}",
    ):
        build(tmp_path / "work", few)


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_holds_the_documents_of_its_value_in_their_order(built_by_source, tokenizer):
    shards = built_by_source.shards
    assert shards.streams == ("Big-books", "songs", "exercises")
    assert shards.corpus_streams == ("Big-books", "songs")
    for name, source in (("Big-books", "Big books"), ("songs", "songs")):
        for split in SPLITS:
            expected = [
                (f"doc/{index}", source, tokenizer.encode(text))
                for index, text in enumerate(SEVERAL)
                if source_of(index) == source and is_validation(text, 0.2) == (split == "validation")
            ]
            stream = shards.stream(name, split)
            got = [stream.document(number) for number in range(stream.num_documents)]
            assert [(each.id, each.source, each.tokens[:-1].tolist()) for each in got] == expected
            assert built_by_source.metrics[f"{name}_{split}_documents"] == len(expected)


def test_documents_without_a_value_are_a_stream_of_their_own(several_inputs, tmp_path):
    shards = build(tmp_path, several_inputs, streams_by="language").shards
    assert shards.streams == ("en", "unknown", "exercises")


@pytest.mark.parametrize(("writes", "max_open_shards"), [(1, 1), (6, 1), (3, 2), (10, 8)])
def test_a_killed_run_of_several_streams_ends_in_the_same_bytes(
    several_inputs, tmp_path, monkeypatch, writes, max_open_shards
):
    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", max_open_shards)
    settings = {"streams_by": "source", "num_workers": 2}
    whole = build(tmp_path / "whole", several_inputs, **settings)
    written, real = [], module.write_shard

    def dying(*args, **kwargs):
        if len(written) == writes:
            raise KeyboardInterrupt
        real(*args, **kwargs)
        written.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "killed", several_inputs, **settings)
    assert build(tmp_path / "killed", several_inputs, **settings).files() == whole.files()


def test_shards_that_are_being_filled_hold_no_more_than_stated(several_inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 1)
    largest, real = [0], module._OpenShard.add

    def add(self, position, document):
        real(self, position, document)
        open_shards[self.folder] = self
        largest[0] = max(largest[0], sum(each.num_tokens for each in open_shards.values()))

    open_shards = {}
    monkeypatch.setattr(module._OpenShard, "add", add)
    build(tmp_path, several_inputs, streams_by="source")
    longest = max(len(text.encode()) for text in SEVERAL) + 1
    assert 300 - longest < largest[0] <= 300 + longest


def test_a_column_that_the_corpus_lacks_is_an_error_that_names_those_there(several_inputs, tmp_path):
    with pytest.raises(
        ConfigError, match=r"streams_by: got 'licence', expected a column of .*: text, id, source, language"
    ):
        build(tmp_path, several_inputs, streams_by="licence")


def test_a_value_that_is_the_name_of_another_stream_is_an_error(inputs, tmp_path):
    corpus = artifacts.corpus(tmp_path / "corpus", CORPUS, source="exercises")
    with pytest.raises(ConfigError, match=r"document 'exercises/0' has the source 'exercises'"):
        build(tmp_path / "work", inputs | {"corpus": corpus}, streams_by="source")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("CC BY 4.0", "CC-BY-4.0"),
        ("../../etc", "etc"),
        (".hidden", "hidden"),
        ("人工", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
        ("x" * 300, "x" * 80),
    ],
)
def test_any_value_makes_a_name_that_is_safe_as_a_folder(value, name):
    assert stream_name(value) == name


# --- report and progress ------------------------------------------------------------------------------------------


def test_the_report_counts_tokens(built):
    page = (built.workspace.report / "report.html").read_text()
    assert f"{int(built.metrics['tokens']):,}" in page
    assert "books" in page


def test_progress_counts_every_document(built):
    assert '"done": 100, "total": 100, "unit": "documents"' in built.workspace.events.read_text().splitlines()[-1]


# --- imported tokenizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "gemma", "gpt2", "t5"])
def test_documents_stand_between_the_tokens_that_an_imported_model_expects(inputs, tmp_path, family):
    imported = Tokenizer.load(write(family, tmp_path))
    others = inputs | {"tokenizer": artifacts.artifact(tmp_path)}
    built = build(tmp_path / "built", others, num_workers=3)
    start, end = imported.document_start_ids, imported.document_end_id
    assert bool(start) == (family in ("llama3", "gemma"))
    for source in SOURCES:
        stream = built.shards.stream(source, "train")
        texts = members(source, "train")
        expected = [token for text in texts for token in (*start, *imported.encode(text), end)]
        assert stream.read(0, stream.num_tokens).tolist() == expected
    assert built.shards.tokenizer.digest == imported.digest
    assert built.files() == build(tmp_path / "again", others, num_workers=1).files()
    lengths = built.shards.token_bytes
    assert lengths[[*imported.special_ids.values()]].tolist() == [0] * len(imported.special_ids)
    if family != "t5":  # its normalizer changes the text
        text = "the fox über 人工"
        assert lengths[imported.encode(text)].sum() == len(text.encode())


def test_a_document_that_cannot_be_encoded_is_quarantined(inputs, tokenizer, tmp_path, monkeypatch):
    def failing(self, texts, *, encode=BytePairEncoder.encode_batch):
        if any(text.startswith("1/7 ") for text in texts):
            raise DataError("too long")
        return encode(self, texts)

    monkeypatch.setattr(BytePairEncoder, "encode_batch", failing)
    built = build(tmp_path, inputs)
    [line] = (built.workspace.output / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"error": "books books/7: too long"}
    assert built.metrics["quarantined"] == 1
    documents = [built.metrics[f"corpus_{split}_documents"] for split in SPLITS]
    assert sum(documents) == len(CORPUS) - 1
