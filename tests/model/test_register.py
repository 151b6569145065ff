import json
import re

import pytest
import torch

from lilpipe.artifact import MANIFEST, Artifact, Manifest, content_digest, digest_file, list_files
from lilpipe.config import RegisterConfig
from lilpipe.errors import ArtifactError
from lilpipe.model import register
from lilpipe.model.hub import load_model, model_files, save_model
from lilpipe.stage import Workspace, get_stage
from tests.model.checkpoints import SMALL, small_model, small_tokenizer


def artifact(directory, *, kind, stage):
    files = list_files(directory)
    manifest = Manifest(
        kind=kind,
        stage=stage,
        step=stage,
        fingerprint="f" * 64,
        config={"num_steps": 7},
        operational={},
        inputs={},
        external={},
        code={},
        packages={},
        git_commit=None,
        environment={},
        files=files,
        content_digest=content_digest(files),
        metrics={},
        elapsed_seconds=1.0,
        created_at="2026-01-01T00:00:00Z",
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json())
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
    metrics = {"grpo": {"greedy": 0.875, "pass_at_8": 0.9}, "note": "dev", "sound": True}
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
    with pytest.raises(ArtifactError, match="logits differ from the input's by"):
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
