import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilpipe.errors import ArtifactError, StoreError
from lilpipe.training import checkpoint, checkpoint_files
from lilpipe.training.checkpoint import check_space
from tests.training.checkpoint_workers import KINDS, build, open_checkpoints, small_state, state_of, updated

IDENTITY = {"pretrain": {"seed": 1, "batch_size": 16, "betas": (0.9, 0.95), "parallel": {"shard": 4}}, "num_steps": 9}


def save(directory, *steps, **options):
    checkpoints = open_checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, small_state(step), {"losses": [step + 0.1], "note": None})
    checkpoints.wait()
    return checkpoints


def load(directory, **options):
    """Step, record and the one value of all tensors."""
    state = small_state(-1)
    found = open_checkpoints(directory, **{"log": pytest.fail, **options}).load_latest(state)
    values = {value for tensor in state.values() for value in tensor.flatten().tolist()}
    assert len(values) == 1
    return (*found, values.pop()) if found else None


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert load(tmp_path / "none") is None
    assert open_checkpoints(tmp_path / "none").steps == []


def test_tensors_of_every_kind_come_back_to_the_bit_and_the_record_with_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "model/matrix": torch.nn.Parameter(torch.randn(5, 3, generator=generator)),
        "model/transposed": torch.randn(3, 5, generator=generator).T,
        "model/half": torch.randn(7, generator=generator).bfloat16(),
        "model/mask": torch.tensor([True, False, True]),
        "model/none": torch.empty(0, 4),
        "optimizer/matrix/step": torch.tensor(3.0),
        "optimizer/matrix/exp_avg": torch.randn(5, 3, generator=generator, dtype=torch.float64),
    }
    record = {"losses": [0.1 + 0.2, float("nan"), 1e-300], "tokens": 2**60, "skipped": {"3": "spike"}}
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(7, state, record)
    empty = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    found = checkpoints.load_latest(empty)
    assert found is not None
    assert found[0] == 7
    assert json.dumps(found[1]) == json.dumps(record)
    for name, tensor in state.items():
        assert torch.equal(empty[name], tensor), name


def test_what_training_changes_after_a_save_does_not_reach_the_disk(tmp_path, monkeypatch):
    go = threading.Event()
    write = checkpoint_files.write_tensors

    def wait_and_write(*args, **options):
        go.wait(10)
        return write(*args, **options)

    monkeypatch.setattr(checkpoint_files, "write_tensors", wait_and_write)
    checkpoints, state, record = open_checkpoints(tmp_path), small_state(5), {"losses": [1.0]}
    checkpoints.save(5, state, record)
    assert checkpoints.steps == []  # it returned before anything was written
    for tensor in state.values():
        tensor.fill_(6)
    record["losses"].append(2.0)
    go.set()
    checkpoints.wait()
    assert load(tmp_path) == (5, {"losses": [1.0]}, 5.0)


def test_nothing_on_disk_is_a_pickle(tmp_path):
    save(tmp_path, 5)
    files = names(tmp_path)
    assert files == [
        "LATEST",
        "step-00000005/index.json",
        "step-00000005/model-00000.safetensors",
        "step-00000005/optimizer-00000.safetensors",
        "step-00000005/record.json",
    ]
    assert (tmp_path / "LATEST").read_text() == "step-00000005"
    for file in files:
        content = (tmp_path / file).read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
        if file.endswith(".json"):
            json.loads(content)


def test_the_last_ones_are_kept_and_multiples_without_the_optimizers_state(tmp_path):
    checkpoints = save(tmp_path, 2, 3, 4, 5, 6, keep_last=2, keep_every=2)
    assert checkpoints.steps == [2, 4, 5, 6]
    assert [name for name in names(tmp_path) if "optimizer" in name] == [
        "step-00000005/optimizer-00000.safetensors",
        "step-00000006/optimizer-00000.safetensors",
    ]
    state = small_state(-1)
    assert checkpoints.load(2, {"model/matrix": state["model/matrix"]}) == {"losses": [2.1], "note": None}
    assert state["model/matrix"].unique().tolist() == [2.0]
    with pytest.raises(ArtifactError, match="tensor optimizer/matrix/step is missing"):
        checkpoints.load(2, state)


def test_a_checkpoint_without_the_optimizers_state_is_not_resumed_from(tmp_path):
    save(tmp_path, 2, 3, keep_last=1, keep_every=2)
    shutil.rmtree(tmp_path / "step-00000003")
    said = []
    assert load(tmp_path, log=said.append) is None
    assert "step-00000002 cannot be resumed (it was kept without optimizer state)" in said[0]


