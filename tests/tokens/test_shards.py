import json
import shutil

import numpy as np
import pytest

from lilpipe.errors import ArtifactError
from lilpipe.tokens.shards import Document, Shard, TokenShards, token_type, write_shard
from tests.tokens.conftest import CORPUS


def test_ids_take_two_bytes_where_the_vocabulary_allows(built, tmp_path):
    assert built.shards.stream("corpus", "train").read(0, 5).dtype == np.uint16
    assert [str(token_type(size)) for size in (65_536, 65_537)] == ["uint16", "uint32"]
    document = Document("a", "b", 3, np.array([1, 70_000], dtype=np.uint32))
    write_shard(tmp_path / "00000.arrow", [document], vocab_size=100_000, next_document=1)
    assert Shard(tmp_path / "00000.arrow").tokens.tolist() == [1, 70_000]


def test_a_read_inside_a_shard_copies_nothing(built):
    stream = built.shards.stream("corpus", "train")
    first = len(stream.shards[0].tokens)
    assert np.shares_memory(stream.read(3, first), stream.shards[0].tokens)
    assert np.shares_memory(stream.read(first, first + 4), stream.shards[1].tokens)
    with pytest.raises(ValueError, match="read-only"):
        stream.read(0, 4)[0] = 1


def test_any_range_reads_as_from_one_array(built):
    stream = built.shards.stream("corpus", "train")
    whole = np.concatenate([shard.tokens for shard in stream.shards])
    assert stream.num_tokens == len(whole)
    for start in range(0, len(whole), 37):
        for length in (1, 2, 50, 299, 301, 700):
            stop = min(start + length, len(whole))
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


def test_documents_of_a_range_are_those_with_a_token_in_it(built):
    stream = built.shards.stream("corpus", "train")
    owner = []
    for shard in stream.shards:
        for row, length in enumerate(np.diff(shard.offsets)):
            owner += [shard.ids[row].as_py()] * int(length)
    for start in range(0, stream.num_tokens, 23):
        for length in (1, 40, 600):
            stop = min(start + length, stream.num_tokens)
            expected = list(dict.fromkeys(owner[start:stop]))
            assert stream.documents(start, stop) == [(name, "books") for name in expected]


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
    with pytest.raises(ArtifactError, match="expected 000000000000, which made the shards"):
        _ = TokenShards.open(directory).tokenizer


def test_a_damaged_shard_is_named(built, tmp_path):
    directory = copy(built, tmp_path)
    path = directory / "shards" / "corpus" / "train" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"train/00001\.arrow: cannot be read as a token shard"):
        TokenShards.open(directory).stream("corpus", "train")


def test_a_directory_without_an_index_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"index\.json: cannot be read"):
        TokenShards.open(tmp_path)
