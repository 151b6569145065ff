"""Peak memory of the corpus stage's processes as the corpus grows tenfold, by step: generated documents, all filters.

    python -m tests.benchmarks.corpus_memory [--megabytes 8] [--factors 1 10] [--task-megabytes 2]

The stage runs in a process of its own, whose tree is sampled. PSS counts a page that several processes share in
parts; memory-mapped pages of files are in it, which the kernel takes back when it needs them. "own" is the anonymous
part, which it cannot take back. Where near-duplicates are matched, signatures are mapped and grow with the corpus.

A task takes at most 32 MiB of a source or of the sorted corpus at a time. That bound is lowered here, so that the
smallest corpus, too, has several tasks of full size for each worker: what then rises, rises with the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data import corpus
from lilpipe.data.sources import readers
from lilpipe.stage import Workspace
from tests.data import prose

FILE_BYTES = 2**20
SENTENCES = (6, 120)
"""Fewest and most of a document, which so has 0.5 to 10 kB."""
COMMON = "the of and to in a is that for it was on are with as be this have from or had by not but what all were"
"""Half of the words."""
WORDS = " ".join(prose.WORDS.values()).split()
EXACT_SHARE, NEAR_SHARE, SAME_URL_SHARE = 0.01, 0.03, 0.02
SAMPLE_SECONDS = 0.05
MIB = 2**20

Peaks = dict[tuple[str, str], tuple[float, float]]
"""Most PSS and most anonymous memory in MiB, by step of the stage and kind of process."""


def main() -> None:
    """Measure each size in turn and print the peaks side by side."""
    parser = argparse.ArgumentParser(description="Peak memory of the corpus stage's processes, by size of the corpus.")
    parser.add_argument("--megabytes", type=float, default=8, help="text of the smallest corpus")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--task-megabytes", type=float, default=2, help="text of a task; 32 as in earnest")
    parser.add_argument("--folder", type=Path, help="where documents and work go; else a temporary folder")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_stage(args.folder, num_workers=args.workers, task_bytes=int(args.task_megabytes * MIB))
        return
    peaks: list[Peaks] = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for factor in args.factors:
            place = folder / str(factor)
            write_corpus(place, int(args.megabytes * 1e6 * factor))
            command = [sys.executable, "-m", "tests.benchmarks.corpus_memory", "--stage", "--folder", str(place)]
            command += ["--workers", str(args.workers), "--task-megabytes", str(args.task_megabytes)]
            peaks.append(watch(subprocess.Popen(command), place / "work" / "scratch" / "tasks"))
    report(args.factors, peaks)


def run_stage(folder: Path, *, num_workers: int, task_bytes: int) -> None:
    """Run the stage on the documents in ``folder``, and print its speed and what it kept."""
    corpus.SHARD_BYTES = corpus.LARGE_SHARD_BYTES = readers.PART_BYTES = task_bytes  # of these this process decides
    start = time.perf_counter()
    metrics = corpus.STAGE.run(everything_on(folder, num_workers), {}, Workspace(folder / "work"))
    speed = metrics["bytes_read"] / 1e6 / (time.perf_counter() - start)
    shown = {name: int(value) for name, value in metrics.items() if name.startswith(("bytes", "documents", "rejected"))}
    print(f"{speed:.2f} MB/s: {json.dumps(shown)}", flush=True)


def everything_on(folder: Path, num_workers: int) -> CorpusConfig:
    """A configuration with every filter."""

    def source(name: str, **others: object) -> dict[str, object]:
        return {"kind": "jsonl", "name": name, "path": str(folder / name), **others}

    return CorpusConfig.model_validate(
        {
            "sources": [source("documents")],
            "language": {"min_score": 0.3},
            "quality": {"c4": True, "max_duplicate_ngram_coverage": 0.5, "max_dirty_words": 5, "max_kl_divergence": 9},
            "exact_dedup": {"paragraphs": True, "lines": True},
            "classifier": {"good": [source("good")], "bad": [source("bad")], "keep_ratio": 0.9},
            "pii": {"phone_numbers": True},
            "decontamination": {"sets": [source("evaluation")]},
            "num_workers": num_workers,
        }
    )


# --- documents ----------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, num_bytes: int) -> None:
    """Write that many bytes of documents, and examples and evaluation items that do not grow."""
    draw = random.Random(0)
    for name, sentences in {"good": 10, "bad": 10, "evaluation": 3}.items():
        rows = ({"text": " ".join(_sentence(draw) for _ in range(sentences))} for _ in range(500))
        _write(folder / name / "0.jsonl", rows)
    documents, number, written = _documents(), 0, 0
    while written < num_bytes:
        written += _write(folder / "documents" / f"{number:05d}.jsonl", documents, min(FILE_BYTES, num_bytes - written))
        number += 1


def _sentence(draw: random.Random) -> str:
    """Words in any order: English to a model of single words, and without n-grams that come again."""
    words = [draw.choice(COMMON.split() if draw.random() < 0.5 else WORDS) for _ in range(draw.randint(8, 16))]
    return " ".join(words).capitalize() + "."


def _documents() -> Iterator[dict[str, str]]:
    """Documents without end: paragraphs of sentences, with copies, near-copies and addresses met before."""
    draw = random.Random(1)
    recent: list[list[str]] = []
    number = 0
    while True:
        kind = draw.random()
        if recent and kind < EXACT_SHARE + NEAR_SHARE:
            chosen = list(draw.choice(recent))
            if kind > EXACT_SHARE:
                chosen[draw.randrange(len(chosen))] = _sentence(draw)
        else:
            chosen = [_sentence(draw) for _ in range(draw.randint(*SENTENCES))]
            recent = [*recent[-99:], chosen]
        page = draw.randrange(number + 1) if draw.random() < SAME_URL_SHARE else number
        yield {
            "id": hashlib.blake2b(str(number).encode(), digest_size=8).hexdigest(),
            "text": "\n\n".join(" ".join(chosen[i : i + 6]) for i in range(0, len(chosen), 6)),
            "url": f"https://www.example.org/{page}.html?utm_source=x",
            "date": f"2024-01-{1 + number % 28:02d}",
        }
        number += 1


def _write(path: Path, rows: Iterator[dict[str, str]], num_bytes: int | None = None) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            written += len(row["text"])
            file.write(json.dumps(row) + "\n")
            if num_bytes is not None and written >= num_bytes:
                break
    return written


# --- memory -------------------------------------------------------------------------------------------------------


def watch(process: subprocess.Popen[bytes], tasks: Path) -> Peaks:
    """Sample the process and its workers until it ends."""
    peaks: Peaks = defaultdict(lambda: (0.0, 0.0))
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        step = _step(tasks)
        for kind, pid in _processes(tree):
            with contextlib.suppress(OSError):  # it has ended
                pss, own = _memory(pid)
                before = peaks[step, kind]
                peaks[step, kind] = (max(before[0], pss), max(before[1], own))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"the stage failed: {process.returncode}")
    return dict(peaks)


def _processes(tree: psutil.Process) -> Iterator[tuple[str, int]]:
    """The stage's process, and the workers: children of the server process that forks them."""
    yield "stage", tree.pid
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in tree.children():
            for worker in child.children():
                yield "worker", worker.pid


