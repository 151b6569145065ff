"""The executors' contract, on local processes; ``test_slurm`` and ``test_ray`` hold clusters to the same."""

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data.executors.executor import open_executor
from lilpipe.errors import DataError
from tests.data.executors.task_steps import NUM_TASKS, num_starts, output, run
from tests.data.prose import prose

WORKERS = pytest.mark.parametrize("num_workers", [1, 2])


@WORKERS
def test_every_task_runs_once_on_a_fresh_copy_of_the_steps(tmp_path, num_workers):
    with open_executor(CorpusConfig(num_workers=num_workers)) as run_tasks:
        told = run(run_tasks, tmp_path)
    assert told == [0, 1, 2, 3]
    lines = {f"{rank}.txt": "".join(f"1 {i} {prose(i, 5)}\n" for i in range(rank, 12, 3)) for rank in range(3)}
    assert output(tmp_path) == {name: text.encode() for name, text in lines.items()}
    assert num_starts(tmp_path) == [1] * NUM_TASKS


@WORKERS
def test_what_is_done_is_not_done_again(tmp_path, num_workers):
    config = CorpusConfig(num_workers=num_workers)
    with open_executor(config) as run_tasks, pytest.raises(DataError, match="field: got that"):
        run(run_tasks, tmp_path, fault="data", fault_rank=2)
    with open_executor(config) as run_tasks:
        assert run(run_tasks, tmp_path)[-2:] == [2, 3]
        assert run(run_tasks, tmp_path) == [3]
    assert num_starts(tmp_path)[2] == 2
    assert len(output(tmp_path)) == NUM_TASKS


def test_a_killed_process_is_an_error_and_no_endless_wait(tmp_path):
    config = CorpusConfig(num_workers=2)
    with open_executor(config) as run_tasks, pytest.raises(BrokenProcessPool):
        run(run_tasks, tmp_path, fault="kill", fault_rank=1)
    with open_executor(config) as run_tasks:
        run(run_tasks, tmp_path)
    assert len(output(tmp_path)) == NUM_TASKS


def test_no_thread_of_pythons_runs_where_workers_are_forked_from():
    code = "import lilpipe.data.corpus, threading; print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
