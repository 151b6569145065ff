import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pandas
import pytest
import torch
from huggingface_hub import ModelCard

from lilpipe.artifact import MANIFEST, Artifact, content_digest, list_files
from lilpipe.config.evaluate import RegisterConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.generation.protocol import RequestError
from lilpipe.locate import locate
from lilpipe.model import register
from lilpipe.model.hub import load_model, model_files, save_model
from lilpipe.stage import Workspace, get_stage
from lilpipe.store import Store
from lilpipe.tracking import MLflowTracker, registered_files
from tests.artifacts import make_manifest
from tests.model.checkpoints import SMALL, small_model, small_tokenizer


def artifact(directory, *, kind, stage):
    manifest = make_manifest(kind=kind, stage=stage, config={"num_steps": 7}, files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json())
    return Artifact(str(directory), directory, manifest)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "trained"
    save_model(small_model(), small_tokenizer(), directory)
    (directory / "report").mkdir()
    (directory / "report" / "report.html").write_text("curves")
    return artifact(directory, kind="Checkpoint", stage="grpo")


@pytest.fixture
def report(tmp_path):
    directory = tmp_path / "evaluated"
    directory.mkdir()
    metrics = {"grpo": {"greedy": 0.875, "pass_at_8": 0.9}, "note": "validation", "sound": True}
    (directory / "metrics.json").write_text(json.dumps(metrics))
    return artifact(directory, kind="Report", stage="evaluate")


def run(tmp_path, name="work", **inputs):
    workspace = Workspace(tmp_path / name)
    return workspace, register.run(RegisterConfig(), inputs, workspace)


def test_the_released_model_is_the_trained_one_with_a_card(tmp_path, source, report):
    workspace, metrics = run(tmp_path, model=source, report=report)
    assert {path.name for path in workspace.output.iterdir()} == {*model_files(source.path), "README.md"}
    for name in model_files(source.path):
        assert digest_file(workspace.output / name) == digest_file(source.path / name)
    assert metrics == {"num_parameters": sum(p.numel() for p in small_model().parameters())}


def test_the_card_says_what_it_is_how_good_and_how_to_load_it(tmp_path, source, report):
    workspace, metrics = run(tmp_path, model=source, report=report)
    card = (workspace.output / "README.md").read_text()
    assert f"{int(metrics['num_parameters']):,}" in card
    assert "| grpo.greedy | 0.875 |" in card
    assert "sound" not in card
    assert source.content_digest in card
    assert '"num_steps": 7' in card
    assert "`grpo`" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert str(tmp_path) not in card


ORIGIN = {"repo_id": "me/tiny", "commit": "0123", "license": "apache-2.0", "base_model": ["some/base"]}


@pytest.mark.parametrize(
    ("origin", "base"),
    [(ORIGIN, "me/tiny"), ({"license": "apache-2.0", "base_model": ["some/base"]}, ["some/base"])],
)
def test_the_card_has_license_and_base_of_an_imported_model(tmp_path, source, origin, base):
    (source.path / "origin.json").write_text(json.dumps(origin))
    workspace, _ = run(tmp_path, model=source)
    card = ModelCard.load(workspace.output / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": base,
    }
    assert "started from an imported model" in card.text
    assert "its base model `some/base`" in card.text
    assert json.loads((workspace.output / "origin.json").read_text()) == origin


def test_the_cards_code_runs_as_written(tmp_path, source):
    workspace, _ = run(tmp_path, model=source)
    code = re.search(r"```python\n(.*?)```", (workspace.output / "README.md").read_text(), re.DOTALL)
    assert code
    exec(code[1].replace("PATH", str(workspace.output)), {})


def test_what_transformers_cannot_load_the_card_does_not_offer_to_it(tmp_path):
    save_model(small_model(SMALL.model_copy(update={"logit_softcap": 30.0})), small_tokenizer(), tmp_path / "bent")
    workspace, _ = run(tmp_path, model=artifact(tmp_path / "bent", kind="Checkpoint", stage="grpo"))
    card = (workspace.output / "README.md").read_text()
    assert "lilpipe alone loads it" in card
    assert "AutoModelForCausalLM" not in card


def test_without_a_report_the_card_says_so(tmp_path, source):
    workspace, _ = run(tmp_path, model=source)
    assert "It has not been evaluated." in (workspace.output / "README.md").read_text()


def test_a_killed_run_leaves_nothing_behind_and_equal_runs_give_equal_bytes(tmp_path, source, report):
    first, _ = run(tmp_path, "first", model=source, report=report)
    killed = Workspace(tmp_path / "killed")
    (killed.output / ".config.json.1.tmp").write_text("{")
    (killed.output / "model.safetensors").write_bytes(b"half")
    register.run(RegisterConfig(), {"model": source, "report": report}, killed)
    assert content_digest(list_files(first.output)) == content_digest(list_files(killed.output))


def test_a_damaged_copy_is_refused(tmp_path, source, monkeypatch):
    def copy_wrongly(origin, target):
        if target.name == "model.safetensors":
            save_model(small_model(seed=1), small_tokenizer(), target.parent)
        else:
            target.write_bytes(origin.read_bytes())

    monkeypatch.setattr(register.shutil, "copyfile", copy_wrongly)
    with pytest.raises(ArtifactError, match="logits differ from those of the input model by"):
        run(tmp_path, model=source)


