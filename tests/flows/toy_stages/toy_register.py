import os
from pathlib import Path

from lilpipe.config import RegisterConfig
from lilpipe.stage import Stage


def run(config, inputs, workspace):
    if (Path(os.environ.get("TOY_TROUBLE", "/nonexistent")) / "register").exists():
        raise RuntimeError("injected failure")
    (workspace.output / "model.txt").write_bytes((inputs["model"].path / "model.txt").read_bytes())
    return {}


STAGE = Stage("register", "Checkpoint", RegisterConfig, run, {"model": "Checkpoint"})
