"""Where imported models come from: the hub's cache, GGUF files, and directories that lie."""

import json
import os
import struct
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lilpipe.cli import app
from lilpipe.config.model import ImportModelConfig
from lilpipe.errors import ArtifactError, DataError, LilpipeError
from lilpipe.model import import_model
from lilpipe.model import model_sources as sources
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.model_sources import check_gguf
from lilpipe.model.origin import ORIGIN_FILE, read_card
from lilpipe.stage import Workspace
from tests.model.checkpoints import small_model, small_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: apache-2.0\nbase_model:\n- some/base\ntags:\n- x\n---\n# A model\n"


@pytest.fixture
def directory(tmp_path):
    save_model(small_model(), small_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path, monkeypatch, directory):
    """The hub's local cache with one repository, whose files are links to blobs."""
    cache = tmp_path / "hub"
    repository = cache / "models--me--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (directory / "README.md").write_text(CARD)
    for number, path in enumerate(directory.iterdir()):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))  # for workers
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub import snapshot_download

    def from_cache(*args, **options):
        return snapshot_download(*args, **options, cache_dir=cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", from_cache)
    return repository


def imported(tmp_path, **settings):
    workspace = Workspace(tmp_path / "work")
    metrics = import_model.run(ImportModelConfig(**settings), {}, workspace)
    return workspace.output, metrics


def test_a_repository_of_the_hub_is_pinned_by_its_commit(hub, tmp_path):
    config = ImportModelConfig(repo_id="me/tiny")
    assert sources.digests(config) == {"repo_id": "me/tiny", "commit": COMMIT}
    output, metrics = imported(tmp_path, repo_id="me/tiny")
    assert metrics["num_parameters"] > 0
    assert load_model(output)[0].config == small_model().config
    assert not any(path.is_symlink() for path in output.iterdir())
    assert json.loads((output / ORIGIN_FILE).read_text()) == {
        "repo_id": "me/tiny",
        "revision": "main",
        "commit": COMMIT,
        "license": "apache-2.0",
        "base_model": ["some/base"],
    }


@pytest.mark.parametrize("settings", [{"repo_id": "me/other"}, {"repo_id": "me/tiny", "revision": "v2"}])
def test_what_the_cache_does_not_have_is_refused_offline(hub, settings):
    with pytest.raises(DataError, match=r"import_model\.repo_id: me/.* cannot be read .*set HF_HUB_OFFLINE=0"):
        sources.digests(ImportModelConfig(**settings))


def test_a_commit_that_the_cache_does_not_have_is_refused(hub, tmp_path):
    with pytest.raises(DataError, match=r"import_model\.repo_id: me/tiny at revision aaaa"):
        imported(tmp_path, repo_id="me/tiny", revision="a" * 40)


def test_only_named_files_are_asked_of_the_hub(monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options) or "/")
    sources._download("me/tiny", COMMIT)
    assert asked["revision"] == COMMIT
    assert "*.py" not in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.json"} & set(asked["allow_patterns"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x", "repo_id": "me/tiny"}, "expected one of them"),
        ({"path": "x", "revision": "v1"}, "revision v1 would be ignored"),
    ],
)
def test_sources_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportModelConfig(**settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no metadata", {}),
        ("---\nlicense: mit\nbase_model: a/b\n---\n", {"license": "mit", "base_model": "a/b"}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: " + "x" * 500 + "\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", {}),
        ("---\nbase_model: 3\n---\n", {}),
        ('---\nlicense: "mit\\n# Heading"\n---\n', {}),
    ],
)
def test_a_card_gives_license_and_base_model_or_nothing(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path / "README.md") == expected
    assert read_card(tmp_path / "none.md") == {}


# --- files that lie -------------------------------------------------------------------------------------------------


