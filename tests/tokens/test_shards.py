import json
import shutil

import numpy as np
import pytest

from lilpipe.errors import ArtifactError
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokens import shards
from lilpipe.tokens.shards import Shard, TokenizedDocument, TokenShards, token_type, write_index, write_shard
from tests.tokens.conftest import CORPUS


def test_ids_take_two_bytes_where_the_vocabulary_allows(built, tmp_path):
    assert built.shards.stream("corpus", "train").read(0, 5).dtype == np.uint16
    assert [str(token_type(size)) for size in (65_536, 65_537)] == ["uint16", "uint32"]
    document = TokenizedDocument("a", "b", 3, np.array([1, 70_000], dtype=np.uint32))
    write_shard(tmp_path / "00000.arrow", [document], vocab_size=100_000, next_document=1)
    assert Shard(tmp_path / "00000.arrow").tokens.tolist() == [1, 70_000]


def test_a_read_inside_a_shard_copies_nothing(built):
    stream = built.shards.stream("corpus", "train")
    first = len(stream.shard(0).tokens)
    assert np.shares_memory(stream.read(3, first), stream.shard(0).tokens)
    assert np.shares_memory(stream.read(first, first + 4), stream.shard(1).tokens)
    with pytest.raises(ValueError, match="read-only"):
        stream.read(0, 4)[0] = 1


def test_any_range_reads_as_from_one_array(built):
    stream = built.shards.stream("corpus", "train")
    whole = np.concatenate([stream.shard(index).tokens for index in range(stream.num_shards)])
    assert stream.num_tokens == len(whole)
    for start in range(0, len(whole), 37):
        for length in (1, 2, 50, 299, 301, 700):
            stop = min(start + length, len(whole))
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


def test_a_document_is_found_by_number_and_id(built):
    stream = built.shards.stream("corpus", "train")
    position = 0
    for number in range(stream.num_documents):
        document = stream.document(number)
        assert stream.read(position, position + len(document.tokens)).tolist() == document.tokens.tolist()
        assert document.source == "books"
        assert document.num_bytes == built.shards.token_bytes[document.tokens].sum()
        assert stream.find(document.id) == [number]
        assert stream.offsets[number] == position
        position += len(document.tokens)
    assert position == stream.num_tokens
    held_out = built.shards.stream("corpus", "validation").document(0).id
    assert stream.find(held_out) == stream.find("nobody") == []


def test_documents_that_share_an_id_are_all_found(tmp_path):
    documents = [TokenizedDocument(name, "s", 1, np.array([1, 2], dtype=np.uint16)) for name in ("a", "b", "a", "a")]
    write_shard(tmp_path / "shards/corpus/train/00000.arrow", documents[:2], vocab_size=9, next_document=2)
    write_shard(tmp_path / "shards/corpus/train/00001.arrow", documents[2:], vocab_size=9, next_document=4)
    write_index(tmp_path, BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, "."), ["corpus"])
    stream = TokenShards.open(tmp_path).stream("corpus", "train")
    assert (stream.find("a"), stream.find("b")) == ([0, 2, 3], [1])
    assert stream.offsets.tolist() == [0, 2, 4, 6, 8]


def test_opening_a_stream_and_asking_where_documents_lie_maps_no_shard(built, monkeypatch):
    monkeypatch.setattr(shards, "Shard", lambda path: pytest.fail(f"mapped {path}"))
    stream = TokenShards.open(built.workspace.output).stream("corpus", "train")
    assert stream.num_documents == len(stream.offsets) - 1
    assert stream.offsets[-1] == stream.num_tokens


def test_bytes_of_tokens_add_up_to_bytes_of_text(built, tokenizer):
    ids = tokenizer.encode(CORPUS[0])
    assert built.shards.token_bytes[ids].sum() == len(CORPUS[0].encode())
    assert built.shards.token_bytes[-8:].tolist() == [0] * 8


def copy(built, tmp_path):
    shutil.copytree(built.workspace.output, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_tokenizer_beside_the_shards_must_be_theirs(built, tmp_path):
    directory = copy(built, tmp_path)
    assert TokenShards.open(directory).tokenizer.digest == built.shards.tokenizer_digest
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | {"tokenizer_digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="expected 000000000000, which encoded the shards"):
        _ = TokenShards.open(directory).tokenizer


def test_a_damaged_shard_is_named(built, tmp_path):
    directory = copy(built, tmp_path)
    path = directory / "shards" / "corpus" / "train" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"train/00001\.arrow: cannot be read as a token shard"):
        TokenShards.open(directory).stream("corpus", "train").shard(1)


@pytest.mark.parametrize("name", ["offsets.npy", "ids.npy"])
def test_a_damaged_index_is_named(built, tmp_path, name):
    directory = copy(built, tmp_path)
    path = directory / "shards" / "corpus" / "train" / name

    def use():
        stream = TokenShards.open(directory).stream("corpus", "train")
        return stream.offsets[0], stream.find("x")

    for content in (path.read_bytes()[:100], path.read_bytes()[:-8]):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{name}: cannot be read as an index"):
            use()
    np.save(path, np.zeros(3))
    with pytest.raises(ArtifactError, match=rf"{name}: got shape \(3,\), expected"):
        use()


def test_a_directory_without_an_index_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"index\.json: cannot be read"):
        TokenShards.open(tmp_path)