def _flip_a_bit(path):
    content = bytearray((path / "model-00000.safetensors").read_bytes())
    content[-2] ^= 1
    (path / "model-00000.safetensors").write_bytes(content)


def _truncate(path):
    content = (path / "optimizer-00000.safetensors").read_bytes()
    (path / "optimizer-00000.safetensors").write_bytes(content[: len(content) // 2])


def _rewrite(name, old, new):
    def rewrite(path):
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return rewrite


DAMAGE = {
    "a flipped bit": _flip_a_bit,
    "truncated tensors": _truncate,
    "missing tensors": lambda path: (path / "model-00000.safetensors").unlink(),
    "empty index": lambda path: (path / "index.json").write_text(""),
    "missing index": lambda path: (path / "index.json").unlink(),
    "index of another form": lambda path: (path / "index.json").write_text("[]"),
    "another shape in the index": _rewrite("index.json", '"shape": [2, 3]', '"shape": [3, 2]'),
    "another loss in the record": _rewrite("record.json", "10.1", "10.2"),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said_so(tmp_path, damage):
    save(tmp_path, 5, 10)
    DAMAGE[damage](tmp_path / "step-00000010")
    said = []
    assert load(tmp_path, log=said.append) == (5, {"losses": [5.1], "note": None}, 5.0)
    if damage != "nothing":
        assert len(said) == 1
        assert "step-00000010 cannot be resumed" in said[0]
        assert not (tmp_path / "step-00000010").exists()
        assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["step-00000010.0"]
    save(tmp_path, 10)  # the run comes by again
    assert load(tmp_path) == (10, {"losses": [10.1], "note": None}, 10.0)


def test_two_damaged_checkpoints_are_none(tmp_path):
    save(tmp_path, 5, 10)
    for step in (5, 10):
        _truncate(tmp_path / f"step-{step:08d}")
    said = []
    assert load(tmp_path, log=said.append) is None
    assert len(said) == 2


def test_the_one_before_is_gone_back_to_by_name_and_by_latest(tmp_path):
    checkpoints = save(tmp_path, 5, 10)
    state = small_state(-1)
    checkpoints.load(5, state)
    assert state["model/matrix"].unique().tolist() == [5.0]
    (tmp_path / "LATEST").write_text("step-00000005")
    assert load(tmp_path) == (5, {"losses": [5.1], "note": None}, 5.0)
    save(tmp_path, 7)
    assert open_checkpoints(tmp_path).steps == [5, 7]


def test_a_changed_setting_is_named_with_those_that_are_safe_to_change(tmp_path):
    safe = ("pretrain.parallel", "num_steps")
    save(tmp_path, 5, identity=IDENTITY, safe=safe)
    other = {"pretrain": {**IDENTITY["pretrain"], "batch_size": 32, "dropout": 0.1}, "num_steps": 9}
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path, identity=other, safe=safe)
    assert "pretrain.batch_size was 16 and is now 32, pretrain.dropout was None and is now 0.1; " in str(caught.value)
    assert "(safe to change: num_steps, pretrain.parallel)" in str(caught.value)


def test_a_safe_change_is_logged_and_gone_along_with(tmp_path):
    save(tmp_path, 5, identity=IDENTITY)
    other = {"pretrain": {**IDENTITY["pretrain"], "parallel": {"shard": 2}}, "num_steps": 9}
    said = []
    assert load(tmp_path, identity=other, safe=["pretrain.parallel"], log=said.append)
    assert said == ["resuming step-00000005 with changed settings: pretrain.parallel.shard was 4 and is now 2"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model/matrix", torch.zeros(3, 3), r"model/matrix: got shape \[2, 3\], expected \[3, 3\]"),
        ("model/other", torch.zeros(1), "tensor model/other is missing"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(tmp_path, name, tensor, message):
    with pytest.raises(ArtifactError, match=f"step-00000005: belongs to another model: {message}"):
        save(tmp_path, 5).load_latest({**small_state(0), name: tensor})


def test_a_failing_disk_is_told_at_the_next_call_by_the_folder_and_the_remedy(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    checkpoints = save(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", full)
        checkpoints.save(10, small_state(10), {})
        with pytest.raises(StoreError, match=rf"{tmp_path}.*No space left on device.*check space"):
            checkpoints.save(15, small_state(15), {})
    checkpoints.wait()  # it was told once
    assert load(tmp_path) == (5, {"losses": [5.1], "note": None}, 5.0)


def test_room_is_asked_for_before_the_first_step_and_before_each_save(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    num_bytes = 6 * 4 + 4 + 6 * 8
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=3 * num_bytes - 1))
    checkpoints = open_checkpoints(tmp_path / "new", keep_last=2)
    with pytest.raises(
        StoreError, match="3 x 76 = 228 bytes are needed for checkpoints and 227 are free; free some space"
    ):
        checkpoints.check_space(small_state(0))
    checkpoints.save(5, small_state(5), {})
    checkpoints.wait()
    checkpoints.check_space(small_state(0))  # one of the three lies there already
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=num_bytes - 1))
    checkpoints.save(10, small_state(10), {})
    with pytest.raises(StoreError, match="1 x 76 = 76 bytes are needed"):
        checkpoints.wait()
    assert checkpoints.steps == [5]


def test_space_is_asked_of_the_disk_that_a_missing_folder_will_lie_on(tmp_path):
    check_space(tmp_path / "a" / "b", 1, 1)
    with pytest.raises(StoreError, match="reduce keep_last, or move the store"):
        check_space(tmp_path / "a" / "b", 2**60, 2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a process that killed its children, and what they left."""
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.training.checkpoint_workers", "killed", str(root)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return root, json.loads(lines[-1])


def test_a_kill_at_any_touch_of_the_disk_leaves_the_old_checkpoint_or_the_new_one(killed):
    _, tries = killed
    assert tries[-1]["status"] == 0
    assert len(tries) > 25
    assert all(one["status"] == -9 for one in tries[:-1])
    steps = [one["found"][0] for one in tries]
    assert set(steps) == {4, 5}
    assert steps == sorted(steps)
    for one in tries:
        step, record, values, said = one["found"]
        assert (record, values, said) == ({"step": step}, [step], [])
        assert one["again"] == tries[-1]["again"]
    kept = [name for name in tries[-1]["again"] if "optimizer" in name]
    assert [name.split("/")[0] for name in kept] == ["step-00000005"]
    assert {name.split("/")[0] for name in tries[-1]["again"]} == {"LATEST", "step-00000004", "step-00000005"}


def test_a_process_that_ends_during_a_save_finishes_it(killed):
    root, _ = killed
    assert load(root / "left") == (1, {}, 1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder in which four processes worked, and the report of each."""
    root = tmp_path_factory.mktemp("world")
    for kind in KINDS:
        save_file(updated("one process", kind), root / f"{kind}.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    subprocess.run([*command, "-m", "tests.training.checkpoint_workers", str(root)], check=True, timeout=300)
    return root, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.distributed
def test_updates_of_parts_are_those_of_one_process(world):
    for report in world[1]:
        assert len(report["muon and adamw"]) == 10
        assert max(report["muon and adamw"].values()) <= 1e-12
        assert max(report["stages"].values()) <= 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_fsdp_is_read_to_the_bit_under_any_layout_and_by_one_process(world, kind):
    root, reports = world
    assert [report["resharded"][kind] for report in reports] == [[]] * 4
    tensors = state_of(*build("one process", kind))
    assert open_checkpoints(root / f"resharded-{kind}").load_latest(tensors) == (3, {"rank": 0})
    expected = load_file(root / f"resharded-{kind}" / "saved.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.detach(), expected[name]), name


@pytest.mark.distributed
def test_what_several_processes_hold_is_written_once_and_by_all_of_them(world):
    num_bytes = sum(tensor.nbytes for tensor in state_of(*build("one process", "adamw")).values())
    assert [report["bytes"] for report in world[1]] == [{"whole": [num_bytes, 8], "hsdp": [num_bytes, 8]}] * 4


@pytest.mark.distributed
def test_stages_that_hold_different_layers_save_one_checkpoint(world):
    tensors = {f"model/{name}": torch.zeros(size) for name, size in (("layers.0", 3), ("layers.1", 3), ("shared", 2))}
    assert open_checkpoints(world[0] / "stages").load_latest(tensors) == (1, {})
    assert {name: tensor.unique().tolist() for name, tensor in tensors.items()} == {
        "model/layers.0": [0.0],
        "model/layers.1": [1.0],
        "model/shared": [1.0],
    }


@pytest.mark.distributed
def test_what_goes_wrong_on_one_process_is_told_to_all(world):
    for report in world[1]:
        assert (
            "rank 2 cannot write a checkpoint (OSError: [Errno 28] No space left on device)"
            in (report["failures"]["disk"])
        )
        assert "seed was 1 and is now 2" in report["failures"]["setting"]
        assert report["failures"]["found"] == 1
