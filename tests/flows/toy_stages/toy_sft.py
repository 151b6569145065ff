from toy_checkpoint import train

from lilpipe.config.sft import SFTConfig
from lilpipe.stage import Stage


def run(config, inputs, workspace):
    return train("sft", config, workspace)


STAGE = Stage("sft", "Checkpoint", SFTConfig, run, {"model": "Checkpoint"}, main_metric="loss")
