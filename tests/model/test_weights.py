"""Files of weights: what is read lazily, and what is refused."""

import json

import psutil
import pytest
import torch
from safetensors.torch import save_file

from lilpipe.errors import ArtifactError
from lilpipe.model.weights import INDEX_FILE, stored_tensors, weight_files, write_tensors


def tensors():
    return {f"layer.{number}": torch.full((4, 4), float(number)) for number in range(5)}


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tensors().items(), tmp_path, dtype=torch.float32, max_shard_bytes=128)
    return tmp_path


def read(directory):
    return dict(stored_tensors(directory))


def test_shards_hold_as_many_tensors_as_fit(sharded):
    files = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert weight_files(sharded) == [INDEX_FILE, *files]
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    assert index["weight_map"] == {f"layer.{number}": files[number // 2] for number in range(5)}
    assert {name: tensor.tolist() for name, tensor in read(sharded).items()} == {
        name: tensor.tolist() for name, tensor in tensors().items()
    }


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path):
    write_tensors(tensors().items(), tmp_path, dtype=torch.float32, max_shard_bytes=1)
    assert len(weight_files(tmp_path)) == 1 + 5


def test_reading_takes_memory_only_for_what_is_looked_at(tmp_path):
    num_bytes = 50 * 2**20
    save_file({"large": torch.zeros(num_bytes, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    process = psutil.Process()
    before = process.memory_info().rss
    held = read(tmp_path)
    assert int(held["large"][0]) == 0
    assert process.memory_info().rss - before < num_bytes / 10
    assert dict(stored_tensors(tmp_path, shapes_only=True))["large"].device.type == "meta"


def test_a_killed_write_leaves_the_weights_that_were_there(sharded):
    before = {name: (sharded / name).read_bytes() for name in weight_files(sharded)}

    def failing():
        yield from list(tensors().items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(failing(), sharded, dtype=torch.float32, max_shard_bytes=64)
    assert {name: (sharded / name).read_bytes() for name in weight_files(sharded)} == before
    write_tensors(tensors().items(), sharded, dtype=torch.float32, max_shard_bytes=128)
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ArtifactError, match=rf"{name}: got pickled weights.*save_pretrained"):
        read(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"got no weights, expected model\.safetensors or"):
        read(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00003\.safetensors: missing"):
        read(sharded)


@pytest.mark.parametrize("damage", [lambda c: c[:-10], lambda c: c[:4], lambda c: b"", lambda c: b"\xff" * len(c)])
def test_a_damaged_shard_is_named(sharded, damage):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"model-00002-of-00003\.safetensors: cannot be read as safetensors"):
        read(sharded)


def test_a_shard_of_another_checkpoint_is_refused(sharded):
    save_file({"layer.2": torch.zeros(1), "other": torch.zeros(1)}, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(
        ArtifactError, match=r"model-00002-of-00003\.safetensors: layer\.3 is only in this file or only in"
    ):
        read(sharded)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": "../b.safetensors"}}'],
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=r"index\.json: cannot be read as a safetensors index"):
        read(tmp_path)
