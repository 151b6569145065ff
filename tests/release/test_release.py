"""Stage ``release``: the directory, GGUF files, and the upload to a stand-in for the hub's API."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from lilpipe.artifact import MANIFEST, Artifact, list_files
from lilpipe.config.release import HubConfig, ReleaseConfig
from lilpipe.errors import ConfigError, LilpipeError
from lilpipe.model.hub import load_model, save_model
from lilpipe.release.release import STAGE
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.artifacts import make_manifest
from tests.model.checkpoints import small_model, small_tokenizer
from tests.model.published import publish


def tokenizer():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    return BytePairTokenizer(ranks, "llama3")


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "trained"
    tokens = tokenizer()
    save_model(small_model(vocab_size=tokens.vocab_size), tokens, directory)
    manifest = make_manifest(kind="Checkpoint", stage="grpo", files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json())
    return Artifact(str(directory), directory, manifest)


def release(tmp_path, source, **settings):
    workspace = Workspace(tmp_path / "work")
    return workspace, STAGE.run(ReleaseConfig(**settings), {"model": source}, workspace)


def test_the_directory_loads_in_transformers_with_the_same_logits(tmp_path, source):
    workspace, metrics = release(tmp_path, source, dtype="float32")
    expected, _ = load_model(source.path)
    loaded = AutoModelForCausalLM.from_pretrained(workspace.output)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, expected(ids), rtol=1e-5, atol=1e-4)
    assert metrics["weights_bytes"] > 4 * metrics["num_parameters"]
    assert (workspace.output / "README.md").exists()
    assert not (workspace.output / "gguf").exists()


def test_weights_are_bfloat16_by_default(tmp_path, source):
    workspace, _ = release(tmp_path, source)
    loaded, _ = load_model(workspace.output)
    expected, _ = load_model(source.path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name


def test_the_record_of_an_imported_model_is_in_the_card_and_beside_it(tmp_path, source):
    (source.path / "origin.json").write_text(json.dumps({"repo_id": "me/tiny", "license": "mit"}))
    workspace, _ = release(tmp_path, source)
    card = ModelCard.load(workspace.output / "README.md")
    assert (card.data["license"], card.data["base_model"]) == ("mit", "me/tiny")
    assert (workspace.output / "origin.json").read_bytes() == (source.path / "origin.json").read_bytes()


def test_gguf_files_and_a_modelfile(tmp_path, source):
    workspace, metrics = release(tmp_path, source, gguf=("F16", "Q8_0"), name="mine", dtype="float32")
    names = sorted(path.name for path in (workspace.output / "gguf").iterdir())
    assert names == ["Modelfile", "mine-F16.gguf", "mine-Q8_0.gguf"]
    content = (workspace.output / "gguf" / "Modelfile").read_text()
    assert content.startswith("FROM ./mine-F16.gguf\nTEMPLATE")
    assert 'PARAMETER stop "<|end_of_turn|>"' in content
    assert 0 < metrics["gguf_bytes/Q8_0"] < metrics["gguf_bytes/F16"]


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_before_anything_is_written(tmp_path, source):
    small_tokenizer().save(source.path)
    with pytest.raises(ConfigError, match=r"release\.gguf: got the pre-tokenizer"):
        release(tmp_path, source, gguf=("F16",))
    assert not list((tmp_path / "work" / "output").iterdir())


def test_the_adapter_is_kept_apart(tmp_path, source):
    (source.path / "adapter").mkdir()
    (source.path / "adapter" / "adapter_config.json").write_text("{}")
    workspace, _ = release(tmp_path, source)
    assert (workspace.output / "adapter" / "adapter_config.json").read_text() == "{}"


# --- hub ----------------------------------------------------------------------------------------------------------


class HubServer(ThreadingHTTPServer):
    """Keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.created, self.files = [], {}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that an upload of small files uses."""

    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer right":
            self.answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "team", "type": "user"})
        else:
            self.answer({"id": "team/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.address()}/team/model", "name": "team/model", "id": "team/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                for item in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitUrl": f"{self.address()}/team/model/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            )
        else:
            self.answer({})

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield server
    server.shutdown()


def hub_config(server):
    return HubConfig(repo_id="team/model", endpoint=f"http://127.0.0.1:{server.server_port}")


def test_upload_sends_every_file_to_a_private_repository(tmp_path, source, hub):
    workspace, _ = release(tmp_path, source, hub=hub_config(hub))
    expected = {str(path.relative_to(workspace.output)) for path in workspace.output.rglob("*") if path.is_file()}
    assert hub.files.keys() == expected
    assert hub.files["config.json"] == (workspace.output / "config.json").read_bytes()
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private"
    assert "right" not in workspace.events.read_text()


def test_a_rejected_token_is_an_error_before_anything_is_written(tmp_path, source, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ConfigError, match=r"release\.hub: the hub rejected the token in HF_TOKEN \(HTTP 401\)"):
        release(tmp_path, source, hub=hub_config(hub))
    assert not list((tmp_path / "work" / "output").iterdir())


def test_no_token(tmp_path, source, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="HF_TOKEN is not set"):
        release(tmp_path, source, hub=hub_config(hub))


def test_offline(tmp_path, source, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is 1, expected 0"):
        release(tmp_path, source, hub=hub_config(hub))


def test_a_hub_that_is_down_is_retryable(tmp_path, source, hub):
    config = HubConfig(repo_id="team/model", endpoint="http://127.0.0.1:9")
    with pytest.raises(Exception, match="refused") as raised:
        release(tmp_path, source, hub=config)
    assert not isinstance(raised.value, LilpipeError)


def test_a_model_of_transformers_is_released_but_not_as_gguf(tmp_path):
    theirs = publish("mamba", tmp_path / "trained", tokenizer=tokenizer())
    manifest = make_manifest(kind="Checkpoint", stage="grpo", files=list_files(tmp_path / "trained"))
    (tmp_path / "trained" / MANIFEST).write_text(manifest.to_json())
    source = Artifact(str(tmp_path / "trained"), tmp_path / "trained", manifest)
    workspace, metrics = release(tmp_path, source, dtype="float32")
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(workspace.output)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert metrics["num_parameters"] == theirs.num_parameters()
    assert "MambaForCausalLM" in (workspace.output / "README.md").read_text()
    with pytest.raises(ConfigError, match="got a model of type 'mamba', expected one of"):
        release(tmp_path, source, gguf=("F16",))
