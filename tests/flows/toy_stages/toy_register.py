from toy_checkpoint import train

from lilpipe.config.evaluate import RegisterConfig
from lilpipe.stage import Stage


def run(config, inputs, workspace):
    train("register", config, workspace)
    (workspace.output / "model.txt").write_bytes((inputs["model"].path / "model.txt").read_bytes())
    return {}


STAGE = Stage("register", "Checkpoint", RegisterConfig, run, {"model": "Checkpoint"})
