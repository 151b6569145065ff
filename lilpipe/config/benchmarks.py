"""Section of stage ``benchmarks``."""

from __future__ import annotations

from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from lilpipe.config.section import CodeFile, Rounding, Section


class BenchmarksConfig(Section):
    """Tasks of EleutherAI's lm-evaluation-harness on models of the pipeline (extra `eval`)."""

    tasks: tuple[str, ...] = ()
    """Names of tasks or groups, of the harness or from `include_path`; `lm-eval ls tasks` lists the harness's."""
    include_path: CodeFile = None
    """Folder with your own task files; relative to the configuration file's folder. The fingerprint includes its files,
    and the local data files that they name."""
    num_fewshot: NonNegativeInt | None = None
    """Few-shot examples per question; if None, the task's own number."""
    limit: PositiveInt | None = None
    """Maximum number of questions per task: the first ones; if None, all."""
    chat: bool = False
    """Apply the chat template to the prompts; every model must have one."""
    batch_size: Annotated[PositiveInt, Rounding] = 16
    """Rows per batch."""
    seed: int | None = None
    """Seed of few-shot examples and sampling; if None, the pipeline's."""
