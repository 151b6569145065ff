"""A stage for tests of the contract: it takes the place of `prompts` and does as its settings say.

``seed`` is what it writes. Faults are planted by files whose folder ``LILPIPE_TOY`` names: ``fail`` raises a bug,
``bad-data`` what the user can mend, ``disk-full`` an ENOSPC, ``kill`` SIGKILLs the process half way, ``hang`` waits.
Each is read once a run, and the count of runs is kept in ``runs``.
"""

import errno
import os
import signal
import time
from pathlib import Path

from lilpipe.config.prompts import PromptsConfig
from lilpipe.errors import DataError
from lilpipe.stage import Stage, Workspace


def run(config: PromptsConfig, inputs: object, workspace: Workspace) -> dict[str, float]:
    faults = Path(os.environ["LILPIPE_TOY"])
    with (faults / "runs").open("a") as file:
        file.write("x")
    first_half = workspace.scratch / "half"
    if not first_half.exists():
        first_half.write_text(f"half {config.seed}")
        with (faults / "first-halves").open("a") as file:
            file.write("x")
    workspace.progress(1, 2, loss=2.0)
    if (faults / "fail").exists():
        raise RuntimeError("a planted bug")
    if (faults / "bad-data").exists():
        raise DataError("docs.jsonl: no documents; name another file")
    if (faults / "disk-full").exists():
        raise OSError(errno.ENOSPC, "No space left on device", str(workspace.output / "data"))
    if (faults / "kill").exists():
        (workspace.output / ".data.1.tmp").write_text("half a write")
        os.kill(os.getpid(), signal.SIGKILL)
    while (faults / "hang").exists():
        time.sleep(0.05)
    (workspace.output / "data").write_text(first_half.read_text() + f", whole, {config.num_validation}")
    workspace.report.mkdir(parents=True, exist_ok=True)
    (workspace.report / "report.html").write_text(f"at {time.time()}")
    workspace.progress(2, 2, loss=1.0)
    return {"loss": 1.0}


STAGE = Stage(name="prompts", output="Prompts", config=PromptsConfig, run=run, main_metric="loss")