def lie(directory, kind):
    """Damage a checkpoint."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    stated = json.loads(config.read_text())
    tensors = load_file(weights)
    if kind == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 2**60) + weights.read_bytes()[8:])
    elif kind == "quantized":
        save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, weights)
    elif kind == "pickled":
        weights.unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
    elif kind == "link":
        weights.rename(directory.parent / "elsewhere.safetensors")
        weights.symlink_to(directory.parent / "elsewhere.safetensors")
    elif kind == "deep":
        config.write_text("[" * 10**6)
    elif kind == "long":
        config.write_text(json.dumps(stated | {"x": "y" * 10**7}))
    elif kind == "index":
        weights.rename(directory / "part.safetensors")
        index = {"weight_map": dict.fromkeys([*tensors, "model.extra.weight"], "part.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "index outside":
        index = {"weight_map": dict.fromkeys(tensors, "../model.safetensors")}
        weights.unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config.write_text(json.dumps(stated | kind))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half", r"model\.safetensors: cannot be read as safetensors"),
        ("header", r"model\.safetensors: cannot be read as safetensors"),
        ("quantized", r"got torch\.int8, expected one of torch\.float32"),
        ("pickled", r"pytorch_model\.bin: got pickled weights"),
        ("link", r"model\.safetensors: got a link to .*elsewhere"),
        ("deep", r"config\.json: cannot be read"),
        ("long", r"config\.json: cannot be read .*expected at most 10,000,000"),
        ("index", r"model\.extra\.weight is only in this file or only in"),
        ("index outside", r"index\.json: cannot be read as a safetensors index"),
        ({"num_hidden_layers": 10**7}, r"number of layers: got 10000000, expected 1 to 10,000"),
        ({"num_hidden_layers": 9_999}, r"number of layers: got 9,999 in config\.json, expected the 3 of the weights"),
        ({"num_hidden_layers": "3"}, r"number of layers: got '3'"),
        ({"max_position_embeddings": 10**12}, r"number of positions: got 1000000000000"),
        ({"hidden_size": 10**30}, r"hidden_size|impossible sizes"),
        ({"hidden_size": 4 * 10**12, "head_dim": 8}, r"impossible sizes|got \(.*\), expected"),
        ({"num_attention_heads": 10**9, "head_dim": 8}, r"got \(.*\), expected"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, r"rope_scaling\.factor"),
        ({"rope_parameters": [1]}, r"rope_parameters: got \[1\], expected a table"),
        (
            {"architectures": ["Evil"], "model_type": ["llama"]},
            r"model_type: got \['llama'\], expected an architecture",
        ),
        ({"rms_norm_eps": float("nan")}, r"norm_eps"),
    ],
    ids=str,
)
def test_a_directory_that_lies_is_refused_by_name_in_time(directory, tmp_path, kind, message):
    lie(directory, kind)
    start = time.monotonic()
    with pytest.raises(LilpipeError, match=message):
        imported(tmp_path, path=str(directory))
    assert time.monotonic() - start < 30
    assert not (tmp_path / "work" / "output" / "model.safetensors").exists()


def test_a_link_out_of_the_directory_is_refused_before_anything_runs(directory):
    lie(directory, "link")
    with pytest.raises(DataError, match=r"import_model\.path: .*got a link to"):
        sources.digests(ImportModelConfig(path=str(directory)))


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not start with a GGUF header"),
        (b"\x80\x04" + 40 * b"x", "does not start with a GGUF header"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "GGUF version: got 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**50, 1), "tensors and 1 settings, expected"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "header with 0 tensors"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.gguf: got a|GGUF version: got 9"):
        check_gguf(tmp_path / "x.gguf")
    with pytest.raises(ArtifactError, match=message):
        check_gguf(tmp_path / "x.gguf")


def test_a_damaged_gguf_is_refused_by_name(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + os.urandom(100))
    with pytest.raises(ArtifactError, match=r"x\.gguf: cannot be converted from GGUF"):
        imported(tmp_path, path=str(tmp_path / "x.gguf"))


def test_a_missing_gguf_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match=r"import_model\.path: .*no such file"):
        sources.digests(ImportModelConfig(path=str(tmp_path / "x.gguf")))


def test_the_command_takes_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setenv("LILPIPE_STORE", str(tmp_path / "store"))
    result = CliRunner().invoke(app, ["import", "me/tiny", "--revision", "main"])
    assert result.exit_code == 0, result.output
    assert "repo_id = 'me/tiny', revision = 'main'" in result.output
