"""A small pipeline for the tests of the executors: it writes lines, and fails as the test has asked for."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from lilpipe.artifact import list_files
from lilpipe.config.corpus import CorpusConfig
from lilpipe.data import corpus
from lilpipe.errors import DataError
from lilpipe.stage import Workspace
from tests.data.prose import prose, write_jsonl

NUM_TASKS = 3


class Proses(PipelineStep):
    """Makes the documents of a rank."""

    def run(self, data=None, rank=0, world_size=1):
        for i in range(rank, 12, world_size):
            yield Document(text=prose(i, 5), id=str(i))


class WriteLines(PipelineStep):
    """Writes a file for each rank. `fault` makes one rank fail: each time that it runs, or, with `once`, the first."""

    def __init__(self, folder, fault="", fault_rank=0, once=True):
        super().__init__()
        self.folder, self.fault, self.fault_rank, self.once = folder, fault, fault_rank, once
        self.num_calls = 0

    def run(self, data, rank=0, world_size=1):
        self.num_calls += 1
        starts, ends = self.folder / f"{rank}.starts", self.folder / f"{rank}.ends"
        before, ended = _pids(starts), _pids(ends)
        if any(_is_alive(pid) for pid in before - ended):
            (self.folder / "overlap").touch()
        _append(starts, os.getpid())
        try:
            if rank == self.fault_rank and not (before and self.once):
                self._fail()
            lines = [f"{self.num_calls} {document.id} {document.text}\n" for document in data]
            (self.folder / f"{rank}.txt").write_text("".join(lines))
        finally:
            _append(ends, os.getpid())

    def _fail(self):
        if self.fault == "kill":
            print("about to be killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "data":
            raise DataError("field: got that, expected this")
        elif self.fault == "bug":
            raise KeyError("a bug of ours")
        elif self.fault == "disk":
            raise OSError(28, "No space left on device", "there")
        elif self.fault == "block":
            time.sleep(120)


def _pids(path):
    return Counter(map(int, path.read_text().split()) if path.exists() else ())


def _append(path, pid):
    with path.open("a") as file:
        file.write(f"{pid}\n")


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(run_tasks, folder, *, num_tasks=NUM_TASKS, **fault):
    """Run the pipeline; returns what `on_done` was told."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    told = []
    pipeline = [Proses(), WriteLines(folder / "out", **fault)]
    run_tasks(pipeline, num_tasks=num_tasks, folder=folder / "log", on_done=told.append)
    return told


def build_corpus(folder, config):
    """Run the corpus stage on a few documents, on the executor of that configuration; digests of what comes out."""
    rows = [{"id": str(i), "text": prose(i)} for i in range(40)]
    path = write_jsonl(folder / "documents.jsonl", [*rows, {"id": "copy", "text": rows[3]["text"] + " And more."}])
    sources = ({"kind": "jsonl", "name": "mine", "path": str(path)},)
    language, off = {"min_score": 0.3}, {"enabled": False}
    config = CorpusConfig.model_validate(
        {
            **config.model_dump(),
            "sources": sources,
            "language": language,
            "decontamination": off,
            "url": {"deduplicate": False},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", 10_000)
        workspace = Workspace(folder / "work")
        corpus.STAGE.run(config, {}, workspace)
    return {name: entry.sha256 for name, entry in list_files(workspace.output).items() if "report" not in name}


def output(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.txt"))}


def num_starts(folder):
    """How often each rank was started."""
    return [len(path.read_text().split()) for path in sorted((folder / "out").glob("*.starts"))]
