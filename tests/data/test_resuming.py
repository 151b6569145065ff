"""A corpus stage that other workers do, or that ends anywhere and goes on, ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from lilpipe.artifact import list_files
from lilpipe.data import corpus
from lilpipe.data.work import PERCENT, Work

from . import planted
from .planted import FEW_BANDS, build, events_of, no_report


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 12_000)
    monkeypatch.setattr(corpus, "build_report", no_report)


def files_of(workspace):
    """Digests of what is content; the report, which costs more to draw than the rest, is tested elsewhere."""
    files = list_files(workspace.output).items()
    return {name: entry.sha256 for name, entry in files if not name.startswith("report/")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of every filter over planted documents that nothing interrupts: folder, inputs, metrics, files."""
    folder = tmp_path_factory.mktemp("whole")
    _, prompts = planted.write_sources(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", 12_000)
        patch.setattr(corpus, "build_report", no_report)
        metrics, workspace = build(planted.settings(folder, **FEW_BANDS), folder / "work", prompts=prompts)
    return folder, prompts, metrics, files_of(workspace)


def test_two_workers_give_the_bytes_of_one(whole):
    folder, prompts, metrics, files = whole
    config = planted.settings(folder, num_workers=2, **FEW_BANDS)
    again, other = build(config, folder / "two workers", prompts=prompts)
    assert files_of(other) == files
    assert again == metrics


STEPS = ("read", "survey", "common n-grams", "shared lines", "addresses", "filter", "match", "write")


def test_a_run_that_ends_in_every_step_once_goes_on_each_time_and_ends_in_the_same_bytes(whole):
    folder, prompts, metrics, files = whole
    config, root, never_broken = planted.settings(folder, **FEW_BANDS), folder / "broken", Work.run
    started: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    broken: set[str] = set()

    def run(self, name, step, num_tasks):
        """Do the step, but for the first time end after the task in the middle, before that is marked as done."""
        real, sizes[name] = type(step).run, num_tasks

        def counted(step, data=None, rank=0, world_size=1):
            started[name] += 1
            real(step, data, rank, world_size)
            if name not in broken and rank == num_tasks // 2:
                broken.add(name)
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(step), "run", counted)
            never_broken(self, name, step, num_tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "run", run)
        for _ in STEPS:
            with pytest.raises(KeyboardInterrupt):
                build(config, root, prompts=prompts)
        again, resumed = build(config, root, prompts=prompts)
    assert broken == set(sizes) == set(STEPS)
    assert files_of(resumed) == files
    assert again == metrics
    assert started == {name: num_tasks + 1 for name, num_tasks in sizes.items()}  # the one in the middle twice


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_ends_in_the_middle_of_writing_again_and_again_ends_in_the_same_bytes(whole, seed):
    folder, prompts, metrics, files = whole
    config, root, draw = planted.settings(folder, **FEW_BANDS), folder / f"broken {seed}", random.Random(seed)
    real, calls = os.fsync, [0]

    def fails(descriptor):
        """What is written is flushed before it gets its name."""
        calls[0] -= 1
        if not calls[0]:
            raise KeyboardInterrupt
        real(descriptor)

    num_failed = 0
    for _ in range(5):
        with pytest.MonkeyPatch.context() as patch:
            calls[0] = draw.randrange(1, 50)
            patch.setattr(os, "fsync", fails)
            try:
                build(config, root, prompts=prompts)
            except KeyboardInterrupt:
                num_failed += 1
    assert num_failed > 2
    again, resumed = build(config, root, prompts=prompts)
    for leftover in resumed.output.rglob(".*.tmp"):  # as the worker does when it starts
        leftover.unlink()
    assert files_of(resumed) == files
    assert again == metrics


KILLED = """
import sys
from pathlib import Path
from lilpipe.data import corpus
from lilpipe.stage import Workspace
from tests.artifacts import artifact
from tests.data import planted
folder, root = map(Path, sys.argv[1:])
corpus.SHARD_BYTES = 12_000
config = planted.settings(folder, num_workers=2, minhash={"num_buckets": 8})
corpus.run(config, {"prompts": artifact(folder / "prompts")}, Workspace(root))
"""


def test_a_process_that_is_killed_with_its_workers_at_work_is_gone_on_with(whole):
    folder, prompts, metrics, files = whole
    root = folder / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(root)], cwd=Path(__file__).parents[2])
    while process.poll() is None and not any(event["done"] >= PERCENT["filter"][0] for event in events_of(root)):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # none goes on writing beside the next try
    again, resumed = build(planted.settings(folder, **FEW_BANDS), root, prompts=prompts)
    assert files_of(resumed) == files
    assert again == metrics
