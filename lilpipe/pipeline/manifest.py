"""Manifest of a finished step: its provenance, files and environment."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lilpipe.artifact import FileEntry, InputEntry, Manifest, all_inputs, content_digest
from lilpipe.config.section import Section
from lilpipe.credentials import hide_credentials, without_credentials
from lilpipe.pipeline.plan import PlannedStep
from lilpipe.stage import Metrics

ATTEMPTS = "attempts.jsonl"
LOGS = ("events.jsonl", ATTEMPTS, "worker.log")


def collect_logs(work: Path) -> None:
    """Copy the logs of a workspace to its output."""
    logs = work / "output" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        if (work / name).exists():
            with (work / name).open(errors="replace") as file, (logs / name).open("w") as copy:
                copy.writelines(map(hide_credentials, file))


def make_manifest(step: PlannedStep, work: Path, files: dict[str, FileEntry], metrics: Metrics) -> Manifest:
    """Return the manifest of a step that finished in ``work`` with these files and metrics."""
    cache_key, section = step.cache_key, step.config
    identity = section.identity()
    return Manifest(
        kind=step.stage.output,
        stage=step.stage.name,
        step=step.name,
        fingerprint=cache_key.fingerprint,
        config=without_credentials(identity),
        operational=without_credentials({k: v for k, v in section.model_dump().items() if k not in identity}),
        inputs={
            role: [
                InputEntry(
                    uri=artifact.uri,
                    stage=artifact.manifest.stage,
                    fingerprint=artifact.manifest.fingerprint,
                    content_digest=artifact.content_digest,
                )
                for artifact in all_inputs(step.inputs, role)
            ]
            for role in step.inputs
        },
        external=cache_key.external,
        code=cache_key.code,
        packages=cache_key.packages,
        git_commit=_git_commit(),
        environment=_environment(section),
        files=files,
        content_digest=content_digest(files),
        metrics=metrics,
        elapsed_seconds=round(sum(_attempt_seconds(work)), 3),
        created_at=datetime.now(UTC).isoformat(),
    )


def _attempt_seconds(work: Path) -> list[float]:
    """Return the duration of each attempt. If the parent process was killed, an attempt ends at its last recorded
    event.
    """
    attempts = [json.loads(line) for line in (work / ATTEMPTS).read_text().splitlines()]
    events = work / "events.jsonl"
    times = [json.loads(line)["time"] for line in events.read_text().splitlines()] if events.exists() else []
    seconds = []
    for position, attempt in enumerate(attempts):
        if "started" not in attempt:
            continue
        after = attempts[position + 1] if position + 1 < len(attempts) else {}
        until = after.get("started", float("inf"))
        last_event = max((t for t in times if attempt["started"] <= t < until), default=attempt["started"])
        seconds.append(after.get("ended", last_event) - attempt["started"])
    return seconds


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the checkout, with ``+changes`` if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _environment(section: Section) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lilpipe": metadata.version("lilpipe"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "world_size": getattr(section, "num_workers", 1),
        "threads": getattr(section, "threads_per_worker", None),
        "seed": getattr(section, "seed", None),
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
