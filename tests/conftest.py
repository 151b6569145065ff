import pytest
from hypothesis import settings

from lilpipe import stage
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.store import Store

# The same examples on every machine; `pytest --hypothesis-profile default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The folder through which faults are planted in the toy stages; they stand in for two real ones."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("LILPIPE_TOY", str(folder))
    monkeypatch.setitem(stage.STAGES, "prompts", "tests.toy")
    monkeypatch.setitem(stage.STAGES, "tokenizer", "tests.toy_reader")
    return folder


def toy_config(**settings):
    """Two steps: `first` writes, `second` reads it."""
    steps = {"first": {"stage": "prompts"}, "second": {"stage": "tokenizer", "inputs": {"prompts": "first"}}}
    return PipelineConfig.model_validate({"recipe": "toy", "steps": steps, **settings})
