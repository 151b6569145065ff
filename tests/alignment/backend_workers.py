"""Run under torchrun on two workers: stages that train a class of transformers, replicated and sharded."""

import sys
from pathlib import Path

import torch

from lilpipe import distributed
from tests.alignment.finetune_workers import LAYOUTS, run

CASES = [(stage, layout) for stage in ("sft", "dpo", "grpo") for layout in ("replicas", "sharded")]


def main(root):
    torch.set_num_threads(1)
    distributed.init()
    for stage, layout in CASES:
        run(stage, root, layout, LAYOUTS[layout], num_workers=2)
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
