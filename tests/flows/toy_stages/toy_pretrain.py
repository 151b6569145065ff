from toy_checkpoint import train

from lilpipe.config.training import PretrainConfig
from lilpipe.stage import Stage


def run(config, inputs, workspace):
    return train("pretrain", config, workspace)


STAGE = Stage("pretrain", "Checkpoint", PretrainConfig, run, {"corpus": "Corpus"}, main_metric="loss")