def _memory(pid: int) -> tuple[float, float]:
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    pss, own = (int(fields[name].split()[0]) / 1024 for name in ("Pss", "Pss_Anon"))
    return pss, own


def _step(tasks: Path) -> str:
    """The step whose tasks run, or have run last."""
    folders = {folder.stat().st_mtime: folder.name for folder in tasks.glob("*")}
    return folders[max(folders)] if folders else "start"


def report(factors: list[int], peaks: list[Peaks]) -> None:
    """Print the peaks by process and step, and how much they rise from the smallest to the largest corpus."""
    print("peak PSS (own) in MiB" + "".join(f"{f'{factor} x':>18}" for factor in factors) + "   rise of own")
    for kind in ("worker", "stage"):
        steps = list(dict.fromkeys(step for each in peaks for step, of in each if of == kind))
        for step in steps:
            _print_row(f"{kind}: {step}", [each.get((step, kind), (0.0, 0.0)) for each in peaks])
        most = [tuple(max(sizes[i] for (_, of), sizes in each.items() if of == kind) for i in (0, 1)) for each in peaks]
        _print_row(f"{kind}: all steps", most)


def _print_row(name: str, sizes: list[tuple[float, ...]]) -> None:
    rise = f"{sizes[-1][1] / sizes[0][1] - 1:+.0%}" if sizes[0][1] else ""
    print(f"{name:<34}" + "".join(f"{f'{pss:.0f} ({own:.0f})':>18}" for pss, own in sizes) + f"   {rise}")


if __name__ == "__main__":
    main()
