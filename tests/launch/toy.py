"""A stage of several workers that fails on order: it adds up numbers, saves after each step, and goes on from there."""

import json
import os
import signal
import time

from lilpipe import distributed
from lilpipe.artifact import write_atomically
from lilpipe.config.parallel import LaunchConfig
from lilpipe.config.section import Section
from lilpipe.errors import DataError
from lilpipe.launch.run_stage import launch
from lilpipe.stage import Stage

NUM_STEPS = 20


class ToyConfig(Section):
    num_workers: int = 2
    fault: str = ""
    fault_rank: int = 1
    fault_step: int = 5
    once: bool = True
    launch: LaunchConfig = LaunchConfig()


def expected(num_workers=2):
    """What the stage comes to, however often it is interrupted."""
    total = 0.0
    for step in range(NUM_STEPS):
        total = total / 2 + sum(rank + step for rank in range(num_workers))
    return total


def run(config, inputs, workspace):
    rank = distributed.rank()
    state = workspace.scratch / "state.json"
    first, total = json.loads(state.read_text()) if state.exists() else (0, 0.0)
    distributed.barrier()
    with distributed.honours_stop():
        for step in range(first, NUM_STEPS):
            distributed.heartbeat(step, "data")
            if (rank, step) == (config.fault_rank, config.fault_step):
                fail(config, workspace)
            distributed.heartbeat(step, "sum")
            part, stop = distributed.sum_floats([float(rank + step), float(distributed.stop_requested())])
            total = total / 2 + part
            if distributed.is_main():
                write_atomically(state, json.dumps([step + 1, total]))
            workspace.progress(step + 1, NUM_STEPS, sum=total)
            if stop:
                distributed.barrier()
                raise distributed.Preempted(f"pre-empted after step {step + 1}; saved")
    (workspace.output / f"rank{rank}").touch()
    return {"total": total, "first": float(first)}


def fail(config, workspace):
    happened = workspace.scratch / "happened"
    if config.once and happened.exists():
        return
    happened.touch()
    print("about to fail", flush=True)
    if config.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif config.fault == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif config.fault == "data":
        raise DataError("field: got that, expected this")
    elif config.fault == "bug":
        raise KeyError("a planted bug")
    elif config.fault == "slow":
        time.sleep(5)
    elif config.fault == "hang":
        time.sleep(600)


STAGE = Stage("toy", output="Report", config=ToyConfig, run=run, distributed=True)


def launch_toy(work, *, on_event=None, settings=None, **fields):
    """The metrics of the stage; ``settings`` are those of ``launch``."""
    work.mkdir(parents=True, exist_ok=True)
    config = ToyConfig(launch=LaunchConfig.model_validate(settings or {}), **fields)
    return launch(STAGE, config, {}, work, on_event=on_event or (lambda event: None))


def messages(work):
    """What the stage's events say to people."""
    events = [json.loads(line) for line in (work / "events.jsonl").read_text().splitlines()]
    return [event["message"] for event in events if "message" in event]
