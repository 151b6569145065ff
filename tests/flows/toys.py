"""The toy pipeline of the tests that go through Prefect and MLflow: corpus, pretrain, sft, register."""

from pathlib import Path

from lilpipe import stage
from lilpipe.recipes import load

FOLDER = Path(__file__).parent / "toy_stages"
CONFIG = FOLDER / "toy.toml"
NAMES = ("corpus", "pretrain", "sft", "register")


def install(monkeypatch, trouble):
    """Put the toy stages in the place of the real ones, here and in the processes started from here.

    ``trouble`` is the folder whose files make a stage fail (`sft`) or hang (`sft-hangs`).
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    monkeypatch.setenv("TOY_TROUBLE", str(trouble))
    for name in NAMES:
        monkeypatch.setitem(stage.STAGES, name, f"toy_{name}")


def toy_config(**overrides):
    return load("tiny", file=CONFIG, overrides=overrides)
