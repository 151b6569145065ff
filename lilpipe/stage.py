"""The stage contract: ``run(config, inputs, workspace) -> metrics``.

A stage is a function from a config section and input artifacts to one output artifact. It writes only below its
workspace, and it may be killed at any instruction and called again with the same workspace: it then goes on from
what lies there.
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
    "register": "lilpipe.model.register",
}
"""Stage to the module that defines it as ``STAGE``."""


class Workspace:
    """Where one stage writes: ``output/`` becomes the artifact, ``scratch/`` survives a kill and is then dropped."""

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
        """Record that ``done`` of ``total`` units are through, with metrics at that point.

        Rank 0 appends one line to ``events.jsonl``, which is the truth: the display, Prefect and MLflow are fed
        from it. After a kill the same step may be recorded again; the last line of a step counts.
        """
        self._append({"done": done, "total": total, "unit": unit, "metrics": metrics})

    def text(self, done: int, name: str, text: str) -> None:
        """Record a text after ``done`` units, such as samples of a model; MLflow keeps it as a file."""
        self._append({"done": done, "name": name, "text": text})

    def log(self, message: str) -> None:
        """Record one line for people."""
        self._append({"message": message})

    def _append(self, event: Mapping[str, Any]) -> None:
        if self.rank == 0:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")


def _no_external(_config: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One kind of step of the pipeline."""

    name: str
    output: Kind
    config: type[Section]
    run: Callable[[Any, Inputs, Workspace], Metrics]
    inputs: Mapping[str, Kind] = field(default_factory=dict)
    """Input roles that must be filled, and the kind that each takes."""
    optional_inputs: Mapping[str, Kind] = field(default_factory=dict)
    """Input roles that may be left out."""
    several: frozenset[str] = frozenset()
    """Input roles that take any number of artifacts; the others take one."""
    external: Callable[[Any], dict[str, str]] = _no_external
    """Digests of what the stage reads from outside the store, by name; raises ``DataError`` if it is not there."""
    names_inputs: bool = False
    """Whether the output says which step each input came from, so that other names make another output."""
    distributed: bool = False
    """Whether ``config.num_workers`` processes run it together under torchrun."""
    main_metric: str = ""
    """The metric that stands for the stage in the summary."""
    extension: Extension | None = None
    """Where the stage was found, if it is the user's own; ``get_stage`` sets it."""


def get_stage(name: str, file: str | None = None) -> Stage:
    """The stage of that name, built-in or the user's own; imports its module.

    Raises ``ConfigError`` if there is none, or if ``file`` is given for a stage that is found without it.
    """
    extension = find("stage", name, file=file, built_in=STAGES)
    if file is not None and (extension is None or extension.file is None):
        raise ConfigError(f"stage {name!r}: file {file} would be ignored, as the name is taken; rename your stage")
    if extension is None:
        return importlib.import_module(STAGES[name]).STAGE
    stage: Stage = load(extension, Stage)
    if stage.name != name:
        raise ConfigError(f"{extension}: got Stage(name={stage.name!r}), expected {name!r}; give both one name")
    return replace(stage, extension=extension)
