import json

import pytest
import torch

from lilpipe.errors import ArtifactError, StoreError
from lilpipe.training import checkpoint
from lilpipe.training.checkpoint import Checkpoint

IDENTITY = {"seed": 1, "optimizer": {"betas": (0.9, 0.95)}}


def save(directory, step):
    tensors = {"weights": torch.full((3,), float(step)), "scalar": torch.tensor(step)}
    checkpoint.save(directory, Checkpoint(step, tensors), identity=IDENTITY)


def load(directory, log=None, identity=IDENTITY):
    return checkpoint.load_latest(directory, identity=identity, log=log or pytest.fail)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert load(tmp_path / "none") is None


def test_the_last_checkpoint_is_loaded_and_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    found = load(tmp_path)
    assert found is not None
    assert found.step == 100
    assert found.tensors["weights"].tolist() == [100.0] * 3
    assert found.tensors["scalar"].item() == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def _flip_a_bit(path):
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-2] ^= 1
    (path / "tensors.safetensors").write_bytes(content)


def _truncate(path):
    content = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(content[: len(content) // 2])


DAMAGE = {
    "a flipped bit": _flip_a_bit,
    "truncated tensors": _truncate,
    "missing tensors": lambda path: (path / "tensors.safetensors").unlink(),
    "empty state": lambda path: (path / "state.json").write_text(""),
    "missing state": lambda path: (path / "state.json").unlink(),
    "state of another form": lambda path: (path / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said_so(tmp_path, damage):
    for step in (5, 10):
        save(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000010")
    said = []
    found = load(tmp_path, log=said.append)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    assert "step-00000010 is damaged" in said[0]
    save(tmp_path, 10)  # the run comes by again
    again = load(tmp_path)
    assert again is not None
    assert again.step == 10


def test_two_damaged_checkpoints_are_none(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
        _truncate(tmp_path / f"step-{step:08d}")
    said = []
    assert load(tmp_path, log=said.append) is None
    assert len(said) == 2


def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(ArtifactError, match="seed was 1 and is 2"):
        load(tmp_path, identity={**IDENTITY, "seed": 2})


@pytest.mark.parametrize("call", ["save_file", "sync_directory", "_flush", "digest_file"])
def test_a_save_that_dies_midway_leaves_the_one_before(tmp_path, monkeypatch, call):
    save(tmp_path, 5)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    found = load(tmp_path)
    assert found is not None
    assert found.step == 5
    save(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_a_full_disk_is_told_by_the_file_and_the_remedy(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StoreError, match=r"step-00000005.*No space left on device.*check space"):
        save(tmp_path, 5)


def test_a_checkpoint_is_plain_safetensors_and_json(tmp_path):
    save(tmp_path, 5)
    state = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    assert state["step"] == 5
    assert sorted(path.name for path in (tmp_path / "step-00000005").iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]