def test_a_model_that_has_diverged_is_not_released(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    save_model(model, small_tokenizer(), tmp_path / "diverged")
    with pytest.raises(ArtifactError, match="not finite"):
        run(tmp_path, model=artifact(tmp_path / "diverged", kind="Checkpoint", stage="grpo"))


def test_the_verification_text_round_trips_through_any_byte_level_tokenizer(source):
    _, tokenizer = load_model(source.path)
    assert tokenizer.decode(tokenizer.encode(register.SAMPLE_TEXT)) == register.SAMPLE_TEXT


def test_the_stage_is_found_by_name():
    stage = get_stage("register")
    assert stage is register.STAGE
    assert stage.output == "Checkpoint"


# --- the registered model answers ---------------------------------------------------------------------------------


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A folder whose MLflow database holds a registered model."""
    folder = tmp_path_factory.mktemp("registry")
    save_model(small_model(), small_tokenizer(), folder / "released")
    (folder / "released" / "origin.json").write_text(json.dumps(ORIGIN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tracker = MLflowTracker(PipelineConfig(recipe="tiny"), pipeline_run="run", store=Store(str(folder / "store")))
        released = artifact(folder / "released", kind="Checkpoint", stage="register")
        tracker.stage_finished("register", released, cached=False, seconds=1.0)
        tracker.close()
        yield folder


@pytest.fixture(scope="module")
def loaded(registered):
    import mlflow

    return mlflow.pyfunc.load_model("models:/lilpipe@champion")


def test_the_registered_model_answers_openais_requests(loaded):
    answer = loaded.predict(CHAT)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == 5
    assert loaded.predict(CHAT)["choices"] == answer["choices"]
    several = loaded.predict({"prompt": "the", "n": 3, "temperature": 1, "seed": 0})
    assert len({choice["text"] for choice in several["choices"]}) == 3


def test_the_registered_model_answers_each_row_of_a_table(loaded):
    (text,) = [choice["message"]["content"] for choice in loaded.predict({**CHAT, "max_tokens": 40})["choices"]]
    continued = loaded.predict({"prompt": "the"})["choices"][0]["text"]
    rows = [{**CHAT, "max_tokens": 40}, {"prompt": "the"}]
    assert loaded.predict(rows) == [text, continued]
    assert loaded.predict(pandas.DataFrame({"prompt": ["the"]})) == [continued]
    gap = pandas.DataFrame({"prompt": ["the", "the"], "max_tokens": [3, None]})  # pandas makes 3.0 and NaN of them
    assert len(loaded.predict(gap)) == 2
    questions = loaded.predict(pandas.DataFrame({"question": ["hi", "the"]}))
    assert questions == loaded.predict(["hi", "the"])
    assert loaded.predict("hi") == questions[:1]
    assert questions[0].startswith(text)


def test_a_request_that_cannot_be_answered_is_refused_by_name(loaded):
    with pytest.raises(RequestError, match="stream: got true"):
        loaded.predict({**CHAT, "stream": True})
    with pytest.raises(RequestError, match="temprature"):
        loaded.predict({**CHAT, "temprature": 1})


def test_the_registered_model_is_the_released_files_and_a_pointer_to_this_package(registered):
    directory = registered_files("models:/lilpipe@champion")
    released = {path.name for path in (registered / "released").iterdir()}
    assert {path.name for path in directory.iterdir()} == {*released, "MLmodel", "registered_model_meta"}
    assert "lilpipe.generation.pyfunc" in (directory / "MLmodel").read_text()


def test_the_version_has_license_and_base_model_as_tags(registered):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{registered / 'mlflow.db'}")
    tags = client.get_model_version_by_alias("lilpipe", "champion").tags
    assert (tags["license"], tags["base_model"]) == ("apache-2.0", "me/tiny")


def test_a_registered_model_is_found_by_its_name_and_another_is_not(registered):
    config, store = PipelineConfig(recipe="tiny"), Store(str(registered / "store"))
    name, directory = locate("models:/lilpipe@champion", config, store)
    assert name == "lilpipe@champion"
    assert load_model(directory)[1].digest == small_tokenizer().digest
    assert locate(str(directory), config, store)[0] == "register"
    with pytest.raises(ArtifactError, match="models:/lilpipe@absent"):
        locate("models:/lilpipe@absent", config, store)
    with pytest.raises(ConfigError, match="'absent': there is no such checkpoint"):
        locate("absent", config, store)


@pytest.mark.slow
def test_mlflow_serves_the_registered_model(registered, loaded):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["-m", "models:/lilpipe@champion", "--host", "127.0.0.1", "--port", str(port), "--env-manager", "local"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", *where]
    # It looks for uvicorn on the path, as in an activated environment.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment, cwd=registered, start_new_session=True) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                until_up(client, process)
                chatted = client.post("/invocations", json=CHAT)
                rows = client.post("/invocations", json={"inputs": ["hi", "the"]})
                refused = client.post("/invocations", json={**CHAT, "temperature": 3})
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    assert chatted.json()["choices"] == loaded.predict(CHAT)["choices"]
    assert rows.json() == {"predictions": loaded.predict(["hi", "the"])}
    assert (refused.status_code, "temperature: got 3" in refused.text) == (400, True)


def until_up(client, process):
    for _ in range(600):
        assert process.poll() is None, "mlflow models serve has ended"
        try:
            if client.get("/ping").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("mlflow models serve does not come up")
