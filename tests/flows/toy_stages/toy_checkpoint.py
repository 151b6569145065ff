"""Trains nothing for ten steps, from its checkpoint on; fails after step 5 while a file says so."""

import json
import os
import time
from pathlib import Path

from lilpipe.errors import DataError

NUM_STEPS = 10


def train(name, config, workspace):
    checkpoint = workspace.scratch / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "loss": 8.0}
    workspace.log(f"{name}: starts at step {state['step']}")
    trouble = Path(os.environ.get("TOY_TROUBLE", "/nonexistent"))
    while state["step"] < NUM_STEPS:
        state = {"step": state["step"] + 1, "loss": state["loss"] * 0.5}
        checkpoint.write_text(json.dumps(state))
        workspace.progress(state["step"], NUM_STEPS, loss=state["loss"])
        if state["step"] == 5 and (trouble / name).exists():
            raise RuntimeError("injected failure")
        if (trouble / f"{name}-bad-data").exists():
            raise DataError("docs.jsonl: no documents; name another file")
        while (trouble / f"{name}-hangs").exists():
            time.sleep(0.05)
    (workspace.output / "model.txt").write_text(f"seed {getattr(config, 'seed', None)}, loss {state['loss']}\n")
    return {"loss": state["loss"]}
