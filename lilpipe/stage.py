"""The stage contract: ``run(config, inputs, workspace) -> metrics``.

A stage is a function from a config section and input artifacts to one output artifact. It writes only below its
workspace. It may be killed at any instruction and called again with the same workspace: it then resumes.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lilpipe.artifact import Inputs, Kind
from lilpipe.config.section import Section
from lilpipe.credentials import hide_credentials
from lilpipe.errors import ConfigError
from lilpipe.extensions import Extension, find, load

Metrics = dict[str, float]

STAGES: dict[str, str] = {
    "corpus": "lilpipe.data.corpus",
    "prompts": "lilpipe.alignment.questions.prompts",
    "tokenizer": "lilpipe.tokenizer.bpe",
    "tokens": "lilpipe.tokens.build",
    "pretrain": "lilpipe.training.pretrain",
    "import_model": "lilpipe.model.import_model",
    "rejection_sampling": "lilpipe.alignment.rollout.rejection_sampling",
    "sft": "lilpipe.training.sft",
    "preferences": "lilpipe.alignment.preference.preferences",
    "dpo": "lilpipe.alignment.preference.dpo",
    "reward_model": "lilpipe.alignment.rewards.reward_model",
    "grpo": "lilpipe.alignment.rl.grpo",
    "ppo": "lilpipe.alignment.rl.ppo",
    "classify": "lilpipe.training.classify",
    "evaluate": "lilpipe.evaluation.evaluate",
    "benchmarks": "lilpipe.evaluation.benchmarks",
    "register": "lilpipe.model.register",
    "release": "lilpipe.release.release",
}
"""Maps each stage to the module that defines it as ``STAGE``."""


class Workspace:
    """Directory of a stage: ``output/`` becomes the artifact; ``scratch/`` survives a kill, and is deleted at the end.

    All ranks share it; only rank 0 records events.
    """

    def __init__(self, root: Path, *, rank: int = 0) -> None:
        self.root = root
        self.rank = rank
        self.output = root / "output"
        self.scratch = root / "scratch"
        self.report = self.output / "report"
        self.events = root / "events.jsonl"
        for directory in (self.output, self.scratch):
            directory.mkdir(parents=True, exist_ok=True)

    def progress(self, done: int, total: int, unit: str = "steps", **metrics: float) -> None:
        """Record that ``done`` of ``total`` units are complete, with metrics at that point.

        Rank 0 appends one line to ``events.jsonl``, which is the source of truth for the display, Prefect and MLflow.
        After a kill the same step may be recorded again; the last line of a step counts.
        """
        self._append({"done": done, "total": total, "unit": unit, "metrics": metrics})

    def text(self, done: int, name: str, text: str) -> None:
        """Record a text after ``done`` units, such as samples from a model; MLflow stores it as a file."""
        self._append({"done": done, "name": name, "text": text})

    def log(self, message: str) -> None:
        """Record a message."""
        self._append({"message": hide_credentials(message)})

    def _append(self, event: Mapping[str, Any]) -> None:
        if self.rank == 0:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")


def _no_external(_config: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Stage:
    """A kind of step of the pipeline."""

    name: str
    output: Kind
    config: type[Section]
    run: Callable[[Any, Inputs, Workspace], Metrics]
    inputs: Mapping[str, Kind] = field(default_factory=dict)
    """Required input roles, and the kind of artifact of each."""
    optional_inputs: Mapping[str, Kind] = field(default_factory=dict)
    """Optional input roles, and the kind of artifact of each."""
    several: frozenset[str] = frozenset()
    """Input roles that accept any number of artifacts; the others accept one."""
    external: Callable[[Any], dict[str, str]] = _no_external
    """Returns the digests of data that the stage reads from outside the store, by name. Raises ``DataError`` if it is
    missing."""
    names_inputs: bool = False
    """Whether the output contains the step names of the inputs, so that other names give another output."""
    distributed: bool = False
    """Whether ``config.num_workers`` workers run the stage together."""
    main_metric: str = ""
    """Metric shown in the summary."""
    extension: Extension | None = None
    """Origin of a custom stage; set by ``get_stage``."""


def get_stage(name: str, file: str | None = None) -> Stage:
    """Return a stage by name, built-in or custom; imports its module.

    Raises ``ConfigError`` if it does not exist, or if ``file`` is given but the name is taken by another stage.
    """
    extension = find("stage", name, file=file, built_in=STAGES)
    if file is not None and (extension is None or extension.file is None):
        raise ConfigError(f"stage {name!r}: file {file} would be ignored: a stage of this name exists; rename yours")
    if extension is None:
        return importlib.import_module(STAGES[name]).STAGE
    stage: Stage = load(extension, Stage)
    if stage.name != name:
        raise ConfigError(f"{extension}: got Stage(name={stage.name!r}), expected {name!r}; use the same name for both")
    return replace(stage, extension=extension)
